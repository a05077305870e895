"""The attention operator: every backend that runs here, gradients, layouts, compilation."""

import pytest
import torch
import torch.nn.functional as F

from mixflow_fast.kernels.attention import choice
from mixflow_fast.kernels.attention import op as attention_module
from mixflow_fast.kernels.attention.op import (
    BACKENDS,
    REGISTRY,
    _attention_backward_op,
    _attention_op,
    attention,
    attention_bytes,
    attention_reference,
)
from tests.support.attention import data, exact, leaves, problem, run, tables
from tests.support.kernels import DEVICE, ON_GPU, assert_as_exact_as_eager, relative_rms

pytestmark = pytest.mark.usefixtures("poisoned_memory")
HERE = list(BACKENDS) if ON_GPU else ["flash", "math"]
IMPLS = ["triton", "reference"]
KINDS = [(None, False), (None, True), ("layer", False), ("rms", True)]
SHAPES = [(1, 2, 1, 64), (2, 5, 3, 72), (2, 7, 2, 10)]


def skip_unless_served(backend: str, qkv: torch.Tensor) -> None:
    """Packages may be absent, and cuDNN may fail its test; the others have to serve a GPU."""
    reason = REGISTRY[backend].missing(qkv.device, qkv.dtype)
    if reason:
        pytest.skip(f"{backend}: {reason}")
    if backend in ("cudnn", "flash2", "flash3"):
        try:
            choice.resolve(backend, qkv, True)
        except ValueError as error:
            pytest.skip(str(error))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("norm", "rotated"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_eager(impl, backend, shape, norm, rotated, dtype) -> None:
    qkv, weights, upstream, options = problem(shape, dtype, norm, rotated)
    skip_unless_served(backend, qkv)
    ours = run(attention, qkv, weights, upstream, backend=backend, impl=impl, **options)
    eager = run(attention_reference, qkv, weights, upstream, **options)
    truth = exact(qkv, weights, upstream, options)
    assert list(ours) == list(truth)
    assert ours["out"].is_contiguous() and ours["dqkv"].is_contiguous()
    for name, value in ours.items():
        assert value.dtype == dtype and value.shape == truth[name].shape
        if name == "dk_bias" and not rotated:
            # The same bias of every key shifts a row's scores together: no gradient at all.
            assert value.norm() <= 0.1 * truth["dq_bias"].norm()
        else:
            assert_as_exact_as_eager(value, eager[name], truth[name], name)


@pytest.mark.parametrize("backend", HERE)
def test_float64(backend) -> None:
    given = problem((2, 5, 2, 12), torch.float64, "layer", True)
    skip_unless_served(backend, given[0])
    found = run(attention, *given[:3], backend=backend, **given[3])
    truth = exact(*given)
    for name, value in found.items():
        assert value.dtype == torch.float64 and relative_rms(value, truth[name]) < 1e-13, name


def test_reference_is_pytorchs() -> None:
    qkv, _, upstream, _ = problem((2, 6, 3, 8), torch.float64)

    def pytorch(qkv):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    ours, theirs = (run(f, qkv, {}, upstream) for f in (attention_reference, pytorch))
    assert all(relative_rms(ours[name], theirs[name]) < 1e-14 for name in ours)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("norm", "rotated"), KINDS)
def test_memory_layouts(impl, norm, rotated) -> None:
    """Slices of wider tensors, tokens first, an expanded upstream gradient: the same bits."""
    B, N, H, K = shape = (2, 5, 2, 16)
    qkv, weights, upstream, options = problem(shape, norm=norm, rotated=rotated)
    options |= {"impl": impl, "backend": "math"}
    upstream = upstream[:1, :1].expand_as(upstream)
    expected = run(attention, qkv, weights, upstream.contiguous(), **options)
    wide = data(B, N, 3 * H * K + 24, seed=8)
    wide[..., 8:-16] = qkv.flatten(2)
    turned = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    for view in (wide[..., 8:-16].unflatten(-1, (3, H, K)), turned):
        assert not view.is_contiguous()
        found = run(attention, view, weights, upstream, **options)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_each_input_alone_gets_its_gradient(impl) -> None:
    qkv, weights, upstream, options = problem((2, 4, 2, 8), norm="layer", rotated=True)
    every = run(attention, qkv, weights, upstream, impl=impl, **options)
    inputs = {"qkv": qkv, **{name: w.detach() for name, w in weights.items()}}
    for name in inputs:
        alone = {k: v.detach().requires_grad_(k == name) for k, v in inputs.items()}
        leaf = alone[name]
        out = attention(alone.pop("qkv"), impl=impl, **alone, **options)
        (gradient,) = torch.autograd.grad(out, leaf, upstream)
        assert torch.equal(gradient, every[f"d{name}"]), name


