"""Formulas of a mixed source against float64, torch.distributions and Monte Carlo; refusals."""

import math

import pytest
import torch
from torch import nn

from mixflow_fast.flow.source import (
    MixedSource,
    StandardSource,
    kl_per_sample,
    mixed_moments,
    mixed_samples,
)

ANY = nn.Linear(2, 4)


def test_kl_is_that_of_torch_distributions() -> None:
    g = torch.Generator().manual_seed(0)
    mean, log_var = torch.randn(2, 5, 3, 4, generator=g, dtype=torch.float64)
    normal = torch.distributions.Normal
    element = torch.distributions.kl_divergence(
        normal(mean, torch.exp(log_var / 2)), normal(torch.zeros_like(mean), 1.0)
    )
    torch.testing.assert_close(
        kl_per_sample(mean, log_var), element.sum((1, 2)), rtol=1e-13, atol=0
    )
    near = torch.full((1, 4), 1e-3, dtype=torch.float64)  # where exp(l) - 1 - l cancels
    series = 4 * 0.5 * (1e-6 / 2 + 1e-9 / 6 + 1e-12 / 24)
    assert kl_per_sample(torch.zeros_like(near), near).item() == pytest.approx(series, rel=1e-9)


@pytest.mark.parametrize("w", [0.0, 0.25, 0.5, 1.0])
def test_moments_of_both_modes_by_monte_carlo(w: float) -> None:
    """Mode "moments": w mu, (1 - w) + w s^2; mode "samples": w mu, w^2 s^2 + (1 - w)^2."""
    n = 200_000
    g = torch.Generator().manual_seed(1)
    eps, eps1 = torch.randn(2, n, 1, generator=g, dtype=torch.float64)
    mean, log_var = torch.full((n, 1), 0.7).double(), torch.full((n, 1), -1.5).double()
    variance = math.exp(-1.5)
    weight = torch.full((n,), w, dtype=torch.float64)
    mixed_mean, std = mixed_moments(mean, log_var, weight)
    for x0, expected in (
        (mixed_mean + std * eps, 1 - w + w * variance),
        (mixed_samples(mean, log_var, weight, eps, eps1), w * w * variance + (1 - w) ** 2),
    ):
        assert x0.mean().item() == pytest.approx(w * 0.7, abs=5 * math.sqrt(expected / n))
        assert x0.var().item() == pytest.approx(expected, rel=5 * math.sqrt(2 / n))


def test_small_variances_keep_their_digits() -> None:
    """float32 against float64: 1 + w (exp(l) - 1) would be off by 1e-3 at w = 1, l = -12."""
    log_var = torch.linspace(-12, 6, 400)[None]
    for w in (0.0, 1e-3, 0.5, 1 - 2**-20, 1.0):
        _, std = mixed_moments(log_var, log_var, w)
        _, exact = mixed_moments(log_var.double(), log_var.double(), w)
        torch.testing.assert_close(std.double(), exact, rtol=3e-7, atol=0)


def test_standard_deviation_is_exactly_one_where_it_should_be() -> None:
    w = (torch.arange(2**16) * 2**8 + 1) * 2.0**-24  # of the lattice that uniform draws lie on
    zero = torch.zeros(len(w), 1)
    _, std = mixed_moments(zero, zero, w)
    assert (std == 1).all()
    log_var = torch.linspace(-12, 6, 1000)[None]
    assert (mixed_moments(log_var, log_var, 0.0)[1] == 1).all()


def test_gradients_stay_finite_at_both_ends() -> None:
    for w in (0.0, 1.0):
        log_var = torch.tensor([[-12.0, 0.0, 6.0]], requires_grad=True)
        mean = torch.zeros(1, 3, requires_grad=True)
        mixed_mean, std = mixed_moments(mean, log_var, torch.tensor([w]))
        (mixed_mean + std).sum().backward()
        # ds/dl = w exp(l) / (2 s), at w = 1 half of s.
        expected = w * torch.exp(log_var.detach() / 2) / 2
        torch.testing.assert_close(log_var.grad, expected, rtol=1e-6, atol=0)
        assert (mean.grad == w).all()


def test_lam_means_the_same_at_every_size_and_beta_does_not() -> None:
    by_lam, by_beta = MixedSource(ANY, lam=0.5), MixedSource(ANY, beta=1e-3)
    assert by_lam.weights(100) == (0.5, 0.005) and by_lam.weights(400) == (0.5, 0.00125)
    assert by_beta.weights(3072) == (pytest.approx(3.072), 1e-3)


def test_log_variances_are_clamped_without_a_gradient() -> None:
    predicted = torch.tensor([[0.0, 0.0, 0.0, 9.0, -99.0, 1.0]], requires_grad=True)
    source = MixedSource(lambda x1: predicted, lam=1.0)
    _, log_var = source.moments((1, 3), x1=torch.zeros(1, 3))
    assert log_var.tolist() == [[6.0, -12.0, 1.0]]
    log_var.sum().backward()
    assert predicted.grad.tolist() == [[0, 0, 0, 0, 0, 1]]
    wide = MixedSource(lambda x1: predicted, lam=1.0, log_var_range=(-50, 20))
    assert wide.moments((1, 3), x1=torch.zeros(1, 3))[1].tolist() == [[9.0, -50.0, 1.0]]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_overflow_is_not_clamped_away(bad: float) -> None:
    predicted = torch.zeros(2, 4)
    predicted[1, 3] = bad
    source = MixedSource(lambda x1: predicted, lam=1.0)
    _, log_var = source.moments((2, 2), x1=torch.zeros(2, 2))
    assert log_var.isnan().tolist() == [[False, False], [False, True]]


