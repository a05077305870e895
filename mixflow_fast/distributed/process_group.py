"""Processes and devices: one process without a launcher, many under torchrun, deepspeed or srun.

A rank that dies must not leave the others waiting: `heartbeat.watching` ends them. Where a rank
only hangs, a collective ends at the timeout of the group, and `lost_ranks.roll_call` turns
PyTorch's message into one that names the missing ranks.
"""

from __future__ import annotations

import atexit
import errno
import os
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from mixflow_fast.messages import error_line

# How long a start waits for all ranks, unless the timeout of the group is shorter.
START_TIMEOUT_S = 600.0
# How long the name of rank 0's machine may be unknown: it is with machines that are just starting.
RESOLVE_S = 60.0
_HOW = "start with torchrun, which sets them all, or unset them for a run of one process"
# Of the group that this module made; a process has one.
_store: dist.Store | None = None
_timeout = timedelta(minutes=30)
_ours = False
_gloo_with_others = False


def local_device(device: str = "auto") -> torch.device:
    """The device of this rank, which becomes the process's current one. Needs no process group.

    Args:
        device: "auto" (CUDA where there is a GPU), "cpu" or "cuda".

    Raises:
        ValueError: "cuda" without a usable GPU, more ranks than GPUs, or Slurm's variables without
            an address to meet at.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device=cuda, but torch sees no GPU; use train.device=cpu or auto")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    _adopt_slurm()
    os.environ.setdefault("LOCAL_RANK", "0")
    if not on_gpu:
        return torch.device("cpu")
    chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if chosen.index >= torch.cuda.device_count():
        raise ValueError(
            f"this machine has {torch.cuda.device_count()} GPUs, but a rank was started for "
            f"number {chosen.index}: start as many processes per machine as it has GPUs"
        )
    torch.cuda.set_device(chosen)
    return chosen


def init_process_group(device: str = "auto", timeout_s: float = 1800.0) -> torch.device:
    """Join the launcher's process group, or make a group of one; return the device of this rank.

    Under `torchrun` or `deepspeed` the environment names rank and peers, under `srun` without them
    Slurm's variables name the rank, and MASTER_ADDR and MASTER_PORT must be set. Without a launcher
    the store is this process's own and needs no port (NCCL listens at one of its own all the same).
    A group that exists already is used as it is. On GPUs the ranks are connected at the end.

    Args:
        device: as for `local_device`.
        timeout_s: how long a collective waits for a rank before it fails. A save of one rank that
            the others wait for must fit into it.

    Raises:
        ValueError: as `local_device`, an incomplete environment, or ranks that did not come or
            cannot reach each other.
    """
    global _store, _timeout, _ours, _gloo_with_others
    chosen = local_device(device)
    _timeout = timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        backend, _ours = "nccl" if chosen.type == "cuda" else "gloo", True
        _store = _meet() if "RANK" in os.environ else dist.HashStore()
        try:
            dist.init_process_group(
                backend,
                store=_store,
                rank=rank(),
                world_size=world_size(),
                timeout=_timeout,
                device_id=chosen if backend == "nccl" else None,
            )
            if backend == "gloo":
                # A gloo group that is still there when the interpreter ends can abort the process.
                # NCCL's is left to the command: to end it would be to wait for a rank that is lost.
                atexit.unregister(leave)  # of an earlier group
                atexit.register(leave)
                _gloo_with_others = _gloo_with_others or dist.get_world_size() > 1
            if backend == "nccl":  # which else connects at the first collective, far from here
                dist.all_reduce(torch.ones(1, device=chosen))
                torch.cuda.synchronize(chosen)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"rank {rank()} of {world_size()} found the others at {_meeting_point()}, but "
                f"{backend} cannot connect to them ({error_line(error)}): set "
                f"{backend.upper()}_SOCKET_IFNAME to the network interface between the machines "
                "(`ip addr` lists them)"
            ) from None
    return chosen


def timeout() -> timedelta:
    """Timeout of the process group, for further groups: they do not inherit it."""
    return _timeout


def same_timeout() -> None:
    """Give the timeout of the process group to all groups there are: DeepSpeed makes its own."""
    if not _ours:  # a caller who made the group has chosen the timeouts, too
        return
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(_timeout, group)


def store() -> dist.Store | None:
    """Key-value store of the ranks; None before the start and for a group that the caller made."""
    return _store


def launchers_store() -> bool:
    """Whether the ranks' store is the launcher's, as under torchrun; else rank 0 keeps it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def with_others_on_gpus() -> bool:
    """Whether this is one of several ranks on GPUs, where the end of a process waits for them."""
    return dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() == "nccl"


def talked_by_gloo() -> bool:
    """Whether this process made a gloo group with other ranks, be it ended or not."""
    return _gloo_with_others


def leave() -> None:
    """End the process group where it is whole, so that nothing warns or waits at exit."""
    global _store
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = None


def rank() -> int:
    """Number of this process; known from the launcher before the group exists."""
    return dist.get_rank() if dist.is_initialized() else _launched()[0]


def world_size() -> int:
    """Number of processes; known from the launcher before the group exists."""
    return dist.get_world_size() if dist.is_initialized() else _launched()[1]


