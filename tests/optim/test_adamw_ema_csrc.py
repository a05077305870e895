"""`AdamWEMA` through `csrc/`: against torch's AdamW in float64, against foreach, and in ZeRO."""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixflow_fast.config.loading import load_config
from mixflow_fast.optim import step_calls
from mixflow_fast.optim.adamw_ema import AdamWEMA
from mixflow_fast.optim.power_ema import power_decay, sigma_rel_to_gamma
from mixflow_fast.training import trainer
from tests.support.csrc_library import require_library
from tests.support.kernels import relative_rms
from tests.support.train_ranks import TINY

SHAPES = [(1,), (3,), (33, 31), (0,), (65_537,)]
IMPLS = ("csrc", "foreach")


@pytest.fixture(autouse=True, scope="module")
def library() -> None:
    require_library()


def parameters(shapes: list = SHAPES) -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]


def gradients(step: int, dtype=torch.float32, shapes: list = SHAPES) -> list[Tensor]:
    g = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def give(params: list, grads: list[Tensor]) -> None:
    for p, grad in zip(params, grads, strict=True):
        if grad.dtype != p.dtype:
            p.grad_dtype = None  # PyTorch asks for the parameter's own otherwise
        p.grad = grad.clone()


def two_groups(params: list, **more) -> list[dict]:
    return [
        {"params": params[:2], "lr": 0.02, "weight_decay": 0.1, **more},
        {"params": params[2:], "betas": (0.5, 0.9), "eps": 1e-4},
    ]


@torch.no_grad()
def error(ours: Tensor, truth: Tensor) -> float:
    return relative_rms(ours, truth) if truth.numel() else 0.0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("decays", "clip", "dtype"),
    [
        ((), 20.0, torch.float32),
        ((0.99,), 0.0, torch.float32),
        ((0.9, 0.99, 0.999), 20.0, torch.float32),
        ((0.99,), 20.0, torch.bfloat16),
    ],
)
def test_hundred_steps_of_torchs_adamw(
    impl: str, decays: tuple, clip: float, dtype: torch.dtype
) -> None:
    """Relative error below 1e-6 with two groups, clipping and decay; foreach is held to it, too."""
    ours = parameters()
    theirs = [torch.nn.Parameter(p.detach().double()) for p in ours]
    options = dict(lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.01)
    a = AdamWEMA(two_groups(ours), **options, ema_decay=decays, grad_clip=clip, impl=impl)
    b = torch.optim.AdamW(two_groups(theirs), **options)
    averages = [[p.detach().clone() for p in theirs] for _ in decays]
    for step in range(100):
        grads = gradients(step, dtype)
        give(ours, grads)
        give(theirs, [g.double() for g in grads])
        norm = torch.nn.utils.clip_grad_norm_(theirs, clip or math.inf)
        a.step()
        b.step()
        for decay, average in zip(decays, averages, strict=True):
            torch._foreach_lerp_(average, [q.detach() for q in theirs], 1 - decay)
        # PyTorch's norm of bfloat16 adds its squares up one after another.
        rel = 1e-6 if dtype == torch.float32 else 1e-5
        assert a.grad_norm.item() == pytest.approx(norm.item(), rel=rel)
    names = ["ema", "ema_1", "ema_2"][: len(decays)]
    assert list(a.state[ours[0]]) == ["step", "exp_avg", "exp_avg_sq", *names]
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        assert error(p, q) < 1e-6, (i, error(p, q))
        for name, average in zip(names, averages, strict=True):
            assert error(a.state[p][name], average[i]) < 1e-6, (i, name)


def run(impl: str, steps: range = range(6), start: AdamWEMA | None = None, **settings) -> AdamWEMA:
    """An optimizer after these steps, of fixed gradients; `start` is one to go on from."""
    params = parameters()
    settings = {"lr": 0.01, "grad_clip": 5.0, "ema_decay": (0.9, 0.99), **settings}
    optimizer = AdamWEMA(two_groups(params), impl=impl, ema_sigma_rel=(0.05, 0.1), **settings)
    if start is not None:
        for p, q in zip(params, weights_of(start), strict=True):
            p.data.copy_(q)
        optimizer.load_state_dict(copy.deepcopy(start.state_dict()))
    for step in steps:
        grads = gradients(step)
        give(params, grads)
        if step == 2:
            params[1].grad = None  # from here on it counts its own steps
        optimizer.step()
    return optimizer


