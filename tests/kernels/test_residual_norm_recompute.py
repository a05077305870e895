"""The backward pass of the residual norm that recomputes its output."""

from __future__ import annotations

import pytest
import torch

from mixflow_fast.kernels.residual_norm import launch
from mixflow_fast.kernels.residual_norm.launch import residual_norm_bytes
from mixflow_fast.kernels.residual_norm.op import residual_norm
from mixflow_fast.kernels.residual_norm.recompute import (
    residual_norm_forward,
    residual_norm_recompute,
)
from tests.support.kernels import assert_as_exact_as_eager, moved
from tests.support.residual_norm import (
    NAMES,
    alone,
    arguments,
    data,
    eager,
    leaves,
    run,
    upstreams,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ALONE = ("h", "gate", "h_bias")


def recomputed(given: dict, upstream: tuple, needs: list[bool] | None = None, **options) -> dict:
    """Outputs and gradients by name, and y recomputed."""
    given = leaves(given, ())
    eps, impl = options.pop("eps", 1e-6), options.pop("impl", "triton")
    options |= {"h_bias": given.pop("h_bias"), "weight": given.pop("weight"), "impl": impl}
    x_new, y, mean, rstd = residual_norm_forward(**given, **options, eps=eps)
    present = {**given, **options}
    needs = needs or [*(present[name] is not None for name in NAMES), True]
    rest = [given[name] for name in ("h", "gate", "shift", "scale")]
    dx_new, dy = upstream
    found = residual_norm_recompute(dy, dx_new, x_new, *rest, mean, rstd, needs, **options)
    assert [v is not None for v in found] == needs
    pairs = zip((*(f"d{name}" for name in NAMES), "y_recomputed"), found, strict=True)
    return {"x_new": x_new, "y": y} | {name: v for name, v in pairs if v is not None}


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    "without", [(), ("shift",), ("weight", "h_bias"), ALONE, (*ALONE, "shift", "weight")], ids=str
)
def test_same_bits_as_the_passes_of_autograd(norm: str, per_token: bool, without: tuple) -> None:
    """With an odd width, a tile that is not full, and the closed form too."""
    shape = (2, 9, 33)
    given, upstream = arguments(shape, per_token, without=without), upstreams(shape)
    function = alone if "h" in without else residual_norm
    upstream = (None, upstream[1]) if "h" in without else upstream
    names = tuple(name for name in NAMES if given[name] is not None)
    for impl in ("triton", "auto"):
        expected = run(function, given, upstream, names, norm=norm, impl=impl)
        ours = recomputed(given, upstream, norm=norm, impl=impl)
        y = ours.pop("y_recomputed")
        assert torch.equal(y, expected["y"]) and y.is_contiguous()
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(ours[name], value) and ours[name].dtype == value.dtype, name


@pytest.mark.parametrize(
    ("shape", "per_token"), [((2, 9, 1152), False), ((1, 9, 384), True), ((2, 3, 272), False)]
)
def test_rows_in_two_parts(shape: tuple[int, int, int], per_token: bool) -> None:
    """The forward pass's y and autograd's gradients, bit for bit."""
    given, upstream = arguments(shape, per_token), upstreams(shape)
    expected = run(residual_norm, given, upstream, impl="triton")
    ours = recomputed(given, upstream)
    assert torch.equal(ours.pop("y_recomputed"), expected["y"])
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("norm", "per_token", "without"),
    [("layer", False, ("weight",)), ("rms", True, ("shift",)), ("rms", False, ALONE)],
    ids=str,
)
def test_as_exact_as_eager(dtype: torch.dtype, norm: str, per_token: bool, without: tuple) -> None:
    shape = (2, 5, 96)
    given = arguments(shape, per_token, dtype, without=without)
    plain = given
    if "h" in without:
        zero = torch.zeros_like(given["x"])
        plain = given | {"h": zero, "gate": zero if per_token else zero[:, 0]}
    found = recomputed(given, upstreams(shape, dtype), norm=norm)
    _, rounded = eager(**plain, norm=norm)
    wide = {name: v if v is None else v.double() for name, v in plain.items()}
    _, truth = eager(**wide, norm=norm)
    assert found["y_recomputed"].dtype == dtype and torch.equal(found["y_recomputed"], found["y"])
    assert_as_exact_as_eager(found["y_recomputed"], rounded, truth, "y")


