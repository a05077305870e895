"""Sampling: fixed-grid and adaptive ODE solvers, guidance, reproducible sample sets.

The engine's clock runs here: t = 0 is noise, t = 1 is data, and a velocity is dx/dt in that clock.
Networks that were trained in the opposite clock (REPA, RAE, SD3) are adapted by `model_velocity`.

A sample is a pure function of (seed, id): its noise and its label come from counter-based streams,
so sample 17 is the same image whether 18 or 50,000 are asked for.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixflow_fast.flow.clock import DATA_AT_1, check_clock
from mixflow_fast.flow.timesteps import shift_time
from mixflow_fast.kernels.philox import Stream, normal, random_words

Velocity = Callable[[Tensor, Tensor], Tensor]

METHODS = ("euler", "heun", "dopri5")
DOPRI5_ATOL, DOPRI5_RTOL = 1e-6, 1e-3  # SiT's defaults


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """Generated samples.

    x: (B, C, H, W) float32 on the CPU. labels: (B,) int64 on the CPU, None for a network without
    classes. nfe: velocity evaluations that one sample took (guidance evaluates two network rows per
    velocity); for the adaptive solver the largest number over the batches.
    """

    x: Tensor
    labels: Tensor | None
    nfe: int


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """The times of `steps` intervals, noise to data, with RAE's time shift k = `shift` applied.

    t -> t / (k - (k - 1) t), which is s -> k s / (1 + (k - 1) s) in the opposite clock s = 1 - t:
    k > 1 spends more of the steps near the noise. Official RAE stops at s = shift(0.001); this grid
    ends at the data, t = 1.

    Returns:
        (steps + 1,) float32, from exactly 0 to exactly 1, increasing.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}")
    if not (math.isfinite(shift) and shift >= 1.0):
        raise ValueError(
            f"shift must be >= 1 (1 = no shift, RAE uses sqrt(latent size / 4096)), got {shift!r}"
        )
    t = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
    return shift_time(t, shift, DATA_AT_1).to(torch.float32)


