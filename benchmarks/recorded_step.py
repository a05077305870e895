"""A step as one rank of many would make it, recorded: `python -m benchmarks.recorded_step`.

The real `Trainer`, engine and optimizer run as rank 0 of 8 or 64 in this one process. Two things
are stand-ins, so numbers of the step mean nothing and its speed neither:

* PyTorch's fake process group, whose collectives return at once and move nothing.
* DeepSpeed's accelerator, which says what CUDA's says (kernels run later, streams are to be waited
  for) and counts where the host would wait.

Prints one JSON object for each case, each with what a later step does, after the first two.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from mixflow_fast.cli.errors import quiet_without_reader

# A width at which ZeRO 3 shards the matrices and keeps the vectors whole, as in the large networks.
NETWORK = ("model.depth=2", "model.hidden_size=192", "model.num_heads=3")
WARM_UP = 2
PRODUCTS = {"mm", "addmm", "bmm", "convolution_backward"}


@dataclass(frozen=True)
class Case:
    """What is recorded.

    Attributes:
        ranks: the size of the stand-in group.
        settings: of the run, as `section.field=value`.
        microsteps: micro-batches of a step.
    """

    ranks: int
    settings: tuple[str, ...] = ()
    microsteps: int = 1


@dataclass(frozen=True)
class Collective:
    """A call: the part of a step, its kind, dtype, whole elements on a rank, ranks.

    `products` are the matrix products of the step that came before it.
    """

    phase: str
    kind: str
    dtype: str
    elements: int
    ranks: int
    products: int


@dataclass
class Recording:
    """What one step did.

    Attributes:
        trained, frozen: elements of the parameters, in the network's order.
        collectives: calls of c10d.
        waits: where the host would wait for the device, by the part of the step and kind.
        objects: exchanges of Python values between the ranks, in a row of metrics.
        products: matrix products of the step.
    """

    trained: list[int] = field(default_factory=list)
    frozen: list[int] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    waits: dict[str, dict[str, int]] = field(default_factory=dict)
    objects: int = 0
    products: int = 0


class Recorder(TorchDispatchMode):
    """Writes down the collectives and waits that happen inside of it.

    Attributes:
        phase: the part of the step that runs: forward, backward or step of the engine, or "own".
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "own"
        self.collectives: list[Collective] = []
        self.waits: dict[str, Counter[str]] = {}
        self.products = 0

    def wait(self, kind: str) -> None:
        """The host waits for the device."""
        self.waits.setdefault(self.phase, Counter())[kind] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, _, name = function._schema.name.partition("::")
        if space == "c10d":
            tensors = [t for t in _tensors(args) if isinstance(t, torch.Tensor)]
            group = next(a for a in args if isinstance(a, torch.ScriptObject))
            size = dist.ProcessGroup.unbox(group).size()
            # The whole of what is gathered or scattered, of which a rank has a part.
            whole = max(t.numel() for t in tensors) if tensors else 0
            dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else "none"
            kind = name.strip("_").removesuffix("_base")
            one = Collective(self.phase, kind, dtype, whole, size, self.products)
            self.collectives.append(one)
        elif name in PRODUCTS:
            self.products += 1
        elif function is torch.ops.aten._local_scalar_dense.default:
            self.wait("read of a value")
        return function(*args, **(kwargs or {}))


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


