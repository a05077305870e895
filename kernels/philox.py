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
The angle is exact: b's first bit is a sign, and the rest, minus a quarter turn, stays within a
quarter of zero, c = b mod 1/2 - 1/4; (cos, sin) 2 pi b = +-(-sin 2 pi c, cos 2 pi c).

Plain PyTorch defines them (`*_reference`); on the CPU the operators of `csrc/` give the same bits
faster, where they were built (`philox_cpu`). Triton device functions, which other kernels call,
make the numbers in registers. The words are the same integers; normals agree to a few units in the
last place of the radius (sine, cosine, logarithm and root are evaluated differently).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from numbers import Integral

import torch
from torch import Tensor

from mixflow_fast.kernels import philox_cpu, runtime
from mixflow_fast.kernels.runtime import jit, tl, triton

_ROUND_A = 0xD2511F53
_ROUND_B = 0xCD9E8D57
_WEYL_A = 0x9E3779B9
_WEYL_B = 0xBB67AE85
_MASK = 0xFFFFFFFF


class Stream(IntEnum):
    """Purpose of a draw. The values are part of a run's identity: never renumber them."""

    ORDER = 0  # permutation of the data set, keyed by epoch
    FLIP = 1  # horizontal flip of a training image
    POSTERIOR = 2  # noise of the VAE posterior sample
    LABEL_DROPOUT = 3  # replacement of the label by the null class
    TIME = 4  # the network's time t
    SLOWING = 5  # position of m inside its interval
    NOISE = 6  # x0 of training
    SAMPLE_NOISE = 7  # x0 of generated samples
    SAMPLE_LABEL = 8  # class labels of generated samples
    CROP = 9  # place of a crop
    INIT = 10  # seeds of weight initialisation
    VALIDATION_NOISE = 11  # x0 of validation losses
    SAMPLE_SDE = 12  # noise of stochastic samplers
    PERTURBATION = 13  # noise that input perturbation adds
    ROLLOUT = 14  # size of the step that makes a rolled-out input


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


def seed_tensor(seed: int, device: torch.device) -> Tensor:
    """The seed's 64 bits as a () int64 tensor, the form in which kernels read it."""
    seed = check_seed(seed)
    # The same 64 bits as an int64, which every operator takes.
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    return torch.full((), signed, dtype=torch.int64, device=device)


def _seed_bits(seed: int | Tensor, positions: Tensor) -> Tensor:
    return seed if isinstance(seed, Tensor) else seed_tensor(seed, positions.device)


def _check_positions(positions: Tensor) -> Tensor:
    if positions.dim() != 1 or positions.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            "positions (ids) must be a 1-D int64 tensor, one per sample, got "
            f"shape {tuple(positions.shape)} and dtype {positions.dtype}"
        )
    return positions.to(torch.int64)


def _blocks(seed: int | Tensor, stream: int, positions: Tensor, numel: int) -> list[Tensor]:
    """Words of every element: four int64 tensors of shape (B, ceil(numel / 4))."""
    seed = seed if isinstance(seed, Tensor) else check_seed(seed)
    key = seed & _MASK, (seed >> 32) & _MASK
    positions = _check_positions(positions)
    if numel < 0:
        raise ValueError(f"numel must be >= 0, got {numel}")
    device = positions.device
    # A block yields four words, so a quarter of the elements need counters.
    block = torch.arange((numel + 3) // 4, dtype=torch.int64, device=device)
    counter = (
        block[None, :],
        torch.full((1, 1), int(stream), dtype=torch.int64, device=device),
        (positions & _MASK)[:, None],
        ((positions >> 32) & _MASK)[:, None],
    )
    return philox_4x32(counter, key)


def words_reference(seed: int | Tensor, stream: int, positions: Tensor, numel: int = 1) -> Tensor:
    """`random_words` in plain PyTorch."""
    words = torch.stack(_blocks(seed, stream, positions, numel), dim=-1)
    return words.flatten(1)[:, :numel]


def random_words(seed: int | Tensor, stream: int, positions: Tensor, numel: int = 1) -> Tensor:
    """Uniform 32-bit words, (B, numel) int64 in [0, 2**32); arguments as `uniform`."""
    positions = _check_positions(positions)
    if philox_cpu.serves(positions):
        return philox_cpu.words(_seed_bits(seed, positions), int(stream), positions, numel)
    return words_reference(seed, stream, positions, numel)


def _unit_open(word: Tensor) -> Tensor:
    """Uniform in (0, 1) of a 32-bit word."""
    # 23 bits and a half fit float32 exactly, and neither 0 nor 1 comes out.
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


def uniform_reference(seed: int | Tensor, stream: int, positions: Tensor, numel: int = 1) -> Tensor:
    """`uniform` in plain PyTorch."""
    return _unit_open(words_reference(seed, stream, positions, numel))


def uniform(seed: int | Tensor, stream: int, positions: Tensor, numel: int = 1) -> Tensor:
    """Uniform numbers in the open interval (0, 1).

    Args:
        seed: in [0, 2**64), or a `seed_tensor` on the device of `positions`.
        stream: a `Stream`.
        positions: (B,) int64 global sample positions.
        numel: numbers per sample.

    Returns:
        (B, numel) float32 on the device of `positions`, in [2^-24, 1 - 2^-24].

    Raises:
        ValueError: bad seed, positions that are not a 1-D integer tensor, negative numel.
    """
    positions = _check_positions(positions)
    if philox_cpu.serves(positions):
        return philox_cpu.uniform(_seed_bits(seed, positions), int(stream), positions, numel)
    return uniform_reference(seed, stream, positions, numel)


def normal_reference(seed: int | Tensor, stream: int, positions: Tensor, numel: int = 1) -> Tensor:
    """`normal` in plain PyTorch."""
    w0, w1, w2, w3 = _blocks(seed, stream, positions, numel)
    pairs = []
    for radius_word, angle_word in ((w0, w1), (w2, w3)):
        radius_uniform = radius_word.to(torch.float32) * 2.0**-32 + 2.0**-33
        radius = torch.sqrt(-2.0 * torch.log(radius_uniform))
        radius = torch.where(angle_word >> 31 == 0, radius, -radius)
        turns = ((angle_word >> 9 & 0x3FFFFF).to(torch.float32) + 0.5) * 2.0**-23 - 0.25
        angle = turns * (2.0 * math.pi)
        pairs += [-radius * torch.sin(angle), radius * torch.cos(angle)]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :numel]