@pytest.mark.parametrize("impl", ["triton", "auto", "reference"])
@pytest.mark.parametrize("per_token", [False, True])
def test_each_result_alone(per_token: bool, impl: str) -> None:
    """Also y by itself: frozen inputs before a trained product."""
    shape = (2, 7, 72)
    given, upstream = arguments(shape, per_token), upstreams(shape)
    expected = recomputed(given, upstream, impl=impl)
    for only in range(8):
        needs = [i == only for i in range(8)]
        name, value = list(recomputed(given, upstream, needs, impl=impl).items())[-1]
        assert name == [*(f"d{n}" for n in NAMES), "y_recomputed"][only]
        assert torch.equal(value, expected[name]), name


def test_strided_inputs_mixed_dtypes_and_no_gradient_of_the_stream() -> None:
    shape = (2, 5, 40)
    dtypes = torch.bfloat16, torch.float32
    for per_token in (False, True):
        given = arguments(shape, per_token, *dtypes)
        dy = data(*shape, seed=7).transpose(0, 2).contiguous().transpose(0, 2)
        assert dy.stride(-1) != 1
        moved_too = {
            "shift": given["shift"].transpose(0, -1).contiguous().transpose(0, -1),
            "x": given["x"].transpose(0, 1).contiguous().transpose(0, 1),
        }
        plain = recomputed(given, (None, dy.contiguous().bfloat16()))
        strided = recomputed(given | moved_too, (None, dy.bfloat16()))
        assert (
            plain["dgate"].dtype == torch.float32 and plain["y_recomputed"].dtype == torch.bfloat16
        )
        assert all(torch.equal(plain[name], strided[name]) for name in plain)
        assert torch.equal(plain["y_recomputed"], plain["y"])


@pytest.mark.parametrize("impl", ["triton", "auto"])
@pytest.mark.parametrize("shape", [(0, 5, 72), (2, 0, 72)])
def test_empty(shape: tuple[int, int, int], impl: str) -> None:
    found = recomputed(arguments(shape), upstreams(shape), impl=impl)
    assert found["y_recomputed"].shape == shape
    assert not any(found[f"d{name}"].any() for name in NAMES)


@pytest.mark.parametrize(
    ("per_token", "norm", "dtype", "without"),
    [
        (False, "layer", torch.bfloat16, ("weight",)),
        (True, "rms", torch.float32, ()),
        (True, "rms", torch.bfloat16, ("shift",)),
        (False, "rms", torch.float32, ALONE),
    ],
    ids=str,
)
def test_declared_bytes(
    monkeypatch: pytest.MonkeyPatch,
    per_token: bool,
    norm: str,
    dtype: torch.dtype,
    without: tuple,
) -> None:
    shape = (2, 19, 24)
    given = leaves(arguments(shape, per_token, torch.float32, dtype, without), ())
    options = {"norm": norm, "h_bias": given.pop("h_bias"), "weight": given.pop("weight")}
    x_new, _, *statistics = residual_norm_forward(**given, **options)
    rest = [given[name] for name in ("h", "gate", "shift", "scale")]
    needs = [({**given, **options})[name] is not None for name in NAMES]
    dx_new, dy = upstreams(shape)
    names = "backward", "reduce", "sum"
    kernels = [getattr(launch, f"_residual_norm_{name}_kernel") for name in names]
    seen = moved(
        monkeypatch,
        kernels,
        lambda: residual_norm_recompute(
            dy, dx_new, x_new, *rest, *statistics, [*needs, True], **options, impl="triton"
        ),
    )
    flags = {f"has_{name}": name not in without for name in ("h", "shift", "h_bias", "weight")}
    flags |= {"per_token": per_token, "norm": norm, "dtype": dtype, "backward": True}
    plain, declared = (residual_norm_bytes(dy, **flags, with_y=with_y) for with_y in (False, True))
    shift = 0 if given["shift"] is None else given["shift"].nbytes
    assert seen == declared == plain + dy.nbytes + shift


def test_meta_and_refusals() -> None:
    given = {n: v.to("meta") for n, v in arguments((0, 5, 16), True).items()}
    found = recomputed(given, tuple(v.to("meta") for v in upstreams((0, 5, 16))), impl="auto")
    assert all(v.is_meta for v in found.values()) and found["y_recomputed"].shape == (0, 5, 16)
    with pytest.raises(ValueError, match="gate must be"):
        recomputed(arguments() | {"gate": data(2, 71)}, upstreams((2, 7, 72)))