def test_the_predictor_runs_in_its_own_dtype() -> None:
    seen = []

    class Predictor(nn.Linear):
        def forward(self, kappa: torch.Tensor) -> torch.Tensor:
            seen.append(kappa.dtype)
            return super().forward(kappa)

    for own in (torch.bfloat16, torch.float64):
        source = MixedSource(Predictor(2, 4).to(own), lam=1.0)
        mean, log_var = source.moments((3, 2), x1=torch.ones(3, 2))
        assert seen[-1] == own and mean.dtype == log_var.dtype == torch.float32
        mean, _ = source.moments((3, 2), x1=torch.ones(3, 2).double(), dtype=torch.float64)
        assert seen[-1] == own and mean.dtype == torch.float64


def test_kappa_is_made_of_what_it_names() -> None:
    x1, z, y = torch.ones(3, 2), torch.full((3, 2), 2.0), torch.tensor([0, 1, 2])
    seen = []

    def predictor(kappa: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(kappa)
        return torch.zeros(3, 2), torch.zeros(3, 2)

    for kappa, expected in {
        "data": x1,
        "noise": z,
        "class": y,
        "data+noise": torch.cat([x1, z], 1),
    }.items():
        source = MixedSource(predictor, kappa=kappa, lam=1.0)
        source.moments((3, 2), x1=x1, y=y, z=z)
        assert torch.equal(seen[-1], expected) and seen[-1].dtype == expected.dtype
        assert source.needs_data == (kappa in ("data", "data+noise"))
        assert source.needs_noise == (kappa in ("noise", "data+noise"))
        assert source.needs_labels == (kappa == "class")
        with pytest.raises(ValueError, match="needs .*got None"):
            source.moments((3, 2))


def test_frozen() -> None:
    predictor = nn.Linear(2, 4)
    source = MixedSource(predictor, lam=1.0)
    assert not source.frozen
    predictor.weight.requires_grad_(False)
    assert not source.frozen, "the bias is trained"
    predictor.requires_grad_(False)
    assert source.frozen
    # Nothing says that a plain function is not trained.
    assert not MixedSource(lambda x1: x1, lam=1.0).frozen


def test_weights_of_the_mixture() -> None:
    assert MixedSource(ANY, lam=1.0).w == "uniform"
    assert MixedSource(ANY, w="discrete", lam=1.0).discrete == 1000
    assert MixedSource(ANY, w="discrete(4)", lam=1.0).discrete == 4
    whole = MixedSource(ANY, w=1, lam=1.0)
    assert whole.w == 1.0 and isinstance(whole.w, float) and whole.discrete == 0
    assert "w=1.0, lam=1.0" in repr(whole) and repr(StandardSource()) == "StandardSource()"


REFUSED = {
    "predictor": (dict(predictor=3, lam=1), "predictor must be callable.*got int"),
    "class of predictors": (dict(predictor=nn.Linear, lam=1), "got the class Linear: make one"),
    "kappa": (dict(kappa="image", lam=1), r"kappa must be one of \('data'.*got 'image'"),
    "mode": (dict(mode="D", lam=1), r"mode must be one of \('moments', 'samples'\), got 'D'"),
    "both weights": (dict(lam=1, beta=1), "exactly one of lam.*beta.*lam=1 and beta=1"),
    "no weight": (dict(), "exactly one of lam.*lam=None and beta=None"),
    "negative": (dict(lam=-1), "lam must be a number >= 0, got -1"),
    "not finite": (dict(beta=math.inf), "beta must be a number >= 0, got inf"),
    "truth": (dict(lam=True), "lam must be a number >= 0, got True"),
    "w above 1": (dict(w=1.5, lam=1), 'w must be "uniform".*got 1.5'),
    "w in steps": (dict(w="discrete(0)", lam=1), r"w must be .*got 'discrete\(0\)'"),
    "w in too many": (dict(w="discrete(1048577)", lam=1), "w must be "),
    "w in words": (dict(w="half", lam=1), "w must be .*got 'half'"),
    "range": (dict(lam=1, log_var_range=(0.5, 2)), "log_var_range must be two numbers around 0"),
    "range too wide": (dict(lam=1, log_var_range=(-12, 90)), r"in \[-80, 80\], got \(-12, 90\)"),
    "dropout": (dict(lam=1, dropout=1.0), r"dropout must be a number in \[0, 1\), got 1.0"),
    "range of one": (dict(lam=1, log_var_range=-12), "log_var_range must be two .*got -12"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        MixedSource(**{"predictor": ANY, **options})


PREDICTED = {
    "too few channels": (torch.zeros(3, 2), r"\(3, 4\) floating-point numbers.*got \(3, 2\)"),
    "integers": (torch.zeros(3, 4, dtype=torch.int64), r"got \(3, 4\) torch.int64"),
    "three": ((torch.zeros(3, 2),) * 3, r"the pair \(mean, log-variance\), got tuple"),
    "nothing": (None, "got NoneType"),
    "mean of another shape": (
        (torch.zeros(3, 1), torch.zeros(3, 2)),
        r"predictor's mean must be \(3, 2\) .*got \(3, 1\)",
    ),
    "log-variance of another shape": (
        (torch.zeros(3, 2), torch.zeros(1, 2)),
        r"predictor's log-variance must be \(3, 2\) .*got \(1, 2\)",
    ),
}


@pytest.mark.parametrize("case", PREDICTED)
def test_refused_predictions(case: str) -> None:
    predicted, message = PREDICTED[case]
    source = MixedSource(lambda x1: predicted, lam=1.0)
    with pytest.raises(ValueError, match=message):
        source.moments((3, 2), x1=torch.zeros(3, 2))
