"""Ranks that are killed, hang or end with an error: real runs under each launcher, real kill -9."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mixflow_fast.checkpoints import run_folder
from mixflow_fast.metrics.metrics_file import read_metrics
from tests.support.launchers import ROOT, RUN, environment, free_port, ranks_of

TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node=2", "--max-restarts=0"]
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
    while run_folder.newest_checkpoint(out) is None:
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
        # Others hear of it at once, through gloo, and from their watchers who it is.
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
    assert "mixflow-fast: error: no answer from rank 0 of 2 (killed" in text

    # The same command (with an end to it), under the other launcher, which ends in order.
    step = run_folder.read_state(run_folder.newest_checkpoint(killed)).step
    resumed = under_deepspeed(killed, f"train.images={8 * (step + 5)}", "train.save_every=5")
    assert ended_within(resumed, 240) == 0, Path(f"{killed}.log").read_text()[-3000:]
    text = Path(f"{killed}.log").read_text()
    assert f"resumed after step {step}" in text
    assert not [word for word in CHATTER if word in text], text[-3000:]
    rows = read_metrics(killed / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, step + 6))


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
