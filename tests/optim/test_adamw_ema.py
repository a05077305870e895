"""`AdamWEMA` against torch's AdamW and the closed form of its average; state, bad settings."""

import copy

import pytest
import torch

from mixflow_fast.optim.adamw_ema import AdamWEMA
from tests.support.optimizers import SETTINGS, STATE, check_against_torch, gradients, parameters


@SETTINGS
def test_matches_torch_adamw(weight_decay: float, clip: float) -> None:
    check_against_torch(AdamWEMA, "cpu", weight_decay, clip)


def test_state_dict_round_trip_is_exact() -> None:
    ours, others = parameters(), parameters()
    a, b = AdamWEMA(ours), AdamWEMA(others)

    def run(params: list, optimizer: AdamWEMA, steps: range) -> None:
        for step in steps:
            for p, grad in zip(params, gradients(step), strict=True):
                p.grad = grad.clone()
            optimizer.step()

    run(ours, a, range(3))
    for p, q in zip(ours, others, strict=True):
        q.data.copy_(p.data)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    run(ours, a, range(3, 6))
    run(others, b, range(3, 6))
    for p, q in zip(ours, others, strict=True):
        assert torch.equal(p, q)
        for key in STATE:
            assert torch.equal(torch.as_tensor(a.state[p][key]), torch.as_tensor(b.state[q][key]))


def test_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay would repeat the learning rate and bias corrections of one step."""
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = AdamWEMA(params)
    for p, grad in zip(params, gradients(0), strict=True):
        p.grad = grad
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    monkeypatch.undo()
    optimizer.step()
    assert not torch.equal(params[0], before[0])


def test_parameters_without_gradient_stay() -> None:
    first, *rest = parameters()
    optimizer = AdamWEMA([first, *rest], lr=1.0)
    first.grad = torch.ones_like(first)
    before = [p.detach().clone() for p in rest]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(rest, before, strict=True))
    assert rest[0] not in optimizer.state


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1.0), ("betas", (1.0, 0.9)), ("eps", -1e-8), ("ema_decay", 1.0), ("grad_clip", -1.0)],
)
def test_bad_settings(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        AdamWEMA(parameters(), **{name: value})
