"""Parameters, gradients and checks for tests of the optimizers."""

import math
from collections.abc import Callable

import pytest
import torch

from mixflow_fast.optim.adamw_ema import AdamWEMA

SHAPES = [(3, 5), (7,), (2, 3, 4)]
STATE = ("step", "exp_avg", "exp_avg_sq", "ema")
SETTINGS = pytest.mark.parametrize(
    ("weight_decay", "clip"), [(w, c) for w in (0.0, 0.1) for c in (0.0, 0.5, 100.0)]
)


def parameters(seed: int = 0, device: str = "cpu") -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=g).to(device)) for shape in SHAPES]


def gradients(step: int, device: str = "cpu") -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=g).to(device) for shape in SHAPES]


def check_against_torch(
    optimizer: type[AdamWEMA], device: str, weight_decay: float, clip: float
) -> None:
    ours = parameters(device=device)
    theirs = [torch.nn.Parameter(p.detach().double()) for p in ours]
    options = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    a = optimizer(ours, **options, ema_decay=0.9, grad_clip=clip)
    b = torch.optim.AdamW(theirs, **options)
    averages = [p.detach().clone() for p in theirs]
    for step in range(20):
        for p, q, grad in zip(ours, theirs, gradients(step, device), strict=True):
            p.grad, q.grad = grad.clone(), grad.double()
        norm = torch.nn.utils.clip_grad_norm_(theirs, clip or math.inf)
        for group in (*a.param_groups, *b.param_groups):
            group["lr"] = 0.01 / (1 + step)
        a.step()
        b.step()
        averages = [0.9 * e + 0.1 * q.detach() for e, q in zip(averages, theirs, strict=True)]
        assert a.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    for p, q, average in zip(ours, theirs, averages, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=2e-6, atol=2e-7)
        torch.testing.assert_close(a.state[p]["ema"].double(), average, rtol=2e-6, atol=2e-7)


def run_both(a: AdamWEMA, b: AdamWEMA, steps: range, skipped: Callable[[int], tuple]) -> None:
    """The same gradients for two optimizers; those of `skipped(step)` are missing."""
    ours, theirs = ([p for g in o.param_groups for p in g["params"]] for o in (a, b))
    for step in steps:
        for i, (p, q, grad) in enumerate(
            zip(ours, theirs, gradients(step, str(ours[0].device)), strict=True)
        ):
            p.grad, q.grad = (None if i in skipped(step) else grad.clone() for _ in range(2))
        a.step()
        b.step()


def assert_same_state(a: AdamWEMA, b: AdamWEMA) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys() and first["state"]
    for key, state in first["state"].items():
        other = second["state"][key]
        assert tuple(state) == tuple(other) == STATE and state["step"] == other["step"]
        for name in STATE[1:]:
            # FusedAdam takes the betas as float32, which moves 1 - 0.999 by 1.3e-5.
            torch.testing.assert_close(state[name], other[name], rtol=2e-5, atol=1e-6)


def two_groups(params: list[torch.nn.Parameter]) -> list[dict]:
    return [
        {"params": params[:2], "lr": 0.02, "weight_decay": 0.1, "ema_decay": 0.5},
        {"params": params[2:], "betas": (0.5, 0.9)},
    ]
