"""Operators of the residual norm: opcheck, compilation, traffic, refusals."""

import itertools

import pytest
import torch

from mixflow_fast.kernels import runtime
from mixflow_fast.kernels.residual_norm import launch
from mixflow_fast.kernels.residual_norm.launch import residual_norm_bytes
from mixflow_fast.kernels.residual_norm.op import modulated_norm, residual_norm
from tests.support.kernels import DEVICE
from tests.support.residual_norm import (
    NAMES,
    SHAPE,
    alone,
    arguments,
    assert_same,
    data,
    leaves,
    run,
    upstreams,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
OPS = torch.ops.mixflow_fast


@pytest.mark.parametrize("per_token", [False, True])
def test_unneeded_gradients_are_not_written(per_token: bool) -> None:
    """No memory for them, and no partial sums where nothing is summed."""
    given = leaves(arguments(per_token=per_token), ())
    names = "gate", "shift", "scale", "h_bias", "weight"
    values = [given[name] for name in names]
    x_new, _, mean, rstd = OPS.residual_norm(*given.values(), "layer", 1e-6, "triton")
    upstream = upstreams(SHAPE)
    for only in range(8):
        needs = [i == only for i in range(8)]
        rest = (*(torch.float32,) * 4, "layer", "triton")
        inputs = (upstream[1], upstream[0], x_new, given["h"], *values, mean, rstd)
        outputs = OPS.residual_norm_backward(*inputs, needs, *rest)
        assert [bool(v.numel()) for v in outputs] == needs
        partial, sums = launch.scratch_shapes(*SHAPE, launch.Needs(*needs), per_token)
        summed = only in ((5, 6) if per_token else (2, 3, 4, 5, 6))
        assert partial == (2, 1, int(summed), 72) and sums == (2, int(only in (5, 6)), 72)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("per_token", [False, True])
def test_opcheck(impl: str, per_token: bool) -> None:
    given = leaves(arguments((2, 3, 16), per_token))
    options = "layer", 1e-6, impl
    torch.library.opcheck(OPS.residual_norm, (*given.values(), *options))
    few = leaves(arguments((2, 3, 16), per_token, without=("shift", "h_bias", "weight")), ("x",))
    torch.library.opcheck(OPS.residual_norm, (*few.values(), "rms", 1e-6, impl))
    modulated = tuple(given[name] for name in ("x", "shift", "scale", "weight"))
    torch.library.opcheck(OPS.modulated_norm, (*modulated, *options))
    plain = leaves(given, ())
    x_new, y, mean, rstd = OPS.residual_norm(*plain.values(), *options)
    inputs = (plain[name] for name in ("h", "gate", "shift", "scale", "h_bias", "weight"))
    needs = [True, False, True, True, True, True, True, True]
    rest = (*(torch.float32,) * 4, "layer", impl)
    torch.library.opcheck(
        OPS.residual_norm_backward, (y, x_new, x_new.clone(), *inputs, mean, rstd, needs, *rest)
    )


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_shapes_and_dtypes_on_the_meta_device(norm: str) -> None:
    for batch, dtype in itertools.product((0, 2), (torch.bfloat16, torch.float32)):
        given = arguments((batch, 5, 16), modulation_dtype=dtype)
        meta = {name: value.to("meta") for name, value in given.items()}
        inputs = leaves(meta)
        outputs = residual_norm(**inputs, norm=norm)
        torch.autograd.backward(outputs, [torch.empty_like(v) for v in outputs])
        assert all(v.shape == meta["x"].shape and v.is_meta for v in outputs)
        for name, value in inputs.items():
            assert value.grad.shape == value.shape and value.grad.dtype == value.dtype, name


@pytest.mark.parametrize(
    ("impl", "per_token"), [("auto", False), ("auto", True), ("triton", False), ("triton", True)]
)
def test_compiled_blocks_give_eagers_values_and_gradients(impl: str, per_token: bool) -> None:
    """Chunked modulation and layers around both operators, in one graph."""
    torch._dynamo.reset()
    B, N, D = 2, 5, 24
    matrix, bias = data(D, D, seed=8), data(D, seed=9)

    def block(x: torch.Tensor, modulation: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, shift2, scale2, _ = modulation.chunk(6, dim=-1)
        h = modulated_norm(x, shift, scale, impl=impl) @ matrix
        x, y = residual_norm(x, h, gate, shift2, scale2, h_bias=bias, weight=weight, impl=impl)
        return x + torch.tanh(y)

    modulation = data(*((B, N, 6 * D) if per_token else (B, 6 * D)), seed=3)
    found = []
    for call in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        inputs = [v.clone().requires_grad_() for v in (data(B, N, D), modulation, data(D, seed=5))]
        out = call(*inputs)
        found.append((out.detach(), *torch.autograd.grad(out, inputs, data(B, N, D, seed=6))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_inductor_gives_eagers_values_and_gradients() -> None:
    torch._dynamo.reset()
    given, upstream = arguments(), upstreams(SHAPE)
    compiled = torch.compile(residual_norm, fullgraph=True)
    assert_same(run(compiled, given, upstream), run(residual_norm, given, upstream), 1e-6)


def test_second_derivatives() -> None:
    given = leaves(arguments((1, 2, 4)))
    for impl in ("triton", "auto"):
        with pytest.raises(RuntimeError, match='impl="reference"'):
            x_new, y = residual_norm(**given, impl=impl)
            torch.autograd.grad((x_new + y).square().sum(), given["x"], create_graph=True)
        with pytest.raises(RuntimeError, match='impl="reference"'):
            y = modulated_norm(given["x"], given["shift"], given["scale"], impl=impl)
            torch.autograd.grad(y.square().sum(), given["x"], create_graph=True)
    y = residual_norm(**given, impl="reference")[1]
    (gradient,) = torch.autograd.grad(y.square().sum(), given["x"], create_graph=True)
    assert torch.autograd.grad(gradient.sum(), given["h"])[0].isfinite().all()


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    ("without", "norm", "dtype"),
    [
        ((), "layer", torch.float32),
        (("shift", "weight"), "layer", torch.bfloat16),
        (("h_bias",), "rms", torch.bfloat16),
        (("h", "gate", "h_bias"), "rms", torch.float32),
        (("h", "gate", "h_bias", "weight"), "layer", torch.bfloat16),
    ],
    ids=str,
)
def test_bytes_are_those_of_the_tensors_that_kernels_get(
    per_token: bool,
    without: tuple,
    norm: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every distinct tensor of a launch is read or written once in it."""
    moved = []
    for name in ("forward", "backward", "reduce", "sum"):
        kernel = getattr(launch, f"_residual_norm_{name}_kernel")

        def spy(*args, run=kernel.run, **kwargs):
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
            moved.append(
                sum({v.data_ptr(): v.numel() * v.element_size() for v in tensors}.values())
            )
            return run(*args, **kwargs)

        monkeypatch.setattr(kernel, "run", spy)
    shape = (2, 19, 24)
    given = arguments(shape, per_token, torch.float32, dtype, without)
    has_h = given["h"] is not None
    names = tuple(name for name in NAMES if given[name] is not None)
    upstream = upstreams(shape)
    function, upstream = (residual_norm, upstream) if has_h else (alone, (None, upstream[1]))
    run(function, given, upstream, names, norm=norm, impl="triton")
    options = {
        f"has_{name}": given[name] is not None for name in ("h", "shift", "h_bias", "weight")
    }
    options |= dict(per_token=per_token, norm=norm, dtype=dtype, has_dx_new=has_h)
    forward, backward = (
        residual_norm_bytes(given["x"].to("meta"), backward=way, **options) for way in (False, True)
    )
    assert (forward, backward) == (moved[0], sum(moved[1:]))


def test_partial_sums_are_small() -> None:
    """SiT-XL/2 in bf16: 4 A forward and 6 A backward, and what the sums add."""
    x = torch.empty(256, 256, 1152, dtype=torch.bfloat16, device="meta")
    size = x.numel() * x.element_size()
    for has_h_bias, most in ((False, 0.41), (True, 0.55)):
        options = dict(per_token=False, has_h_bias=has_h_bias)
        assert 4 < residual_norm_bytes(x, backward=False, **options) / size < 4.02
        assert 6 < residual_norm_bytes(x, backward=True, **options) / size < 6 + most


BAD = [
    (dict(norm="batch"), "norm must be one of"),
    (dict(x=torch.zeros(7, 72, device=DEVICE)), r"x must be floating-point \(B, N, D\)"),
    (dict(x=torch.zeros(SHAPE, dtype=torch.int64, device=DEVICE)), "x must be floating-point"),
    (dict(h=torch.zeros(2, 7, 71, device=DEVICE)), r"h must be .*\(2, 7, 72\), got \(2, 7, 71\)"),
    (dict(gate=torch.zeros(2, 7, 72, device=DEVICE)), r"gate must be \(B, D\) = \(2, 72\)"),
    (dict(scale=torch.zeros(2, 7, 72, device=DEVICE)), r"gate must be \(B, N, D\), as scale"),
    (dict(scale=torch.zeros(72, device=DEVICE)), r"scale must be \(B, D\), or \(B, N, D\)"),
    (dict(shift=torch.zeros(2, 1, device=DEVICE)), r"shift must be \(B, D\)"),
    (dict(scale=torch.zeros(2, 72, dtype=torch.int32, device=DEVICE)), "scale must be a floating"),
    (dict(h_bias=torch.zeros(71, device=DEVICE)), r"h_bias must be \(D,\) = \(72,\), got \(71,\)"),
    (dict(weight=torch.zeros(72, device="meta")), "weight must be a floating-point tensor on x's"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
@pytest.mark.parametrize("impl", ["triton", "auto", "reference"])
def test_bad_input(change: dict, message: str, impl: str) -> None:
    with pytest.raises(ValueError, match=message):
        residual_norm(**arguments() | change, impl=impl)


def test_bad_input_without_a_branch_and_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(without=("h", "gate", "h_bias"))
    with pytest.raises(ValueError, match="shift must be"):
        modulated_norm(given["x"], given["shift"][:1], given["scale"])
    wide = [data(1, 1, 4100), data(1, 4100), data(1, 4100)]
    with pytest.raises(ValueError, match="widths up to 4096, got 4100"):
        modulated_norm(*wide, impl="triton")
    assert modulated_norm(*wide).shape == (1, 1, 4100)
    with pytest.raises(ValueError, match="float64"):
        residual_norm(
            **{name: value.double() for name, value in arguments().items()}, impl="triton"
        )
    with pytest.raises(ValueError, match="impl must be one of"):
        residual_norm(**arguments(), impl="cuda")
    monkeypatch.setattr(runtime, "triton", None)
    assert residual_norm(**arguments())[0].shape == SHAPE
    with pytest.raises(ValueError, match="Triton is not installed"):
        residual_norm(**arguments(), impl="triton")
