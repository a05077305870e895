"""Order of the samples: a keyed permutation of the data set that is evaluated one point at a time.

The stream of training examples is endless and numbered by a global position:

    epoch, offset = position // size, position % size
    index         = permutation[seed, epoch](offset)

The permutation is a Feistel network on the smallest power-of-two domain that covers `size` (at
least 2^6), walked along its cycle until the value falls inside range(size) (Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", 2002). Nothing is stored, any position costs the same, and
a resumed run needs only the position. The two halves differ by one bit when the domain has an odd
number of bits; the round function is Philox with the counter (half, stream + round * 2^16, epoch
low, epoch high).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_fast.kernels.philox import Stream, philox_4x32

MAX_SIZE = 1 << 40
MAX_POSITION = 1 << 62
_ROUNDS = 8
_MIN_BITS = 6  # a smaller domain has too few round functions: its orders are visibly not uniform
_MASK = 0xFFFFFFFF


def _permute(value: Tensor, epoch: Tensor, bits: int, key: tuple[int, int], stream: int) -> Tensor:
    """The Feistel permutation of range(2**bits): (B,) int64 -> (B,) int64."""
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = value >> right_bits, value & ((1 << right_bits) - 1)
    epoch_low, epoch_high = epoch & _MASK, (epoch >> 32) & _MASK
    for round_ in range(_ROUNDS):
        purpose = torch.full_like(value, stream + (round_ << 16))
        word = philox_4x32((right, purpose, epoch_low, epoch_high), key)[0]
        left, right = right, left ^ (word & ((1 << left_bits) - 1))
        left_bits, right_bits = right_bits, left_bits
    return (left << right_bits) | right


def sample_index(
    positions: Tensor, size: int, seed: int, shuffle: bool = True, stream: int = Stream.ORDER
) -> Tensor:
    """Index in the data set of the training examples at global positions.

    Every epoch (`size` consecutive positions from a multiple of `size`) visits each index exactly
    once; epochs and seeds have different orders.

    Args:
        positions: (B,) int64 global sample positions in [0, 2**62].
        size: samples in the data set, 1 to 2**40.
        seed: in [0, 2**64).
        shuffle: False gives the stored order, the same in every epoch.
        stream: what the order is of, a `Stream`.

    Returns:
        (B,) int64 in [0, size), on the device of `positions`.

    Raises:
        ValueError: an argument outside the ranges above.
    """
    if not isinstance(positions, Tensor) or positions.dim() != 1 or positions.dtype != torch.int64:
        got = (
            f"shape {tuple(positions.shape)} and dtype {positions.dtype}"
            if isinstance(positions, Tensor)
            else f"a {type(positions).__name__}"
        )
        raise ValueError(f"positions must be a 1-D int64 tensor, one per sample, got {got}")
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MAX_SIZE:
        raise ValueError(
            f"size must be an integer in [1, 2**40] (samples in the set), got {size!r}"
        )
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be an integer in [0, 2**64), got {seed!r}")
    if positions.numel():
        low, high = (int(bound) for bound in positions.aminmax())
        if low < 0 or high > MAX_POSITION:
            raise ValueError(f"positions must lie in [0, 2**62], got {low} to {high}")

    epoch, offset = positions // size, positions % size
    if not shuffle or size == 1:
        return offset
    key = (seed & _MASK, seed >> 32)
    bits = max(_MIN_BITS, (size - 1).bit_length())
    index = _permute(offset, epoch, bits, key, int(stream))
    # Cycle walking. The domain is less than twice `size` (but for tiny sets): few rounds suffice.
    outside = (index >= size).nonzero()[:, 0]
    while outside.numel():
        index[outside] = _permute(index[outside], epoch[outside], bits, key, int(stream))
        outside = outside[index[outside] >= size]
    return index
