"""Detection of ranks that are gone: those that are left name them in one error.

PyTorch's own errors say which connection broke, not which rank ended, or why.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

from mixflow_fast.distributed.heartbeat import verdict
from mixflow_fast.distributed.process_group import rank, store, world_size
from mixflow_fast.distributed.watcher import CAUSES, ends_too, no_answer
from mixflow_fast.messages import error_line

# How long survivors wait for each other before they call a rank lost.
ROLL_CALL_S = 10.0
# How long the watchers need for what they find where the store is gone with its process.
_VERDICT_S = 4.0
# PyTorch raises most failures of communication as RuntimeErrors that only their text tells apart.
_PEER_FAILURE = re.compile(
    r"gloo|nccl|tcpstore|connection (closed|reset|refused)|broken pipe|socket|timed? ?out", re.I
)


class RankLost(RuntimeError):
    """Another process of this run is gone or hangs; the group cannot be used any more.

    Attributes:
        found: what happened, without what this rank does about it.
        speaks: whether this rank should print the message, which one rank per machine does.
    """

    def __init__(self, found: str, speaks: bool) -> None:
        super().__init__(ends_too(found, rank()))
        self.found, self.speaks = found, speaks


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
        if store() is None or world_size() == 1:
            raise
        if not is_peer_failure(error):
            reason = _entry(error_line(error))
            ask_store(lambda store: store.set(_key(rank()), reason), 2.0, store())
            raise
        raise _lost(error, wait_s) from error


def _lost(error: Exception, wait_s: float) -> RankLost:
    """The error that names the ranks that do not answer or ended with an error of their own."""
    me, ranks, here = rank(), world_size(), socket.gethostname()
    # Rank -> its machine, and the error that it ended with, or "".
    answers = {me: (here, "")}

    def ask(store: dist.Store) -> None:
        store.set(_key(me), _entry(""))
        deadline = time.monotonic() + wait_s
        while len(answers) < ranks and time.monotonic() < deadline and verdict() is None:
            for other in set(range(ranks)) - answers.keys():
                if store.check([_key(other)]):
                    host, _, reason = store.get(_key(other)).decode().partition("\n")
                    answers[other] = host, reason
            time.sleep(0.1)

    store_answered = ask_store(ask, wait_s + 2, store())
    # Ranks whose main thread is blocked do not answer, but their watchers know that they live.
    if (known := verdict(0.0 if store_answered else _VERDICT_S)) is not None:
        return RankLost(known.found, known.speaks)
    missing = sorted(set(range(ranks)) - answers.keys())
    reasons = [f"rank {r} ended with {reason}" for r, (_, reason) in answers.items() if reason]
    if not store_answered:  # the store lives in the launcher, or in rank 0
        launcher = "TORCHELASTIC_USE_AGENT_STORE" in os.environ
        reasons.insert(0, f"{'the launcher of ' * launcher}rank 0 does not answer {CAUSES}")
    elif missing:
        reasons.insert(0, no_answer(missing, ranks))
    cause_known = any(reason for _, reason in answers.values())
    found = "; ".join(reasons) or "the ranks lost touch"
    if not cause_known:  # it may be the error of this rank
        found += f" ({error_line(error)[:160]})"
    speaks = me == min(r for r, (host, _) in answers.items() if host == here)
    return RankLost(found, speaks)


def ask_store(ask: Callable[[dist.Store], None], limit_s: float, store: dist.Store) -> bool:
    """Whether `ask` came to its end within the limit.

    In a thread, because calls wait without end where the store's machine is cut off, and no signal
    handler runs meanwhile.
    """
    done = threading.Event()

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            ask(store)
            done.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    return done.is_set()


def is_peer_failure(error: BaseException | None) -> bool:
    """Whether communication failed; looks through errors that were raised from others."""
    while error is not None:
        if isinstance(error, dist.DistError):
            return True
        if type(error) is RuntimeError and _PEER_FAILURE.search(str(error)):
            return True
        error = error.__cause__
    return False


def _entry(reason: str) -> str:
    """Entry of this rank in the store: its machine, and the error that it ended with."""
    return f"{socket.gethostname()}\n{reason}"


def _key(rank: int) -> str:
    return f"mixflow_fast/roll_call/{rank}"
