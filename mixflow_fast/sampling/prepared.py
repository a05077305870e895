"""A network made ready to be sampled in one way, as often as one likes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixflow_fast.metrics.progress import Progress
from mixflow_fast.models import network as models
from mixflow_fast.sampling.draws import SdeNoise, draw_labels, sde_keys
from mixflow_fast.sampling.execution import Mode, Precision, choose_mode, network_for
from mixflow_fast.sampling.graphs import Capture, GraphLoop
from mixflow_fast.sampling.guidance import Guidance, Network, guided_velocity
from mixflow_fast.sampling.remedies import Remedy
from mixflow_fast.sampling.sampler import Sampler
from mixflow_fast.sampling.solvers import PlannedVelocity
from mixflow_fast.sampling.source import SampleSource, sampling_noise


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """Generated samples.

    Attributes:
        x: (B, C, H, W) float32 on the CPU.
        labels: (B,) int64 on the CPU, None for a network without classes.
        nfe: velocity evaluations that one sample took (guidance evaluates two network rows per
            velocity); for the adaptive solver the largest number over the batches.
    """

    x: Tensor
    labels: Tensor | None
    nfe: int


@dataclass(frozen=True)
class StartingBatch:
    """Samples before their first step, on the device; all batches have one size.

    Attributes:
        x0: (B, C, H, W) float32 states at t = 0.
        ids: (B,) int64.
        y: (B,) int64 labels; None for a network without classes.
        wanted: how many of the rows were asked for; those after them fill up the last batch.
    """

    x0: Tensor
    ids: Tensor
    y: Tensor | None
    wanted: int


def _config_value(model: Network, name: str) -> int | tuple[int, int] | None:
    """A field of `model.config`, which may be a dictionary; None where it is not there."""
    config = getattr(model, "config", None)
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _sample_shape(model: Network, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    if shape is None and isinstance(model, models.Network):
        shape = (model.in_channels, model.input_size, model.input_size)
    if shape is None:
        channels, size = _config_value(model, "in_channels"), _config_value(model, "input_size")
        if channels is None or size is None:
            raise ValueError(
                "shape=(C, H, W) must be given: model.config has no in_channels and input_size"
            )
        height, width = (size, size) if isinstance(size, int) else size
        shape = (channels, height, width)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape must be (C, H, W), all >= 1, got {tuple(shape)}")
    return tuple(shape)


def _check_path(
    model: Network, sampler: Sampler, remedy: Remedy | None, guide: Network | None
) -> None:
    """Refuse formulas, and a guide, of another path than the network's, where that is known."""
    own = getattr(model, "path", None)
    if own is None:
        return
    theirs = getattr(guide, "path", None)
    if theirs not in (None, own):
        raise ValueError(
            f"the guide was trained on the path {theirs!r}, the network on {own!r}: their "
            "velocities at one state and time belong to different distributions, give another guide"
        )
    if sampler.path_matters and sampler.path != own:
        raise ValueError(
            f"{sampler.method} for the path {sampler.path!r}, but the network was trained on "
            f"{own!r}: use Sampler(..., path={own!r}), or a method such as 'heun' that does not ask"
        )
    if remedy is not None and remedy.linear_path and own != "linear":
        raise ValueError(
            f"the remedy {remedy.name} is written for the linear path, and the network was trained "
            f"on {own!r}"
        )


