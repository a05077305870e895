"""The plain lines of every operator: providers "eager" and "compile".

Those of the objective are what a trainer holds today, written for speed as a careful user would.
Those of the transformer block are the networks' eager mode, with PyTorch's fused norms and
attention. `benchmarks/README.md` says why they are the baselines.
`RECOMPUTE` are the gradients of an activation together with the activation itself, in closed form:
one loop over memory for a compiler, where autograd's lines of both directions would be two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

import benchmarks.rows  # noqa: F401 (chooses Triton's interpreter, before Triton is imported)
from mixflow_fast.diagnostics.block_cases import EPS
from mixflow_fast.models.blocks import rotate

GAMMA = 0.8


def interpolate(x1: Tensor, x0: Tensor, slowed_t: Tensor) -> Tensor:
    """x_m = m x1 + (1 - m) x0 in float32, cast to x1's dtype; slowed_t: (B,) float32."""
    m = slowed_t.view(-1, *([1] * (x1.dim() - 1)))
    return (m * x1.float() + (1 - m) * x0.float()).to(x1.dtype)


def prepare(x1: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_m, t, m, x0) for t ~ Beta(2, 1), m ~ U[(1 - gamma) t, t], x0 ~ N(0, I)."""
    x0 = torch.randn_like(x1)
    t = torch.rand(len(x1), device=x1.device).sqrt()
    slowed_t = t * (1 - gamma * torch.rand(len(x1), device=x1.device))
    return interpolate(x1, x0, slowed_t), t, slowed_t, x0


def velocity_loss(pred: Tensor, x1: Tensor, x0: Tensor) -> Tensor:
    """Mean over samples and elements of |pred - (x1 - x0)|^2 in float32."""
    error = pred.float() - (x1.float() - x0.float())
    return error.square().flatten(1).mean(dim=1).mean()


def mixed_source(
    x1: Tensor, predicted: Tensor, w: Tensor, slowed_t: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_m, x0, KL, eps) of a mixed source, mode "moments", its log-variance clamped to [-12, 6].

    Noise is float32, as x0 is, so that autograd need not cast it.
    """
    mean, log_var = predicted.float().chunk(2, dim=1)
    log_var = log_var.clamp(-12.0, 6.0)
    eps = torch.randn_like(mean)
    w = w.view(-1, *([1] * (x1.dim() - 1)))
    x0 = w * mean + torch.sqrt((1 - w) + w * torch.exp(log_var)) * eps
    kl = 0.5 * (mean.square() + torch.expm1(log_var) - log_var).flatten(1).sum(dim=1)
    return interpolate(x1, x0, slowed_t), x0, kl, eps


class BiasOfProduct(torch.autograd.Function):
    """Stands for the end of a matrix product that added a bias: its result is there already."""

    @staticmethod
    def forward(ctx: FunctionCtx, biased: Tensor, product: Tensor, bias: Tensor) -> Tensor:
        return biased.view_as(biased)

    @staticmethod
    def backward(ctx: FunctionCtx, dz: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, dz, dz.flatten(0, -2).sum(0)


def _over_tokens(m: Tensor) -> Tensor:
    return m.unsqueeze(1) if m.dim() == 2 else m


def plain_modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None = None
) -> Tensor:
    width = x.shape[-1:]
    y = F.layer_norm(x, width, eps=EPS) if weight is None else F.rms_norm(x, width, weight, EPS)
    return y * (1 + _over_tokens(scale)) + _over_tokens(shift)


def plain_residual_norm(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    h_bias: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    x = x + _over_tokens(gate) * (h if h_bias is None else h + h_bias)
    return x, plain_modulated_norm(x, shift, scale, weight)


def plain_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def plain_swiglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    a, b = (x if bias is None else x + bias).chunk(2, dim=-1)
    return F.silu(a) * b


def _plain_qk(
    qkv: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each (B, H, N, K)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    width = qkv.shape[-1:]
    if q_bias is not None:
        q = F.layer_norm(q, width, q_weight, q_bias, EPS)
        k = F.layer_norm(k, width, k_weight, k_bias, EPS)
    elif q_weight is not None:
        q, k = F.rms_norm(q, width, q_weight, EPS), F.rms_norm(k, width, k_weight, EPS)
    if cos is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q, k, v


def plain_qk_norm_rope(qkv: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
    q, k, _ = _plain_qk(qkv, **given)
    return q.transpose(1, 2), k.transpose(1, 2)


def plain_attention(qkv: Tensor, **given: Tensor) -> Tensor:
    q, k, v = _plain_qk(qkv, **given)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


PLAIN = {
    "residual_norm": plain_residual_norm,
    "modulated_norm": plain_modulated_norm,
    "gelu": plain_gelu,
    "swiglu": plain_swiglu,
    "qk_norm_rope": plain_qk_norm_rope,
    "attention": plain_attention,
}


def plain_gelu_recompute(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(gelu(x + bias), dx, dbias)."""
    z = x + bias
    dz = torch.ops.aten.gelu_backward(dy, z, approximate="tanh")
    return F.gelu(z, approximate="tanh"), dz, dz.flatten(0, -2).sum(0)


def plain_swiglu_recompute(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(silu(a) b, dx, dbias) where x + bias is (a, b)."""
    a, b = (x + bias).chunk(2, dim=-1)
    sigmoid, silu = a.sigmoid(), F.silu(a)
    dx = torch.cat([dy * b * (sigmoid + silu * (1 - sigmoid)), dy * silu], dim=-1)
    return silu * b, dx, dx.flatten(0, -2).sum(0)


RECOMPUTE = {"gelu": plain_gelu_recompute, "swiglu": plain_swiglu_recompute}
