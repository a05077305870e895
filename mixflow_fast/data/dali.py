"""Micro-batches of images through NVIDIA DALI, fed in our own order.

DALI's readers and random operators are not used: the order, the flips and the position of every
sample go into the pipeline as inputs, so a position is the same sample as in `BatchLoader`, on any
number of ranks, and a run starts anywhere at the same cost. From prepared sets the pixels are the
same too: lossless files are decoded exactly, and no other pixel is computed. From other folders
decoding is the same and ADM's crop is the same but for rounding (`mixflow_fast/data/dali_crop.py`).

With `exec_dynamic=True` a batch that is kept stays as it is; without it DALI writes into it.
"""

from __future__ import annotations

import importlib.util
import time
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from mixflow_fast.data.copy_stream import WaitTimes
from mixflow_fast.data.dali_crop import adm_crop
from mixflow_fast.data.dali_feed import Feed, check_by_pillow, make_feed
from mixflow_fast.data.dataset import Batch, Dataset, ImageDataset
from mixflow_fast.data.label_dropout import LabelDropout
from mixflow_fast.data.microbatch_order import MicrobatchOrder
from mixflow_fast.data.order import sample_index
from mixflow_fast.messages import error_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nvidia.dali.data_node import DataNode
    from nvidia.dali.pipeline import Pipeline

# DALI's own defaults turn images by EXIF and, on a GPU, repeat chroma values instead of
# interpolating them. With these its CPU decoder has the bits of Pillow.
DECODER: dict[str, bool] = {
    "adjust_orientation": False,
    "jpeg_fancy_upsampling": True,
    "use_fast_idct": False,
}
_INSTALL = 'pip install "mixflow_fast[gpu]"'
_QUEUE = 2  # micro-batches in the pipeline


def is_installed() -> bool:
    """Whether DALI could be imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package `nvidia` at all
        return False


def dali_problem(dataset: Dataset | ImageDataset) -> str | None:
    """Why DALI cannot give a dataset's examples, a sentence; None where it can."""
    if getattr(dataset, "encoded", None) is None:
        return f"DALI decodes image files, and {dataset.name} holds none"
    if not dataset.encoded:
        return f"{dataset.name} holds raw pixels, which nothing has to decode"
    if not is_installed():
        return f"DALI is not installed: {_INSTALL}"
    return None


def choose_loader(
    wanted: Literal["auto", "threads", "dali"],
    dataset: Dataset | ImageDataset,
    device: torch.device,
) -> Literal["threads", "dali"]:
    """Which loader gives the examples of a run.

    Args:
        wanted: the setting `data.loader`; "auto" takes DALI on a GPU where it can be used. On a
            CPU its resize takes four times as long as Pillow's.
        dataset: the examples.
        device: where the batches are used.

    Raises:
        ValueError: DALI is demanded and cannot be used.
    """
    if wanted == "threads" or (wanted == "auto" and device.type != "cuda"):
        return "threads"
    problem = dali_problem(dataset)
    if problem and wanted == "dali":
        raise ValueError(f"data.loader=dali cannot be used: {problem}; or set data.loader=auto")
    return "threads" if problem else "dali"


def preprocessing_version(device: torch.device) -> str:
    """What a run records of its pixels: "dali/2.4.0/cpu"."""
    import nvidia.dali

    return f"dali/{nvidia.dali.__version__}/{device.type}"


