"""The sampler loops of SiT's official code, written from the formulas: the provider "official".

ODE: torchdiffeq's fixed-grid methods over the points of an even grid. SDE: Euler-Maruyama with a
drift that asks the network twice, once for the velocity and once for the score, and a last step of
0.04 without noise (form sigma, last step "Mean"). Guidance: the network's `forward_with_cfg` on a
state of twice the rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixflow_fast.models import Transformer

# (state, (B,) times) -> velocity.
Field = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[Tensor], Tensor]
LAST_SIZE = 0.04


def field_of(model: Transformer, z: Tensor, y: Tensor, cfg_scale: float) -> tuple[Field, Tensor]:
    """(the velocity field, the state that it starts from: of twice the rows under guidance)."""
    if cfg_scale == 1.0:
        return (lambda x, t: model(x, t, y)), z
    labels = torch.cat([y, torch.full_like(y, model.null_class)])
    return (lambda x, t: model.forward_with_cfg(x, t, labels, cfg_scale)), torch.cat([z, z])


@torch.no_grad()
def sample_ode(
    model: Transformer, z: Tensor, y: Tensor, steps: int, method: str, cfg_scale: float
) -> Tensor:
    """`steps` intervals of torchdiffeq's method "euler" or "heun2" from 0 to 1."""
    from torchdiffeq import odeint

    field, x = field_of(model, z, y, cfg_scale)

    def drift(t: Tensor, x: Tensor) -> Tensor:
        times = torch.ones(x.shape[0], device=x.device) * t
        velocity = field(x, times)
        assert velocity.shape == x.shape
        return velocity

    grid = torch.linspace(0, 1, steps + 1, device=x.device)
    states = odeint(drift, x, grid, method=method, atol=1e-6, rtol=1e-3)
    return states[-1][: len(z)]


@torch.no_grad()
def sample_sde(
    model: Transformer,
    z: Tensor,
    y: Tensor,
    steps: int,
    cfg_scale: float,
    draw: Draw = torch.randn_like,
) -> Tensor:
    """`steps - 1` steps of Euler-Maruyama up to 0.96, and the last one.

    draw: standard normal noise of a state's shape.
    """
    field, x = field_of(model, z, y, cfg_scale)

    def of_state(t: Tensor, x: Tensor) -> Tensor:
        return t.view(-1, *[1] * (x.dim() - 1))

    def score(x: Tensor, t: Tensor) -> Tensor:
        s = of_state(t, x)
        alpha, sigma = s, 1 - s
        return (alpha * field(x, t) - x) / (sigma**2 + alpha * sigma)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return field(x, t) + (1 - of_state(t, x)) * score(x, t)

    grid = torch.linspace(0, 1 - LAST_SIZE, steps, device=x.device)
    h = grid[1] - grid[0]
    for time in grid[:-1]:
        noise = draw(x)
        t = torch.ones(x.shape[0], device=x.device) * time
        mean = x + drift(x, t) * h
        x = mean + torch.sqrt(2 * (1 - of_state(t, x))) * noise * torch.sqrt(h)
    t = torch.ones(x.shape[0], device=x.device) * grid[-1]
    return (x + drift(x, t) * LAST_SIZE)[: len(z)]
