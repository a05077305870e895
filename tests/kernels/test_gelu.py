"""GELU with its bias, and helpers shared with SwiGLU: kernels against reference and float64."""

import pytest
import torch
from torch.nn import functional

from mixflow_fast.kernels.activations import gelu as module
from mixflow_fast.kernels.activations import rows
from mixflow_fast.kernels.activations.gelu import gelu, gelu_bytes, gelu_reference
from tests.support.kernels import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    assert_as_exact_as_eager,
    data,
    moved,
    relative_rms,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # Meant to: 1 / inf is 0. Devices do not say it, NumPy does.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),
]
# Several strips, a last one that is not full, several blocks of columns, columns that are not 8 n.
SHAPES = [(1, 1, 64), (2, 5, 96), (2, 7, 72), (7, 33), (150, 300), (3, 1023)]
IMPLS = ("triton", "auto", "reference")


def run(function, x: torch.Tensor, bias: torch.Tensor | None, dy: torch.Tensor) -> dict:
    x = x.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    y = function(x, bias)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "dbias": None if bias is None else bias.grad}


def ours(impl: str):
    return lambda x, bias: gelu(x, bias, impl=impl)


def eager(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.gelu(x if bias is None else x + bias.to(x.dtype), approximate="tanh")


def by_hand(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    z = x if bias is None else x + bias
    return 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))


def truth(x: torch.Tensor, bias: torch.Tensor | None, dy: torch.Tensor) -> dict:
    return run(by_hand, x.double(), None if bias is None else bias.double(), dy.double())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_errors_are_eagers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, bias, dy = (data(*s, dtype=dtype, seed=i) for i, s in enumerate((shape, shape[-1:], shape)))
    exact, plain = truth(x, bias, dy), run(eager, x, bias, dy)
    for impl in IMPLS:
        found = run(ours(impl), x, bias, dy)
        for name, value in found.items():
            assert value.dtype == dtype and value.shape == exact[name].shape, name
            assert_as_exact_as_eager(value, plain[name], exact[name], f"{impl} {name}")


