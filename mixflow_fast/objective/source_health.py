"""Health of a mixed source: how far what it gives is from N(0, I), where samplers start.

    kl_per_dim          mean of KL / D of the unmixed source
    sigma               mean of exp(log_var / 2)
    mean_rms            RMS of the mean
    aggregate_mean      RMS over channels of the mean of x0, over batch and places
    aggregate_var       mean over channels of the variance of x0, over batch and places
    distance_to_normal  mean over channels of W2^2(N(mean, var), N(0, 1)) = mean^2 + (std - 1)^2
    mse_low_w, mse_high_w   velocity losses where w < 0.1 and where w > 0.9

The sampler starts from N(0, I) while the network was trained on the aggregate of all x0 of the
mixture: the last but one says how far that is away. At weak KL the aggregate shrinks (w = 1) or
overshoots (mixing): a variance far from 1 is the sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_fast.objective.mixflow import Interpolation

LOW_W = 0.1
HIGH_W = 0.9


def source_health(it: Interpolation, samples: Tensor | None = None) -> dict[str, Tensor]:
    """The numbers above for a batch: float32 scalars on its device, which is not waited for.

    Args:
        it: what `MixFlow.prepare` returned.
        samples: (B,) losses of the samples of `MixFlow.loss_and_samples` (unweighted), from which
            the KL is taken off again; without them there are no `mse_*`. A batch without such a w
            has NaN there.

    Returns:
        by name; empty where the source is N(0, I).

    Raises:
        ValueError: samples of another batch.
    """
    if it.source is None:
        return {}
    draw = it.source
    with torch.no_grad():
        x0 = it.x0().transpose(0, 1).flatten(1).float()
        mean, std = x0.mean(dim=1), x0.std(dim=1, correction=0)
        numel = draw.mean.shape[1:].numel()
        health = {
            "kl_per_dim": draw.kl.mean() / numel,
            "sigma": torch.exp(draw.log_var / 2).mean(),
            "mean_rms": draw.mean.square().mean().sqrt(),
            "aggregate_mean": mean.square().mean().sqrt(),
            "aggregate_var": std.square().mean(),
            "distance_to_normal": (mean.square() + (std - 1).square()).mean(),
        }
        if samples is not None:
            if samples.shape != draw.w.shape:
                raise ValueError(
                    f"samples must be the (B,) = {tuple(draw.w.shape)} losses of this batch, got "
                    f"{tuple(samples.shape)}"
                )
            mse = samples.detach() - draw.kl_weight * draw.kl
            for name, bin_ in (("mse_low_w", draw.w < LOW_W), ("mse_high_w", draw.w > HIGH_W)):
                # By a sum and not by an index, which would wait for the device.
                health[name] = torch.where(bin_, mse, 0).sum() / bin_.sum()
        return {name: value.float() for name, value in health.items()}
