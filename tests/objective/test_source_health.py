"""Health of a mixed source: numbers of known Gaussians, and no waiting for the device."""

import dataclasses
import math

import pytest
import torch

from mixflow_fast import MixFlow
from mixflow_fast.flow.source import MixedSource
from mixflow_fast.objective import Interpolation
from mixflow_fast.objective.source_health import source_health


def prepared(
    mean: float, log_var: float, n: int = 4096, **options
) -> tuple[MixFlow, Interpolation]:
    x1 = torch.zeros(n, 2, 2, 2)
    # The two channels have means of opposite signs, whose mean is no sign of health.
    means = torch.tensor([mean, -mean]).view(1, 2, 1, 1).expand_as(x1)
    source = MixedSource(
        lambda x1: (means, torch.full_like(x1, log_var)), **{"lam": 0.5, **options}
    )
    mix = MixFlow(gamma=0, timesteps="uniform", clock="data_at_1", source=source)
    return mix, mix.prepare(x1, torch.arange(n))


@pytest.mark.parametrize(
    ("mean", "log_var", "w"), [(0.0, 0.0, 1), (0.8, -1.5, 1), (0.8, -1.5, 0.5)]
)
def test_of_a_known_gaussian(mean: float, log_var: float, w: float) -> None:
    _, it = prepared(mean, log_var, w=w)
    health = source_health(it)
    assert all(value.dim() == 0 and value.dtype == torch.float32 for value in health.values())
    assert not any(value.requires_grad for value in health.values())
    kl = 0.5 * (mean**2 + math.expm1(log_var) - log_var)
    assert health["kl_per_dim"].item() == pytest.approx(kl, rel=1e-5, abs=1e-7)
    assert health["sigma"].item() == pytest.approx(math.exp(log_var / 2), rel=1e-5)
    assert health["mean_rms"].item() == pytest.approx(mean, rel=1e-5)
    variance = 1 - w + w * math.exp(log_var)
    assert health["aggregate_mean"].item() == pytest.approx(w * mean, abs=0.03)
    assert health["aggregate_var"].item() == pytest.approx(variance, rel=0.05)
    distance = (w * mean) ** 2 + (math.sqrt(variance) - 1) ** 2
    assert health["distance_to_normal"].item() == pytest.approx(distance, rel=0.1, abs=1e-3)


def test_of_the_noise_in_use() -> None:
    """The sample that was interpolated, and not the predictor's own at w = 1."""
    _, it = prepared(0.8, -1.5, n=64, w=0.5)
    channels = it.x0().transpose(0, 1).flatten(1)
    health = source_health(it)
    assert health["aggregate_var"].item() == pytest.approx(
        channels.var(dim=1, correction=0).mean().item(), rel=1e-6
    )
    assert health["aggregate_mean"].item() == pytest.approx(
        channels.mean(dim=1).square().mean().sqrt().item(), rel=1e-6
    )


def test_does_not_depend_on_the_size_of_the_batch() -> None:
    few, many = (source_health(prepared(0.8, -1.5, n=n)[1]) for n in (2048, 8192))
    for name, value in few.items():
        assert many[name].item() == pytest.approx(value.item(), rel=0.1, abs=2e-3), name


def test_losses_by_weight_are_without_the_kl() -> None:
    mix, it = prepared(0.8, -1.5)
    loss, samples = mix.loss_and_samples(torch.zeros_like(it.x), it)
    health = source_health(it, samples)
    mse = (0 - (it.x1 - it.x0())).square().flatten(1).mean(dim=1)
    w = it.source.w
    assert health["mse_low_w"].item() == pytest.approx(mse[w < 0.1].mean().item(), rel=1e-5)
    assert health["mse_high_w"].item() == pytest.approx(mse[w > 0.9].mean().item(), rel=1e-5)
    _, high = prepared(0.8, -1.5, w=1)
    assert source_health(high, samples)["mse_low_w"].isnan()
    with pytest.raises(ValueError, match=r"samples must be the \(B,\) = \(4096,\).*got \(4,\)"):
        source_health(it, samples[:4])


def test_of_the_standard_source_is_nothing() -> None:
    mix = MixFlow(clock="data_at_1")
    assert source_health(mix.prepare(torch.zeros(3, 2))) == {}


def test_is_not_waited_for() -> None:
    """On tensors without values, of which any read is an error."""
    _, it = prepared(0.8, -1.5, n=8)
    parts = {name: getattr(it.source, name).to("meta") for name in ("mean", "log_var", "w", "kl")}
    moments = parts.pop("mean"), parts.pop("log_var")
    draw = dataclasses.replace(it.source, **parts, _moments=lambda: moments)
    empty = dataclasses.replace(it, source=draw, _x0=it.x0().to("meta"))
    health = source_health(empty, torch.empty(8, device="meta"))
    assert len(health) == 8 and all(value.is_meta for value in health.values())
