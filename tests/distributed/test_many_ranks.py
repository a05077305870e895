"""Two processes under torchrun, deepspeed and srun's variables: real runs, real kill -9."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import distributed_c10d

from mixflow_fast.checkpoints import run_folder
from mixflow_fast.config.loading import load_config
from mixflow_fast.distributed import process_group
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.training.trainer import Trainer
from tests.support.train_ranks import TINY

ROOT = Path(__file__).resolve().parents[2]
ON_PATH = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node=2", "--max-restarts=0"]
RUN = ["train", "photos", *TINY, "train.microbatch_size=4", "train.zero_stage=1"]
RUN += ["train.precision=fp32", "train.device=cpu", "train.keep_last=1"]
ENDLESS = ["train.images=100000000", "train.save_every=5"]
# What torch and DeepSpeed print where a process group is not ended in order, or ends too early.
CHATTER = (
    "destroy_process_group",
    "TCPStore",
    "Exception raised from",
    "Warning",
    "gloo",
    "Broken",
)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return kept | ON_PATH | own | more


def start(command: list[str], log: Path, **more: str) -> subprocess.Popen:
    with log.open("w") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(**more), stdout=file, stderr=subprocess.STDOUT
        )


def under_torchrun(out: Path, *overrides: str) -> subprocess.Popen:
    command = [*TORCHRUN, "-m", "mixflow_fast.cli", *RUN, *overrides, f"out={out}"]
    return start(command, Path(f"{out}.log"))


def under_deepspeed(out: Path, *overrides: str) -> subprocess.Popen:
    command = ["deepspeed", "--num_gpus=2", f"--master_port={free_port()}", "--module"]
    command += ["mixflow_fast.cli", *RUN, *overrides, f"out={out}"]
    return start(command, Path(f"{out}.log"))


def as_slurm_tasks(out: Path, *overrides: str) -> list[subprocess.Popen]:
    """As `srun --ntasks=2 mixflow-fast train ...` starts them: no launcher stands by."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "mixflow_fast.cli", *RUN, *overrides, f"out={out}"]
    return [
        start(
            command,
            Path(f"{out}.{rank}.log"),
            SLURM_PROCID=str(rank),
            SLURM_LOCALID=str(rank),
            SLURM_STEP_NUM_TASKS="2",
            **meeting,
        )
        for rank in range(2)
    ]


def wait_for_checkpoint(out: Path, *processes: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not (out / "weights.pt").exists():
        assert time.monotonic() < deadline, "no checkpoint in 240 s"
        ended = [p for p in processes if p.poll() is not None]
        assert not ended, [log.read_text()[-2000:] for log in out.parent.glob("*.log")]
        time.sleep(0.05)


def rank_process(launcher: subprocess.Popen, rank: int) -> int:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for pid in children:
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return int(pid)
    raise AssertionError(f"no rank {rank} among {children}")


def ended_within(process: subprocess.Popen, seconds: float) -> int:
    try:
        return process.wait(timeout=seconds)
    finally:
        process.kill()


def test_a_killed_rank_ends_the_run_which_then_resumes(tmp_path: Path) -> None:
    """kill -9 of rank 1 under torchrun, and of rank 0, which holds the store, without it."""
    killed, headless = tmp_path / "killed", tmp_path / "headless"
    launcher, tasks = under_torchrun(killed, *ENDLESS), as_slurm_tasks(headless, *ENDLESS)
    try:
        wait_for_checkpoint(killed, launcher, *tasks)
        os.kill(rank_process(launcher, 1), signal.SIGKILL)
        wait_for_checkpoint(headless, *tasks)
        tasks[0].kill()
        # Others hear of it at once, through gloo; the roll call takes 10 s.
        assert ended_within(tasks[1], 30) == 1
        assert ended_within(launcher, 30) == 1
    finally:
        for process in (launcher, *tasks):
            process.kill()
            process.wait()
    text = Path(f"{killed}.log").read_text()
    assert "mixflow-fast: error: no answer from rank 1 of 2 (killed" in text
    assert "rank 0 ends too. The same command resumes" in text
    text = Path(f"{headless}.1.log").read_text()
    assert "mixflow-fast: error: rank 0 does not answer (killed" in text

    # The same command (with an end to it), under the other launcher, which ends in order.
    step = run_folder.read_state(run_folder.newest_checkpoint(killed)).step
    again = under_deepspeed(killed, f"train.images={8 * (step + 5)}", "train.save_every=5")
    assert ended_within(again, 240) == 0, Path(f"{killed}.log").read_text()[-3000:]
    text = Path(f"{killed}.log").read_text()
    assert f"resumed after step {step}" in text
    assert not [word for word in CHATTER if word in text], text[-3000:]
    rows = read_metrics(killed / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, step + 6))