def weights_of(optimizer: AdamWEMA) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_close(a: AdamWEMA, b: AdamWEMA, bits: bool = False) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert one["param_groups"] == two["param_groups"]
    for p, q in zip(weights_of(a), weights_of(b), strict=True):
        assert list(a.state[p]) == list(b.state[q])
        pairs = [(p, q), *((a.state[p][k], b.state[q][k]) for k in a.state[p] if k != "step")]
        assert a.state[p]["step"] == b.state[q]["step"]
        for x, y in pairs:
            assert x.dtype == y.dtype and x.shape == y.shape
            assert torch.equal(x, y) if bits else error(x, y.double()) < 2e-6


def test_both_have_one_state_and_a_run_can_change_between_them() -> None:
    whole = {impl: run(impl) for impl in IMPLS}
    assert_close(whole["csrc"], whole["foreach"])
    params = weights_of(whole["csrc"])
    assert [whole["csrc"].state[p]["step"] for p in params] == [6, 5, 6, 6, 6]
    assert set(whole["csrc"].state[params[0]]) >= {"ema", "ema_1", "ema_power_0", "ema_power_1"}
    for first, second in (("csrc", "foreach"), ("foreach", "csrc"), ("csrc", "csrc")):
        half = run(first, range(3))
        resumed = run(second, range(3, 6), start=half)
        assert_close(resumed, whole[second], bits=first == second)
    assert_close(run("csrc"), whole["csrc"], bits=True)
    assert_close(run("auto"), whole["csrc"], bits=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_power_function_averages_are_their_definition(impl: str) -> None:
    p = torch.nn.Parameter(torch.full((5,), 100.0))
    optimizer = AdamWEMA([p], lr=0.1, ema_decay=(), ema_sigma_rel=(0.1, 0.25), impl=impl)
    gammas = [sigma_rel_to_gamma(0.1), sigma_rel_to_gamma(0.25)]
    expected = [p.detach().double() for _ in gammas]
    for step in range(1, 40):
        p.grad = torch.arange(5.0) - 2
        optimizer.step()
        for i, gamma in enumerate(gammas):
            expected[i] = torch.lerp(p.detach().double(), expected[i], power_decay(gamma, step))
        assert list(optimizer.state[p]) == [
            *("step", "exp_avg", "exp_avg_sq", "ema_power_0", "ema_power_1")
        ]
        for i in range(2):
            assert error(optimizer.state[p][f"ema_power_{i}"], expected[i]) < 5e-7


@pytest.mark.parametrize("impl", IMPLS)
def test_checkpoint_of_a_run_with_one_average(impl: str) -> None:
    """As written before there were others: its groups do not know them, its state has "ema"."""
    old = AdamWEMA(parameters(), lr=0.01, ema_decay=0.9, impl=impl)
    give(weights_of(old), gradients(0))
    old.step()
    saved = copy.deepcopy(old.state_dict())
    for group in saved["param_groups"]:
        del group["ema_sigma_rel"]
    assert list(saved["state"][0]) == ["step", "exp_avg", "exp_avg_sq", "ema"]
    new = AdamWEMA(parameters(), lr=0.5, impl=impl)
    for p, q in zip(weights_of(new), weights_of(old), strict=True):
        p.data.copy_(q)
    new.load_state_dict(saved)
    for optimizer in (old, new):
        give(weights_of(optimizer), gradients(1))
        optimizer.step()
    assert_close(old, new, bits=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_stay_as_they_are(impl: str) -> None:
    """ "foreach" scales float32 ones in place, as ever; "csrc" reads the factor in its pass."""
    params = parameters()
    optimizer = AdamWEMA(params, grad_clip=0.5, impl=impl)
    grads = gradients(0)
    give(params, grads)
    optimizer.step()
    same = [torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True)]
    assert all(same) if impl == "csrc" else not any(same[:3])
    assert optimizer.grad_norm.item() == pytest.approx(
        math.sqrt(sum(g.square().sum() for g in grads))
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_copies(impl: str) -> None:
    params = parameters()
    optimizer = AdamWEMA(params, lr=0.01, impl=impl)
    copies = {p: torch.full_like(p, math.nan, dtype=torch.bfloat16) for p in params[1:]}
    optimizer.set_copies(copies)
    for step in range(2):
        give(params, gradients(step))
        optimizer.step()
        assert all(torch.equal(c, p.bfloat16()) for p, c in copies.items())
    assert "copies" not in str(optimizer.state_dict()["param_groups"])
    optimizer.set_copies({})
    before = copies[params[1]].clone()
    params[1].data.add_(1)
    optimizer.step()
    assert torch.equal(copies[params[1]], before)
    with pytest.raises(ValueError, match="none of them"):
        optimizer.set_copies({torch.ones(3): torch.ones(3).bfloat16()})
    for wrong in (torch.ones(3), torch.ones(4).bfloat16(), torch.ones(6).bfloat16()[::2]):
        with pytest.raises(ValueError, match=r"copies must be contiguous bfloat16 of shape \(3,\)"):
            optimizer.set_copies({params[1]: wrong})


def test_layouts() -> None:
    """Gradients of another layout are copied; such parameters are foreach's, or refused."""
    results = {}
    for impl in ("auto", "csrc", "foreach"):
        plain, turned = parameters([(4, 6), (4, 6)])
        turned.data = turned.data.t()
        give(
            [plain, turned],
            [x.t().contiguous().t() for x in gradients(0, shapes=[(4, 6)])] + [torch.ones(6, 4)],
        )
        assert not plain.grad.is_contiguous()
        optimizer = AdamWEMA([plain, turned], lr=0.01, impl=impl)
        if impl == "csrc":
            with pytest.raises(
                ValueError, match=r'impl="csrc" updates contiguous .* use impl="auto"'
            ):
                optimizer.step()
            continue
        optimizer.step()
        results[impl] = plain, turned, optimizer.state[turned]["ema"]
    for a, b in zip(results["auto"], results["foreach"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    half.grad = torch.ones_like(half)
    with pytest.raises(ValueError, match="got torch.float16"):
        AdamWEMA([half], impl="csrc").step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"impl": "cuda"}, r"impl must be one of .*'foreach'\), got 'cuda'"),
        ({"ema_decay": (0.9, 1.0)}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"ema_sigma_rel": (0.3,)}, r"ema_sigma_rel must be in \(0, 0.2887\]"),
        ({"ema_sigma_rel": (0.1,) * 16}, "at most 16 EMAs, got 1 and 16"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamWEMA(parameters(), **settings)


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 1), ("bf16", 2)])
def test_inside_deepspeed(tmp_path: Path, precision: str, stage: int) -> None:
    """Whole runs on the operator alone: resumed to the same bits, and close to foreach's."""
    common = [*TINY, f"train.precision={precision}", f"train.zero_stage={stage}"]
    common += [
        "train.device=cpu",
        "optim.lr=0.001",
        "optim.grad_clip=0.5",
        "optim.ema_decays=[0.9]",
    ]

    def weights(out: str, impl: str, images: int = 32) -> dict[str, dict[str, Tensor]]:
        given = [*common, f"optim.impl={impl}", f"train.images={images}", f"out={tmp_path / out}"]
        result = trainer.train(load_config("photos", given), quiet=True)
        return torch.load(result.weights, weights_only=True)

    whole = weights("whole", "csrc")
    weights("parts", "csrc", images=16)
    parts, plain = weights("parts", "csrc"), weights("plain", "foreach")
    for kind in ("model", "ema"):
        assert whole[kind].keys() == plain[kind].keys()
        for name, w in whole[kind].items():
            assert torch.equal(w, parts[kind][name]), name
            torch.testing.assert_close(w, plain[kind][name], rtol=1e-4, atol=2e-5)
    assert any(not torch.equal(w, whole["ema"][name]) for name, w in whole["model"].items())


def test_one_pass_is_faster_than_foreach(record_property: Callable) -> None:
    """The fastest of interleaved steps, in one process: a ratio, no speed of its own."""
    fastest = dict.fromkeys(IMPLS, math.inf)
    optimizers = {}
    for impl in IMPLS:
        p = torch.nn.Parameter(torch.randn(2_000_000))
        p.grad = torch.randn(2_000_000)
        optimizers[impl] = AdamWEMA([p], grad_clip=1.0, weight_decay=0.01, impl=impl)
    for _ in range(12):
        for impl, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            fastest[impl] = min(fastest[impl], time.perf_counter() - start)
    ratio = fastest["foreach"] / fastest["csrc"]
    record_property("foreach_to_csrc", ratio)
    assert ratio > 1.5, ratio


def test_names_of_the_limits_agree() -> None:
    from mixflow_fast.extension import sources_folder

    header = (sources_folder() / "adamw_ema.h").read_text()
    assert f"kMaxEmas = {step_calls.MAX_EMAS};" in header