def test_two_runs_give_the_same_bits() -> None:
    qkv, weights, upstream, options = problem((2, 9, 3, 72), norm="layer", rotated=True)
    first, second = (
        run(attention, qkv, weights, upstream, impl="triton", **options) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("first", HERE)
@pytest.mark.parametrize("second", HERE)
def test_one_backends_forward_fits_anothers_backward(first, second) -> None:
    """lse means the same for all backends: a choice may change between the passes."""
    qkv, _, upstream, _ = problem((2, 7, 2, 16), torch.bfloat16)
    for backend in (first, second):
        skip_unless_served(backend, qkv)
    nothing, rest = [None] * 6, ("none", 1e-6)
    truth = exact(qkv, {}, upstream, {})["dqkv"]
    out, lse, _ = _attention_op(qkv, *nothing, *rest, first, True, "auto")
    state = out, lse, qkv.new_empty(0), qkv
    dqkv, *_ = _attention_backward_op(upstream, *state, *nothing, *rest, second, "auto")
    assert relative_rms(dqkv, truth) < 1e-2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", [None, "layer"])
def test_empty_batches(impl, norm) -> None:
    qkv, weights, upstream, options = problem((0, 4, 2, 8), norm=norm, rotated=True)
    found = run(attention, qkv, weights, upstream, impl=impl, **options)
    assert found.pop("out").shape == (0, 4, 16)
    assert found.pop("dqkv").shape == (0, 4, 3, 2, 8)
    assert all(not g.any() for g in found.values())


def test_without_gradients_nothing_is_kept(monkeypatch) -> None:
    sizes = []

    def spy(*arguments):
        outputs = _attention_op(*arguments)
        sizes.append([x.numel() for x in outputs])
        return outputs

    monkeypatch.setattr(attention_module, "_attention_op", spy)
    qkv, weights, _, options = problem((2, 4, 2, 8), norm="layer", rotated=True)
    kept = attention(qkv, **weights, **options)
    with torch.no_grad():
        free = attention(qkv, **weights, **options)
    attention(qkv, **{name: w.detach() for name, w in weights.items()}, **options)
    attention(qkv.clone().requires_grad_())
    assert sizes == [[128, 16, 256], [128, 0, 0], [128, 0, 0], [128, 16, 0]]
    assert torch.equal(kept, free)


def arguments(norm: str, impl: str, backend: str) -> tuple[torch.Tensor, list]:
    weights = leaves("layer", 8, torch.float32)
    if norm == "none":
        weights = dict.fromkeys(weights)
    qkv = data(2, 5, 3, 2, 8).requires_grad_()
    return qkv, [*tables(5, 8).values(), *weights.values(), norm, 1e-6, backend, impl]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_opcheck(impl, norm) -> None:
    qkv, (*rest, backend, _) = arguments(norm, impl, "auto")
    choice.choose_backend(2, 5, 2, 8, torch.float32, DEVICE)
    for with_state in (True, False):
        given = qkv if with_state else qkv.detach()
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in rest]
        options = rest if with_state else detached
        torch.library.opcheck(_attention_op, (given, *options, backend, with_state, impl))
    out, lse, qk = _attention_op(qkv.detach(), *detached, backend, True, impl)
    given = (torch.ones_like(out), out, lse, qk, qkv.detach(), *detached, backend, impl)
    torch.library.opcheck(_attention_backward_op, given)


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("batch", [0, 2])
def test_shapes_on_meta_tensors(norm, batch) -> None:
    """ "auto" is not resolved there: the shapes are every backend's."""
    qkv, rest = arguments(norm, "reference", "auto")
    qkv, *rest = (
        x.detach()[: batch if x.dim() == 5 else None] if isinstance(x, torch.Tensor) else x
        for x in (qkv, *rest)
    )
    *rest, backend, impl = rest
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in rest]
    for with_state in (True, False):
        real = _attention_op(qkv, *rest, backend, with_state, impl)
        fake = _attention_op(qkv.to("meta"), *meta, backend, with_state, impl)
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_without_a_break_and_without_a_test(impl, monkeypatch) -> None:
    """A shape first seen under torch.compile is tested when it runs, not while it is traced."""
    choice.reset_choices()
    given = problem((2, 6, 2, 8), norm="rms", rotated=True)
    seen = []
    original = choice._self_test

    def spy(name, key):
        seen.append(torch.compiler.is_compiling())
        return original(name, key)

    monkeypatch.setattr(choice, "_self_test", spy)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    found = run(compiled, *given[:3], impl=impl, **given[3])
    plain = run(attention, *given[:3], impl=impl, **given[3])
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert seen and not any(seen)


