"""Processes as launchers start them: their environment, and short scripts on two ranks."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from tests.support.train_ranks import TINY

ROOT = Path(__file__).resolve().parents[2]
ON_PATH = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
# A short run of two ranks.
RUN = ["train", "photos", *TINY, "train.microbatch_size=4", "train.zero_stage=1"]
RUN += ["train.precision=fp32", "train.device=cpu", "train.keep_last=1"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return kept | ON_PATH | own | more


def on_ranks(ranks: int, module: str, *arguments: str) -> None:
    """Run a module of tests/support under torchrun to its end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "-m", module, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


GROUP = """
import os, sys, time
import torch
import torch.distributed as dist
from mixflow_fast.distributed.lost_ranks import RankLost, roll_call
from mixflow_fast.distributed.process_group import init_process_group, same_timeout

init_process_group("cpu", timeout_s={timeout_s})
other = dist.new_group()  # as DeepSpeed makes them: with PyTorch's 30 minutes
same_timeout()
try:
    with roll_call(wait_s=2):
        {body}
except RankLost as error:
    print("LOST", error.speaks, error, flush=True)
    os._exit(1)
"""


WATCHED = """
import ctypes, os, signal, subprocess, sys, time
import torch.distributed as dist
from mixflow_fast.distributed import heartbeat
from mixflow_fast.distributed.process_group import init_process_group

init_process_group("cpu", timeout_s=60)
with heartbeat.watching():
    dist.barrier()
    {body}
os._exit(0)
"""


def ranks_of(body: str, ranks: int = 2, timeout_s: float = 3.0) -> list[tuple[int, str]]:
    """(exit code, output) of processes that run `body` with a group of this timeout."""
    body = textwrap.indent(textwrap.dedent(body), " " * 8).lstrip()
    script = GROUP.format(body=body, timeout_s=timeout_s)
    return run_ranks([[script]] * ranks, world_size=2)


def watched_ranks(
    bodies: dict[int, str], only: int | None = None, ended: list[float] | None = None
) -> list[tuple[int, str]]:
    """As `run_ranks`, of ranks that watch each other; `bodies`: rank -> its statement."""
    return run_ranks(
        [[WATCHED.format(body=bodies[rank])] for rank in sorted(bodies)], None, only, ended
    )


def run_ranks(
    scripts: list[list[str]],
    world_size: int | None = None,
    only: int | None = None,
    ended: list[float] | None = None,
) -> list[tuple[int, str]]:
    """(exit code, output) of each rank, started without a launcher.

    Args:
        scripts: each rank's text in Python, and its arguments.
        world_size: where not all of them come.
        only: the rank that is waited for; the others are killed then.
        ended: takes the seconds that it took to end.
    """
    started = time.monotonic()
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    meeting["WORLD_SIZE"] = str(world_size or len(scripts))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", *script],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **meeting),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, script in enumerate(scripts)
    ]
    try:
        if only is not None:
            processes[only].wait(timeout=60)
            ended.append(time.monotonic() - started)
            for process in processes:
                process.kill()
        outputs = [p.communicate(timeout=60)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]
