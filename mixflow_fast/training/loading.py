"""The loader of a run: which one, and with how many threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Protocol

import torch

from mixflow_fast.config.data_sections import DataConfig
from mixflow_fast.config.schema import TrainConfig
from mixflow_fast.data import Batch, Dataset, Latents
from mixflow_fast.data.copy_stream import WaitTimes
from mixflow_fast.data.dali import DaliLoader, choose_loader, preprocessing_version
from mixflow_fast.data.device_loader import DeviceLoader
from mixflow_fast.data.label_dropout import LabelDropout
from mixflow_fast.data.resident import Resident, fits, resident_problem
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.metrics.data_wait import WaysOut

# Steps after which `data.resident=auto` looks how much memory is left.
_STEPS_BEFORE = 3
_MOST_WORKERS = 8  # threads of one rank; reading and decoding needs no more


class Loader(Protocol):
    """The micro-batches of one rank, endless; a context manager that closes it.

    Attributes:
        microsteps: micro-batches of one optimizer step on this rank.
        wait: what waiting for data took.
        position: first global position of the optimizer step that the next one belongs to.
    """

    microsteps: int
    wait: WaitTimes

    @property
    def position(self) -> int: ...

    def __next__(self) -> Batch:
        """The next micro-batch, valid until the next call."""
        ...

    def close(self) -> None:
        """Stops its threads."""
        ...

    def __enter__(self) -> Loader: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


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


def check_loading(section: DataConfig, dataset: Dataset, device: torch.device) -> None:
    """Refuse a loader or a place for the data that cannot be had here, before the run begins.

    Raises:
        ValueError: names the setting, why, and the way out.
    """
    choose_loader(section.loader, dataset, device)
    if section.resident == "on" and (problem := resident_problem(dataset)):
        raise ValueError(f"data.resident=on cannot be had: {problem}: set data.resident=off")


def describe_loader(section: DataConfig, dataset: Dataset, device: torch.device) -> str:
    """Whose decoder gives the pixels of a run, "pil/13.0.0"; "" where nothing is decoded.

    Args:
        section: the section `data` of the configuration.
        dataset: the examples.
        device: where they are used.
    """
    if not getattr(dataset, "encoded", False):
        return ""
    if choose_loader(section.loader, dataset, device) == "dali":
        return preprocessing_version(device)
    import PIL

    return f"pil/{PIL.__version__}"


def build_loader(
    section: DataConfig, dataset: LabelDropout, order: LoaderOrder, device: torch.device
) -> Loader:
    """The micro-batches of this rank, on the device.

    Args:
        section: the section `data` of the configuration.
        dataset: the examples, with the labels that the network is trained on.
        order: which of them, and where it starts.
        device: where the batches are used.

    Raises:
        ValueError: as `check_loading`.
    """
    check_loading(section, dataset.dataset, device)
    workers = loader_workers(section)
    if choose_loader(section.loader, dataset, device) == "dali":
        return DaliLoader(
            dataset, num_workers=workers, device=device, threads=max(2, workers), **asdict(order)
        )

    def ring(order: LoaderOrder, resident: Resident | None = None) -> DeviceLoader:
        options = dict(depth=section.depth, workers=workers, resident=resident)
        return DeviceLoader(dataset, device, **options, **asdict(order))

    if section.resident == "off":
        return ring(order)
    latents = dataset.dataset
    if section.resident == "on":
        return ring(order, Resident(latents, device))
    if resident_problem(latents):  # auto takes it where it can be had
        return ring(order)
    return _ResidentLater(order, ring, latents, device)


class _ResidentLater:
    """A loader that takes its latents to the device after some steps, if there is room then.

    Before, nobody knows what a step takes.

    Args:
        order: where it starts.
        make: a loader from its order and what lies on the device.
        latents: moments of a set.
        device: where they may go.
    """

    def __init__(
        self,
        order: LoaderOrder,
        make: Callable[[LoaderOrder, Resident | None], DeviceLoader],
        latents: Latents,
        device: torch.device,
    ) -> None:
        self._order, self._make, self._latents, self._device = order, make, latents, device
        self._loader = make(order, None)
        self.microsteps, self.wait = self._loader.microsteps, self._loader.wait
        self._left = _STEPS_BEFORE * self.microsteps

    @property
    def position(self) -> int:
        """As `DeviceLoader`."""
        return self._loader.position

    def __next__(self) -> Batch:
        if not self._left and fits(self._latents.table, self._device):
            self._loader.close()
            order = replace(self._order, start_position=self.position)
            self._loader = self._make(order, Resident(self._latents, self._device))
            self._loader.wait = self.wait
        self._left -= 1
        return next(self._loader)

    def close(self) -> None:
        """As `DeviceLoader`."""
        self._loader.close()

    def __enter__(self) -> _ResidentLater:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


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