@pytest.mark.parametrize("bias_dtype", [FP32, BF16, None])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_bias_of_another_dtype_or_none(dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    """As under autocast; the sum of x and bias is not rounded."""
    x, dy = data(70, 40, dtype=dtype), data(70, 40, dtype=dtype, seed=2)
    bias = None if bias_dtype is None else data(40, dtype=bias_dtype, seed=1)
    exact = truth(x, bias, dy)
    for impl in IMPLS:
        found = run(ours(impl), x, bias, dy)
        assert found["y"].dtype == found["dx"].dtype == dtype
        for name, value in found.items():
            if value is None:
                continue
            assert name != "dbias" or value.dtype == bias_dtype
            # A float32 result rounded once.
            assert_as_exact_as_eager(value, exact[name].to(value.dtype), exact[name], name)


def test_tails_are_right_one_by_one() -> None:
    """Where 1 + tanh cancels, eager has lost all digits: relative errors, element by element."""
    x = torch.linspace(-9, 9, 301, device=DEVICE).view(7, 43)
    dy = torch.ones_like(x)
    found, exact = run(ours("triton"), x, None, dy), truth(x, None, dy)
    # Not by 1 + tanh, whose float64 value cancels too.
    z = x.double()
    v = 2 * (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)
    assert ((found["y"].double() / (z * torch.sigmoid(v))) - 1).nan_to_num().abs().max() < 1e-5
    assert (found["dx"].double() - exact["dx"]).abs().max() < 1e-6


@pytest.mark.parametrize(("dtype", "large"), [(FP32, 1e4), (BF16, 1e4), (FP16, 6e4)])
def test_large_values_stay_finite(dtype: torch.dtype, large: float) -> None:
    x = torch.tensor([[large, -large, large / 3, -large / 3, 0.0, -0.0]], dtype=dtype).to(DEVICE)
    bias = torch.zeros(6, dtype=dtype, device=DEVICE)
    found = run(ours("triton"), x, bias, torch.ones_like(x))
    step = torch.tensor([[1.0, 0, 1, 0, 0.5, 0.5]], dtype=dtype, device=DEVICE)
    assert torch.equal(found["y"], x.clamp(min=0)) and torch.equal(found["dx"], step)
    assert torch.equal(found["dbias"], step[0])


def test_nan_comes_through() -> None:
    x = data(3, 40)
    x[1, 7] = torch.nan
    found = run(ours("triton"), x, data(40, seed=1), torch.ones_like(x))
    for name, value in found.items():
        assert value.isnan().sum() == 1 and value[..., 7].isnan().any(), name


def test_each_input_alone_requires_grad() -> None:
    x, bias, dy = data(70, 40), data(40, seed=1), data(70, 40, seed=2)
    for impl in IMPLS:
        both = run(ours(impl), x, bias, dy)
        alone = x.clone().requires_grad_()
        gelu(alone, bias, impl=impl).backward(dy)
        assert torch.equal(alone.grad, both["dx"])
        alone = bias.clone().requires_grad_()
        gelu(x, alone, impl=impl).backward(dy)
        assert torch.equal(alone.grad, both["dbias"])
        assert not gelu(x, bias, impl=impl).requires_grad


def test_two_runs_give_the_same_bits() -> None:
    arguments = data(150, 300), data(300, seed=1), data(150, 300, seed=2)
    first, second = (run(ours("triton"), *arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_memory_layouts() -> None:
    """Transposed and sliced inputs, an expanded upstream gradient: the same, contiguous."""
    x, bias = data(6, 5, 40), data(40, seed=1)
    one = torch.tensor(1.5, device=DEVICE).expand(6, 5, 40)
    same = x.transpose(0, 1).contiguous().transpose(0, 1)
    wide = data(6, 5, 81)
    wide[..., :40] = x
    strided = torch.stack([bias, bias], dim=1)[:, 0]
    for impl in ("triton", "auto"):
        expected = run(ours(impl), x, bias, one.contiguous())
        for other in (same, wide[..., :40]):
            assert not other.is_contiguous() and not strided.is_contiguous()
            found = run(ours(impl), other, strided, one)
            for name in found:
                # PyTorch's own bits may depend on the layout.
                assert relative_rms(found[name], expected[name]) <= 1e-6 * (impl == "auto"), name
            y = gelu(other, bias, impl=impl)
            assert y.is_contiguous()


def test_rows_and_views_that_start_anywhere() -> None:
    """A row start that is not 16-byte aligned."""
    flat, bias = data(5 * 40 + 1), data(40, seed=1)
    x = flat[1:].view(5, 40)
    dy = torch.ones_like(x)
    found, expected = run(ours("triton"), x, bias, dy), run(ours("triton"), x.clone(), bias, dy)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("shape", [(0, 5, 40), (4, 0), (0,)])
@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_do(shape: tuple[int, ...], impl: str) -> None:
    x, bias = data(*shape), data(shape[-1], seed=1)
    found = run(ours(impl), x, bias, torch.ones_like(x))
    assert found["y"].shape == found["dx"].shape == shape
    assert found["dbias"].shape == shape[-1:] and not found["dbias"].any()


def test_one_dimension() -> None:
    x, bias = data(40), data(40, seed=1)
    found = run(ours("triton"), x, bias, torch.ones_like(x))
    assert torch.equal(found["dx"], found["dbias"]) and found["y"].shape == (40,)


def test_second_derivatives_are_refused_but_by_the_reference() -> None:
    x = data(3, 40).requires_grad_()
    for impl in ("triton", "auto"):
        with pytest.raises(RuntimeError, match='impl="reference"'):
            torch.autograd.grad(gelu(x, impl=impl).sum(), x, create_graph=True)
    (first,) = torch.autograd.grad(gelu(x, impl="reference").sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.abs().max() > 0


def test_float64_is_for_the_reference() -> None:
    x, bias = data(3, 40).double(), data(40, seed=1).double()
    assert torch.autograd.gradcheck(
        lambda x, b: gelu(x, b), (x[:2, :5].requires_grad_(), bias[:5].requires_grad_())
    )
    assert relative_rms(gelu(x, bias), by_hand(x, bias)) < 1e-14
    with pytest.raises(ValueError, match="float64"):
        gelu(x, bias, impl="triton")


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(3, 40), torch.zeros(39), r"bias must have x's last dimension, \(40,\)"),
        (torch.zeros(3, 40), torch.zeros(1, 40), "bias must have"),
        (torch.zeros(3, 40), torch.zeros(40, dtype=torch.int64), "bias must be a floating"),
        (torch.zeros(3, 40), torch.zeros(40, device="meta"), "bias must be a floating"),
        (torch.zeros(()), None, "x must be a floating"),
        (torch.zeros(3, 40, dtype=torch.int32), None, "x must be a floating"),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_bad_input(x: torch.Tensor, bias: torch.Tensor | None, message: str, impl: str) -> None:
    with pytest.raises(ValueError, match=message):
        gelu(x, bias, impl=impl)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_opcheck(impl: str, has_bias: bool) -> None:
    ops = torch.ops.mixflow_fast
    x = data(2, 3, 40).requires_grad_()
    bias = data(40, seed=1, dtype=BF16).requires_grad_() if has_bias else None
    torch.library.opcheck(ops.gelu, (x, bias, impl))
    plain = [v if v is None else v.detach() for v in (x, bias)]
    dy = data(2, 3, 40, seed=2)
    torch.library.opcheck(ops.gelu_backward, (dy, *plain, has_bias, False, impl))
    torch.library.opcheck(ops.gelu_backward, (dy, *plain, has_bias, True, impl))


@pytest.mark.parametrize("impl", ["triton", "auto"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_is_eager(impl: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    bias = data(40, seed=1)

    def step(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return 2 * gelu(x * 1.5, bias, impl=impl)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (5, 7) if dynamic else (5,):
        x, dy = data(2, length, 40), data(2, length, 40, seed=2)
        found, expected = run(compiled, x, bias, dy), run(step, x, bias, dy)
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)


def test_meta_tensors_have_the_right_shapes() -> None:
    x, bias = torch.empty(0, 5, 40, device="meta"), torch.empty(40, device="meta", dtype=BF16)
    y = torch.ops.mixflow_fast.gelu(x, bias, "reference")
    dx, dbias, _ = torch.ops.mixflow_fast.gelu_backward(y, x, bias, True, False, "reference")
    assert y.shape == dx.shape == x.shape and y.is_contiguous()
    assert dbias.shape == (40,) and dbias.dtype == BF16


@pytest.mark.parametrize("bias_dtype", [FP32, BF16, None])
def test_declared_bytes_are_those_of_the_tensors(
    monkeypatch: pytest.MonkeyPatch, bias_dtype: torch.dtype | None
) -> None:
    x, dy = data(150, 40, dtype=BF16), data(150, 40, dtype=BF16)
    bias = None if bias_dtype is None else data(40, dtype=bias_dtype)
    forward = [module._gelu_forward_kernel]
    backward = [module._gelu_backward_kernel, rows._add_strips_kernel]
    leaves = x.requires_grad_(), bias if bias is None else bias.requires_grad_()
    y = None

    def call() -> None:
        nonlocal y
        y = gelu(*leaves, impl="triton")

    assert moved(monkeypatch, forward, call) == gelu_bytes(x, bias, False)
    assert moved(monkeypatch, backward, lambda: y.backward(dy)) == gelu_bytes(x, bias, True)


def test_strips_fill_a_device_and_cost_little() -> None:
    """Of (tokens, 4D) in SiT-XL: four programs a multiprocessor, partial sums below 2%."""
    for M in (8192, 16384, 32768, 65536):
        x = torch.empty(M, 4608, dtype=BF16, device="meta")
        bias = torch.empty(4608, dtype=BF16, device="meta")
        count = rows.strips(M, 4608)
        assert 4 * 132 <= count * 4608 / rows.BLOCK_F <= 5 * 132
        data_bytes = 3 * x.numel() * 2
        assert gelu_bytes(x, bias, True) < 1.02 * data_bytes
    # Every row is in a strip, and strips are whole numbers of tiles.
    for M, F in ((1, 1), (63, 8), (65, 5000), (10**6, 64), (10**7, 11008)):
        height = rows.strip_rows(M, F)
        assert height % 16 == 0 and height * rows.strips(M, F) >= M


def test_the_reference_is_the_formula() -> None:
    x, bias = data(5, 40), data(40, seed=1)
    assert relative_rms(gelu_reference(x, bias), by_hand(x.double(), bias.double())) < 1e-6
