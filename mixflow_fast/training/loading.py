"""The loader of a run: which one, and with how many threads."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Protocol

import torch

from mixflow_fast.config.data_sections import DataConfig
from mixflow_fast.config.schema import TrainConfig
from mixflow_fast.data import Batch, Dataset
from mixflow_fast.data.device_loader import DeviceLoader
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.metrics.data_wait import WaysOut

_MOST_WORKERS = 8  # threads of one rank; reading and decoding needs no more


class Loader(Protocol):
    """What a step needs of a loader.

    Attributes:
        microsteps: micro-batches of one optimizer step on this rank.
    """

    microsteps: int

    def __next__(self) -> Batch:
        """The next micro-batch, valid until the next call."""
        ...


@dataclass(frozen=True)
class LoaderOrder:
    """Which examples a loader gives, in which order; arguments of `DeviceLoader`."""

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
) -> DeviceLoader:
    """The micro-batches of this rank, on the device.

    Args:
        section: the section `data` of the configuration.
        dataset: the examples, with the labels that the network is trained on.
        order: which of them, and where it starts.
        device: where the batches are used.

    Raises:
        ValueError: a loader or a place for the data that cannot be had here.
    """
    return DeviceLoader(
        dataset, device, depth=section.depth, workers=loader_workers(section), **asdict(order)
    )


def ways_out(section: DataConfig) -> WaysOut:
    """What to change where training waits for its data."""
    more = f"raise data.workers (now {loader_workers(section)})"
    if section.kind in ("folder", "webdataset"):
        more += ", or prepare the images once (`mixflow-fast data prepare`)"
    elif section.kind == "images" and section.loader != "dali":
        more += ", or try data.loader=dali"
    resident = "copy the latents to the GPU once, data.resident=on"
    if section.kind != "latents" or section.resident == "on":
        resident = f"raise data.depth (now {section.depth})"
    elif section.images is None:
        more += f", or {resident}"
    return WaysOut(preparing=more, copying=resident)
