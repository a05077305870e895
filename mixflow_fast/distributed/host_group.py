"""Exchange of small Python values and of errors between the ranks, in host memory.

If one rank raises an error and the others go on, they wait in a collective until its timeout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


class HostGroup:
    """All ranks of the process group, which must exist, for exchanges on the host.

    Args:
        timeout: how long an exchange waits for a rank before it fails; None: 30 minutes.
        separate: shares no connection with any other group, so that a thread can use it while
            others talk.
    """

    def __init__(self, timeout: timedelta | None = None, separate: bool = False) -> None:
        self.ranks = dist.get_world_size()
        self.rank = dist.get_rank()
        # By gloo, because NCCL would copy the values to the device and wait for it.
        several = self.ranks > 1 and (separate or dist.get_backend() != "gloo")
        self._group = dist.new_group(backend="gloo", timeout=timeout) if several else None

    @classmethod
    def alone(cls) -> HostGroup:
        """This process alone, whatever process group there is or is not."""
        group = cls.__new__(cls)
        group.ranks, group.rank, group._group = 1, 0, None
        return group

    def all_gather(self, mine: Value) -> list[Value]:
        """The values of all ranks, in the order of the ranks. Every rank must call it."""
        if self.ranks == 1:
            return [mine]
        values = [mine] * self.ranks
        dist.all_gather_object(values, mine, group=self._group)
        return values

    @contextlib.contextmanager
    def raise_together(self) -> Iterator[None]:
        """A ValueError or OSError of one rank inside is raised on all ranks at the end.

        Every rank must enter it. Collectives inside would wait for a rank that failed.
        """
        mine = None
        try:
            yield
        except (ValueError, OSError) as error:
            mine = error
        found = [error for error in self.all_gather(mine) if error is not None]
        if found:
            raise mine or found[0]