def integrate(velocity: Velocity, x: Tensor, times: Tensor, method: str) -> tuple[Tensor, int]:
    """Integrate dx/dt = velocity(x, t) along `times`.

    "euler":  x += h v(x, t)                                                    N evaluations
    "heun":   k = v(x, t); x += h/2 (k + v(x + h k, t + h)), every interval    2N evaluations
              (the explicit trapezoid; torchdiffeq and SiT call it heun2)
    "dopri5": adaptive Dormand-Prince 5(4) of torchdiffeq, atol 1e-6, rtol 1e-3. The step size is
              controlled over the whole batch, so samples of one batch are coupled within it.

    N is the number of intervals. SiT's and RAE's `num_steps` counts grid points: their num_steps=10
    is our 9 intervals.

    Args:
        velocity: (x, t) -> dx/dt of x's shape; t is (B,) float32 in the engine's clock.
        x: (B, ...) state at times[0]; kept in float32, or in float64 when it comes in float64.
        times: (N + 1,) strictly increasing floats.
        method: one of METHODS.

    Returns:
        the state at times[-1], and the number of velocity evaluations.

    Raises:
        ValueError: bad times, unknown method, velocity of another shape, torchdiffeq missing.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not x.is_floating_point() or x.dim() < 1:
        raise ValueError(f"x must be a (B, ...) float tensor, got {tuple(x.shape)} {x.dtype}")
    if times.dim() != 1 or times.numel() < 2 or not times.is_floating_point():
        raise ValueError(
            "times must be a 1-D float tensor of at least two points (N intervals need N + 1), got "
            f"shape {tuple(times.shape)} and dtype {times.dtype}"
        )
    grid = times.tolist()
    # Written so that a NaN fails it too.
    if not all(b > a for a, b in zip(grid, grid[1:], strict=False)):
        raise ValueError(f"times must increase strictly (0 = noise, 1 = data), got {grid}")

    x = x if x.dtype == torch.float64 else x.to(torch.float32)
    nfe = 0

    def evaluate(state: Tensor, t: float | Tensor) -> Tensor:
        nonlocal nfe
        nfe += 1
        label = torch.empty(state.shape[0], dtype=torch.float32, device=state.device).fill_(t)
        v = velocity(state, label)
        if v.shape != state.shape:
            raise ValueError(
                f"velocity must have the shape of x, {tuple(state.shape)}, got {tuple(v.shape)}"
            )
        return v.to(state.dtype)

    if method == "dopri5":
        return _dopri5(evaluate, x, times), nfe
    for t, t_next in zip(grid, grid[1:], strict=False):
        h = t_next - t
        v = evaluate(x, t)
        if method == "heun":
            v = (v + evaluate(x + h * v, t_next)) / 2
        x = x + h * v
    return x, nfe


def _dopri5(evaluate: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor) -> Tensor:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ValueError(
            "method 'dopri5' needs torchdiffeq: pip install \"mixflow_fast[eval]\", "
            "or use method 'heun'"
        ) from error
    # Interior points change only where the solver reports, so the two ends are enough.
    ends = times[[0, -1]].to(x)
    path = odeint(
        lambda t, state: evaluate(state, t),
        x,
        ends,
        method="dopri5",
        atol=DOPRI5_ATOL,
        rtol=DOPRI5_RTOL,
    )
    return path[-1]


def _null_class(model: Any) -> int:
    null = getattr(model, "null_class", None)
    if null is None:
        raise ValueError(
            "cfg_scale other than 1 needs a network with a null class (trained with label "
            "dropout); this one has none: use cfg_scale=1"
        )
    return int(null)


def model_velocity(
    model: Any,
    y: Tensor | None,
    cfg_scale: float = 1.0,
    cfg_channels: int | str | None = "auto",
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """The velocity in the engine's clock of a network that runs in its own.

    A "noise_at_1" network (REPA, RAE, SD3) sees the label 1 - t, and its output is negated. A
    network that returns a tuple (REPA: velocity, projections) gives its first item.

    Classifier-free guidance: v = u + cfg_scale (c - u), u with the null class, both in one forward
    of 2B rows. The official SiT guides the first three channels only and the others keep c; REPA
    and RAE guide all. "auto" follows the network's own `cfg_channels`. Guidance is applied where
    lo <= t <= hi of `guidance_interval`, and where no sample is inside, the second half is not
    computed. REPA's published guidance_high = 0.7 counts from the data end: (0.3, 1.0) here. Heun's
    second velocity is guided by its own time (REPA's corrector tests the time of the first).

    Args:
        model: called as model(x, t, y), or model(x, t) when y is None; has `clock`
            ("data_at_1" | "noise_at_1") and, for guidance, `null_class` (int).
        y: (B,) int64 labels, or None for a network without classes.
        cfg_scale: 1 = no guidance, no second forward.
        cfg_channels: number of leading channels to guide; None = all; "auto" = the network's
            attribute `cfg_channels`, all without one.
        guidance_interval: (lo, hi) in the engine's clock.

    Returns:
        velocity(x, t): x (B, C, ...), t (B,) float32 -> (B, C, ...) in x's dtype.

    Raises:
        ValueError: unknown clock, a prediction that is not a velocity, no null class, no labels,
            channels or interval out of range.
    """
    clock = check_clock(getattr(model, "clock", None))
    prediction = getattr(model, "prediction", "velocity")
    if prediction != "velocity":
        raise ValueError(f"model.prediction must be 'velocity' to be sampled, got {prediction!r}")
    if not math.isfinite(cfg_scale):
        raise ValueError(f"cfg_scale must be finite, got {cfg_scale}")
    low, high = guidance_interval
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(
            "guidance_interval must be (low, high) with 0 <= low <= high <= 1, 0 = noise, "
            f"got {guidance_interval}"
        )
    if cfg_channels == "auto":
        cfg_channels = getattr(model, "cfg_channels", None)
    if isinstance(cfg_channels, str) or (cfg_channels is not None and cfg_channels < 1):
        raise ValueError(
            f'cfg_channels must be >= 1, None for all channels or "auto", got {cfg_channels!r}'
        )
    guided = cfg_scale != 1.0
    if guided:
        null = _null_class(model)
        if y is None:
            raise ValueError("cfg_scale other than 1 needs labels y, got None")
    everywhere = low == 0.0 and high == 1.0
    network = getattr(model, "velocity", model)  # REPA's SiT: without its projectors

    def call(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        own_t = t if clock == DATA_AT_1 else 1.0 - t
        out = network(x, own_t) if labels is None else network(x, own_t, labels)
        out = out[0] if isinstance(out, tuple) else out
        return (out if clock == DATA_AT_1 else -out).to(x.dtype)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if not guided:
            return call(x, t, y)
        if cfg_channels is not None and cfg_channels > x.shape[1]:
            raise ValueError(
                f"cfg_channels must be at most the {x.shape[1]} channels of x, got {cfg_channels}"
            )
        inside = (t >= low) & (t <= high)
        if not everywhere and not bool(inside.any()):
            return call(x, t, y)
        labels = torch.cat([y, torch.full_like(y, null)])
        both = call(torch.cat([x, x]), torch.cat([t, t]), labels)
        cond, uncond = both.chunk(2)
        out = uncond + cfg_scale * (cond - uncond)
        if cfg_channels is not None and cfg_channels < x.shape[1]:
            out = torch.cat([out[:, :cfg_channels], cond[:, cfg_channels:]], dim=1)
        if everywhere:
            return out
        return torch.where(inside.view(-1, *[1] * (x.dim() - 1)), out, cond)

    return velocity


def _config_value(model: Any, name: str) -> Any:
    config = getattr(model, "config", None)
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _sample_shape(model: Any, shape: tuple[int, ...] | None) -> tuple[int, ...]:
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


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule has the training flag that it had."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [module.training for module in modules]
    try:
        for module in modules[:1]:
            module.eval()
        with torch.inference_mode():
            yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


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
    model: Any,
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
        steps: intervals of the grid (SiT's num_steps - 1); "dopri5" uses only its ends.
        method, shift: see `integrate` and `time_grid`.
        cfg_scale, cfg_channels, guidance_interval: see `model_velocity`.
        ids: (B,) int64 >= 0.
        balanced: drawn labels are id % num_classes.
        batch_size: rows per forward (twice that under guidance).
        shape: (C, H, W) of one sample.
        device: where to run; default: where the network's first parameter is.
        progress: a progress bar, on a terminal only.

    Raises:
        ValueError: counts that disagree, labels outside [0, num_classes], unknown shape, and what
            the functions named above raise.
    """
    ids = _check_ids(ids, labels, num)
    shape = _sample_shape(model, shape)
    times = time_grid(steps, shift)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer >= 1, got {batch_size!r}")
    if device is None:
        first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        device = torch.device("cpu") if first is None else first.device

    total, num_classes = ids.shape[0], _config_value(model, "num_classes")
    filler = -total % batch_size
    last = int(ids[-1]) if total else 0
    padded = torch.cat([ids, last + 1 + torch.arange(filler, device="cpu")])
    if labels is not None:
        labels = labels.to("cpu", torch.int64)
        if total and num_classes and not 0 <= int(labels.min()) <= int(labels.max()) <= num_classes:
            raise ValueError(
                f"labels must lie in [0, {num_classes}] ({num_classes} = the null class), "
                f"got {int(labels.min())} .. {int(labels.max())}"
            )
        padded_labels = torch.cat([labels, labels[-1:].expand(filler)])
    elif num_classes:
        padded_labels = draw_labels(seed, padded, num_classes, balanced)
    else:
        padded_labels = None

    # Allocated outside inference mode: the caller may differentiate through what comes back.
    x = torch.empty(total, *shape, dtype=torch.float32, device="cpu")
    nfe = 0
    with _evaluating(model):
        starts = range(0, total, batch_size)
        for start in _with_progress(starts, progress):
            chunk = slice(start, start + batch_size)
            y = None if padded_labels is None else padded_labels[chunk].to(device)
            noise = normal(seed, Stream.SAMPLE_NOISE, padded[chunk].to(device), math.prod(shape))
            velocity = model_velocity(model, y, cfg_scale, cfg_channels, guidance_interval)
            out, evaluations = integrate(velocity, noise.view(-1, *shape), times, method)
            nfe = max(nfe, evaluations)
            x[chunk] = out[: total - start].to("cpu", torch.float32)
    drawn = None if padded_labels is None else padded_labels[:total].clone()
    return SampleResult(x=x, labels=drawn, nfe=nfe)


def _with_progress(starts: range, progress: bool) -> Any:
    if not (progress and sys.stderr.isatty()):
        return starts
    from tqdm import tqdm

    return tqdm(starts, desc="sampling", unit="batch", leave=False)
