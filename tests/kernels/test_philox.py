"""Philox against the published known answers, and the properties of its draws."""

import math

import pytest
import torch

from mixflow_fast.kernels import philox
from mixflow_fast.kernels.philox import (
    Stream,
    box_muller,
    normal,
    philox_4x32,
    philox_words,
    random_words,
    seed_tensor,
    uniform,
    unit_open,
)
from mixflow_fast.kernels.runtime import jit, tl
from tests.support.kernels import DEVICE, ON_GPU

# Random123 (Salmon et al.), tests/kat_vectors, rows "philox4x32 10".
KNOWN_ANSWERS = [
    "00000000 00000000 00000000 00000000 / 00000000 00000000 / 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff / ffffffff ffffffff / 408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 / a4093822 299f31d0 / d16cfe09 94fdcceb 5001e420 24126ea1",
]


@pytest.mark.parametrize("row", KNOWN_ANSWERS)
def test_known_answers(row: str) -> None:
    counter, key, expected = row.split(" / ")
    words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    k0, k1 = (int(word, 16) for word in key.split())
    out = philox_4x32(words, (k0, k1))
    assert [f"{int(word):08x}" for word in out] == expected.split()


def test_layout_of_key_and_counter() -> None:
    """The counter is (element // 4, stream, position low, position high), the key is the seed."""
    seed, position = 0x1234567_89ABCDEF, (7 << 32) | 0xDEADBEEF
    words = random_words(seed, Stream.NOISE, torch.tensor([position]), 11)[0]
    counter = [torch.tensor([x]) for x in (2, int(Stream.NOISE), 0xDEADBEEF, 7)]
    block = philox_4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    assert words[8:].tolist() == [int(word) for word in block[:3]]


def test_draw_does_not_depend_on_place_or_count() -> None:
    ids = torch.tensor([5, 2**40 + 3, 11, 0])
    full = normal(3, Stream.NOISE, ids, 100)
    for row, sample in enumerate(ids):
        assert torch.equal(normal(3, Stream.NOISE, sample.view(1), 100)[0], full[row])
    assert torch.equal(normal(3, Stream.NOISE, ids.flip(0), 100), full.flip(0))
    assert torch.equal(normal(3, Stream.NOISE, ids, 37), full[:, :37])


def test_layout_of_large_batches_does_not_change_bits() -> None:
    """Vectorised and scalar code paths of the CPU must agree, whatever the chunking."""
    ids = torch.arange(64)
    full = normal(0, Stream.NOISE, ids, 3073)
    parts = torch.cat([normal(0, Stream.NOISE, part, 3073) for part in ids.split(5)])
    assert torch.equal(full, parts)


def test_uniform_is_exact_and_open() -> None:
    words = random_words(1, Stream.TIME, torch.arange(5000), 4)
    u = uniform(1, Stream.TIME, torch.arange(5000), 4)
    assert u.dtype == torch.float32
    assert torch.equal(u.double(), ((words >> 9).double() + 0.5) / 2**23)
    assert philox._unit_open(torch.tensor([0, 2**32 - 1])).tolist() == [2**-24, 1 - 2**-24]


def test_normal_matches_float64_box_muller() -> None:
    ids = torch.arange(200)
    words = random_words(9, Stream.NOISE, ids, 64).double().view(200, 16, 4)
    radius = torch.sqrt(-2 * torch.log((words[..., 0::2] + 0.5) / 2**32))
    angle = 2 * math.pi * (torch.floor(words[..., 1::2] / 512) + 0.5) / 2**23
    truth = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1).flatten(1)
    z = normal(9, Stream.NOISE, ids, 64)
    assert (z.double() - truth).abs().max() < 2e-6