def normal(
    seed: int | Tensor, stream: int, positions: Tensor, numel: int = 1, impl: str = "auto"
) -> Tensor:
    """Standard normal numbers, (B, numel) float32; arguments and errors as `uniform`.

    impl: "reference", "triton" or "auto" (Triton on CUDA devices). The numbers of "triton" are
    bit for bit those that the other kernels make in registers, those of "reference" the bits of
    `normal_reference`.
    """
    if not runtime.use_kernels(impl, positions.device):
        positions = _check_positions(positions)
        if philox_cpu.serves(positions):
            return philox_cpu.normal(_seed_bits(seed, positions), int(stream), positions, numel)
        return normal_reference(seed, stream, positions, numel)
    seed = _seed_bits(seed, positions)
    if not 0 <= numel <= runtime.MAX_SAMPLE:
        raise ValueError(f"numel must be in [0, 2**29] for the Triton kernel, got {numel}")
    return _normal_op(seed, _check_positions(positions), int(stream), numel)


@jit
def philox_words(seed, stream: tl.constexpr, position, block):
    """Four uint32 words for each counter block (element // 4).

    In all device functions here seed and position are int64 scalars, blocks int32.
    """
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, block.to(tl.uint32), tl.cast(stream, tl.uint32), low, high)


@jit
def unit_open(word):
    """Uniform in (0, 1) of a 32-bit word, as `_unit_open`."""
    # The word's upper 23 bits as a float in [1, 2), and then exactly (k + 1/2) 2^-23: a conversion
    # from integers would wait for a slower unit.
    one_to_two = ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    return one_to_two - 0.999999940395355224609375  # 1 - 2^-24


@jit
def first_uniform(seed, stream: tl.constexpr, position):
    """Element 0 of a stream, in (0, 1)."""
    w0, w1, w2, w3 = philox_words(seed, stream, position, tl.cast(0, tl.int32))
    return unit_open(w0)


@jit
def minus_two_log(a):
    """-2 ln a for a in [2^-33, 1]: a = 2^k (1 + f) with |ln(1 + f)| <= ln(2) / 2."""
    bits = a.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    # Least squares in relative error: 7e-9.
    p = -2.845422805e-01 + f * (2.640420839e-01 + f * (-2.524065512e-01 + f * 1.472573601e-01))
    p = -6.666670809e-01 + f * (
        5.000170389e-01 + f * (-3.999965315e-01 + f * (3.324273982e-01 + f * p))
    )
    return k.to(tl.float32) * -1.3862943611198906 + (f * f * (1.0 + f * p) - 2.0 * f)


@jit
def square_root(x):
    """sqrt of x >= 0, rounded to nearest or nearly so: a device's own is off by one unit."""
    # A Newton step on the device's approximate reciprocal root; the bound keeps 0 from giving NaN.
    y = tl.rsqrt(tl.maximum(x, 1e-30))
    root = x * y
    return root + (0.5 * y) * (x - root * root)


