"""Dropout by (seed, layer, position, element): the same bits everywhere, and the right shares."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from mixflow_fast.kernels.dropout import dropout, dropout_reference, layer_keys
from mixflow_fast.kernels.philox import Stream, random_words
from tests.support.kernels import DEVICE, data

KEYS = layer_keys(7, 3).to(DEVICE)
POSITIONS = torch.tensor([5, 2**40 + 3, 11], device=DEVICE)


def test_definition() -> None:
    """Element e of layer k is dropped where its word under the layer's key is below p 2^32."""
    x = data(3, 2, 5)
    words = random_words(7, Stream.DROPOUT, torch.arange(3), 2)
    key = int(words[1, 0]) | int(words[1, 1]) << 32
    word = random_words(key, Stream.DROPOUT, POSITIONS.cpu(), 10).view(3, 2, 5).to(DEVICE)
    truth = torch.where(word < 0.25 * 2**32, 0.0, x / 0.75)
    torch.testing.assert_close(dropout(x, 0.25, KEYS[1], POSITIONS), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 1), (3, 7, 11, 13), (3, 4, 16, 32), (0, 5)])
def test_kernel_has_the_bits_of_the_reference(shape: tuple, dtype: torch.dtype) -> None:
    x, positions = data(*shape, dtype=dtype).requires_grad_(), POSITIONS[: shape[0]]
    dy = data(*shape, dtype=dtype, seed=1)
    out = {}
    for impl in ("reference", "triton"):
        y = dropout(x, 0.13, KEYS[0], positions, impl)
        out[impl] = y, torch.autograd.grad(y, x, dy)[0]
    for reference, kernel in zip(out["reference"], out["triton"], strict=True):
        assert torch.equal(reference, kernel)


def test_mask_does_not_depend_on_batch_or_memory() -> None:
    x = data(3, 4, 6, 6)
    whole = dropout(x, 0.5, KEYS[2], POSITIONS)
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(dropout(x[one], 0.5, KEYS[2], POSITIONS[one]), whole[one])
    strided = x.to(memory_format=torch.channels_last)
    assert torch.equal(dropout(strided, 0.5, KEYS[2], POSITIONS), whole)


def test_layers_and_positions_are_independent() -> None:
    """Shares of common zeros are p^2 within five standard deviations, and of zeros p."""
    n, p = 20_000, 0.3
    ones = torch.ones(3, n, device=DEVICE)
    masks = [dropout(ones, p, key, POSITIONS)[row] == 0 for key in KEYS for row in range(3)]
    for first in range(len(masks)):
        assert abs(masks[first].float().mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
        for second in range(first):
            both = (masks[first] & masks[second]).float().mean()
            assert abs(both - p * p) < 5 * math.sqrt(p * p * (1 - p * p) / n)


def test_gradient_is_the_mask_again() -> None:
    x = data(3, 10).double().cpu().requires_grad_()
    assert gradcheck(lambda x: dropout(x, 0.4, KEYS[0].cpu(), POSITIONS.cpu()), x)
    assert torch.equal(
        dropout(x, 0.4, KEYS[0].cpu(), POSITIONS.cpu()),
        dropout_reference(x, 0.4, KEYS[0].cpu(), POSITIONS.cpu()),
    )


def test_what_is_not_finite_stays_visible() -> None:
    x = torch.full((3, 64), math.nan, device=DEVICE)
    assert dropout(x, 0.9, KEYS[0], POSITIONS).isnan().all()
    assert dropout(x, 0.9, KEYS[0], POSITIONS, "triton").isnan().all()


def test_torch_compile_and_registration() -> None:
    x = data(3, 8).requires_grad_()
    compiled = torch.compile(
        lambda x: dropout(x, 0.5, KEYS[0], POSITIONS), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), dropout(x, 0.5, KEYS[0], POSITIONS))
    torch.library.opcheck(
        torch.ops.mixflow_fast.dropout.default, (x, 0.5, KEYS[0], POSITIONS, False)
    )


def test_refusals() -> None:
    x = data(3, 8)
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\), got 1"):
        dropout(x, 1.0, KEYS[0], POSITIONS)
    with pytest.raises(ValueError, match=r"positions must be \(B,\) = \(3,\)"):
        dropout(x, 0.5, KEYS[0], POSITIONS[:2])
    assert dropout(x, 0.0, KEYS[0], POSITIONS) is x