def test_moments() -> None:
    n = 1_000_000
    z = normal(0, Stream.NOISE, torch.arange(1000), 1000).double().flatten()
    expected = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}  # moment: (value, variance of z^k)
    for k, (value, variance) in expected.items():
        assert abs((z**k).mean().item() - value) < 5 * math.sqrt(variance / n), k
    u = uniform(0, Stream.TIME, torch.arange(n))[:, 0].double()
    assert abs(u.mean().item() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    counts = torch.histc(u, bins=100, min=0, max=1)
    chi2 = ((counts - n / 100) ** 2 / (n / 100)).sum().item()
    assert abs(chi2 - 99) < 5 * math.sqrt(2 * 99)


def test_independence_of_streams_samples_elements_and_seeds() -> None:
    ids = torch.arange(400)
    z = normal(0, Stream.NOISE, ids, 1000)
    others = {
        "stream": normal(0, Stream.SAMPLE_NOISE, ids, 1000),
        "seed": normal(1, Stream.NOISE, ids, 1000),
        "high seed bits": normal(1 << 32, Stream.NOISE, ids, 1000),
        "next sample": normal(0, Stream.NOISE, ids + 1, 1000),
        "high position bits": normal(0, Stream.NOISE, ids + (1 << 32), 1000),
        "next element": z.roll(1, dims=1),
        "next block": z.roll(4, dims=1),
    }
    bound = 5 / math.sqrt(z.numel())
    for name, other in others.items():
        assert abs((z * other).mean().item()) < bound, name
        # Box-Muller halves share a radius: squares must be uncorrelated too.
        assert abs(((z**2 - 1) * (other**2 - 1)).mean().item()) < 2 * bound, name
    words = random_words(0, Stream.NOISE, torch.arange(2000), 50).flatten()
    assert len(words.unique()) > len(words) - 10  # 1.2 collisions of 32-bit words are expected


@pytest.mark.parametrize("seed", [-1, 1 << 64, 1.0, True, None])
def test_bad_seed(seed: object) -> None:
    with pytest.raises(ValueError, match="seed"):
        uniform(seed, Stream.TIME, torch.arange(2))


@pytest.mark.parametrize("ids", [torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2)])
def test_bad_positions(ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="positions"):
        uniform(0, Stream.TIME, ids)


@jit
def _words_kernel(
    seed_ptr, positions_ptr, words_ptr, uniform_ptr, STREAM: tl.constexpr, BLOCKS: tl.constexpr
):
    sample = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    position = tl.load(positions_ptr + sample)
    w0, w1, w2, w3 = philox_words(tl.load(seed_ptr), STREAM, position, block)
    out = words_ptr + sample * (4 * BLOCKS) + 4 * block
    tl.store(out, w0.to(tl.int64))
    tl.store(out + 1, w1.to(tl.int64))
    tl.store(out + 2, w2.to(tl.int64))
    tl.store(out + 3, w3.to(tl.int64))
    tl.store(uniform_ptr + sample * BLOCKS + block, unit_open(w0))


@pytest.mark.parametrize("seed", [0, 1, 0x1234567_89ABCDEF, 2**63, 2**64 - 1])
@pytest.mark.parametrize("stream", [Stream.TIME, Stream.NOISE])
def test_device_words_are_the_same_integers(seed: int, stream: Stream) -> None:
    positions = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 12345, 2**62], device=DEVICE)
    words = torch.zeros(7, 1024, dtype=torch.int64, device=DEVICE)
    u = torch.zeros(7, 256, device=DEVICE)
    seed_bits = seed_tensor(seed, DEVICE)
    _words_kernel[(7,)](seed_bits, positions, words, u, STREAM=int(stream), BLOCKS=256)
    assert torch.equal(words, random_words(seed, stream, positions, 1024))
    assert torch.equal(u, uniform(seed, stream, positions, 1024)[:, ::4])
    assert torch.equal(words, random_words(seed_bits, stream, positions, 1024))


@pytest.mark.parametrize("numel", [1, 5, 128, 129, 2051])
def test_words_and_uniform_numbers_in_one_launch(numel: int, poisoned_memory: None) -> None:
    positions = torch.tensor([3, 2**32 - 1, 2**40 + 12345], device=DEVICE)
    for draw in (random_words, uniform):
        expected = draw(2**63 + 7, Stream.SOURCE_WEIGHT, positions, numel)
        made = draw(2**63 + 7, Stream.SOURCE_WEIGHT, positions, numel, "triton")
        assert made.dtype == expected.dtype and torch.equal(made, expected)
        assert draw(7, Stream.TIME, positions[:0], numel, "triton").shape == (0, numel)
    arguments = seed_tensor(7, DEVICE), positions, int(Stream.TIME), numel
    torch.library.opcheck(torch.ops.mixflow_fast.words, arguments)
    with pytest.raises(ValueError, match="numel"):
        random_words(7, Stream.TIME, positions, -1, "triton")


