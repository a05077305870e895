"""Norm and rotation of q and k: kernels and reference against PyTorch's own, float64 and itself."""

import pytest
import torch
import torch.nn.functional as F

from mixflow_fast.kernels.attention import qk_norm_rope_launch
from mixflow_fast.kernels.attention.qk_norm_rope import (
    _qk_norm_rope_backward_op,
    _qk_norm_rope_op,
    finish,
    qk_norm_rope,
    qk_norm_rope_reference,
)
from mixflow_fast.kernels.attention.qk_norm_rope_launch import QkOptions, row_parts
from tests.support.attention import angles, data, doubled, leaves, tables
from tests.support.kernels import DEVICE, assert_as_exact_as_eager, relative_rms

pytestmark = pytest.mark.usefixtures("poisoned_memory")
IMPLS = ["triton", "reference"]
# (norm, rotated)
KINDS = [(None, True), ("layer", False), ("layer", True), ("rms", False), ("rms", True)]
# (B, N, H, K)
# 72 lies in 64 + 8, and 88 in 64 + 32 with columns beyond its end.
SHAPES = [(1, 1, 1, 64), (2, 5, 3, 72), (1, 3, 5, 88), (2, 7, 2, 10)]


def eager(qkv, *, cos=None, sin=None, norm=None, eps=1e-6, **weights):
    """As a model writes it: PyTorch's norms in the data's dtype, the rotation in the tables'."""
    found = []
    for side, x in zip("qk", qkv.unbind(2)[:2], strict=True):
        weight, bias = weights.get(f"{side}_weight"), weights.get(f"{side}_bias")
        if norm == "layer":
            x = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        elif norm == "rms":
            x = F.rms_norm(x, x.shape[-1:], weight, eps)
        if cos is not None:
            c, s = cos[None, :, None], sin[None, :, None]
            half = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
            x = (x * c + half * s).to(qkv.dtype)
        found.append(x)
    return found