def _launched() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun, deepspeed or else Slurm's srun gives them."""
    if "RANK" in os.environ:
        number, ranks = _number("RANK", 0), _number("WORLD_SIZE", 1)
        if not 0 <= number < ranks:
            raise ValueError(f"RANK={number} must be in [0, WORLD_SIZE={ranks}): {_HOW}")
        return number, ranks, _number("LOCAL_RANK", 0)
    # Only in a step of several tasks, because a batch script and an salloc shell have SLURM_PROCID.
    tasks = _number("SLURM_STEP_NUM_TASKS", 1)
    if tasks > 1 and "SLURM_PROCID" in os.environ:
        return _number("SLURM_PROCID", 0), tasks, _number("SLURM_LOCALID", 0)
    if _number("WORLD_SIZE", 1) > 1:  # as one process each would train alone in the same folder
        raise ValueError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, but not RANK: {_HOW}")
    return 0, 1, _number("LOCAL_RANK", 0)


def _number(name: str, default: int) -> int:
    """A number that a launcher sets."""
    text = os.environ.get(name, str(default))
    if not text.strip().isdecimal():
        raise ValueError(f"{name} must be a whole number, got {text!r}: {_HOW}")
    return int(text)


def _adopt_slurm() -> None:
    """Set the environment variables that DeepSpeed and torch read, from those of Slurm."""
    number, ranks, local = _launched()
    if "RANK" in os.environ or ranks == 1:
        return
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ValueError(
            f"srun started this as task {number} of {ranks}, but MASTER_ADDR and MASTER_PORT are "
            "not set: export them in the batch script, or let srun start one torchrun per machine "
            "(docs/slurm/train.sbatch)"
        )
    if torch.cuda.device_count() == 1:
        local = 0  # Slurm shows each task its own GPU alone
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(local)}


def _meeting_point() -> str:
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"


def _check_port(address: str, port: int) -> None:
    """Refuse a port that rank 0 could not open: PyTorch would wait for it until its timeout."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            why = "is in use by another program" if in_use else f"cannot be opened ({error})"
            raise ValueError(
                f"port {port} of {address} {why}: choose another with MASTER_PORT / --master-port"
            ) from None


def _reach(address: str, port: int, limit_s: float, listening: bool) -> None:
    """Wait until the address of the ranks' meeting is known, and somebody listens there.

    Not in PyTorch, which says neither what is wrong nor hears of Ctrl-C meanwhile.

    Args:
        address, port: where they meet.
        limit_s: how long to wait.
        listening: whether another process is to listen; else the name alone is looked up.

    Raises:
        ValueError: it did not come true within the limit, and why.
    """
    started = time.monotonic()
    while True:
        try:
            if listening:
                socket.create_connection((address, port), timeout=5.0).close()
            else:
                socket.getaddrinfo(address, port)
            return
        except socket.gaierror as error:
            limit_s = min(limit_s, RESOLVE_S)
            why = f"MASTER_ADDR={address} is not the name of a machine ({error.strerror})"
        except ConnectionRefusedError:
            why = f"nothing listens at {_meeting_point()}: start rank 0, or correct MASTER_PORT"
        except OSError as error:
            why = f"{_meeting_point()} cannot be reached ({error}): is the address rank 0's, and "
            why += "the port open to other machines?"
        waited = time.monotonic() - started
        if waited >= limit_s:
            found = f"rank {rank()} of {world_size()} waited {waited:.0f} s for rank 0"
            raise ValueError(f"the start failed: {found}: {why}")
        time.sleep(min(1.0, limit_s - waited))


def _meet() -> dist.Store:
    """The store of the ranks, once all of them are there."""
    missing = {"WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if missing:
        raise ValueError(f"RANK is set, but not {', '.join(sorted(missing))}: {_HOW}")
    most = min(timedelta(seconds=START_TIMEOUT_S), _timeout)
    address, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0)
    if not 0 < port < 65536:
        raise ValueError(f"MASTER_PORT must be in [1, 65535], got {port}")
    hosting = rank() == 0 and not launchers_store()
    if hosting:
        _check_port(address, port)
    started = time.monotonic()
    _reach(address, port, most.total_seconds(), listening=not hosting)
    try:
        met, *_ = next(dist.rendezvous("env://", timeout=most))
        # Under torchrun the launcher has met the others; the ranks themselves have not.
        met.set_timeout(most)
        came = met.add("mixflow_fast/came", 1)
        if came == world_size():
            met.set("mixflow_fast/all_came", "")
        met.wait(["mixflow_fast/all_came"], most)
        met.set_timeout(_timeout)
    except (RuntimeError, ValueError, OSError) as error:
        if isinstance(error, dist.DistNetworkError) and not hosting:
            raise ValueError(
                f"the start failed: what listens at {_meeting_point()} does not answer as rank 0 "
                f"does ({error_line(error, 80)}): if the port is another program's, choose another "
                "with MASTER_PORT / --master-port"
            ) from None
        raise ValueError(
            f"the start failed: rank {rank()} waited {time.monotonic() - started:.0f} s at "
            f"{_meeting_point()} for {world_size()} processes ({error_line(error)}). Start "
            "all of them, with the same MASTER_ADDR and MASTER_PORT; the address must be rank "
            "0's and the port free there and open to the other machines"
        ) from None
    return met
