"""Processes and devices: one process without a launcher, many under torchrun, deepspeed or srun.

A rank that dies must not leave the others waiting: gloo's sockets close with it, which ends the
others' next collective (the trainer has one on the host at every step), and what only hangs ends at
the group's timeout. `roll_call` then turns PyTorch's message into one that names the missing ranks.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

# In which all ranks of a start must have come, if the group's timeout is not shorter still.
START_TIMEOUT_S = 600.0
# How long survivors wait for each other before they call a rank lost.
ROLL_CALL_S = 10.0
_PEER_FAILURE = re.compile(
    r"gloo|nccl|tcpstore|connection (closed|reset|refused)|broken pipe|socket|timed? ?out", re.I
)
_CAUSES = " (killed, out of memory, hanging, or the machine or its network is gone)"
_store: dist.Store | None = None
_timeout = timedelta(minutes=30)
_ours = False


class RankLost(RuntimeError):
    """Another process of this run is gone or hangs; the group cannot be used any more.

    Attributes:
        speaks: whether this rank is the one of its machine that should print the message.
    """

    def __init__(self, message: str, speaks: bool) -> None:
        super().__init__(message)
        self.speaks = speaks


def init_process_group(device: str = "auto", timeout_s: float = 1800.0) -> torch.device:
    """Join the launcher's process group, or make a group of one; return this rank's device.

    Under `torchrun` or `deepspeed` the environment names rank and peers, under `srun` without them
    Slurm's variables name the rank, and MASTER_ADDR and MASTER_PORT must be set. Without a launcher
    no port is opened. A group that exists already is used as it is.

    Args:
        device: "auto" (CUDA where there is a GPU), "cpu" or "cuda".
        timeout_s: after which a collective that a rank does not join fails. A save of one rank
            which the others wait for must fit into it.

    Raises:
        ValueError: "cuda" without a usable GPU, more ranks than GPUs, an incomplete environment, or
            ranks that did not come or cannot reach each other.
    """
    global _store, _timeout, _ours
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device=cuda, but torch sees no GPU; use train.device=cpu or auto")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    _adopt_slurm()
    os.environ.setdefault("LOCAL_RANK", "0")
    chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        if chosen.index >= torch.cuda.device_count():
            raise ValueError(
                f"this machine has {torch.cuda.device_count()} GPUs, but a rank was started for "
                f"number {chosen.index}: start as many processes per machine as it has GPUs"
            )
        torch.cuda.set_device(chosen)
    _timeout = timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        backend, _ours = "nccl" if on_gpu else "gloo", True
        _store = _meet() if "RANK" in os.environ else dist.HashStore()
        try:
            dist.init_process_group(
                backend, store=_store, rank=rank(), world_size=world_size(), timeout=_timeout
            )
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"rank {rank()} of {world_size()} found the others at {_meeting_point()}, but "
                f"{backend} cannot connect to them ({_line(error)}): set "
                f"{backend.upper()}_SOCKET_IFNAME to the network interface between the machines "
                "(`ip addr` lists them)"
            ) from None
    return chosen


def timeout() -> timedelta:
    """That of the process group, for further groups: they do not inherit it."""
    return _timeout


def same_timeout() -> None:
    """Give that of the process group to all groups there are: DeepSpeed makes its own."""
    if not _ours:  # made by the caller, with groups and timeouts of its own
        return
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(_timeout, group)


def leave() -> None:
    """End the process group where it is whole, so that nothing warns or waits at exit."""
    global _store
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = None


def rank() -> int:
    """This process's number; known from the launcher before the group exists."""
    return dist.get_rank() if dist.is_initialized() else _launched()[0]


def world_size() -> int:
    """How many processes there are; known from the launcher before the group exists."""
    return dist.get_world_size() if dist.is_initialized() else _launched()[1]


@contextlib.contextmanager
def roll_call(wait_s: float = ROLL_CALL_S) -> Iterator[None]:
    """Errors inside are told to the other ranks; one that another rank caused names that rank.

    Args:
        wait_s: how long the other ranks have to answer.

    Raises:
        RankLost: instead of an error of the communication with the other ranks.
    """
    try:
        yield
    except RankLost:
        raise
    except Exception as error:
        if _store is None or world_size() == 1:
            raise
        if not _is_peer_failure(error):
            reason = _entry(_line(error))
            _ask_store(lambda store: store.set(_key(rank()), reason), 2.0)
            raise
        raise _lost(error, wait_s) from error


