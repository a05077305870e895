"""`AdamWEMA` against torch's AdamW and the EMA's closed form; schedules against their formulas."""

import copy
import math

import pytest
import torch

from mixflow_fast.optim import AdamWEMA, learning_rate

SHAPES = [(3, 5), (7,), (2, 3, 4)]


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=g) for shape in SHAPES]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
def test_matches_torch_adamw(weight_decay: float, clip: float) -> None:
    ours, theirs = parameters(), [torch.nn.Parameter(p.detach().double()) for p in parameters()]
    options = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    a = AdamWEMA(ours, **options, ema_decay=0.9, grad_clip=clip)
    b = torch.optim.AdamW(theirs, **options)
    averages = [p.detach().clone() for p in theirs]
    for step in range(20):
        for p, q, grad in zip(ours, theirs, gradients(step), strict=True):
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
        for key in ("step", "exp_avg", "exp_avg_sq", "ema"):
            assert torch.equal(torch.as_tensor(a.state[p][key]), torch.as_tensor(b.state[q][key]))


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


def test_learning_rate_schedules() -> None:
    common = dict(lr=1.0, warmup_images=100, decay_images=1100, final_lr=0.1)
    assert learning_rate(50, **common) == 0.5
    assert learning_rate(100, **common) == 1.0
    assert learning_rate(10**9, **common) == 1.0
    assert learning_rate(600, schedule="linear", **common) == pytest.approx(0.55)
    assert learning_rate(350, schedule="cosine", **common) == pytest.approx(
        0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    )
    for schedule in ("linear", "cosine"):
        assert learning_rate(1100, schedule=schedule, **common) == pytest.approx(0.1)
        assert learning_rate(5000, schedule=schedule, **common) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="schedule"):
        learning_rate(0, lr=1.0, schedule="step")
