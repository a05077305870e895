"""Reproducible sample sets: noise and labels by id, batches, the network in evaluation mode.

A sample is a pure function of (seed, id): its noise and its label come from counter-based streams,
so sample 17 is the same image whether 18 or 50,000 are asked for. So does the noise that a
stochastic sampler adds on its way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_fast.sampling.draws import draw_labels, sde_noise
from mixflow_fast.sampling.execution import Mode, Precision
from mixflow_fast.sampling.guidance import Guidance, Network
from mixflow_fast.sampling.prepared import PreparedSampling, SampleResult
from mixflow_fast.sampling.remedies import Remedy
from mixflow_fast.sampling.sampler import Sampler
from mixflow_fast.sampling.source import SampleSource

__all__ = ["SampleResult", "draw_labels", "sample", "sde_noise"]


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
    mode: Mode = "eager",
    precision: Precision | None = None,
    source: SampleSource | None = None,
) -> SampleResult:
    """Draw samples: a pure function of the network, the settings, `seed` and `ids`.

    The starting noise of id i is normal(seed, Stream.SAMPLE_NOISE, i), or what a mixed source makes
    of it (`mixflow_fast.sampling.source.sampling_noise`). The last batch is filled up
    with the ids that follow, so a sample's bits do not depend on how many are asked for; between
    batch sizes they agree to rounding (for "dopri5" and "rk45", whose step control spans the batch,
    to the solver's tolerance). The network is put in evaluation mode and gets its training flags
    back; no global random state is read or changed.

    Args:
        model: network as in `model_velocity`; `model.config` gives in_channels, input_size and
            num_classes where they are not given here.
        labels: (B,) int64 classes; None draws them as `draw_labels` does, or passes none to a
            network without num_classes.
        num: number of samples, when neither labels nor ids say it; ids default to 0 .. num - 1.
        steps, method, shift: a `Sampler` of these; steps are intervals of the grid (SiT's
            num_steps - 1), of which "dopri5" and "rk45" use only the ends.
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
        mode: "eager" (the network as it is run now), "compile" (its blocks through torch.compile),
            "graph" (the same, and each step one CUDA graph; fixed-step methods on a GPU), or
            "auto", see `mixflow_fast.sampling.execution.choose_mode`. It changes rounding only.
            For several calls make a `PreparedSampling` once: it keeps what is compiled and
            captured.
        precision: of the network's weights and activations, "fp32" or "bf16"; None: as they are.
            State, guidance and update are float32 in any case, and times are exact.
        source: `sample_source(...)` of the mixed source that the network was trained with; None
            begins at N(0, I).

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
    ids = _check_ids(ids, labels, num)
    calls = sampler.nfe
    if calls is not None and isinstance(batch_size, int) and batch_size > 0:
        calls *= -(-len(ids) // batch_size)
    prepared = PreparedSampling(
        model,
        sampler,
        guidance,
        guide=guide,
        remedy=remedy,
        batch_size=batch_size,
        shape=shape,
        device=device,
        mode=mode,
        precision=precision,
        calls=calls,
        source=source,
    )
    return prepared.draw(ids, labels, seed=seed, balanced=balanced, progress=progress)