def build_pipeline(
    source: Callable[[], tuple[list[np.ndarray], ...]],
    batch_size: int,
    threads: int,
    device: torch.device,
    crop: int | None,
    decoder: Mapping[str, bool] = DECODER,
) -> Pipeline:
    """A pipeline from encoded files to uint8 images.

    Args:
        source: called for each batch: payloads, numbers, flips, and the plans where `crop` is set
            (see `Feed.inputs`).
        batch_size: samples of every batch.
        threads: of DALI, for decoding on the CPU.
        device: "cpu", or the GPU that decodes JPEG and holds the images.
        crop: side of ADM's crop; None where images are taken as they are.
        decoder: options of `fn.decoders.image`.

    Returns:
        A pipeline whose outputs are images, (H, W, 3) uint8 each, and the numbers.
    """
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = device.type == "cuda"

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=_number(device) if on_gpu else None,
        exec_dynamic=True,
        prefetch_queue_depth=_QUEUE,
        enable_conditionals=True,
    )
    def graph() -> tuple[DataNode, DataNode]:
        inputs = fn.external_source(source, num_outputs=3 + (crop is not None), batch=True)
        # "mixed" decodes JPEG on the GPU, and other formats on the CPU.
        image = fn.decoders.image(
            inputs[0], device="mixed" if on_gpu else "cpu", output_type=types.RGB, **decoder
        )
        if crop is not None:
            image = adm_crop(image, inputs[3], crop)
        return fn.flip(image, horizontal=inputs[2]), inputs[1]

    pipeline = graph()
    pipeline.build()
    return pipeline


def _number(device: torch.device) -> int:
    """Which GPU a device is."""
    return torch.cuda.current_device() if device.index is None else device.index


def _shutdown(pool: ThreadPoolExecutor) -> None:
    # Must not wait: the garbage collector may run this in a worker.
    pool.shutdown(wait=False, cancel_futures=True)


