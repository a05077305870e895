"""Positions of calls without ids, in the workers of a loader; input perturbation."""

import math
import warnings

import pytest
import torch

from mixflow_fast import MixFlow
from mixflow_fast.flow import DATA_AT_1, NOISE_AT_1
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.layout import to_tokens
from mixflow_fast.kernels.philox import Stream


class _PreparedInWorkers(torch.utils.data.Dataset):
    """What people write who prepare in the loader and do not pass ids."""

    def __init__(self) -> None:
        self.mix = MixFlow(clock=DATA_AT_1, seed=1)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            t = self.mix.prepare(torch.zeros(1, 1, 2, 2)).t
        assert "without ids in a DataLoader's worker" in str(told[0].message)
        return t


def test_workers_of_a_loader_draw_other_times_in_each_worker_and_epoch() -> None:
    loader = torch.utils.data.DataLoader(_PreparedInWorkers(), num_workers=2)
    drawn = [t.item() for _ in range(2) for t in loader]
    assert len(set(drawn)) == 16


def test_ranks_with_equal_seeds_draw_other_times_in_their_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        torch.manual_seed(3)
        drawn += [
            t.item() for t in torch.utils.data.DataLoader(_PreparedInWorkers(), num_workers=2)
        ]
    assert len(set(drawn)) == 16


@pytest.mark.parametrize("clock", [DATA_AT_1, NOISE_AT_1])
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_input_perturbation(clock: str, path: str) -> None:
    """The input is that of the noise x0 + g xi; what the loss compares with is that of x0."""
    g, x1, ids = 0.2, torch.linspace(-1, 1, 6 * 32).view(6, 2, 4, 4), torch.arange(6) + 3
    plain = MixFlow(clock=clock, path=path, seed=5)
    mix = MixFlow(clock=clock, path=path, seed=5, input_perturbation=g)
    it, without = mix.prepare(x1, ids=ids), plain.prepare(x1, ids=ids)
    xi = philox.normal(5, Stream.PERTURBATION, ids, 32).view(x1.shape)
    told = dict(ids=ids, t=it.t, slowed_t=it.slowed_t)
    expected = plain.prepare(x1, x0=without.x0() + g * xi, **told)
    torch.testing.assert_close(it.x, expected.x, rtol=0, atol=1e-6)
    assert float((it.x - without.x).abs().max()) > 0.05
    assert torch.equal(it.t, without.t) and torch.equal(it.slowed_t, without.slowed_t)
    assert torch.equal(it.x0(), without.x0())
    pred = torch.tanh(x1)
    assert torch.equal(mix.loss(pred, it), plain.loss(pred, without))


def test_input_perturbation_of_tokens_and_half_precision() -> None:
    x1, ids = torch.linspace(-1, 1, 3 * 32).view(3, 2, 4, 4), torch.arange(3)
    mix = MixFlow(clock=DATA_AT_1, input_perturbation=0.1)
    whole = mix.prepare(x1, ids=ids).x
    assert torch.equal(mix.prepare(x1, ids=ids, patch_size=2).x, to_tokens(whole, 2))
    half = mix.prepare(x1, ids=ids, dtype=torch.bfloat16).x
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), whole, rtol=2**-6, atol=2**-7)


def test_no_input_perturbation() -> None:
    """0 changes no bit, and noise that is given is used exactly (validation gives it)."""
    x1, ids = torch.linspace(-1, 1, 3 * 32).view(3, 2, 4, 4), torch.arange(3)
    plain = MixFlow(clock=DATA_AT_1)
    off = MixFlow(clock=DATA_AT_1, input_perturbation=0)
    assert torch.equal(off.prepare(x1, ids=ids).x, plain.prepare(x1, ids=ids).x)
    on = MixFlow(clock=DATA_AT_1, input_perturbation=0.5)
    x0 = torch.zeros_like(x1)
    assert torch.equal(on.prepare(x1, ids=ids, x0=x0).x, plain.prepare(x1, ids=ids, x0=x0).x)
    for wrong in (-0.1, math.inf, math.nan, "0.1", True):
        with pytest.raises(ValueError, match="input_perturbation must be a number >= 0"):
            MixFlow(clock=DATA_AT_1, input_perturbation=wrong)
