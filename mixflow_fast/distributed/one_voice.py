"""What several ranks have to say, said by one of them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from datetime import timedelta

import torch.distributed as dist

from mixflow_fast.distributed.lost_ranks import ask_store
from mixflow_fast.distributed.process_group import launchers_store, rank, store, world_size

# How long a rank looks for the others before it speaks for itself.
_PATIENCE_S = 2.0


def is_first_to_say(text: str) -> bool:
    """Whether this rank is the first that wants to say this text.

    A refusal that all ranks come to is so printed once, and what only one rank has is printed by
    that rank. True where the others cannot be asked: said twice is better than not at all.
    """
    if world_size() == 1:
        return True
    digest = hashlib.sha256(text.encode()).hexdigest()
    # torchrun keeps its store over restarts.
    key = f"mixflow_fast/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{digest}"
    answers: list[int] = []

    def ask(common: dist.Store) -> None:
        answers.append(common.add(key, 1))
        deadline = time.monotonic() + _PATIENCE_S / 2
        # Where rank 0 keeps the store, it goes with rank 0.
        if rank() == 0 and not launchers_store():
            while common.add(key, 0) < world_size() and time.monotonic() < deadline:
                time.sleep(0.02)

    with contextlib.suppress(RuntimeError, OSError, ValueError):
        if store() is not None:
            ask_store(ask, _PATIENCE_S, store())
        elif launchers_store():
            ask_store(ask, _PATIENCE_S, _of_the_launcher())
    if not answers or answers[0] == 1:
        return True
    # A launcher ends all ranks when the first has ended: not before the other one has said it.
    time.sleep(_PATIENCE_S / 4)
    return False


def _of_the_launcher() -> dist.Store:
    """torchrun's store, which is there before the ranks have met."""
    limit = timedelta(seconds=_PATIENCE_S)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=limit)
