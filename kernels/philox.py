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
from mixflow_fast.kernels.runtime import HAS_ASM, jit, tl, triton

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
    SOURCE_WEIGHT = 15  # weight w of a mixed source
    SOURCE_NOISE = 16  # second noise of a mixed source that mixes samples
    SOURCE_SIGNAL = 17  # noise that a mixed source is conditioned on
    SAMPLE_SIGNAL = 18  # the same for generated samples
    SAMPLE_WEIGHT = 19  # weight w for generated samples
    SAMPLE_SOURCE_NOISE = 20  # second noise for generated samples
    DROPOUT = 21  # dropout inside a network
    SOURCE_DROPOUT = 22  # w = 0 of a mixed source, whatever its weight was
    BUCKET = 23  # order of the shapes of batches
    CAPTION_CHOICE = 24  # which of an image's captions
    PROMPT_DROP = 25  # replacement of the prompt by the empty one
    ENCODER_DROP = 26  # zeros in place of what single text encoders give


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


def random_words(
    seed: int | Tensor, stream: int, positions: Tensor, numel: int = 1, impl: str = "reference"
) -> Tensor:
    """Uniform 32-bit words, (B, numel) int64 in [0, 2**32); arguments as `uniform`."""
    positions = _check_positions(positions)
    if runtime.use_kernels(impl, positions.device):
        _check_numel(numel)
        return _words_op(_seed_bits(seed, positions), positions, int(stream), numel)
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


def uniform(
    seed: int | Tensor, stream: int, positions: Tensor, numel: int = 1, impl: str = "reference"
) -> Tensor:
    """Uniform numbers in the open interval (0, 1).

    Args:
        seed: in [0, 2**64), or a `seed_tensor` on the device of `positions`.
        stream: a `Stream`.
        positions: (B,) int64 global sample positions.
        numel: numbers per sample.
        impl: "reference" is plain PyTorch, a hundred small launches on a GPU, "triton" one and
            "auto" takes that on CUDA devices. The numbers are the same bits.

    Returns:
        (B, numel) float32 on the device of `positions`, in [2^-24, 1 - 2^-24].

    Raises:
        ValueError: bad seed, positions that are not a 1-D integer tensor, negative numel.
    """
    positions = _check_positions(positions)
    if runtime.use_kernels(impl, positions.device):
        return _unit_open(random_words(seed, stream, positions, numel, impl))
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
    _check_numel(numel)
    return _normal_op(seed, _check_positions(positions), int(stream), numel)


def _check_numel(numel: int) -> None:
    if not 0 <= numel <= runtime.MAX_SAMPLE:
        raise ValueError(f"numel must be in [0, 2**29] for the Triton kernel, got {numel}")


