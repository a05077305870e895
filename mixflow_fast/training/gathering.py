"""Whole tensors out of the partitions of all ranks, many parameters at once.

ZeRO 1 and 2 lay all trained parameters one behind the other and cut that row into a partition for
each rank. Neighbours in the row are put together in one buffer: each rank that has a part of them
broadcasts it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mixflow_fast.checkpoints.shards import Fragment

# Elements of a buffer, or one parameter if that is larger: 0.2 GB of float32 beside the training
# state, and long enough messages for any network.
AT_ONCE = 50_000_000


@dataclass(frozen=True)
class Share:
    """What one rank has of a buffer.

    Attributes:
        rank: who has it.
        begin, end: where it stands in the buffer.
        fragments: the pieces of the rank's partitions that it consists of, in this order.
    """

    rank: int
    begin: int
    end: int
    fragments: tuple[Fragment, ...]


@dataclass(frozen=True)
class Gathering:
    """Parameters that are put together in one buffer.

    Attributes:
        places: name -> (begin, end) in the buffer, in the network's order.
        shares: of all ranks that have something of them.
    """

    places: Mapping[str, tuple[int, int]]
    shares: tuple[Share, ...]

    @property
    def numel(self) -> int:
        """Elements of the buffer."""
        return max(end for _, end in self.places.values())


def plan(
    numels: Mapping[str, int], owned: Sequence[Sequence[Fragment]], most: int = AT_ONCE
) -> list[Gathering]:
    """How to put all parameters together in buffers of bounded size; the same on every rank.

    Args:
        numels: name -> elements, in the network's order.
        owned: for each rank, which pieces of which parameters its partitions hold.
        most: elements of a buffer, unless one parameter is larger.

    Raises:
        ValueError: the ranks together do not hold every element of a parameter exactly once.
    """
    groups: list[dict[str, tuple[int, int]]] = []
    filled = most
    for name, numel in numels.items():
        if filled + numel > most:
            groups.append({})
            filled = 0
        groups[-1][name] = filled, filled + numel
        filled += numel
    pieces: dict[str, list[tuple[int, Fragment]]] = {name: [] for name in numels}
    for rank, fragments in enumerate(owned):
        for fragment in fragments:
            pieces[fragment.name].append((rank, fragment))
    return [Gathering(places, _shares(places, pieces)) for places in groups]


def _shares(
    places: Mapping[str, tuple[int, int]], pieces: Mapping[str, list[tuple[int, Fragment]]]
) -> tuple[Share, ...]:
    """Who sends what of a buffer: pieces of one rank that follow each other are sent at once."""
    shares: list[Share] = []
    reached = 0
    for name, (begin, end) in places.items():
        for rank, piece in sorted(pieces[name], key=lambda one: one[1].start):
            if not piece.numel:
                continue
            if begin + piece.start != reached:
                raise ValueError(f"the ranks' partitions do not hold {name} exactly once")
            reached += piece.numel
            if shares and shares[-1].rank == rank:
                last = shares.pop()
                shares.append(Share(rank, last.begin, reached, (*last.fragments, piece)))
            else:
                shares.append(Share(rank, reached - piece.numel, reached, (piece,)))
        if reached != end:
            raise ValueError(f"the ranks' partitions do not hold {name} exactly once")
    return tuple(shares)


def gather(
    gatherings: Sequence[Gathering], partitions: Sequence[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, or an optimizer's state of it: flat, float32, on the partitions' device.

    Every rank must go through all of them.

    Args:
        gatherings: of `plan`.
        partitions: this rank's, as its fragments count them.
    """
    rank, several = dist.get_rank(), dist.get_world_size() > 1
    flat = [partition.detach().view(-1) for partition in partitions]
    for gathering in gatherings:
        buffer = torch.empty(gathering.numel, dtype=torch.float32, device=flat[0].device)
        for share in gathering.shares:
            if share.rank == rank:
                place = share.begin
                for piece in share.fragments:
                    own = flat[piece.partition][piece.offset : piece.offset + piece.numel]
                    buffer[place : place + piece.numel].copy_(own)
                    place += piece.numel
            if several:
                dist.broadcast(buffer[share.begin : share.end], src=share.rank)
        for name, (begin, end) in gathering.places.items():
            # A copy: what is saved of a view is all that it is a view of.
            yield name, buffer[begin:end].clone()