@jit
def _box_muller_kernel(radius_ptr, angle_ptr, x_ptr, y_ptr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    radius_word = tl.load(radius_ptr + i).to(tl.uint32)
    x, y = box_muller(radius_word, tl.load(angle_ptr + i).to(tl.uint32))
    tl.store(x_ptr + i, x)
    tl.store(y_ptr + i, y)


def test_device_normals_against_the_reference_and_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a million pairs with the rarest words among them, against PyTorch and float64."""
    n = 1 << 18
    words = random_words(7, Stream.NOISE, torch.tensor([3]), 2 * n)[0]
    radius_word, angle_word = words[::2].clone(), words[1::2].clone()
    radius_word[:2000] = torch.cat([torch.arange(1000), 2**32 - 1 - torch.arange(1000)])
    angle_word[2000:4000] = torch.cat([torch.arange(1000), 2**32 - 1 - torch.arange(1000)])
    monkeypatch.setattr(philox, "_blocks", lambda *_: [radius_word[None], angle_word[None]] * 2)
    plain = philox.normal_reference(0, 0, torch.zeros(1, dtype=torch.int64), 4 * n)
    plain = plain.view(n, 4)[:, :2]
    x, y = torch.empty(2, n, device=DEVICE)
    block = 1024 if ON_GPU else n
    _box_muller_kernel[(n // block,)](radius_word.to(DEVICE), angle_word.to(DEVICE), x, y, N=block)
    device = torch.stack([x, y], dim=-1).cpu()

    a = (radius_word.to(torch.float32) * 2.0**-32 + 2.0**-33).double()
    radius = torch.sqrt(-2 * torch.log(a))
    angle = ((angle_word >> 9).double() + 0.5) * (2 * math.pi / 2**23)
    exact = radius[:, None] * torch.stack([torch.cos(angle), torch.sin(angle)], dim=-1)
    ulp = 2.0 ** (torch.floor(torch.log2(radius.clamp(min=1e-6))) - 23)[:, None]
    error = (device.double() - exact).abs()
    if ON_GPU:
        # The first words are the rarest, where the logarithm's error is most of a tiny radius.
        assert error[4000:].square().mean().sqrt() < 2e-6
        assert error[radius > 0.1].max() < 1e-5 and error.max() < 1e-3
        return
    assert ((device - plain).double().abs() / ulp).max() <= 3
    errors = [(v / ulp).square().mean().sqrt() for v in (error, (plain.double() - exact).abs())]
    assert errors[0] <= 1.2 * errors[1] and errors[1] < 0.6


def _hardware_normals(radius_word: torch.Tensor, angle_word: torch.Tensor, off) -> torch.Tensor:
    """`polar_hardware`'s numbers in float64 steps, each unit off by as much as it may be.

    off(n): n numbers in [-1, 1], errors in units of a bound. The bounds are those of the PTX ISA:
    lg2.approx 2^-22 (absolute in (1/2, 2), else relative), sqrt.approx 2^-23 relative, sin.approx
    and cos.approx 2^-20.5 absolute on [-2 pi, 2 pi].
    """
    n = len(radius_word)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float32).double()

    a = rounded(radius_word.to(torch.float32).double() * 2.0**-32 + 2.0**-33)
    log = torch.log2(a)
    bound = torch.where(a > 0.5, torch.ones_like(a), log.abs()) * 2.0**-22
    log = rounded(log + off(n) * bound).abs()
    radius = torch.sqrt(rounded(log * rounded(torch.tensor(2 * math.log(2.0)).double())))
    radius = rounded(radius * (1 + off(n) * 2.0**-23))
    one_to_two = 1 + (angle_word >> 9).double() * 2.0**-23
    turn = torch.tensor(2 * math.pi).double()  # float32's, as the kernel has it
    angle = rounded(one_to_two * turn - 6.283185005187988)
    cosine = rounded(torch.cos(angle) + off(n) * 2.0**-20.5)
    sine = rounded(torch.sin(angle) + off(n) * 2.0**-20.5)
    return rounded(torch.stack([radius * cosine, radius * sine], dim=-1))


@pytest.mark.parametrize("errors", ["random", "at the bounds"])
def test_the_hardware_units_bounds_are_enough(errors: str) -> None:
    """Normals made with every unit as wrong as its documentation allows, against float64.

    What no device has shown yet: that the units keep to their bounds.
    """
    n = 1 << 17
    words = random_words(7, Stream.NOISE, torch.tensor([3]), 2 * n)[0]
    radius_word, angle_word = words[::2].clone(), words[1::2].clone()
    # The smallest and largest radii and the ends of the circle are in it.
    edge = torch.tensor([0, 1, 127, 128, 2**31, 2**32 - 1, 2**32 - 2, 2**32 - 129, 2**32 - 4096])
    radius_word[:9], angle_word[9:18] = edge, edge
    generator = torch.Generator().manual_seed(5)

    def off(count: int) -> torch.Tensor:
        drawn = 2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1
        return drawn if errors == "random" else drawn.sign()

    made = _hardware_normals(radius_word, angle_word, off)
    a = (radius_word.to(torch.float32) * 2.0**-32 + 2.0**-33).double()
    radius = torch.sqrt(-2 * torch.log(a))
    angle = ((angle_word >> 9).double() + 0.5) * (2 * math.pi / 2**23)
    exact = radius[:, None] * torch.stack([torch.cos(angle), torch.sin(angle)], dim=-1)
    error = (made - exact).abs()
    assert made.isfinite().all()
    # A tiny radius is mostly the logarithm's error, and rare: below 1e-3 one in two million.
    assert error[radius > 0.1].max() < 1e-5 and error.max() < 1e-3
    made, exact = made[18:].flatten(), exact[18:].flatten()  # without the planted words
    assert (made - exact).square().mean().sqrt() < 2e-6
    for power in (1, 2, 3, 4):
        assert abs((made**power).mean() - (exact**power).mean()) < 1e-5
    tails = [(x.abs() > 4).sum() for x in (made, exact)]
    assert tails[0] == tails[1] > 0
    # Kolmogorov-Smirnov, in units of 1 / sqrt(n): one value for both, of a normal distribution.
    distances = []
    for x in (made, exact):
        probability, count = torch.special.ndtr(x.sort().values), len(x)
        steps = torch.arange(count + 1, dtype=torch.float64) / count
        low, high = (probability - steps[:-1]).max(), (steps[1:] - probability).max()
        distances.append(float(torch.maximum(low, high)) * math.sqrt(count))
    assert abs(distances[0] - distances[1]) < 0.01 and distances[1] < 1.36


def test_device_draw_does_not_depend_on_place_or_count(poisoned_memory: None) -> None:
    ids = torch.tensor([5, 2**40 + 3, 11], device=DEVICE)
    full = normal(3, Stream.NOISE, ids, 1500, impl="triton")
    plain = normal(3, Stream.NOISE, ids, 1500, impl="reference")
    torch.testing.assert_close(full, plain, rtol=0, atol=1e-4 if ON_GPU else 2e-6)
    assert torch.equal(normal(3, Stream.NOISE, ids[1:2], 1500, impl="triton")[0], full[1])
    assert torch.equal(
        normal(3, Stream.NOISE, ids.flip(0), 37, impl="triton"), full.flip(0)[:, :37]
    )
    assert normal(3, Stream.NOISE, ids[:0], 8, impl="triton").shape == (0, 8)
    assert normal(3, Stream.NOISE, ids, 0, impl="triton").shape == (3, 0)
    with pytest.raises(ValueError, match="numel"):
        normal(3, Stream.NOISE, ids, 2**29 + 1, impl="triton")