def test_the_groups_of_deepspeed_have_the_timeout_too(tmp_path: Path) -> None:
    process_group.init_process_group("cpu")
    overrides = [*RUN[2:], "train.images=8", "train.timeout_minutes=2", f"out={tmp_path}"]
    config = load_config("photos", overrides)
    assert Trainer(config, quiet=True).run().finished
    found = [
        g._get_backend(torch.device("cpu")).options._timeout for g in distributed_c10d._world.pg_map
    ]
    assert len(found) > 1 and set(found) == {timedelta(minutes=2)}


GROUP = """
import os, sys, time
import torch
import torch.distributed as dist
from mixflow_fast import distributed

distributed.init_process_group("cpu", timeout_s=3)
other = dist.new_group()  # as DeepSpeed makes them: with PyTorch's 30 minutes
distributed.same_timeout()
try:
    with distributed.roll_call(wait_s=2):
        {body}
except distributed.RankLost as error:
    print("LOST", error.speaks, error, flush=True)
    os._exit(1)
"""


def ranks_of(body: str, ranks: int = 2) -> list[tuple[int, str]]:
    """(exit code, output) of processes that run `body` with a group of 3 s."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    script = GROUP.format(body=textwrap.indent(textwrap.dedent(body), " " * 8).lstrip())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), **meeting),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [p.communicate(timeout=60)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]


def test_a_rank_that_ends_with_an_error_tells_the_others_why() -> None:
    (_, first), (_, second) = ranks_of(
        """
        if dist.get_rank() == 1:
            raise OSError("no such shard: 7.npy")
        dist.all_reduce(torch.ones(1))
        """
    )
    assert "LOST True rank 1 ended with OSError: no such shard: 7.npy: rank 0 ends too" in first
    assert "OSError: no such shard: 7.npy" in second and "LOST" not in second


def test_a_hanging_rank_is_named_in_every_group() -> None:
    results = ranks_of(
        """
        if dist.get_rank() == 1:
            time.sleep(9)
            os._exit(0)
        dist.all_reduce(torch.ones(1), group=other)
        """
    )
    code, text = results[0]
    assert code == 1 and "LOST True no answer from rank 1 of 2" in text


def test_ranks_that_do_not_come_are_reported() -> None:
    ((code, text),) = ranks_of("pass", ranks=1)
    assert code == 1 and "ValueError: the start failed: rank 0 waited 3 s at 127.0.0.1:" in text
    assert "for 2 processes" in text and "Start all of them" in text


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*LAUNCHED, "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(process_group.dist, "is_initialized", lambda: False)
    return monkeypatch


def test_who_this_process_is(no_launcher: pytest.MonkeyPatch) -> None:
    assert (process_group.rank(), process_group.world_size()) == (0, 1)
    # A batch script or an salloc shell of a job with 16 tasks is still one process.
    no_launcher.setenv("SLURM_PROCID", "0")
    no_launcher.setenv("SLURM_NTASKS", "16")
    assert (process_group.rank(), process_group.world_size()) == (0, 1)
    no_launcher.setenv("SLURM_STEP_NUM_TASKS", "16")
    no_launcher.setenv("SLURM_PROCID", "5")
    assert (process_group.rank(), process_group.world_size()) == (5, 16)
    # torchrun inside of srun.
    no_launcher.setenv("RANK", "9")
    no_launcher.setenv("WORLD_SIZE", "32")
    assert (process_group.rank(), process_group.world_size()) == (9, 32)


def test_incomplete_environments_are_refused(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("SLURM_STEP_NUM_TASKS", "4")
    no_launcher.setenv("SLURM_PROCID", "3")
    with pytest.raises(ValueError, match="task 3 of 4, but MASTER_ADDR and MASTER_PORT"):
        process_group.init_process_group("cpu")
    no_launcher.setenv("RANK", "0")
    no_launcher.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK is set, but not MASTER_ADDR, MASTER_PORT"):
        process_group.init_process_group("cpu")


@pytest.mark.parametrize(("gpus", "local"), [(0, "2"), (8, "2"), (1, "0")])
def test_slurm_tasks_get_the_names_that_others_read(
    no_launcher: pytest.MonkeyPatch, gpus: int, local: str
) -> None:
    """A task that is shown its own GPU alone takes number 0."""
    meeting = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    slurm = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "10", "SLURM_LOCALID": "2"}
    for name, value in (meeting | slurm).items():
        no_launcher.setenv(name, value)
    no_launcher.setattr(torch.cuda, "device_count", lambda: gpus)
    process_group._adopt_slurm()
    found = [os.environ.pop(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    assert found == ["10", "16", local]


@pytest.mark.parametrize("script", sorted((ROOT / "docs" / "slurm").glob("*.sbatch")))
def test_slurm_scripts_are_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
