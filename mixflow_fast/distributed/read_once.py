"""A file that all ranks need, read by one rank of each machine: 64 readers of one file are 64 times
its size from a file system that all machines share."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable

import torch.distributed as dist
from torch import Tensor

from mixflow_fast.distributed import process_group
from mixflow_fast.distributed.host_group import HostGroup


def read_once_a_machine(
    host_group: HostGroup, read: Callable[[], None], tensors: Iterable[Tensor]
) -> None:
    """Fill tensors on one rank of each machine; its other ranks receive them over gloo.

    Every rank must call it, with tensors of the same shapes in the same order.

    Args:
        host_group: all ranks.
        read: fills the tensors from files; called on one rank of each machine.
        tensors: on the CPU, contiguous.

    Raises:
        ValueError, OSError: what `read` raised on one rank, on all.
    """
    machines = host_group.all_gather(socket.gethostname())
    mine = machines[host_group.rank]
    reader = machines.index(mine)
    with host_group.raise_together():
        if host_group.rank == reader:
            read()
    if host_group.ranks == 1:
        return
    groups = {}
    for machine in dict.fromkeys(machines):  # every rank takes part in making every group
        ranks = [rank for rank, name in enumerate(machines) if name == machine]
        groups[machine] = dist.new_group(ranks, process_group.timeout(), backend="gloo")
    for tensor in tensors:
        dist.broadcast(tensor, reader, group=groups[mine])
    dist.destroy_process_group(groups[mine])
