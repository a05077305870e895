"""Runs that are killed with kill -9 at random times, and what must be true of them at the end.

    python -m tests.support.kill_harness [--kills 50] [--seed 0] [--keep FOLDER] [--engine ddp]

A run is started, killed, and started again by the same command until it has had its share of kills,
then left to finish. After that
* weights, moments, EMA and counters are those of a run that nobody killed, bit for bit;
* the history of the run that counts (what each start did up to the step that the next one resumed
  from) holds every example's position once, in order, on any number of ranks;
* metrics.jsonl has every step once, with the losses of the run that nobody killed.

Every start is a fork of a process that has imported everything: what a start costs without the
imports is its share of a second, so that 50 fit into minutes. A kill falls uniformly over the time
in which the started run trains and saves, one in five over its start-up too. Every other step
saves, so that many kills fall into a save.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from mixflow_fast.cli import main as run_command
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.training.engine import import_deepspeed
from mixflow_fast.training.step_record import StepOutput
from mixflow_fast.training.trainer import Trainer
from tests.support.runs import assert_same_bits
from tests.support.train_ranks import TINY

BATCH = 8
WAIT_S = 90.0  # nothing here may take so long
KILLS_A_RUN = 8
ENGINES = {
    "deepspeed": ["train.zero_stage=1"],
    "ddp": ["train.engine=ddp", "train.zero_stage=0", "train.precision=bf16"],
}


@dataclass
class Start:
    """One start of the command: its processes, and where they write what they did."""

    command: list[str]
    folder: Path
    ranks: int
    pids: list[int] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        sys.stdout.flush()
        for rank in range(self.ranks):
            pid = os.fork()
            if pid == 0:
                _child(self.command, self.folder, rank, self.ranks, port)
            self.pids.append(pid)

    def trace(self, rank: int = 0) -> list[dict]:
        """What a rank did: {"start": step}, then {"step", "positions"} each."""
        file = self.folder / f"rank_{rank}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def poll(self) -> list[int]:
        """Exit codes of the processes that have ended, negative for a signal; reaps them."""
        for pid in self.pids:
            if pid not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return list(self.codes.values())

    def wait(self) -> list[int]:
        """Exit codes, once all have ended."""
        _until(lambda: len(self.poll()) == self.ranks, self)
        return self.poll()

    def kill(self, ranks: list[int]) -> None:
        """kill -9."""
        self.poll()
        for rank in ranks:
            if self.pids[rank] not in self.codes:
                os.kill(self.pids[rank], signal.SIGKILL)

    def log(self) -> str:
        return "\n".join(f.read_text()[-2000:] for f in sorted(self.folder.glob("*.log")))


def _child(command: list[str], folder: Path, rank: int, ranks: int, port: int) -> None:
    """The command in a forked process; writes down the positions of every step's examples."""
    code = 70
    try:
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        log = os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        trace = os.open(folder / f"rank_{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        _record(trace)
        code = run_command(command)
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _record(trace: int) -> None:
    """Every trainer of this process writes down its start and the positions of each step."""
    init = Trainer.__init__

    def log(row: dict) -> None:
        os.write(trace, (json.dumps(row) + "\n").encode())

    def write_down(step: int, outputs: list[StepOutput], means: object) -> None:
        positions = [position for made in outputs for position in made.it.ids.tolist()]
        log({"step": step, "positions": positions})

    def built(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.on_step = write_down
        log({"start": self.step})

    Trainer.__init__ = built


def _until(condition, start: Start) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            start.kill(list(range(start.ranks)))
            raise AssertionError(f"nothing happened for {WAIT_S} s:\n{start.log()}")
        time.sleep(0.002)


def command(out: Path, ranks: int, steps: int, engine: str) -> list[str]:
    own = [f"out={out}", f"train.images={BATCH * steps}", "train.save_every=2", "train.keep_last=1"]
    own += [
        *ENGINES[engine],
        f"train.microbatch_size={BATCH // ranks}",
        "optim.ema_decays=[0.9]",
    ]
    return ["train", "photos", *TINY, *own]


def uninterrupted(folder: Path, ranks: int, steps: int, engine: str) -> float:
    """The run that nobody kills; returns the seconds from built to finished."""
    start = Start(command(folder / "out", ranks, steps, engine), folder / "start_0", ranks)
    _until(lambda: start.trace(), start)
    began = time.monotonic()
    codes = start.wait()
    assert codes == [0] * ranks, start.log()
    return time.monotonic() - began


def killed(
    folder: Path,
    ranks: int,
    steps: int,
    kills: int,
    seconds: float,
    draw: random.Random,
    engine: str,
) -> Counter:
    """A run that is killed so often, then finishes; what the kills met.

    Args:
        seconds: what the run takes from built to finished if nobody kills it.
    """
    found: Counter = Counter()
    starts: list[Start] = []

    def again() -> Start:
        name = folder / f"start_{len(starts)}"
        starts.append(Start(command(folder / "out", ranks, steps, engine), name, ranks))
        return starts[-1]

    for number in range(kills):
        start = again()
        began = time.monotonic()
        if draw.random() < 0.2:
            moment = draw.uniform(0, 1.0)
        else:
            _until(lambda: start.trace() or start.poll(), start)  # noqa: B023
            began = time.monotonic()
            ahead = 1 - start.trace()[0]["start"] / steps if start.trace() else 0.0
            moment = draw.uniform(0, seconds * min(2 / (kills + 1), ahead))
        _until(lambda: time.monotonic() - began >= moment or start.poll(), start)  # noqa: B023
        if start.poll():  # it finished, or failed
            assert start.wait() == [0] * ranks, start.log()
            found["runs that finished before their kill"] += 1
            break
        # Of several ranks, now and then only one dies: the others must end by themselves.
        victims = list(range(ranks)) if number % 4 else [draw.randrange(ranks)]
        start.kill(victims)
        if not all(start.trace(rank) for rank in range(ranks)):
            # It waits for ranks that never came, for minutes; torchrun would end it.
            start.kill(list(range(ranks)))
        codes = start.wait()
        if 0 in codes:  # it ended between the look at it and the kill
            assert max(row.get("step", 0) for row in start.trace()) == steps, start.log()
            found["runs that finished before their kill"] += 1
            break
        found["kills"] += 1
        found["kills of one rank of several"] += len(victims) < ranks
        found["before the first step"] += len(start.trace()) < 2
        # A start that got so far has removed what the one before left under such names.
        built = bool(start.trace())
        names = [p.name for p in (folder / "out" / "checkpoints").glob(".*") if built]
        found["inside of a save"] += any(name.startswith(".writing") for name in names)
        found["inside of a deletion"] += any(name.startswith(".deleting") for name in names)
    last = again()
    assert last.wait() == [0] * ranks, last.log()
    resumed = [rows[0]["start"] for start in starts if (rows := start.trace())]
    found["resumed from a checkpoint"] += sum(step > 0 for step in resumed)
    found["passed over a checkpoint"] += sum("passed over" in start.log() for start in starts)
    assert resumed == sorted(resumed)
    check_history(starts, ranks, steps)
    return found


def check_history(starts: list[Start], ranks: int, steps: int) -> None:
    """Each example's position once, in order, in what counts of all starts."""
    began = [start for start in starts if all(start.trace(rank) for rank in range(ranks))]
    first = [start.trace()[0]["start"] for start in began]
    done = 0
    for start, resumed, following in zip(began, first, [*first[1:], steps], strict=True):
        assert resumed == done, "a start did not resume where the one before counts to"
        traces = []
        for rank in range(ranks):
            rows = start.trace(rank)
            assert rows[0]["start"] == resumed
            made = [row["step"] for row in rows[1:]]
            assert made == list(range(resumed + 1, resumed + 1 + len(made)))
            traces.append({row["step"]: row["positions"] for row in rows[1:]})
        for step in range(resumed + 1, following + 1):
            positions = [position for trace in traces for position in trace[step]]
            assert sorted(positions) == list(range(BATCH * (step - 1), BATCH * step)), step
        done = following
    assert done == steps


def check_result(folder: Path, reference: Path, steps: int) -> None:
    """Same bits, same metrics, nothing left over."""
    assert_same_bits(folder / "out", reference / "out")
    rows, true = (read_metrics(f / "out" / "metrics.jsonl") for f in (folder, reference))
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for key in ("loss", "grad_norm", "lr", "images_seen"):
        assert [row[key] for row in rows] == [row[key] for row in true], key
    left = sorted(p.name for p in (folder / "out" / "checkpoints").iterdir())
    assert left == [f"step_{steps:08d}"], left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=120, help="of one run")
    parser.add_argument("--one-rank", action="store_true", help="no runs of two ranks")
    parser.add_argument("--engine", choices=list(ENGINES), default="deepspeed")
    parser.add_argument("--keep", help="work here and keep it; default: a temporary folder")
    options = parser.parse_args()
    import_deepspeed()
    began = time.monotonic()
    work = Path(options.keep or tempfile.mkdtemp(prefix="kill-"))
    print(f"in {work}, which stays if something is wrong", flush=True)
    draw = random.Random(options.seed)
    found: Counter = Counter()
    seconds: dict[int, float] = {}
    number = 0
    while found["kills"] < options.kills:
        ranks = 2 if number % 3 == 1 and not options.one_rank else 1
        if ranks not in seconds:
            whole = work / f"whole_{ranks}"
            seconds[ranks] = uninterrupted(whole, ranks, options.steps, options.engine)
        kills = min(KILLS_A_RUN, options.kills - found["kills"])
        folder = work / f"run_{number}"
        one = killed(folder, ranks, options.steps, kills, seconds[ranks], draw, options.engine)
        check_result(folder, work / f"whole_{ranks}", options.steps)
        found += one
        found["runs"] += 1
        number += 1
        print(f"run {number}: {ranks} rank(s), {dict(one)}: the same bits", flush=True)
    if options.keep is None:
        with contextlib.suppress(OSError):
            shutil.rmtree(work)
    took = time.monotonic() - began
    print(f"{found['kills']} kills in {found['runs']} runs, {took:.0f} s; seed {options.seed}")
    for name, count in found.items():
        if name not in ("kills", "runs"):
            print(f"  {count:3d} {name}")
    print("every run finished with the bits of a run that nobody killed; no example lost or twice")


if __name__ == "__main__":
    main()
