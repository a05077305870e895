"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011), as plain PyTorch.

Every draw is a pure function of (seed, stream, position, element):

    key     = (seed low 32 bits, seed high 32 bits)
    counter = (element // 4, stream, position low 32 bits, position high 32 bits)

and `element % 4` picks one of the four 32-bit words that a block yields. `position` is the global
position of a training example in the run (or the id of a sample that is being generated), so the
numbers do not depend on the rank, on the micro-batch, on the place inside the batch, or on what
was drawn before. Nothing has to be saved to resume but the position.

The integers are exact on every device. The floats are float32 functions of them:

    uniform in (0, 1):  ((word >> 9) + 1/2) * 2^-23                              (exact)
    normal:             sqrt(-2 ln a) * (cos 2 pi b, sin 2 pi b)                 (Box-Muller)
                        a = word_even * 2^-32 + 2^-33 in (0, 1],  b = uniform(word_odd)

a is rounded to float32, so the smallest radii (below about 5e-4, one in ten million) are coarse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from numbers import Integral

import torch
from torch import Tensor

_ROUND_A = 0xD2511F53
_ROUND_B = 0xCD9E8D57
_WEYL_A = 0x9E3779B9
_WEYL_B = 0xBB67AE85
_MASK = 0xFFFFFFFF


class Stream(IntEnum):
    """What a number is drawn for. The values are part of a run's identity: never renumber them."""

    ORDER = 0  # permutation of the data set, keyed by epoch
    FLIP = 1  # horizontal flip of a training image
    POSTERIOR = 2  # noise of the VAE posterior sample
    LABEL_DROPOUT = 3  # replacement of the label by the null class
    TIME = 4  # label time t
    SLOWING = 5  # position of m inside its interval
    NOISE = 6  # x0 of training
    SAMPLE_NOISE = 7  # x0 of generated samples
    SAMPLE_LABEL = 8  # class labels of generated samples
    CROP = 9  # place of a crop
    INIT = 10  # seeds of weight initialisation


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    # int64 multiplication wraps, and the wrapped bit pattern is that of the unsigned product.
    product = b * a
    return (product >> 32) & _MASK, product & _MASK


def philox_4x32(counter: Sequence[Tensor], key: tuple[int, int], rounds: int = 10) -> list[Tensor]:
    """The Philox4x32 block function.

    Args:
        counter: four int64 tensors that broadcast together, each holding 32-bit words.
        key: two 32-bit words.
        rounds: 10 is the standard, crush-resistant count.

    Returns:
        four int64 tensors of 32-bit words, the shape of the broadcast counter.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(rounds):
        hi0, lo0 = _mul_hi_lo(_ROUND_A, c0)
        hi1, lo1 = _mul_hi_lo(_ROUND_B, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL_A) & _MASK, (k1 + _WEYL_B) & _MASK
    return [c0, c1, c2, c3]


def check_seed(seed: int) -> int:
    """The seed as an int; ValueError if it is no integer in [0, 2**64)."""
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be an integer in [0, 2**64), got {seed!r}")
    return int(seed)


def _check_positions(positions: Tensor) -> Tensor:
    if positions.dim() != 1 or positions.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            "positions (ids) must be a 1-D int64 tensor, one per sample, got "
            f"shape {tuple(positions.shape)} and dtype {positions.dtype}"
        )
    return positions.to(torch.int64)


def _blocks(seed: int, stream: int, positions: Tensor, numel: int) -> list[Tensor]:
    """Words of every element: four int64 tensors of shape (B, ceil(numel / 4))."""
    seed = check_seed(seed)
    key = seed & _MASK, seed >> 32
    positions = _check_positions(positions)
    if numel < 0:
        raise ValueError(f"numel must be >= 0, got {numel}")
    device = positions.device
    block = torch.arange((numel + 3) // 4, dtype=torch.int64, device=device)
    counter = (
        block[None, :],
        torch.full((1, 1), int(stream), dtype=torch.int64, device=device),
        (positions & _MASK)[:, None],
        ((positions >> 32) & _MASK)[:, None],
    )
    return philox_4x32(counter, key)


def random_words(seed: int, stream: int, positions: Tensor, numel: int = 1) -> Tensor:
    """Uniform 32-bit words, (B, numel) int64 in [0, 2**32); arguments as `uniform`."""
    words = torch.stack(_blocks(seed, stream, positions, numel), dim=-1)
    return words.flatten(1)[:, :numel]


def _unit_open(word: Tensor) -> Tensor:
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


def uniform(seed: int, stream: int, positions: Tensor, numel: int = 1) -> Tensor:
    """Uniform numbers in the open interval (0, 1).

    Args:
        seed: in [0, 2**64).
        stream: a `Stream`.
        positions: (B,) int64 global sample positions.
        numel: numbers per sample.

    Returns:
        (B, numel) float32 on the device of `positions`, in [2^-24, 1 - 2^-24].

    Raises:
        ValueError: bad seed, positions that are not a 1-D integer tensor, negative numel.
    """
    return _unit_open(random_words(seed, stream, positions, numel))


def normal(seed: int, stream: int, positions: Tensor, numel: int = 1) -> Tensor:
    """Standard normal numbers, (B, numel) float32; arguments and errors as `uniform`."""
    w0, w1, w2, w3 = _blocks(seed, stream, positions, numel)
    pairs = []
    for radius_word, angle_word in ((w0, w1), (w2, w3)):
        radius_uniform = radius_word.to(torch.float32) * 2.0**-32 + 2.0**-33
        radius = torch.sqrt(-2.0 * torch.log(radius_uniform))
        angle = _unit_open(angle_word) * (2.0 * math.pi)
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :numel]
