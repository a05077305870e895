"""The residual norm of adaLN blocks: kernels, closed form and reference, against float64 too."""

import pytest
import torch

from mixflow_fast.kernels.residual_norm.launch import MAX_WIDTH
from mixflow_fast.kernels.residual_norm.op import (
    modulated_norm,
    modulated_norm_reference,
    residual_norm,
    residual_norm_reference,
)
from mixflow_fast.kernels.residual_norm.row_parts import row_parts
from tests.support.kernels import DEVICE, FLOORS, assert_as_exact_as_eager, relative_rms
from tests.support.residual_norm import (
    NAMES,
    OUTPUTS,
    SHAPE,
    alone,
    arguments,
    assert_same,
    data,
    eager,
    leaves,
    run,
    upstreams,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    "without", [(), ("weight",), ("h_bias", "shift"), ("h_bias", "weight", "shift")], ids=str
)
def test_every_form_is_the_reference(norm: str, per_token: bool, without: tuple) -> None:
    """The kernels, and the closed form that serves where they cannot run."""
    given, upstream = arguments(per_token=per_token, without=without), upstreams(SHAPE)
    expected = run(residual_norm_reference, given, upstream, norm=norm)
    for impl in ("triton", "auto"):
        assert_same(run(residual_norm, given, upstream, norm=norm, impl=impl), expected)
    plain = run(residual_norm, given, upstream, norm=norm, impl="reference")
    assert all(torch.equal(plain[name], expected[name]) for name in expected)
    assert_same(run(eager, given, upstream, norm=norm), expected)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("per_token", [False, True])
