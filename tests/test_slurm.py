"""docs/slurm/train.sbatch as it is, with stand-ins for Slurm's commands.

The stand-in for srun signals what Slurm signals: the process that it starts, and none below it.
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mixflow_fast.checkpoints import run_folder
from tests.support.launchers import RUN, environment, free_port

SCRIPT = Path(__file__).parents[1] / "docs" / "slurm" / "train.sbatch"
SRUN = r"""
while [ "$1" != bash ]; do echo "$1" >>srun.options; shift; done
SLURM_NNODES=1 SLURM_NODEID=0 "$@" & echo $! >task.pid
wait $!; code=$?
while kill -0 "$(cat task.pid)" 2>/dev/null; do wait "$(cat task.pid)"; code=$?; done
exit $code
"""
SCONTROL = r"""
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$*" >>requeued; fi
"""
SCANCEL = r'kill -"${1#--signal=}" "$(cat task.pid)"'
# As the real one it dies of USR1; its ranks end well of it.
TORCHRUN = r"""
for rank in 0 1; do
    bash -c 'trap "echo heard >>heard.'$rank'; exit 0" USR1
             touch up.'$rank'; while :; do sleep 0.05; done' &
done
wait -n && wait -n
"""
FAILING = "echo start >>starts; exit 1"


def prepare(folder: Path, *run: str, torchrun: str | None = None) -> dict[str, str]:
    """The script with its own run, and the environment of a job in `folder`."""
    commands = {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL}
    if torchrun is not None:
        commands["torchrun"] = torchrun
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    text, found = re.subn(r"\nRUN=\([^)]*\)", f"\nRUN=({' '.join(run)})", SCRIPT.read_text())
    assert found == 1
    (folder / "train.sbatch").write_text(text)
    env = environment(
        SLURM_JOB_ID=str(free_port() - 20000),
        SLURM_JOB_NODELIST="here",
        SLURM_GPUS_ON_NODE="2",
        SLURM_CPUS_PER_TASK="8",
    )
    return env | {"PATH": f"{folder}{os.pathsep}{env['PATH']}"}


def start(folder: Path, env: dict[str, str]) -> subprocess.Popen:
    with (folder / "log").open("a") as log:
        command = ["bash", "train.sbatch"]
        return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)


def wait_for(process: subprocess.Popen, *paths: Path) -> None:
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in paths):
        assert process.poll() is None and time.monotonic() < deadline, paths
        time.sleep(0.05)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def end(process: subprocess.Popen, seconds: float) -> int:
    try:
        return process.wait(timeout=seconds)
    finally:
        process.kill()


def test_the_signal_before_the_limit_reaches_every_rank(tmp_path: Path) -> None:
    env = prepare(tmp_path, "train", torchrun=TORCHRUN)
    job = start(tmp_path, env)
    wait_for(job, tmp_path / "up.0", tmp_path / "up.1")
    job.send_signal(signal.SIGUSR1)
    assert end(job, 20) == 0, lines(tmp_path / "log")
    assert lines(tmp_path / "heard.0") == lines(tmp_path / "heard.1") == ["heard"]
    assert lines(tmp_path / "requeued") == [f"requeue {env['SLURM_JOB_ID']}"]
    assert "--cpus-per-task=8" in lines(tmp_path / "srun.options")


def test_a_run_that_is_stopped_by_hand_is_not_queued_again(tmp_path: Path) -> None:
    """`scancel --signal=USR1 JOB` signals the steps of a job, not its script."""
    env = prepare(tmp_path, "train", torchrun=TORCHRUN)
    job = start(tmp_path, env)
    wait_for(job, tmp_path / "up.0", tmp_path / "up.1")
    subprocess.run(["scancel", "--signal=USR1", "1"], cwd=tmp_path, env=env, check=True)
    assert end(job, 20) == 0, lines(tmp_path / "log")
    assert lines(tmp_path / "heard.0") == lines(tmp_path / "heard.1") == ["heard"]
    assert lines(tmp_path / "requeued") == []


def test_a_failing_run_is_queued_again_but_not_for_ever(tmp_path: Path) -> None:
    env = prepare(tmp_path, "train", torchrun=FAILING)
    for part in range(1, 6):
        assert end(start(tmp_path, env), 20) == 1
        assert len(lines(tmp_path / "starts")) == part
        assert len(lines(tmp_path / "requeued")) == min(part, 3), lines(tmp_path / "log")
    # A part that ends well begins the count anew.
    (tmp_path / "torchrun").write_text("#!/bin/bash\nexit 0\n")
    assert end(start(tmp_path, env), 20) == 0 and len(lines(tmp_path / "requeued")) == 3
    (tmp_path / "torchrun").write_text(f"#!/bin/bash\n{FAILING}\n")
    assert end(start(tmp_path, env), 20) == 1 and len(lines(tmp_path / "requeued")) == 4


@pytest.mark.long
def test_a_run_that_is_stopped_before_the_limit_resumes(tmp_path: Path) -> None:
    """Real torchrun, two ranks."""
    out = tmp_path / "run"
    run = [*RUN, f"out={out}"]
    env = prepare(tmp_path, *run, "train.images=100000000")
    job = start(tmp_path, env)
    wait_for(job, out / "metrics.jsonl")
    time.sleep(3)
    assert run_folder.newest_checkpoint(out) is None  # train.save_every=0: none but at the stop
    job.send_signal(signal.SIGUSR1)
    assert end(job, 120) == 0, lines(tmp_path / "log")[-20:]
    step = run_folder.read_state(run_folder.newest_checkpoint(out)).step
    assert step > 0 and len(lines(tmp_path / "requeued")) == 1

    env = prepare(tmp_path, *run, f"train.images={8 * (step + 3)}")
    assert end(start(tmp_path, env), 120) == 0, lines(tmp_path / "log")[-20:]
    assert run_folder.read_state(run_folder.newest_checkpoint(out)).step == step + 3
    assert len(lines(tmp_path / "requeued")) == 1
