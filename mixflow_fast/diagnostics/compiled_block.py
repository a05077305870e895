"""Gradients of a compiled block against those of the same block in eager mode.

A compiler can leave a gradient wrong and finite; `models/inductor.py` tells of one. One block is
compiled as a run compiles it, at one sample and at two: a dimension of one is code of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mixflow_fast.diagnostics.kernel_checks import Finding, relative_rms, worst
from mixflow_fast.models import Transformer, build

# Of float32 gradients, compiled against eager: both sum the same numbers in another order.
LIMIT = 1e-4


class _Size(NamedTuple):
    """Side of the latents (patches of 2), width, heads."""

    input_size: int
    hidden_size: int
    num_heads: int


# 4096 tokens of width 1280: Inductor fuses sums over rows and columns from there on.
_ON_GPU, _SMALL = _Size(128, 1280, 16), _Size(4, 32, 2)


def check_compiled_block(device: torch.device) -> Iterator[Finding]:
    """The worst gradient for a batch of one and of two, float32.

    On a GPU in some 2 GB of its memory; it compiles for as long as the start of a run does.
    """
    size = _ON_GPU if device.type == "cuda" else _SMALL
    for batch in (1, 2):
        eager, compiled = (_gradients(size, mode, batch, device) for mode in ("eager", "compile"))
        yield worst(
            Finding(
                "compiled block",
                f"batch {batch}",
                name,
                "float32",
                relative_rms(compiled[name], gradient),
                LIMIT,
            )
            for name, gradient in eager.items()
        )


def _gradients(size: _Size, mode: str, batch: int, device: torch.device) -> dict[str, Tensor]:
    """Of the block's parameters, its input and its modulation, by name."""
    g = torch.Generator().manual_seed(3)
    net = _network(size, g).to(device).set_execution(mode=mode)
    shape = batch, net.in_channels, size.input_size, size.input_size
    x, weights = (torch.randn(shape, generator=g).to(device) for _ in range(2))
    t = torch.linspace(0.3, 0.6, batch, device=device)
    y = torch.arange(batch, device=device)
    (net(x, t, y) * weights).sum().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def _network(size: _Size, generator: torch.Generator) -> Transformer:
    """One block between its embedders and its last layer, with no weight at zero."""
    # Its own draws: the diagnosis leaves the process's generators as they are.
    with torch.random.fork_rng(devices=[]):
        net = build("SiT-S/2", depth=1, num_classes=2, learn_sigma=False, **size._asdict())
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                fan_in = p[0].numel() if p.dim() > 1 else p.numel()
                p.copy_(torch.randn(p.shape, generator=generator) / fan_in**0.5)
    return net