def _lost(error: Exception, wait_s: float) -> RankLost:
    """Who answers, who does not, and who ended with an error of its own."""
    me, ranks, here = rank(), world_size(), socket.gethostname()
    answers = {me: (here, "")}

    def ask(store: dist.Store) -> None:
        store.set(_key(me), _entry(""))
        deadline = time.monotonic() + wait_s
        while len(answers) < ranks and time.monotonic() < deadline:
            for other in set(range(ranks)) - answers.keys():
                if store.check([_key(other)]):
                    host, _, reason = store.get(_key(other)).decode().partition("\n")
                    answers[other] = host, reason
            time.sleep(0.1)

    asked = _ask_store(ask, wait_s + 2)
    missing = sorted(set(range(ranks)) - answers.keys())
    reasons = [f"rank {r} ended with {reason}" for r, (_, reason) in answers.items() if reason]
    if not asked:  # the store lives in the launcher, or in rank 0
        launcher = "TORCHELASTIC_USE_AGENT_STORE" in os.environ
        reasons.insert(0, f"{'the launcher of ' * launcher}rank 0 does not answer{_CAUSES}")
    elif missing:
        word = "rank" if len(missing) == 1 else "ranks"
        listed = ", ".join(map(str, missing))
        reasons.insert(0, f"no answer from {word} {listed} of {ranks}{_CAUSES}")
    told = any(reason for _, reason in answers.values())
    found = "; ".join(reasons) or "the ranks lost touch"
    if not told:  # this rank's own error may be the cause
        found += f" ({_line(error)[:160]})"
    speaks = me == min(r for r, (host, _) in answers.items() if host == here)
    return RankLost(f"{found}: rank {me} ends too. The same command resumes", speaks)


def _ask_store(ask: Callable[[dist.Store], None], limit_s: float) -> bool:
    """Whether `ask` came to its end. Calls wait without end where the store's machine is cut off,
    and no signal handler runs meanwhile: so not in this thread."""
    done = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            ask(_store)
            done.append(True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    return bool(done)


def _is_peer_failure(error: BaseException | None) -> bool:
    """Whether communication failed; looks through errors that were raised from others."""
    while error is not None:
        if isinstance(error, dist.DistError):
            return True
        if type(error) is RuntimeError and _PEER_FAILURE.search(str(error)):
            return True
        error = error.__cause__
    return False


def _entry(reason: str) -> str:
    return f"{socket.gethostname()}\n{reason}"


def _key(rank: int) -> str:
    return f"mixflow_fast/roll_call/{rank}"


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _launched() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun, deepspeed or else Slurm's srun gives them."""
    e = os.environ
    if "RANK" in e:
        return int(e["RANK"]), int(e.get("WORLD_SIZE", 1)), int(e.get("LOCAL_RANK", 0))
    # Of a step with several tasks only: a batch script and an salloc shell have SLURM_PROCID too.
    if int(e.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in e:
        local = int(e.get("SLURM_LOCALID", 0))
        return int(e["SLURM_PROCID"]), int(e["SLURM_STEP_NUM_TASKS"]), local
    return 0, 1, int(e.get("LOCAL_RANK", 0))


def _adopt_slurm() -> None:
    """Give DeepSpeed and torch the names that they read."""
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


def _meet() -> dist.Store:
    """The store of the ranks, once all have come."""
    missing = {"WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if missing:
        raise ValueError(
            f"RANK is set, but not {', '.join(sorted(missing))}: start with torchrun, which sets "
            "them all, or unset RANK for a run of one process"
        )
    most = min(timedelta(seconds=START_TIMEOUT_S), _timeout)
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=most))
        # Under torchrun the launcher has met the others; the ranks themselves have not.
        store.set_timeout(most)
        came = store.add("mixflow_fast/came", 1)
        if came == world_size():
            store.set("mixflow_fast/all_came", "")
        store.wait(["mixflow_fast/all_came"], most)
        store.set_timeout(_timeout)
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"the start failed: rank {rank()} waited {most.total_seconds():.0f} s at "
            f"{_meeting_point()} for {world_size()} processes ({_line(error)}). Start all of them, "
            "with the same MASTER_ADDR and MASTER_PORT; the address must be rank 0's and the port "
            "free there and open to the other machines"
        ) from None
    return store