@jit
def box_muller(radius_word, angle_word):
    """Two normals from two words, as the module's docstring says."""
    # A float from bits, [1, 2) by its exponent: a conversion from integers is a slower unit's.
    half_turns = (((angle_word >> 8) & 0x7FFFFE) | 0x3F800000).to(tl.float32, bitcast=True)
    c = half_turns * 0.5 - 0.749999940395355224609375  # 3/4 - 2^-24; exact
    angle = c * 6.283185307179586
    z = angle * angle
    # sin and cos on [-pi/2, pi/2], least squares in absolute error: 5e-9 and 5e-10.
    p = -1.666665673e-01 + z * (8.333010326e-03 + z * (-1.980620201e-04 + z * 2.599278195e-06))
    sine = angle + (angle * z) * p
    p = 4.166665532e-02 + z * (-1.388856117e-03 + z * (2.476885424e-05 - z * 2.618569020e-07))
    cosine = (1.0 - 0.5 * z) + (z * z) * p
    a = radius_word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = square_root(minus_two_log(a)).to(tl.uint32, bitcast=True)
    # The sign of both normals is the first bit of the angle: half a turn more.
    radius = (radius ^ (angle_word & 0x80000000)).to(tl.float32, bitcast=True)
    return -(radius * sine), radius * cosine


@jit
def normal_tile(
    seed,
    stream: tl.constexpr,
    position,
    row,
    column,
    ROW_STRIDE,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Normals of elements (row + i) * ROW_STRIDE + column + j, (ROWS, COLUMNS) float32.

    VECTOR: neighbours that one thread makes, 8 or 4, as many as it loads of the data at once: the
    numbers then need no exchange between threads. ROW_STRIDE must be a multiple of 4 (or there is
    one row) and column of VECTOR. 1 is without conditions: each element computes its own block.
    """
    rows = row + tl.arange(0, ROWS)[:, None]
    if VECTOR == 8:
        block = rows * (ROW_STRIDE // 4) + column // 4 + 2 * tl.arange(0, COLUMNS // 8)[None, :]
        n0, n1, n2, n3 = _normal_block(seed, stream, position, block)
        n4, n5, n6, n7 = _normal_block(seed, stream, position, block + 1)
        even = tl.interleave(tl.interleave(n0, n4), tl.interleave(n2, n6))
        odd = tl.interleave(tl.interleave(n1, n5), tl.interleave(n3, n7))
        noise = tl.interleave(even, odd)
    elif VECTOR == 4:
        block = rows * (ROW_STRIDE // 4) + column // 4 + tl.arange(0, COLUMNS // 4)[None, :]
        n0, n1, n2, n3 = _normal_block(seed, stream, position, block)
        noise = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
    else:
        element = rows * ROW_STRIDE + column + tl.arange(0, COLUMNS)[None, :]
        w0, w1, w2, w3 = philox_words(seed, stream, position, element >> 2)
        first = (element & 2) == 0
        x, y = box_muller(tl.where(first, w0, w2), tl.where(first, w1, w3))
        noise = tl.where((element & 1) == 0, x, y)
    return noise


@jit
def _normal_block(seed, stream: tl.constexpr, position, block):
    w0, w1, w2, w3 = philox_words(seed, stream, position, block)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return n0, n1, n2, n3


@jit
def _normal_kernel(
    seed_ptr, positions_ptr, out_ptr, numel, programs, STREAM: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    sample = (program // programs).to(tl.int64)
    start = (program % programs) * BLOCK
    noise = normal_tile(
        tl.load(seed_ptr), STREAM, tl.load(positions_ptr + sample), 0, start, 0, 1, BLOCK, 4
    )
    offsets = start + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + sample * numel + offsets, noise, mask=offsets < numel)


@torch.library.custom_op("mixflow_fast::normal", mutates_args=())
def _normal_op(seed: Tensor, positions: Tensor, stream: int, numel: int) -> Tensor:
    out = torch.empty(len(positions), numel, dtype=torch.float32, device=positions.device)
    if out.numel():
        positions = positions.contiguous()
        block = 1024
        programs = triton.cdiv(numel, block)
        grid = (runtime.check_grid(len(positions) * programs, len(positions)),)
        with runtime.on_device(positions):
            _normal_kernel[grid](
                seed,
                positions,
                out,
                numel,
                programs,
                STREAM=stream,
                BLOCK=block,
                num_warps=4,
                **runtime.OPTIONS,
            )
    return out


@_normal_op.register_fake
def _(seed: Tensor, positions: Tensor, stream: int, numel: int) -> Tensor:
    return positions.new_empty((len(positions), numel), dtype=torch.float32)