class PreparedSampling:
    """A network with everything decided but which samples are drawn.

    What is compiled, cast and captured is kept between calls: the weights must keep their places (a
    step of an optimizer in place is fine), and in bf16 they are those of the moment of preparation.

    Args:
        model, sampler, guidance, guide, remedy, batch_size, shape, device, mode, precision, source:
            as `mixflow_fast.sampling.sample` takes them.
        calls: of the network that are to come in all, for mode "auto".
        capture: what makes a graph of a step, in place of a CUDA graph; for mode "graph".

    Attributes:
        mode: "eager", "compile" or "graph".
        batch_size: samples in every batch, those that fill up the last one included.

    Raises:
        ValueError: as `mixflow_fast.sampling.sample`.
    """

    def __init__(
        self,
        model: Network,
        sampler: Sampler,
        guidance: Guidance,
        *,
        guide: Network | None = None,
        remedy: Remedy | None = None,
        batch_size: int = 64,
        shape: tuple[int, int, int] | None = None,
        device: torch.device | str | None = None,
        mode: Mode = "eager",
        precision: Precision | None = None,
        calls: int | None = None,
        capture: Capture | None = None,
        source: SampleSource | None = None,
    ) -> None:
        _check_path(model, sampler, remedy, guide)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer >= 1, got {batch_size!r}")
        self._sampler, self._guidance, self._remedy = sampler, guidance, remedy
        self.batch_size, self._capture = batch_size, capture
        self._shape = _sample_shape(model, shape)
        self._num_classes = _config_value(model, "num_classes")
        self._source = source
        self._device = _device_of(model) if device is None else torch.device(device)
        if capture is None:
            mode = choose_mode(mode, model, self._device, calls)
        self.mode, self._plan = mode, sampler.plan()
        if mode == "graph" and self._plan is None:
            raise ValueError(
                f"mode='graph' needs a method whose steps are known beforehand, got "
                f"{sampler.method}: use mode='compile', or another method"
            )
        compiled = mode in ("compile", "graph") and capture is None
        self._model = network_for(model, compiled, precision)
        self._guide = None if guide is None else network_for(guide, compiled, precision)
        self._loop: GraphLoop | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights."""
        if isinstance(self._model, models.Network):
            return self._model.product_dtype
        return next((p.dtype for p in self._model.parameters()), torch.float32)

    def describe(self) -> str:
        """How the network is run."""
        how = {
            "eager": "eager" if not self._runs_compiled else "as it is compiled",
            "compile": "compiled blocks",
            "graph": "a CUDA graph for each kind of step, compiled blocks in it",
        }[self.mode]
        return f"{str(self.dtype).removeprefix('torch.')}, {how}; float32 state"

    @property
    def _runs_compiled(self) -> bool:
        return isinstance(self._model, models.Network) and self._model.execution.compiles

    def with_sampler(self, sampler: Sampler) -> PreparedSampling:
        """Another sampler on the same prepared networks, in an eager loop."""
        return PreparedSampling(
            self._model,
            sampler,
            self._guidance,
            guide=self._guide,
            remedy=self._remedy,
            batch_size=self.batch_size,
            shape=self._shape,
            device=self._device,
            source=self._source,
        )

    def draw(
        self,
        ids: Tensor,
        labels: Tensor | None = None,
        *,
        seed: int = 0,
        balanced: bool = False,
        progress: bool = False,
    ) -> SampleResult:
        """The samples of ids (B,) int64 >= 0; other arguments as `mixflow_fast.sampling.sample`."""
        total = ids.shape[0]
        keys = sde_keys(seed, self._sampler.steps) if self._sampler.stochastic else None
        # Allocated outside inference mode: the caller may differentiate through what comes back.
        x = torch.empty(total, *self._shape, dtype=torch.float32, device="cpu")
        drawn: list[Tensor] = []
        nfe = done = 0
        counted = Progress(total, "sampling", "samples", quiet=not progress)
        with self.evaluating(), counted:
            for batch in self.batches(ids, labels, seed=seed, balanced=balanced):
                out, evaluations = self._run(batch.x0, batch.ids, batch.y, keys)
                nfe = max(nfe, evaluations)
                x[done : done + batch.wanted] = out[: batch.wanted].to("cpu", torch.float32)
                drawn += [] if batch.y is None else [batch.y[: batch.wanted].cpu()]
                done += batch.wanted
                counted.advance(batch.wanted)
        return SampleResult(x=x, labels=self._joined(drawn), nfe=nfe)

    def batches(
        self, ids: Tensor, labels: Tensor | None = None, *, seed: int = 0, balanced: bool = False
    ) -> Iterator[StartingBatch]:
        """Where the samples of ids begin, in batches of one size; arguments as `draw`.

        To be iterated over inside of `evaluating`.
        """
        total, size = ids.shape[0], self.batch_size
        last = int(ids[-1]) if total else 0
        # Batches of one size: kernels may sum in another order for another number of rows, and a
        # graph has one size anyway.
        padded = torch.cat([ids, last + 1 + torch.arange(-total % size, device="cpu")])
        y = _padded_labels(labels, self._num_classes, padded, total, seed, balanced)
        classes = self._source_classes(y, padded, seed, balanced)
        w = None if self._source is None else self._source.w
        for start in range(0, total, size):
            chunk = slice(start, start + size)
            own = padded[chunk].to(self._device)
            x0 = sampling_noise(
                None if self._source is None else self._source.source,
                seed,
                own,
                self._shape,
                None if classes is None else classes[chunk],
                w,
            )
            batch_y = None if y is None else y[chunk].to(self._device)
            yield StartingBatch(x0, own, batch_y, min(size, total - start))

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode of the networks and inference mode inside; both as before afterwards."""
        others = [self._guide, None if self._source is None else self._source.source.predictor]
        return _evaluating(self._model, *[other for other in others if other is not None])

    def velocity(self, y: Tensor | None) -> PlannedVelocity:
        """The guided velocity of samples with labels y, (B,) int64 on the device, or without."""
        return guided_velocity(self._model, y, self._guidance, self._guide, self._remedy)

    def _joined(self, drawn: list[Tensor]) -> Tensor | None:
        """Labels of all batches; None for a network without classes."""
        if drawn:
            return torch.cat(drawn)
        return torch.empty(0, dtype=torch.int64) if self._num_classes else None

    def _source_classes(
        self, y: Tensor | None, padded_ids: Tensor, seed: int, balanced: bool
    ) -> Tensor | None:
        """True classes for the source, (B,) int64 on the CPU; None where it does not see them.

        The null class hides the label from the network alone, in training and here: its samples
        begin at the source of a class that is drawn as a label.
        """
        if self._source is None or not self._source.source.needs_labels:
            return None
        num_classes = self._num_classes
        if not num_classes:
            num_classes = _config_value(self._source.source.predictor, "num_classes")
        if not num_classes:
            return y
        drawn = draw_labels(seed, padded_ids, num_classes, balanced)
        return drawn if y is None else torch.where(y == num_classes, drawn, y)

    def _run(
        self, x: Tensor, ids: Tensor, y: Tensor | None, keys: Tensor | None
    ) -> tuple[Tensor, int]:
        """(the samples of a whole batch, velocity evaluations)."""
        if self.mode != "graph":
            noise = None if keys is None else SdeNoise(keys, ids, self._shape)
            return self._sampler.run(self.velocity(y), x, noise)
        if self._loop is None:
            self._loop = GraphLoop(
                self._plan,
                self._sampler.memory,
                lambda labels: self._sampler.told(self.velocity(labels)),
                tuple(x.shape),
                y is not None,
                self._guidance.scale,
                self._device,
                self._capture,
            )
        evaluations = sum(len(step.times) for step in self._plan)
        steps = len(self._plan)
        return self._loop.run(x, ids, y, None if keys is None else keys[:steps]), evaluations


@contextmanager
def _evaluating(*models: Network) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule has the training flag that it had."""
    networks = [model for model in models if isinstance(model, nn.Module)]
    modules = [module for network in networks for module in network.modules()]
    flags = [module.training for module in modules]
    try:
        for network in networks:
            network.eval()
        with torch.inference_mode():
            yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


def _device_of(model: Network) -> torch.device:
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if first is None else first.device


def _padded_labels(
    labels: Tensor | None,
    num_classes: int | None,
    padded_ids: Tensor,
    total: int,
    seed: int,
    balanced: bool,
) -> Tensor | None:
    """Labels of `total` samples and of those that fill up the last batch; None without classes."""
    if labels is None:
        return draw_labels(seed, padded_ids, num_classes, balanced) if num_classes else None
    labels = labels.to("cpu", torch.int64)
    if total and num_classes and not 0 <= int(labels.min()) <= int(labels.max()) <= num_classes:
        raise ValueError(
            f"labels must lie in [0, {num_classes}] ({num_classes} = the null class), "
            f"got {int(labels.min())} .. {int(labels.max())}"
        )
    return torch.cat([labels, labels[-1:].expand(len(padded_ids) - total)])
