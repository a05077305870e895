"""Inputs for tests of the residual norm, the models' own lines, and results by name."""

import torch
import torch.nn.functional as F

from mixflow_fast.kernels.residual_norm.op import modulated_norm
from tests.support.kernels import DEVICE, relative_rms

NAMES = ("x", "h", "gate", "shift", "scale", "h_bias", "weight")
OUTPUTS = ("x_new", "y", *(f"d{name}" for name in NAMES))
SHAPE = (2, 7, 72)


def data(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(dtype).to(DEVICE)


def arguments(
    shape: tuple[int, int, int] = SHAPE,
    per_token: bool = False,
    dtype: torch.dtype = torch.float32,
    modulation_dtype: torch.dtype | None = None,
    without: tuple[str, ...] = (),
) -> dict[str, torch.Tensor | None]:
    """All inputs by name: gate, shift and scale are chunks of one tensor, as in the models."""
    B, N, D = shape
    modulation_dtype = modulation_dtype or dtype
    wide = (B, N, 6 * D) if per_token else (B, 6 * D)
    chunked = data(*wide, dtype=modulation_dtype, seed=3)
    shift, scale, gate = (0.5 * chunked).chunk(6, dim=-1)[1:4]
    found = {
        "x": data(*shape, dtype=dtype) + 0.3,
        "h": data(*shape, dtype=dtype, seed=1),
        "gate": gate,
        "shift": shift,
        "scale": scale,
        "h_bias": data(D, dtype=modulation_dtype, seed=4),
        "weight": 1 + 0.3 * data(D, dtype=modulation_dtype, seed=5),
    }
    return {name: None if name in without else value for name, value in found.items()}


def upstreams(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple:
    return data(*shape, dtype=dtype, seed=6), 0.7 * data(*shape, dtype=dtype, seed=7)


def eager(x, h, gate, shift, scale, h_bias=None, weight=None, norm="layer", eps=1e-6, **_):
    """The lines of the models, in the dtype of the data."""
    if scale.dim() == 2:
        gate, scale = gate.unsqueeze(1), scale.unsqueeze(1)
        shift = None if shift is None else shift.unsqueeze(1)
    x_new = x + gate * (h if h_bias is None else h + h_bias)
    normalise = F.layer_norm if norm == "layer" else F.rms_norm
    y = normalise(x_new, x.shape[-1:], weight, eps=eps) * (1 + scale)
    return x_new, y if shift is None else y + shift


def leaves(given: dict, names: tuple[str, ...] = NAMES, to: torch.dtype | None = None) -> dict:
    """Detached inputs of which `names` require grad; strides stay, unless they are cast."""
    found = {}
    for name, value in given.items():
        value = value if value is None or to is None else value.to(to)
        needs = value is not None and name in names
        found[name] = None if value is None else value.detach().requires_grad_(needs)
    return found


def run(function, given: dict, upstream: tuple, names: tuple = NAMES, to=None, **options) -> dict:
    """Outputs and gradients by name."""
    inputs = leaves(given, names, to)
    x_new, y = function(**inputs, **options)
    wanted = [name for name in names if inputs[name] is not None]
    pairs = [(v, g) for v, g in zip((x_new, y), upstream, strict=True) if g is not None]
    values = [v for v, _ in pairs]
    gradients = torch.autograd.grad(
        values, [inputs[name] for name in wanted], [g.to(v.dtype) for v, g in pairs]
    )
    found = dict(zip((f"d{name}" for name in wanted), gradients, strict=True))
    return {"x_new": x_new.detach(), "y": y.detach()} | found


def alone(x, h, gate, shift, scale, h_bias=None, weight=None, **options):
    """`modulated_norm` with `residual_norm`'s signature and outputs."""
    return x, modulated_norm(x, shift, scale, weight=weight, **options)


def assert_same(ours: dict, expected: dict, tolerance: float = 1e-6) -> None:
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert value.shape == expected[name].shape and value.dtype == expected[name].dtype, name
        assert relative_rms(value, expected[name]) < tolerance, name
