"""Reproducible sample sets: noise and labels by id, batches, the network in evaluation mode.

A sample is a pure function of (seed, id): its noise and its label come from counter-based streams,
so sample 17 is the same image whether 18 or 50,000 are asked for. So does the noise that a
stochastic sampler adds on its way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mixflow_fast.kernels.philox import Stream, normal, random_words
from mixflow_fast.metrics.progress import Progress
from mixflow_fast.sampling.guidance import Guidance, Network, guided_velocity
from mixflow_fast.sampling.remedies import Remedy
from mixflow_fast.sampling.sampler import Sampler


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


def _config_value(model: Network, name: str) -> int | tuple[int, int] | None:
    """A field of `model.config`, which may be a dictionary; None where it is not there."""
    config = getattr(model, "config", None)
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _sample_shape(model: Network, shape: tuple[int, ...] | None) -> tuple[int, ...]:
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


def draw_labels(seed: int, ids: Tensor, num_classes: int, balanced: bool = False) -> Tensor:
    """Class labels of the samples `ids`: (B,) int64 in [0, num_classes).

    Uniform from (seed, Stream.SAMPLE_LABEL, id), or id % num_classes when `balanced` (every class
    equally often: the protocol of 50 images per class).
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be >= 1, got {num_classes}")
    if balanced:
        return ids % num_classes
    # Integers all the way: a float product may round up to num_classes.
    return (random_words(seed, Stream.SAMPLE_LABEL, ids)[:, 0] * num_classes) >> 32


def sde_noise(seed: int, ids: Tensor, step: int, shape: tuple[int, ...]) -> Tensor:
    """Noise of a stochastic sampler's interval `step`: (B, *shape) float32, from (seed, id, step).

    The interval's own key comes from Stream.SAMPLE_SDE at the position `step`.
    """
    low, high = random_words(seed, Stream.SAMPLE_SDE, torch.tensor([step]), 2)[0].tolist()
    own_seed = low | high << 32
    return normal(own_seed, Stream.SAMPLE_SDE, ids, math.prod(shape)).view(-1, *shape)


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


def _check_ids(ids: Tensor | None, labels: Tensor | None, num: int | None) -> Tensor:
    counts = {"ids": ids, "labels": labels}
    sizes = {name: value.shape[0] for name, value in counts.items() if value is not None}
    for name, value in counts.items():
        if value is not None and (
            value.dim() != 1 or value.dtype not in (torch.int32, torch.int64)
        ):
            raise ValueError(
                f"{name} must be a 1-D int64 tensor, one per sample, got shape "
                f"{tuple(value.shape)} and dtype {value.dtype}"
            )
    if num is not None:
        sizes["num"] = num
    if not sizes:
        raise ValueError("give num, labels or ids: how many samples to draw is not known")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"num, labels and ids must agree on the number of samples, got {sizes}")
    total = next(iter(sizes.values()))
    if total < 0:
        raise ValueError(f"num must be >= 0, got {total}")
    ids = torch.arange(total, device="cpu") if ids is None else ids.to("cpu", torch.int64)
    if total and int(ids.min()) < 0:
        raise ValueError(f"ids must be >= 0, got {int(ids.min())}")
    return ids


def sample(
    model: Network,
    *,
    labels: Tensor | None = None,
    num: int | None = None,
    steps: int = 50,
    method: str = "euler",
    cfg_scale: float = 1.0,
    cfg_channels: int | str | None = "auto",
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    shift: float = 1.0,
    seed: int = 0,
    ids: Tensor | None = None,
    balanced: bool = False,
    batch_size: int = 64,
    shape: tuple[int, int, int] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    guide: Network | None = None,
    remedy: Remedy | None = None,
) -> SampleResult:
    """Draw samples: a pure function of the network, the settings, `seed` and `ids`.

    The starting noise of id i is normal(seed, Stream.SAMPLE_NOISE, i). The last batch is filled up
    with the ids that follow, so a sample's bits do not depend on how many are asked for; between
    batch sizes (and for "dopri5", whose step control spans the batch) they agree to rounding
    (to the solver's tolerance). The network is put in evaluation mode and gets its training flags
    back; no global random state is read or changed.

    Args:
        model: network as in `model_velocity`; `model.config` gives in_channels, input_size and
            num_classes where they are not given here.
        labels: (B,) int64 classes; None draws them as `draw_labels` does, or passes none to a
            network without num_classes.
        num: number of samples, when neither labels nor ids say it; ids default to 0 .. num - 1.
        steps, method, shift: a `Sampler` of these; steps are intervals of the grid (SiT's
            num_steps - 1), of which "dopri5" uses only the ends.
        cfg_scale, cfg_channels, guidance_interval: a `Guidance` of these.
        ids: (B,) int64 >= 0.
        balanced: drawn labels are id % num_classes.
        batch_size: rows per forward (twice that under guidance).
        shape: (C, H, W) of one sample.
        device: where to run; default: where the network's first parameter is.
        progress: say on stderr how far it is.
        sampler: instead of steps, method and shift.
        guidance: instead of cfg_scale, cfg_channels and guidance_interval.
        guide: the other network of Guidance(kind="autoguidance").
        remedy: one of `mixflow_fast.sampling.remedies`.

    Raises:
        ValueError: both a sampler or guidance and what it stands for; a sampler, remedy or
            guide for another path than `model.path`; counts that disagree; labels outside
            [0, num_classes]; unknown shape; what the functions named above raise.
    """
    if sampler is None:
        sampler = Sampler(method, steps, shift)
    elif (steps, method, shift) != (50, "euler", 1.0):
        raise ValueError("give a sampler, or steps, method and shift, but not both")
    if guidance is None:
        guidance = Guidance(cfg_scale, cfg_channels, guidance_interval)
    elif (cfg_scale, cfg_channels, guidance_interval) != (1.0, "auto", (0.0, 1.0)):
        raise ValueError("give guidance, or cfg_scale and what belongs to it, but not both")
    _check_path(model, sampler, remedy, guide)
    ids = _check_ids(ids, labels, num)
    shape = _sample_shape(model, shape)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer >= 1, got {batch_size!r}")
    device = _device_of(model) if device is None else device
    total, num_classes = ids.shape[0], _config_value(model, "num_classes")
    last = int(ids[-1]) if total else 0
    # Batches of one size: kernels may sum in another order for another number of rows.
    padded = torch.cat([ids, last + 1 + torch.arange(-total % batch_size, device="cpu")])
    padded_labels = _padded_labels(labels, num_classes, padded, total, seed, balanced)

    # Allocated outside inference mode: the caller may differentiate through what comes back.
    x = torch.empty(total, *shape, dtype=torch.float32, device="cpu")
    nfe = 0
    counted = Progress(total, "sampling", "samples", quiet=not progress)
    with _evaluating(model, *([] if guide is None else [guide])), counted:
        for start in range(0, total, batch_size):
            chunk = slice(start, start + batch_size)
            y = None if padded_labels is None else padded_labels[chunk].to(device)
            own = padded[chunk].to(device)
            noise = normal(seed, Stream.SAMPLE_NOISE, own, math.prod(shape)).view(-1, *shape)
            velocity = guided_velocity(model, y, guidance, guide, remedy)
            on_the_way = partial(sde_noise, seed, own, shape=shape)
            out, evaluations = sampler.run(velocity, noise, on_the_way)
            nfe = max(nfe, evaluations)
            x[chunk] = out[: total - start].to("cpu", torch.float32)
            counted.advance(min(batch_size, total - start))
    drawn = None if padded_labels is None else padded_labels[:total].clone()
    return SampleResult(x=x, labels=drawn, nfe=nfe)
