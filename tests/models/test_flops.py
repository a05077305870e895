"""Peaks of devices by name; a SongUNet's FLOPs as PyTorch counts them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mixflow_fast.models import SongUNet
from mixflow_fast.models.flops import count, peak_tflops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("AMD EPYC", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 1},
        {"num_blocks": 2, "channel_mult": (1, 2, 2), "img_resolution": 64},
        {"num_blocks": 1, "model_channels": 32, "activate_w_mode": True},
    ],
)
def test_songunet(options: dict) -> None:
    """Forward and backward pass; no gradient of the input."""
    with torch.device("meta"):
        net = SongUNet(**options).eval()
        x = torch.zeros(2, 3, net.input_size, net.input_size)
        w = torch.zeros(2) if options.get("activate_w_mode") else None
        with FlopCounterMode(display=False, depth=0) as counter:
            out = net(x, torch.zeros(2), w=w)
            forward = counter.get_total_flops()
            out.backward(torch.empty_like(out))
    expected = count(net)
    assert forward == 2 * expected.forward
    assert counter.get_total_flops() == 2 * expected.train
