"""Model FLOPs of text-to-image networks, held against published sizes."""

from __future__ import annotations

import pytest
import torch

from mixflow_fast.models.text_to_image import adapter_for
from mixflow_fast.models.text_to_image.network import TextToImage
from mixflow_fast.training.costs import text_to_image_flops
from tests.support.released_sd3 import LARGE, MEDIUM, cond, on_meta
from tests.support.text_to_image import FAMILIES, SD3


@pytest.mark.parametrize(
    ("config", "parameters", "side", "tflops"),
    [
        (MEDIUM, 2_243_171_520, 64, 2.27),
        pytest.param(MEDIUM, 2_243_171_520, 128, 10.98, marks=pytest.mark.long),
        pytest.param(LARGE, 8_056_627_520, 64, 7.34, marks=pytest.mark.long),
        pytest.param(LARGE, 8_056_627_520, 128, 30.25, marks=pytest.mark.long),
    ],
)
def test_a_forward_pass_of_the_released_models(
    config: dict[str, object], parameters: int, side: int, tflops: float
) -> None:
    """512 and 1024 pixels at 231 tokens of text; a training step takes three times as much, less
    the gradients of what comes in."""
    net = on_meta(config)
    assert sum(p.numel() for p in net.parameters()) == parameters
    found = text_to_image_flops(net, {(16, side, side): 1}, cond(231, 4096, 2048))
    assert 2.995 < found / (tflops * 1e12) < 3.005


def test_the_mean_over_buckets_and_what_is_not_trained() -> None:
    net, told = on_meta(SD3), cond(12, 32, 64)
    small = text_to_image_flops(net, {(16, 8, 8): 1}, told)
    large = text_to_image_flops(net, {(16, 8, 12): 1}, told)
    assert small < large
    mixed = text_to_image_flops(net, {(16, 8, 8): 3, (16, 8, 12): 1}, told)
    assert mixed == round((3 * small + large) / 4)
    # Of more than three areas three are counted, and the others follow: a batch has some dozens.
    shapes = {(16, 8, 8): 5, (16, 8, 10): 1, (16, 10, 10): 2, (16, 12, 10): 3, (16, 12, 12): 1}
    each = {shape: text_to_image_flops(net, {shape: 1}, told) for shape in shapes}
    mean = sum(each[shape] * count for shape, count in shapes.items()) / 12
    assert text_to_image_flops(net, shapes, told) == round(mean)
    # Of a frozen base the gradients of the weights, a third, are not computed.
    net.requires_grad_(False)
    net.transformer.proj_out.requires_grad_(True)
    last = text_to_image_flops(net, {(16, 8, 8): 1}, told)
    assert last < 0.4 * small


def test_a_network_that_reads_values_has_no_count() -> None:
    network = FAMILIES["z-image"].build().to("meta")
    told = {"prompt_embeds": torch.empty(1, 12, 32, device="meta"),
            "prompt_mask": torch.empty(1, 12, dtype=torch.bool, device="meta")}  # fmt: skip
    assert text_to_image_flops(TextToImage(adapter_for(network)), {(16, 8, 8): 1}, told) is None