@jit
def philox_words(seed, stream: tl.constexpr, position, block):
    """Four uint32 words for each counter block (element // 4).

    In all device functions here seed and position are int64 scalars, blocks int32.
    """
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = block.to(tl.uint32)
    c1 = tl.cast(stream, tl.uint32)
    c2 = (position & 0xFFFFFFFF).to(tl.uint32)
    c3 = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        # One wide product gives both halves: asked for one by one, they are two multiplications.
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        # In brackets what is the same for all elements in the first rounds.
        c0 = (b >> 32).to(tl.uint32) ^ (c1 ^ k0)
        c2 = (a >> 32).to(tl.uint32) ^ (c3 ^ k1)
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        k0 = k0 + tl.cast(0x9E3779B9, tl.uint32)
        k1 = k1 + tl.cast(0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


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
def polar_hardware(radius_word, angle_word):
    """`polar` by the units of NVIDIA's devices for logarithm, root, sine and cosine.

    Each is right to about 2^-22 of what it gives, or of 1. The root of a logarithm that came out
    above zero would be NaN, so its sign is dropped; all in one piece, so that no compiler takes it
    apart in one kernel and not in another.
    """
    a = tl.fma(radius_word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    radius = tl.inline_asm_elementwise(
        "{ .reg .f32 t; lg2.approx.ftz.f32 t, $1; abs.ftz.f32 t, t; "
        "mul.ftz.f32 t, t, 0f3FB17218; sqrt.approx.ftz.f32 $0, t; }",  # 2 ln 2
        "=f,f",
        [a],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )
    # A whole turn and 2^-24 of one less: the angle in (0, 2 pi) that belongs to the word's uniform.
    one_to_two = ((angle_word >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    angle = tl.fma(one_to_two, 6.283185307179586, -6.283185005187988)
    cosine = tl.inline_asm_elementwise(
        "cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
    )
    sine = tl.inline_asm_elementwise(
        "sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
    )
    return radius, cosine, sine


@jit
def polar_exact(radius_word, angle_word):
    """`polar` as `normal_reference` has it, for the interpreter."""
    a = radius_word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt(-2.0 * tl.log(a))
    radius = tl.where((angle_word >> 31) == 0, radius, -radius)
    turns = ((angle_word >> 9) & 0x3FFFFF).to(tl.float32)
    angle = ((turns + 0.5) * 1.1920928955078125e-07 - 0.25) * 6.283185307179586
    return radius, -tl.sin(angle), tl.cos(angle)


@jit
def polar(radius_word, angle_word):
    """(radius, cosine, sine) of two words: the normals of the module's docstring are radius times
    the others. By the interpreter's formula all three may have changed their signs.
    """
    if HAS_ASM:
        radius, cosine, sine = polar_hardware(radius_word, angle_word)
    else:
        radius, cosine, sine = polar_exact(radius_word, angle_word)
    return radius, cosine, sine


@jit
def box_muller(radius_word, angle_word):
    """Two normals from two words, as the module's docstring says."""
    radius, cosine, sine = polar(radius_word, angle_word)
    # A product that a compiler fuses with the sum after it is not rounded, and which it fuses
    # depends on the kernel. This one is fused already: the same number everywhere.
    return tl.fma(radius, cosine, 0.0), tl.fma(radius, sine, 0.0)


@jit
def normal_pairs(
    seed,
    stream: tl.constexpr,
    position,
    row,
    column,
    ROW_STRIDE,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Normals of elements (row + i) * ROW_STRIDE + column + 2 j, and of those after each of them.

    Two tiles of (ROWS, PAIRS) float32: Box-Muller makes pairs, and storage of 16 bits an element
    comes in words of two.

    VECTOR: neighbours that one thread makes, 8 or 4, as many as it loads of the data at once: the
    numbers then need no exchange between threads. ROW_STRIDE must be a multiple of 4 (or there is
    one row) and column of VECTOR. 1 is without conditions: each element computes its own block.
    """
    rows = row + tl.arange(0, ROWS)[:, None]
    if VECTOR == 8:
        block = rows * (ROW_STRIDE // 4) + column // 4 + 2 * tl.arange(0, PAIRS // 4)[None, :]
        n0, n1, n2, n3 = _normal_block(seed, stream, position, block)
        n4, n5, n6, n7 = _normal_block(seed, stream, position, block + 1)
        first = tl.interleave(tl.interleave(n0, n4), tl.interleave(n2, n6))
        second = tl.interleave(tl.interleave(n1, n5), tl.interleave(n3, n7))
    elif VECTOR == 4:
        block = rows * (ROW_STRIDE // 4) + column // 4 + tl.arange(0, PAIRS // 2)[None, :]
        n0, n1, n2, n3 = _normal_block(seed, stream, position, block)
        first = tl.interleave(n0, n2)
        second = tl.interleave(n1, n3)
    else:
        element = rows * ROW_STRIDE + column + 2 * tl.arange(0, PAIRS)[None, :]
        first = _normal_at(seed, stream, position, element)
        second = _normal_at(seed, stream, position, element + 1)
    return first, second


@jit
def _normal_block(seed, stream: tl.constexpr, position, block):
    w0, w1, w2, w3 = philox_words(seed, stream, position, block)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return n0, n1, n2, n3


@jit
def _normal_at(seed, stream: tl.constexpr, position, element):
    w0, w1, w2, w3 = philox_words(seed, stream, position, element >> 2)
    first = (element & 2) == 0
    x, y = box_muller(tl.where(first, w0, w2), tl.where(first, w1, w3))
    return tl.where((element & 1) == 0, x, y)


@jit(any_value=["programs"], any_address=["seed_ptr", "positions_ptr"])
def _normal_kernel(
    seed_ptr, positions_ptr, out_ptr, numel, programs, STREAM: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    sample = (program // programs).to(tl.int64)
    start = (program % programs) * BLOCK
    seed, position = tl.load(seed_ptr), tl.load(positions_ptr + sample)
    first, second = normal_pairs(seed, STREAM, position, 0, start, 0, 1, BLOCK // 2, 4)
    noise = tl.interleave(first, second)
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


@jit(any_value=["blocks"], any_address=["seed_ptr", "positions_ptr"])
def _words_kernel(
    seed_ptr, positions_ptr, out_ptr, numel, blocks, STREAM: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    element = (program % blocks) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)[None, :]
    block = (program % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    seed, position = tl.load(seed_ptr), tl.load(positions_ptr + sample)
    w0, w1, w2, w3 = philox_words(seed, STREAM, position, block)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)).to(tl.int64)
    tl.store(out_ptr + sample * numel + element, words, mask=element < numel)


@torch.library.custom_op("mixflow_fast::words", mutates_args=())
def _words_op(seed: Tensor, positions: Tensor, stream: int, numel: int) -> Tensor:
    out = torch.empty(len(positions), numel, dtype=torch.int64, device=positions.device)
    if out.numel():
        positions = positions.contiguous()
        block = 32 if numel <= 128 else 256
        blocks = triton.cdiv(numel, 4 * block)
        grid = (runtime.check_grid(len(positions) * blocks, len(positions)),)
        with runtime.on_device(positions):
            _words_kernel[grid](
                seed,
                positions,
                out,
                numel,
                blocks,
                STREAM=stream,
                BLOCK=block,
                num_warps=1 if block == 32 else 4,
                **runtime.OPTIONS,
            )
    return out


@_words_op.register_fake
def _(seed, positions, stream, numel):
    return positions.new_empty(len(positions), numel, dtype=torch.int64)
