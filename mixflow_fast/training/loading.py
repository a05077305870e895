"""The loader of a run: which one, and with how many threads."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

import torch

from mixflow_fast.config.data_sections import DataConfig
from mixflow_fast.config.schema import TrainConfig
from mixflow_fast.data import BatchLoader, Dataset
from mixflow_fast.distributed.host_group import HostGroup

_MOST_WORKERS = 8  # threads of one rank; reading and decoding needs no more


@dataclass(frozen=True)
class LoaderOrder:
    """Which examples a loader gives, in which order; arguments of `BatchLoader`."""

    seed: int
    global_batch_size: int
    microbatch_size: int
    rank: int
    world_size: int
    start_position: int

    @classmethod
    def of(
        cls, section: TrainConfig, microbatch: int, host_group: HostGroup, start: int
    ) -> LoaderOrder:
        """The order of a run from the global position `start` on."""
        return cls(
            seed=section.seed,
            global_batch_size=section.global_batch_size,
            microbatch_size=microbatch,
            rank=host_group.rank,
            world_size=host_group.ranks,
            start_position=start,
        )


def loader_workers(section: DataConfig) -> int:
    """Threads that prepare the examples of this rank: `data.workers`, or what its cores allow."""
    if section.workers is not None:
        return section.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # One core launches the training step.
    return min(_MOST_WORKERS, max(1, (cores or 1) // ranks - 1))


def build_loader(
    section: DataConfig, dataset: Dataset, order: LoaderOrder, device: torch.device
) -> BatchLoader:
    """The micro-batches of this rank.

    Args:
        section: the section `data` of the configuration.
        dataset: the examples, with the labels that the network is trained on.
        order: which of them, and where it starts.
        device: where the batches are used.
    """
    return BatchLoader(dataset, num_workers=loader_workers(section), **asdict(order))