def run(function, qkv, weights, upstream, **options) -> dict[str, torch.Tensor]:
    """q, k and all gradients, by name."""
    qkv = qkv.detach().requires_grad_()
    weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
    outputs = function(qkv, **weights, **options)
    gradients = torch.autograd.grad(outputs, [qkv, *weights.values()], list(upstream))
    names = ["q", "k", "dqkv", *(f"d{name}" for name in weights)]
    return dict(zip(names, [*(x.detach() for x in outputs), *gradients], strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("norm", "rotated"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_eager(impl, shape, norm, rotated, dtype) -> None:
    B, N, H, K = shape
    qkv = data(B, N, 3, H, K, dtype=dtype) * 2 + 0.5
    upstream = data(2, B, N, H, K, dtype=dtype, seed=3) * 1.7
    weights, rope = leaves(norm, K, dtype), tables(N, K) if rotated else {}
    ours = run(qk_norm_rope, qkv, weights, upstream, norm=norm, impl=impl, **rope)
    plain = run(eager, qkv, weights, upstream, norm=norm, **rope)
    truth = run(
        eager, qkv.double(), doubled(weights), upstream.double(), norm=norm, **doubled(rope)
    )
    assert list(ours) == list(truth)
    for name, value in ours.items():
        assert value.dtype == dtype and value.shape == truth[name].shape
        assert_as_exact_as_eager(value, plain[name], truth[name], name)
    assert not ours["dqkv"][:, :, 2].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_rotation_is_the_complex_one(impl) -> None:
    """x0 + i x1 times exp(i theta), an independent formula; its gradient turns back."""
    B, N, H, K = 2, 6, 2, 12
    qkv = data(B, N, 3, H, K)
    upstream = data(2, B, N, H, K, seed=3)
    found = run(qk_norm_rope, qkv, {}, upstream, impl=impl, **tables(N, K))
    turn = torch.polar(torch.ones_like(angles(N, K)).double(), angles(N, K).double())

    def turned(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * by[None, :, None]).flatten(-2)

    for i, name in enumerate("qk"):
        assert relative_rms(found[name], turned(qkv[:, :, i], turn)) < 1e-6
        assert relative_rms(found["dqkv"][:, :, i], turned(upstream[i], turn.conj())) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("norm", "K"), [("layer", 33), ("rms", 33), ("layer", 1), ("rms", 130)])
def test_widths_without_pairs_and_without_weights(impl, norm, K) -> None:
    B, N, H = 2, 3, 2
    qkv, upstream = data(B, N, 3, H, K), data(2, B, N, H, K, seed=3)
    ours = run(qk_norm_rope, qkv, {}, upstream, norm=norm, impl=impl)
    truth = run(eager, qkv.double(), {}, upstream.double(), norm=norm)
    for name, value in ours.items():
        if truth[name].norm() > 1e-9:
            assert relative_rms(value, truth[name]) < 3e-6, name
        else:  # LayerNorm over one element
            assert value.abs().max() < 1e-6


@pytest.mark.parametrize("K", [64, 72])
def test_many_rows_a_program(monkeypatch, K) -> None:
    """Programs that loop over tiles, a last one with less to do, and more partial rows than one."""
    monkeypatch.setattr(qk_norm_rope_launch, "MAX_PARTIALS", 2)
    B, N, H = 3, 17, 2
    qkv, upstream = data(B, N, 3, H, K), data(2, B, N, H, K, seed=3)
    weights = leaves("layer", K, torch.float32)
    options = dict(norm="layer", eps=1e-5, **tables(N, K))
    ours = run(qk_norm_rope, qkv, weights, upstream, impl="triton", **options)
    truth = run(
        eager,
        qkv.double(),
        doubled(weights),
        upstream.double(),
        **dict(norm="layer", eps=1e-5, **doubled(tables(N, K))),
    )
    for name, value in ours.items():
        assert relative_rms(value, truth[name]) < 1e-6, name


@pytest.mark.parametrize(("N", "H", "K"), [(45, 1, 64), (9, 40, 64), (70, 1, 34)])
def test_rotation_over_several_groups_of_tokens(N, H, K) -> None:
    """Programs that begin inside a sample, sections wider than a program, a last group cut off."""
    qkv, upstream = data(2, N, 3, H, K), data(2, 2, N, H, K, seed=3)
    ours = run(qk_norm_rope, qkv, {}, upstream, impl="triton", **tables(N, K))
    truth = run(eager, qkv.double(), {}, upstream.double(), **doubled(tables(N, K)))
    for name, value in ours.items():
        assert relative_rms(value, truth[name]) < 1e-6, name


@pytest.mark.parametrize("impl", IMPLS)
def test_memory_layouts(impl) -> None:
    """A slice of a wider projection, gaps between heads, an expanded upstream gradient."""
    B, N, H, K = 2, 5, 2, 8
    qkv = data(B, N, 3, H, K)
    weights = leaves("rms", K, torch.float32)
    options = dict(norm="rms", impl=impl, **tables(N, K))
    upstream = data(2, 1, 1, 1, K, seed=3).expand(2, B, N, H, K)
    expected = run(qk_norm_rope, qkv, weights, upstream.contiguous(), **options)
    wide = data(B, N, 3 * H * K + 24, seed=8)
    wide[..., 8:-16] = qkv.flatten(2)
    gaps = data(B, N, 3, H, K + 8, seed=8)
    gaps[..., :K] = qkv
    turned = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    views = wide[..., 8:-16].unflatten(-1, (3, H, K)), gaps[..., :K], turned
    for view in views:
        assert not view.is_contiguous()
        # A leaf of these strides: `detach` keeps them.
        found = run(qk_norm_rope, view, weights, upstream, **options)
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("impl", IMPLS)
def test_each_input_alone_gets_its_gradient(impl) -> None:
    B, N, H, K = 2, 3, 2, 8
    qkv, upstream = data(B, N, 3, H, K), data(2, B, N, H, K, seed=3)
    weights = leaves("layer", K, torch.float32)
    options = dict(norm="layer", impl=impl, **tables(N, K))
    every = run(qk_norm_rope, qkv, weights, upstream, **options)
    inputs = {"qkv": qkv, **{name: w.detach() for name, w in weights.items()}}
    for name in inputs:
        alone = {k: v.detach().requires_grad_(k == name) for k, v in inputs.items()}
        outputs = qk_norm_rope(
            alone.pop("qkv") if name != "qkv" else alone["qkv"],
            **{k: v for k, v in alone.items() if k != "qkv"},
            **options,
        )
        leaf = alone[name]
        (gradient,) = torch.autograd.grad(outputs, [leaf], list(upstream))
        assert torch.equal(gradient, every[f"d{name}"]), name
    # Only one of the two outputs is used.
    leaf = qkv.clone().requires_grad_()
    q, _ = qk_norm_rope(leaf, **{k: w.detach() for k, w in weights.items()}, **options)
    (gradient,) = torch.autograd.grad(q, leaf, upstream[0])
    assert torch.equal(gradient[:, :, 0], every["dqkv"][:, :, 0])
    assert not gradient[:, :, 1:].any()


def test_two_runs_give_the_same_bits() -> None:
    B, N, H, K = 2, 9, 3, 72
    qkv, upstream = data(B, N, 3, H, K), data(2, B, N, H, K, seed=3)
    weights, options = leaves("layer", K, torch.float32), dict(norm="layer", **tables(N, K))
    first, second = (
        run(qk_norm_rope, qkv, weights, upstream, impl="triton", **options) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [40, 72, 128])
def test_samples_do_not_depend_on_the_batch(K, dtype) -> None:
    """Bit for bit, with programs that work on two samples at once."""
    B, N, H = 3, 7, 3
    qkv, upstream = data(B, N, 3, H, K, dtype=dtype), data(2, B, N, H, K, dtype=dtype, seed=3)
    weights, options = leaves("layer", K, dtype), dict(norm="layer", **tables(N, K))
    every = run(qk_norm_rope, qkv, weights, upstream, impl="triton", **options)
    last = run(qk_norm_rope, qkv[2:], weights, upstream[:, 2:], impl="triton", **options)
    for name in ("q", "k", "dqkv"):
        assert torch.equal(last[name], every[name][2:]), name


@pytest.mark.parametrize("K", [72, 64])
def test_gradients_may_lie_where_they_go(K) -> None:
    """As backends that pack leave them, and with a rotation across threads."""
    B, N, H = 2, 5, 3
    qkv, rope = data(B, N, 3, H, K), tables(N, K)
    weights = [w.detach() for w in leaves("layer", K, torch.float32).values()]
    options = QkOptions(*rope.values(), *weights, "layer", 1e-6)
    gradients = data(B, N, 3, H, K, seed=3)
    apart = torch.empty_like(qkv)
    expected = finish(tuple(gradients.clone().unbind(2)), apart, qkv, options, "triton")
    found = finish(gradients.unbind(2)[:2], gradients, qkv, options, "triton")
    assert torch.equal(gradients, apart)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("K", "dtype", "expected"),
    [
        (72, torch.bfloat16, (8, 64, 8)),
        (72, torch.float32, (16, 64, 16)),
        (96, torch.float16, (8, 64, 32)),
        (88, torch.bfloat16, (8, 64, 32)),
        (64, torch.bfloat16, (8, 64, 0)),
        (128, torch.float32, (32, 128, 0)),
        (112, torch.bfloat16, (16, 128, 0)),
        (70, torch.bfloat16, (16, 128, 0)),
        (1, torch.float32, (1, 1, 0)),
    ],
)
def test_parts_of_a_row(K, dtype, expected) -> None:
    assert row_parts(K, dtype) == expected


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")
@pytest.mark.parametrize("impl", IMPLS)
def test_weights_of_another_dtype_and_a_closed_form(impl) -> None:
    """bf16 data, float32 weights: q / rms(q) w, of rows that are known."""
    qkv = torch.tensor([3.0, 4.0], device=DEVICE).expand(1, 2, 3, 1, 2).to(torch.bfloat16)
    w = torch.tensor([2.0, -1.0], device=DEVICE, requires_grad=True)
    q, k = qk_norm_rope(qkv, norm="rms", q_weight=w, k_weight=w, eps=0.0, impl=impl)
    expected = torch.tensor([6.0, -4.0]) / 12.5**0.5
    assert q.dtype == torch.bfloat16
    torch.testing.assert_close(q[0, 1, 0].cpu().float(), expected, rtol=4e-3, atol=0)
    (q.float().sum() + 2 * k.float().sum()).backward()
    assert w.grad.dtype == torch.float32
    torch.testing.assert_close(w.grad.cpu(), 6 * torch.tensor([3.0, 4.0]) / 12.5**0.5)


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_batches(impl) -> None:
    qkv = data(0, 4, 3, 2, 8).requires_grad_()
    weights = leaves("layer", 8, torch.float32)
    q, k = qk_norm_rope(qkv, norm="layer", impl=impl, **weights, **tables(4, 8))
    assert q.shape == k.shape == (0, 4, 2, 8)
    (q.sum() + k.sum()).backward()
    assert qkv.grad.shape == qkv.shape
    assert all(not w.grad.any() for w in weights.values())


def arguments(norm: str, impl: str) -> list:
    weights = leaves("layer", 8, torch.float32)
    if norm == "none":
        weights = dict.fromkeys(weights)
    return [*tables(5, 8).values(), *weights.values(), norm, 1e-6, impl]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_opcheck(impl, norm) -> None:
    qkv, rest = data(2, 5, 3, 2, 8), arguments(norm, impl)
    torch.library.opcheck(_qk_norm_rope_op, (qkv.requires_grad_(), *rest))
    rest = [x.detach() if isinstance(x, torch.Tensor) else x for x in rest]
    gradient = data(2, 5, 2, 2, 8, seed=1)
    torch.library.opcheck(_qk_norm_rope_backward_op, (gradient, qkv.detach(), *rest))
    shapes = [x.shape for x in _qk_norm_rope_backward_op(gradient, qkv.detach(), *rest)]
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in rest]
    fake = _qk_norm_rope_backward_op(gradient.to("meta"), qkv.detach().to("meta"), *meta)
    assert [x.shape for x in fake] == shapes


