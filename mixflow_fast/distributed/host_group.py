"""What the ranks tell each other on the host, so that all take the same way.

An error of one rank that the others do not hear of leaves them in a collective until its timeout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist


class HostGroup:
    """Exchange of small Python values between the ranks. Needs the process group.

    Args:
        timeout: after which an exchange fails that a rank does not join; None: 30 minutes.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self.ranks = dist.get_world_size()
        self.rank = dist.get_rank()
        # gloo: what is exchanged is in host memory, and no device has to be waited for.
        several = self.ranks > 1 and dist.get_backend() != "gloo"
        self._group = dist.new_group(backend="gloo", timeout=timeout) if several else None

    def all_gather(self, mine: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks. Every rank must call it."""
        if self.ranks == 1:
            return [mine]
        values: list[Any] = [None] * self.ranks
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