class DaliLoader:
    """An endless iterator over the micro-batches of one rank, decoded by DALI.

    As `BatchLoader`, and the same examples; the batches are on `device`, uint8 (M, 3, S, S). The
    files are read by threads of ours, up to 2 * num_workers micro-batches ahead. A file that cannot
    be decoded is named by the `next` that would have returned its batch, which closes the loader.

    Args:
        dataset: images with encoded files, or `LabelDropout` around such.
        seed, global_batch_size, microbatch_size, rank, world_size, shuffle: as `MicrobatchOrder`.
        start_position: global position to start at, a multiple of global_batch_size.
        num_workers: threads that read files; at least one is there.
        device: where the images are wanted.
        threads: of DALI, which decode what the GPU does not.
        zero_copy: give DALI's own memory, channels last, in place of a copy. A batch must be
            dropped before DALI's memory is short; meant for benchmarks.

    Attributes:
        microsteps: micro-batches of one optimizer step on this rank.
        ahead: micro-batches that may be read or decoded before they are asked for.
        wait: what waiting for data took, on the host.

    Raises:
        ValueError: DALI cannot be used, or as `MicrobatchOrder`; in `next`, a bad image.
        RuntimeError: in `next`, DALI failed otherwise, or gave another batch than was fed.
    """

    def __init__(
        self,
        dataset: LabelDropout | ImageDataset,
        *,
        seed: int,
        global_batch_size: int,
        microbatch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_position: int = 0,
        num_workers: int = 1,
        shuffle: bool = True,
        device: torch.device | str = "cpu",
        threads: int = 2,
        zero_copy: bool = False,
    ) -> None:
        if problem := dali_problem(dataset):
            raise ValueError(f"DALI cannot be used: {problem}")
        if not isinstance(dataset, LabelDropout):
            dataset = LabelDropout(dataset, 0.0, None)
        self._order = MicrobatchOrder(
            len(dataset),
            seed=seed,
            global_batch_size=global_batch_size,
            microbatch_size=microbatch_size,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
        )
        self.dataset, self.seed, self._shuffle = dataset, seed, shuffle
        self.device, self._zero_copy = torch.device(device), zero_copy
        self.microsteps, self.wait = self._order.microsteps, WaitTimes()
        self._microstep = self._order.microstep_at(start_position)  # next to return
        self._submitted = self._microstep  # next to read
        self._lookahead = 2 * max(1, num_workers)
        self.ahead = self._lookahead + _QUEUE
        # In order: what was submitted and not returned, what is being read, what DALI has.
        self._expected: deque[tuple[Tensor, Tensor]] = deque()
        self._reading: deque[Future[Feed]] = deque()
        self._fed: deque[Feed] = deque()
        self._unreadable: Exception | None = None
        self._closed = False
        workers = max(1, num_workers)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="mixflow_fast-reader")
        weakref.finalize(self, _shutdown, self._pool)
        # A pipeline holds its source: this one must not keep the loader alive.
        loader = weakref.ref(self)
        self._pipeline: Pipeline | None = build_pipeline(
            lambda: loader()._next_inputs(),
            microbatch_size,
            threads,
            self.device,
            dataset.size if dataset.crops else None,
        )

    @property
    def position(self) -> int:
        """First global position of the optimizer step that the next micro-batch belongs to."""
        return self._order.step_position(self._microstep)

    def indices(self, positions: Tensor) -> Tensor:
        """(B,) int64, on the CPU: which samples of the dataset stand at global positions."""
        return sample_index(positions.cpu(), len(self.dataset), self.seed, self._shuffle)

    def __iter__(self) -> DaliLoader:
        return self

    def __next__(self) -> Batch:
        if self._closed or self._pipeline is None:
            raise RuntimeError("the DaliLoader is closed; make a new one at the position you need")
        started = time.perf_counter()
        try:
            batch = self._run(self._pipeline)
        except BaseException:
            self.close()
            raise
        self.wait.host_s += time.perf_counter() - started
        self.wait.batches += 1
        self._microstep += 1
        return batch

    def _next_inputs(self) -> tuple[list[np.ndarray], ...]:
        """The next micro-batch for DALI, which calls this."""
        while len(self._reading) < self._lookahead:
            task = self._order(self._submitted)
            self._expected.append(task)
            self._reading.append(self._pool.submit(make_feed, self.dataset, *task, self.seed))
            self._submitted += 1
        try:
            feed = self._reading.popleft().result()
        except Exception as error:
            # DALI would wrap it.
            self._unreadable = error
            raise
        self._fed.append(feed)
        return feed.inputs()

    def _run(self, pipeline: Pipeline) -> Batch:
        on_gpu = self.device.type == "cuda"
        try:
            # With the stream that uses the images, DALI lets that wait and not the host.
            stream = torch.cuda.current_stream(self.device) if on_gpu else None
            images, numbers = pipeline.run(stream)
        except Exception as error:
            raise self._explained(error) from error
        indices, positions = self._expected.popleft()
        self._fed.popleft()
        came = torch.from_numpy(np.asarray(numbers.as_array()).reshape(-1).copy())
        if not torch.equal(came, positions):
            raise RuntimeError(
                f"DALI gave the images of the positions {came.tolist()[:4]}..., expected "
                f"{positions.tolist()[:4]}...: what goes in and what comes out is shifted"
            )
        # (M, S, S, 3), DALI's memory; permuted into memory of our own on the current stream, after
        # which DALI may have its memory back.
        pixels = torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)
        labels = self.dataset.labels(indices, positions, self.seed)
        own = pixels if self._zero_copy else pixels.contiguous()
        return Batch(None, labels, positions, images=own).to(self.device)

    def _explained(self, error: Exception) -> Exception:
        """The error with the name of the file that it comes from, where one can be found."""
        if self._unreadable is not None:
            return self._unreadable
        try:
            for feed in self._fed:
                check_by_pillow(self.dataset, feed)
        except ValueError as found:
            return found
        return RuntimeError(
            f"DALI failed, though Pillow reads all images of the batch at position {self.position} "
            f"(data.loader=threads goes on without DALI): {error_line(error, 300)}"
        )

    def close(self) -> None:
        """Stops the threads and lets go of the pipeline. Safe to call twice."""
        self._closed = True
        self._reading.clear()
        self._fed.clear()
        self._pipeline = None
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> DaliLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