def test_compiles_without_a_break() -> None:
    qkv, upstream = data(2, 5, 3, 2, 8), data(2, 2, 5, 2, 8, seed=1)
    weights, options = leaves("rms", 8, torch.float32), dict(norm="rms", **tables(5, 8))
    plain = run(qk_norm_rope, qkv, weights, upstream, impl="triton", **options)
    compiled = torch.compile(qk_norm_rope, fullgraph=True, backend="aot_eager")
    found = run(compiled, qkv, weights, upstream, impl="triton", **options)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_second_derivatives_belong_to_the_reference() -> None:
    qkv = data(1, 2, 3, 1, 4).double().requires_grad_()
    rope = doubled(tables(2, 4))
    with pytest.raises(RuntimeError, match="qk_norm_rope_reference"):
        torch.autograd.grad(qk_norm_rope(qkv, **rope)[0].sum(), qkv, create_graph=True)
    weights = doubled(leaves("layer", 4, torch.float32))
    weights = {name: w.requires_grad_() for name, w in weights.items()}

    def function(qkv, *values):
        named = dict(zip(weights, values, strict=True))
        return qk_norm_rope_reference(qkv, norm="layer", **named, **rope)

    assert torch.autograd.gradcheck(function, (qkv, *weights.values()))
    assert torch.autograd.gradgradcheck(function, (qkv, *weights.values()))