@pytest.mark.parametrize("backend", HERE)
def test_autocast_does_not_reach_inside(backend) -> None:
    given = problem((2, 6, 2, 8), norm="rms", rotated=True)
    skip_unless_served(backend, given[0])
    choice.reset_choices()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = run(attention, *given[:3], backend=backend, **given[3])
    outside = run(attention, *given[:3], backend=backend, **given[3])
    assert all(torch.equal(inside[name], outside[name]) for name in outside)


def test_training_a_projection_and_inference_mode() -> None:
    """As a model calls it: a view of a linear layer's output; no copies of the gradient."""
    linear = torch.nn.Linear(16, 48).to(DEVICE)
    x = data(2, 5, 16)
    with torch.inference_mode():
        first = attention(linear(x).view(2, 5, 3, 2, 8))
    out = attention(linear(x).view(2, 5, 3, 2, 8))
    assert torch.equal(first, out.detach())
    (ours,) = torch.autograd.grad(out.square().sum(), linear.weight)
    out = attention_reference(linear(x).view(2, 5, 3, 2, 8))
    (plain,) = torch.autograd.grad(out.square().sum(), linear.weight)
    assert relative_rms(ours, plain) < 1e-5


def test_second_derivatives_belong_to_the_reference() -> None:
    qkv = data(1, 3, 3, 1, 4).double().requires_grad_()
    with pytest.raises(RuntimeError, match="attention_reference"):
        torch.autograd.grad(attention(qkv, backend="math").sum(), qkv, create_graph=True)
    assert torch.autograd.gradgradcheck(attention_reference, (qkv,))


def test_bad_input() -> None:
    qkv = data(1, 4, 3, 2, 8)
    with pytest.raises(ValueError, match='backend must be "auto" or one of .*flash3'):
        attention(qkv, backend="xformers")
    with pytest.raises(ValueError, match="norm must be one of"):
        attention(qkv, norm="batch")
    with pytest.raises(ValueError, match=r"qkv must be .*\(B, N, 3, H, K\)"):
        attention(qkv.flatten(2))
    with pytest.raises(ValueError, match="impl must be one of"):
        attention(qkv, impl="cuda")


def test_bytes() -> None:
    shape, dtype = (256, 256, 16, 72), torch.bfloat16
    A = 256 * 256 * 1152 * 2
    tables_ = 2 * 256 * 72 * 4

    def count(backend, *, heads=shape, **options) -> int:
        return attention_bytes(*heads, dtype, backend=backend, **options)

    assert count("flash") == count("flash2") == 0
    assert count("flash", rope=True) == 4 * A + tables_
    assert count("flash", norm="layer") == 4 * A
    for backend, separate in (("flash", True), ("cudnn", True), ("flash2", False)):
        plain = 6 * A if separate else 0
        assert count(backend, backward=True) == plain
        moved = 6 if separate else 4
        assert count(backend, backward=True, rope=True) == moved * A + tables_
        assert count(backend, backward=True, norm="rms") == (moved + 2) * A
    # Padded heads come back separate.
    odd = (2, 4, 2, 36)
    assert count("efficient", heads=odd, backward=True) == 6 * 2 * 4 * 2 * 36 * 2
