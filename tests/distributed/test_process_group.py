"""Who a process is under each launcher, how the ranks meet, and the timeouts of their groups."""

import contextlib
import os
import re
import socket
import subprocess
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import distributed_c10d

from mixflow_fast.config.loading import load_config
from mixflow_fast.distributed import process_group
from mixflow_fast.training.trainer import Trainer
from tests.support.launchers import LAUNCHED, ROOT, RUN, free_port, ranks_of


def test_the_groups_of_deepspeed_have_the_timeout_too(tmp_path: Path) -> None:
    process_group.init_process_group("cpu")
    overrides = [*RUN[2:], "train.images=8", "train.timeout_minutes=2", f"out={tmp_path}"]
    config = load_config("photos", overrides)
    assert Trainer(config, quiet=True).run().finished
    found = [
        g._get_backend(torch.device("cpu")).options._timeout for g in distributed_c10d._world.pg_map
    ]
    assert len(found) > 1 and set(found) == {timedelta(minutes=2)}


def test_ranks_that_do_not_come_are_reported() -> None:
    ((code, text),) = ranks_of("pass", ranks=1)
    assert code == 1 and "ValueError: the start failed: rank 0 waited " in text
    assert 3 <= int(re.search(r"waited (\d+) s at 127.0.0.1:", text)[1]) <= 8
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


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ({"RANK": "a"}, "RANK must be a whole number, got 'a': start with torchrun"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE must be a whole number, got ''"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK=2 must be in \[0, WORLD_SIZE=2\)"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but not RANK: start with torchrun"),
        ({"RANK": "0"}, "but not MASTER_ADDR, MASTER_PORT, WORLD_SIZE: start with torchrun"),
    ],
)
def test_what_a_launcher_got_wrong(
    no_launcher: pytest.MonkeyPatch, launcher: dict[str, str], message: str
) -> None:
    for name, value in launcher.items():
        no_launcher.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        process_group.init_process_group("cpu")


def meet_at(patch: pytest.MonkeyPatch, address: str, port: object, rank: int) -> None:
    patch.setattr(process_group, "START_TIMEOUT_S", 0.3)
    patch.setattr(process_group, "RESOLVE_S", 0.1)
    meeting = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": address, "MASTER_PORT": port}
    for name, value in meeting.items():
        patch.setenv(name, str(value))


@pytest.mark.parametrize("rank", [0, 1])
def test_where_the_ranks_cannot_meet(no_launcher: pytest.MonkeyPatch, rank: int) -> None:
    """Each says what it is, and how long it waited, if it did."""
    started, port = time.monotonic(), free_port()
    meet_at(no_launcher, "no-such-machine.invalid", port, rank)
    with pytest.raises(ValueError, match="MASTER_ADDR=no-such-machine.invalid is not the name"):
        process_group.init_process_group("cpu")
    meet_at(no_launcher, "127.0.0.1", 295110, rank)
    with pytest.raises(ValueError, match=r"MASTER_PORT must be in \[1, 65535\], got 295110"):
        process_group.init_process_group("cpu")
    meet_at(no_launcher, "127.0.0.1", "x", rank)
    with pytest.raises(ValueError, match="MASTER_PORT must be a whole number, got 'x'"):
        process_group.init_process_group("cpu")
    if rank:
        meet_at(no_launcher, "127.0.0.1", port, rank)
        message = f"rank 1 of 2 waited 0 s for rank 0: nothing listens at 127.0.0.1:{port}: start"
        with pytest.raises(ValueError, match=message):
            process_group.init_process_group("cpu")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("rank", [0, 1])
def test_a_port_of_another_program(no_launcher: pytest.MonkeyPatch, rank: int) -> None:
    started = time.monotonic()
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    other.accept()[0].sendall(b"HTTP/1.1 400 Bad Request")

        threading.Thread(target=answer, daemon=True).start()
        meet_at(no_launcher, "127.0.0.1", port, rank)
        message = f"^port {port} of 127.0.0.1 is in use by another program: choose another "
        if rank:
            message = f"what listens at 127.0.0.1:{port} does not answer as rank 0 does .*another "
        message += "with MASTER_PORT / --master-port"
        with pytest.raises(ValueError, match=message):
            process_group.init_process_group("cpu")
        other.shutdown(socket.SHUT_RDWR)
    assert time.monotonic() - started < 10


def test_ranks_on_gpus_are_connected_at_the_start(no_launcher: pytest.MonkeyPatch) -> None:
    """The device is bound, and what NCCL says comes with the way out of it. (NCCL stands in.)"""
    device, given = torch.device("cuda", 0), {}
    no_launcher.setattr(process_group, "local_device", lambda _: device)
    no_launcher.setattr(process_group, "_store", None)

    def start(backend: str, **options: object) -> None:
        given.update(options, backend=backend)

    def not_connected(tensor: object) -> None:
        raise process_group.dist.DistBackendError("NCCL error: remote process exited")

    no_launcher.setattr(process_group.dist, "init_process_group", start)
    no_launcher.setattr(process_group.dist, "all_reduce", not_connected)
    no_launcher.setattr(process_group.torch, "ones", lambda *size, device: device)
    with pytest.raises(ValueError, match="nccl cannot connect .*remote process.*NCCL_SOCKET_IFN"):
        process_group.init_process_group("cuda")
    assert given["backend"] == "nccl" and given["device_id"] == device


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