BAD = [
    (dict(qkv=torch.zeros(2, 5, 2, 2, 8)), r"\(B, N, 3, H, K\)"),
    (dict(qkv=torch.zeros(2, 5, 3, 16)), r"\(B, N, 3, H, K\)"),
    (dict(qkv=torch.zeros(2, 5, 3, 2, 8, dtype=torch.int32)), "floating-point"),
    (dict(norm="batch"), "norm must be one of"),
    (dict(cos=torch.zeros(5, 8)), "cos and sin belong together"),
    (dict(cos=torch.zeros(5, 4), sin=torch.zeros(5, 4)), r"cos must be \(N, K\) = \(5, 8\)"),
    (dict(cos=torch.zeros(5, 8), sin=torch.zeros(5, 8).half()), "sin must be .* float32"),
    (dict(q_weight=torch.ones(8), norm="rms"), "q_weight and k_weight belong together"),
    (dict(q_weight=torch.ones(8), k_weight=torch.ones(8)), 'need norm="layer"'),
    (
        dict(norm="layer", q_bias=torch.ones(8), k_bias=torch.ones(8)),
        'biases need norm="layer" and weights',
    ),
    (dict(q_weight=torch.ones(8), k_weight=torch.ones(4), norm="rms"), "k_weight must be"),
    (dict(q_weight=torch.ones(8), k_weight=torch.ones(8).half(), norm="rms"), "of one dtype"),
    (dict(impl="cuda"), "impl must be one of"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change, message) -> None:
    change = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    qkv = change.pop("qkv", data(2, 5, 3, 2, 8))
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(qkv, **change)


def test_a_rotation_needs_pairs() -> None:
    with pytest.raises(ValueError, match="even head dimension, got K = 3"):
        qk_norm_rope(data(1, 2, 3, 1, 3), cos=data(2, 3), sin=data(2, 3))