class _Stream:
    """A stream on which nothing runs."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def synchronize(self) -> None:
        self._recorder.wait("stream.synchronize")

    def wait_stream(self, other: object) -> None:
        """On the device: the host goes on."""

    def wait_event(self, event: object) -> None:
        """On the device: the host goes on."""

    def record_event(self, event: object = None) -> None:
        """On the device: the host goes on."""

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        """It was no context of its own."""


class _Event:
    """An event that has not come when it is asked for, as at the end of a long queue."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def record(self, stream: object = None) -> None:
        """On the device: the host goes on."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self._recorder.wait("event.synchronize")

    def wait(self, stream: object = None) -> None:
        """On the device: the host goes on."""


def as_cuda(recorder: Recorder) -> None:
    """Let DeepSpeed's accelerator of the CPU say of itself what CUDA's says, for this process."""
    accelerator = type(importlib.import_module("deepspeed.accelerator").get_accelerator())
    stream = _Stream(recorder)
    accelerator.is_synchronized_device = lambda _: False
    accelerator.resolves_data_dependency = lambda _: False
    accelerator.handles_memory_backpressure = lambda _: False
    accelerator.Stream = property(lambda _: lambda *a, **k: _Stream(recorder))
    accelerator.Event = property(lambda _: lambda *a, **k: _Event(recorder))
    accelerator.current_stream = lambda _, *device: stream
    accelerator.default_stream = lambda _, *device: stream
    accelerator.stream = lambda _, chosen: chosen or stream
    accelerator.synchronize = lambda _, *device: recorder.wait("device.synchronize")
    torch.Tensor.record_stream = lambda _, stream: None


def join_fake_group(ranks: int) -> Counter[str]:
    """Make this process rank 0 of a group that is not there; returns the count of exchanges."""
    importlib.import_module("torch.testing._internal.distributed.fake_pg")
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=ranks)
    exchanges: Counter[str] = Counter()
    real = dist.new_group

    def new_group(*args: object, **kwargs: Any) -> dist.ProcessGroup:
        return real(*args, **{**kwargs, "backend": None})

    def all_gather_object(values: list[object], mine: object, group: object = None) -> None:
        exchanges["objects"] += 1
        values[:] = [mine] * len(values)

    dist.new_group, dist.all_gather_object = new_group, all_gather_object
    return exchanges


class _Ready:
    """Micro-batches that are made already: what the loader reads, it reads in host memory."""

    def __init__(self, loader: Any, count: int) -> None:
        self.microsteps = loader.microsteps
        # Clones: a loader may give a batch's memory to the next one.
        self._batches = iter([next(loader).map(torch.clone) for _ in range(count)])

    def __next__(self) -> Any:
        return next(self._batches)


def record(case: Case, exchanges: Counter[str]) -> Recording:
    """A step of a run of `case`, its vote on stopping, and one row of metrics."""
    from mixflow_fast.config.loading import load_config
    from mixflow_fast.models import SiT
    from mixflow_fast.training.trainer import Trainer

    recorder = Recorder()
    SiT._check_inputs = lambda *_: None  # looks at the labels, on a CPU only
    importlib.import_module("mixflow_fast.training.engine").import_deepspeed()
    as_cuda(recorder)
    with tempfile.TemporaryDirectory() as folder:
        batch = 2 * case.ranks * case.microsteps
        own = [*NETWORK, f"train.global_batch_size={batch}", "train.microbatch_size=2"]
        own += ["train.images=1e9", "train.device=cpu", f"out={folder}/run", *case.settings]
        trainer = Trainer(load_config("photos", own), quiet=True)
        trained, frozen = [], []
        for p in trainer.model.parameters():  # ZeRO 3 empties them
            (trained if p.requires_grad else frozen).append(getattr(p, "ds_numel", p.numel()))
        with _phases(trainer.engine, recorder), trainer.loader() as loader:
            ready = _Ready(loader, (WARM_UP + 1) * case.microsteps)
            for _ in range(WARM_UP):
                trainer.train_step(ready)
            recorder.waits.clear()
            with recorder:
                trainer.train_step(ready)
                products, recorder.phase = recorder.products, "vote"
                trainer._stop.requested()
        exchanges.clear()
        with trainer._open_log([]) as log:
            _write_row(trainer, log)
        trainer.close()
    recorder.waits.pop("vote", None)  # its values are in host memory
    waits = {phase: dict(kinds) for phase, kinds in recorder.waits.items()}
    return Recording(trained, frozen, recorder.collectives, waits, exchanges["objects"], products)


def _write_row(trainer: Any, log: Any) -> None:
    """What the trainer does every log_every steps."""
    from mixflow_fast.training.duty import RunContext, Timetable
    from mixflow_fast.training.periodic import Logging

    context = RunContext(trainer.out, trainer.engine, trainer.host_group, trainer._throughput, log)
    when, batch = Timetable(1, trainer.config.steps, 0), trainer.config.train.global_batch_size
    Logging(context, when, trainer.guard, trainer._learning_rate, batch).run(trainer.step)


@contextlib.contextmanager
def _phases(engine: Any, recorder: Recorder) -> Iterator[None]:
    """Tell the recorder which part of the step runs."""

    def named(phase: str, call: Any) -> Any:
        def inner(*args: object, **kwargs: object) -> object:
            recorder.phase = phase
            try:
                return call(*args, **kwargs)
            finally:
                recorder.phase = "own"

        return inner

    own = type(engine)
    forward, backward, step = own.__call__, own.backward, own.step
    own.__call__, own.backward = named("forward", forward), named("backward", backward)
    own.step = named("step", step)
    try:
        yield
    finally:
        own.__call__, own.backward, own.step = forward, backward, step


def main(argv: Sequence[str] | None = None) -> int:
    """Record the cases of one number of ranks, each a JSON list [ranks, settings, microsteps]."""
    given = sys.argv[1:] if argv is None else argv
    cases = [Case(r, tuple(s), m) for r, s, m in map(json.loads, given)]
    torch.set_num_threads(1)
    exchanges = join_fake_group(cases[0].ranks)
    for case in cases:
        print(json.dumps({**asdict(case), **asdict(record(case, exchanges))}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(quiet_without_reader(main))