def test_without_a_branch(norm: str, per_token: bool) -> None:
    names, without = ("x", "shift", "scale", "weight"), ("h", "gate", "h_bias")
    given, upstream = arguments(per_token=per_token, without=without), (None, upstreams(SHAPE)[1])

    def plain(x, h, gate, shift, scale, h_bias=None, weight=None, **options):
        return x, modulated_norm_reference(x, shift, scale, weight=weight, **options)

    expected = run(plain, given, upstream, names, norm=norm)
    for impl in ("triton", "auto", "reference"):
        assert_same(run(alone, given, upstream, names, norm=norm, impl=impl), expected)
    zero = arguments(per_token=per_token) | {"h": torch.zeros(SHAPE, device=DEVICE)}
    zero |= {"h_bias": None}
    x_new, y = residual_norm(**leaves(zero, ()), norm=norm, impl="triton")
    assert torch.equal(x_new, zero["x"]) and relative_rms(y, expected["y"]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("per_token", [False, True])
def test_errors_are_eagers(dtype: torch.dtype, norm: str, per_token: bool) -> None:
    given, upstream = arguments((2, 5, 96), per_token, dtype), upstreams((2, 5, 96), dtype)
    ours = run(residual_norm, given, upstream, norm=norm, impl="triton")
    plain = run(eager, given, upstream, norm=norm)
    truth = run(eager, given, upstream, to=torch.float64, norm=norm)
    assert tuple(ours) == OUTPUTS
    for name in OUTPUTS:
        assert ours[name].dtype == dtype
        assert_as_exact_as_eager(ours[name], plain[name], truth[name], name)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("per_token", [False, True])
def test_the_closed_form_in_float64(norm: str, per_token: bool) -> None:
    """Against autograd of the reference, and against finite differences."""
    given = arguments(per_token=per_token)
    given = {name: value.double() for name, value in given.items()}
    upstream = tuple(v.double() for v in upstreams(SHAPE))
    ours = run(residual_norm, given, upstream, norm=norm)
    assert_same(ours, run(residual_norm_reference, given, upstream, norm=norm), 1e-13)
    small = leaves({n: v.double() for n, v in arguments((1, 2, 4), per_token).items()})

    def call(*values):
        return residual_norm(**dict(zip(NAMES, values, strict=True)), norm=norm)

    assert torch.autograd.gradcheck(call, tuple(small.values()))


@pytest.mark.parametrize(
    ("shape", "per_token"),
    [
        ((1, 1, 64), False),
        ((2, 19, 33), False),
        ((2, 19, 33), True),
        ((1, 3, 1023), False),
        ((3, 8, 1), False),
        ((1, 65, 16), False),
        ((65, 1, 16), False),
        ((1, 9, 1152), False),
        ((2, 9, 384), True),
        ((1, 17, 768), False),
        ((2, 3, 272), False),
    ],
)
def test_shapes(shape: tuple[int, int, int], per_token: bool) -> None:
    """Odd widths, several tiles and an unfinished one, more samples than one block sums.

    The last four rows lie in two parts, that of 272 in 256 + 64 with lanes beyond its end.
    """
    norm = "rms" if shape[-1] == 1 else "layer"
    given, upstream = arguments(shape, per_token), upstreams(shape)
    ours = run(residual_norm, given, upstream, norm=norm, impl="triton")
    truth = run(eager, given, upstream, to=torch.float64, norm=norm)
    plain = run(eager, given, upstream, norm=norm)
    for name in OUTPUTS:
        if truth[name].any():  # of a single number, the norm is constant
            assert_as_exact_as_eager(ours[name], plain[name], truth[name], name)


@pytest.mark.parametrize(
    ("dtype", "modulation_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_dtypes_may_differ(dtype: torch.dtype, modulation_dtype: torch.dtype, impl: str) -> None:
    """Outputs have x's dtype, gradients their inputs'; h's differs from x's as well."""
    given = arguments(dtype=dtype, modulation_dtype=modulation_dtype)
    given |= {"h": given["h"].to(torch.float16)}
    upstream = upstreams(SHAPE, dtype)
    ours = run(residual_norm, given, upstream, impl=impl)
    truth = run(eager, given, upstream, to=torch.float64)
    dtypes = [dtype, dtype, *(given[name].dtype for name in NAMES)]
    for name, expected in zip(OUTPUTS, dtypes, strict=True):
        assert ours[name].dtype == expected, name
        # Rounded once, or twice where x' was before.
        allowed = 2 * max(torch.finfo(expected).eps, torch.finfo(dtype).eps) + FLOORS[dtype]
        assert relative_rms(ours[name], truth[name]) < allowed, name


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_each_input_alone_requires_grad(per_token: bool, impl: str) -> None:
    given, upstream = arguments(per_token=per_token), upstreams(SHAPE)
    everything = run(residual_norm, given, upstream, impl=impl)
    for name in NAMES:
        single = run(residual_norm, given, upstream, (name,), impl=impl)
        assert torch.equal(single["y"], everything["y"])
        assert relative_rms(single[f"d{name}"], everything[f"d{name}"]) < 1e-6, name
    with torch.no_grad():
        outputs = residual_norm(**leaves(given), impl=impl)
        assert not any(v.requires_grad for v in outputs)
        assert torch.equal(outputs[1], everything["y"])


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_one_output_alone_is_used(impl: str) -> None:
    given, upstream = arguments(), upstreams(SHAPE)
    for pair in ((upstream[0], None), (None, upstream[1])):
        names = ("x", "h", "gate", "h_bias") if pair[1] is None else NAMES
        ours = run(residual_norm, given, pair, names, impl=impl)
        assert_same(ours, run(residual_norm_reference, given, pair, names))
    # Nothing flows to what only y depends on.
    ours = run(residual_norm, given, (upstream[0], None), ("x", "scale", "weight"), impl=impl)
    assert not ours["dscale"].any() and not ours["dweight"].any()


@pytest.mark.parametrize("per_token", [False, True])
def test_memory_layouts(per_token: bool) -> None:
    """Slices and transposes in, expanded upstream gradients; outputs are contiguous."""
    given, upstream = arguments(per_token=per_token), upstreams(SHAPE)
    wide = data(2, 9, 80)
    wide[:, 1:8, 8:] = given["h"]
    moved = {
        "x": given["x"].transpose(0, 1).contiguous().transpose(0, 1),
        "h": wide[:, 1:8, 8:],
        "gate": given["gate"].transpose(0, -1).contiguous().transpose(0, -1),
        "h_bias": given["h_bias"].repeat_interleave(2)[::2],
        "weight": given["weight"].repeat_interleave(3)[::3],
    }
    assert not any(value.is_contiguous() for value in moved.values())
    assert moved["gate"].stride(-1) != 1 and given["scale"].stride(-1) == 1
    expected = run(residual_norm, given, upstream, impl="triton")
    ours = run(residual_norm, given | moved, upstream, impl="triton")
    swapped = tuple(v.transpose(1, 2).contiguous().transpose(1, 2) for v in upstream)
    second = run(residual_norm, given, swapped, impl="triton")
    for name in OUTPUTS:
        assert torch.equal(ours[name], expected[name]), name
        assert torch.equal(second[name], expected[name]), name
        assert ours[name].is_contiguous(), name
    one = torch.full((), 0.5, device=DEVICE)
    expanded = run(residual_norm, given, (one.expand(SHAPE), one.expand(SHAPE)), impl="triton")
    full = torch.full(SHAPE, 0.5, device=DEVICE)
    written = run(residual_norm, given, (full, full), impl="triton")
    assert all(torch.equal(expanded[name], written[name]) for name in OUTPUTS)


@pytest.mark.parametrize("impl", ["triton", "auto", "reference"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", [(0, 5, 72), (2, 0, 72)])
def test_empty_batches(impl: str, per_token: bool, shape: tuple[int, int, int]) -> None:
    """Sums over nothing are 0."""
    given, upstream = arguments(shape, per_token), upstreams(shape)
    ours = run(residual_norm, given, upstream, impl=impl)
    for name, value in given.items():
        gradient = ours[f"d{name}"]
        assert gradient.shape == value.shape and not gradient.any(), name
    assert ours["y"].shape == shape


@pytest.mark.parametrize("shape", [(3, 19, 72), (3, 9, 1152), (3, 11, 272)])
def test_two_runs_give_the_same_bits_and_samples_do_not_depend_on_the_batch(
    shape: tuple[int, int, int],
) -> None:
    given, upstream = arguments(shape), upstreams(shape)
    first, second = (run(residual_norm, given, upstream, impl="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in OUTPUTS)
    vectors = ("h_bias", "weight")
    last = {n: v if n in vectors else v[2:] for n, v in given.items()}
    single = run(residual_norm, last, tuple(v[2:] for v in upstream), impl="triton")
    for name in OUTPUTS:
        if name.removeprefix("d") not in vectors:
            assert torch.equal(single[name], first[name][2:]), name


@pytest.mark.parametrize(
    ("D", "expected"),
    [
        (1152, (1024, 128, 2)),
        (768, (512, 256, 2)),
        (384, (256, 128, 1)),
        (272, (256, 64, 1)),
        (1280, (1024, 256, 4)),
        (1040, (1024, 128, 2)),
        (3072, (2048, 1024, 8)),
        (1024, (1024, 0, 4)),
        (2048, (2048, 0, 8)),
        (1792, (2048, 0, 8)),
        (1151, (2048, 0, 4)),
        (96, (128, 0, 1)),
        (33, (64, 0, 1)),
    ],
)
def test_parts_of_a_row(D: int, expected: tuple[int, int, int]) -> None:
    """The widths of SiT and DiT-DH; whole rows where two parts gain nothing or lie unaligned."""
    assert row_parts(D) == expected


def test_parts_fit_every_width() -> None:
    for D in range(1, MAX_WIDTH + 1):
        head, tail, warps = row_parts(D)
        assert head + tail >= D and (tail or head < 2 * max(D, 64)) and 1 <= warps <= 8
        for part in (head, tail or head):
            assert part & (part - 1) == 0
        # A thread holds whole vectors of the head, and two neighbours of the tail or more.
        assert not tail or (head % (32 * warps * 8) == 0 and tail >= 64 * warps and head < D)


def test_constant_tokens_and_zero_gates() -> None:
    """As at initialisation of adaLN-Zero, and where the variance is 0."""
    given = arguments(without=("h_bias", "weight")) | {"x": torch.ones(SHAPE, device=DEVICE)}
    given |= {name: torch.zeros(2, 72, device=DEVICE) for name in ("gate", "shift", "scale")}
    ours = run(residual_norm, given, upstreams(SHAPE), impl="triton")
    assert torch.equal(ours["x_new"], given["x"])
    assert not ours["y"].any() and not ours["dh"].any() and not ours["dscale"].any()
    assert all(value.isfinite().all() for value in ours.values()) and ours["dgate"].any()


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_y_is_the_norm_of_the_rounded_sum(impl: str) -> None:
    """y is computed from x' as it was rounded, which is what the backward pass reads."""
    given = leaves(arguments(dtype=torch.bfloat16), ())
    x_new, y = residual_norm(**given, impl=impl)
    rest = given["shift"], given["scale"]
    normed = modulated_norm(x_new, *rest, weight=given["weight"], impl=impl)
    wide = {name: value.float() for name, value in given.items()}
    assert (
        relative_rms(normed, y)
        < 2e-4
        < relative_rms(residual_norm(**wide, impl=impl)[1].bfloat16(), y)
    )


def test_eps_counts() -> None:
    given = leaves(arguments(), ())
    given["x"], given["h"] = 1e-3 * given["x"], 1e-3 * given["h"]
    given["h_bias"] = None
    found = [residual_norm(**given, eps=eps, impl="triton")[1] for eps in (1e-6, 1e-4)]
    expected = [residual_norm_reference(**given, eps=eps)[1] for eps in (1e-6, 1e-4)]
    assert all(relative_rms(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))
    assert relative_rms(found[0], found[1]) > 0.1
