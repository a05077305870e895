"""`torch.ops.mixflow_fast.philox_*` against the PyTorch lines that define them, bit for bit."""

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixflow_fast import MixFlow, extension
from mixflow_fast.kernels import philox, philox_cpu
from mixflow_fast.kernels.interpolate import Moments
from mixflow_fast.kernels.philox import Stream, seed_tensor
from tests.support.csrc_library import require_library

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
CPU = torch.device("cpu")
POSITIONS = torch.tensor([0, 1, -1, 2**32 - 1, 2**32, 2**62 + 12345, -(2**63)])
# Around blocks (4), vectors (32 and 64), tiles (1024) and pieces (16384), each plus a bit.
COUNTS = (0, 1, 2, 3, 4, 5, 8, 63, 64, 65, 1023, 1025, 1028, 4 * 4096 - 1, 4 * 4096 + 7)
TWINS = {
    "philox_words": philox.words_reference,
    "philox_uniform": philox.uniform_reference,
    "philox_normal": philox.normal_reference,
}


@pytest.fixture(autouse=True, scope="module")
def library() -> None:
    require_library()


def bits(x: Tensor) -> Tensor:
    """What tells -0 from 0 and one NaN from another."""
    return x.view(torch.int32) if x.dtype == torch.float32 else x


def same(op: str, seed: int, stream: int, positions: Tensor, numel: int) -> bool:
    ours = getattr(torch.ops.mixflow_fast, op)(seed_tensor(seed, CPU), positions, stream, numel)
    twin = TWINS[op](seed, stream, positions, numel)
    return (
        ours.dtype == twin.dtype
        and ours.is_contiguous()
        and torch.equal(bits(ours), bits(twin.contiguous()))
    )


@pytest.mark.parametrize("op", TWINS)
@pytest.mark.parametrize("numel", COUNTS)
def test_the_bits_of_the_twin(op: str, numel: int) -> None:
    for seed, stream in ((0, 0), (2**64 - 1, 2**32 - 1), (2**63 + 5, Stream.NOISE)):
        assert same(op, seed, stream, POSITIONS, numel)


@pytest.mark.parametrize("op", TWINS)
def test_the_bits_of_the_twin_for_many_small_samples(op: str) -> None:
    """Samples that share vectors and pieces; positions that lie apart in memory."""
    positions = torch.arange(2 * 9001).flip(0)[::2] * 7919
    for numel in (1, 3, 12):
        assert same(op, 3, Stream.FLIP, positions, numel)
    assert same(op, 3, Stream.FLIP, POSITIONS[:0], 5)


@pytest.mark.parametrize("op", TWINS)
def test_any_number_of_threads_gives_the_same_bits(op: str) -> None:
    call = getattr(torch.ops.mixflow_fast, op)
    arguments = seed_tensor(11, CPU), torch.arange(5), int(Stream.NOISE), 16381
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(call(*arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """The block function in Python's integers, from the paper's definition."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


HARNESS = """
#include "philox_cpu.cpp"
extern "C" void run(int width, int64_t seed, int64_t position, uint32_t stream, uint32_t first,
                    int64_t count, uint32_t* out) {
  using namespace mixflow;
  Words tile;
  const Counter counter = make_counter(seed, stream, position);
  if (width == 0) philox(counter, first, count, tile);
#ifdef MIXFLOW_ONE_LIBRARY_FOR_X86
  if (width == 2) sse2::philox(counter, first, count, tile);
  if (width == 4) avx2::philox(counter, first, count, tile);
  if (width == 8) avx512::philox(counter, first, count, tile);
#endif
  for (int k = 0; k < 4; ++k) memcpy(out + k * count, tile.w[k], 4 * count);
}
extern "C" int has(int width) {
#ifdef MIXFLOW_ONE_LIBRARY_FOR_X86
  if (width == 4) return __builtin_cpu_supports("avx2");
  if (width == 8) return __builtin_cpu_supports("avx512f");
#endif
  return 1;
}
"""


@pytest.fixture(scope="module")
def widths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Callable, int]]:
    """Every version of the rounds that this machine can run: (function, width)."""
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("philox")
    (folder / "harness.cpp").write_text(HARNESS)
    libraries = {}
    for name, flags in (("chosen", []), ("portable", ["-DMIXFLOW_PORTABLE"])):
        command = ["c++", "-shared", "-fPIC", "-std=c++17", f"-I{SOURCES}", *flags]
        command += [flag for flag in extension.CXX_FLAGS if flag != "-fopenmp"]
        path = folder / f"{name}.so"
        subprocess.run([*command, str(folder / "harness.cpp"), "-o", str(path)], check=True)
        libraries[name] = ctypes.CDLL(str(path))
    found = {name: (library.run, 0) for name, library in libraries.items()}
    if platform.machine() == "x86_64":
        library = libraries["chosen"]
        found.update((f"{8 * n} bytes", (library.run, n)) for n in (2, 4, 8) if library.has(n))
    return found


def test_every_width_of_vector_gives_the_words_of_the_paper(widths: dict) -> None:
    seed, position, stream, first, count = 0x1234567_89ABCDEF, -(2**40) + 5, 2**32 - 2, 2**32 - 9, 8
    low, high = position & 0xFFFFFFFF, (position >> 32) & 0xFFFFFFFF
    key = [seed & 0xFFFFFFFF, seed >> 32]
    expected = [plain_philox([first + i, stream, low, high], key) for i in range(count)]
    for name, (run, width) in widths.items():
        out = (ctypes.c_uint32 * (4 * count))()
        signed = ctypes.c_int64(seed), ctypes.c_int64(position)
        unsigned = ctypes.c_uint32(stream), ctypes.c_uint32(first)
        run(width, *signed, *unsigned, ctypes.c_int64(count), out)
        words = [[out[k * count + i] for k in range(4)] for i in range(count)]
        assert words == expected, name


@pytest.mark.parametrize("op", TWINS)
def test_opcheck(op: str) -> None:
    call = getattr(torch.ops.mixflow_fast, op)
    torch.library.opcheck(call, (seed_tensor(1, CPU), POSITIONS, 6, 37))


@pytest.mark.parametrize("op", TWINS)
def test_wrong_arguments_are_named(op: str) -> None:
    call = getattr(torch.ops.mixflow_fast, op)
    seed = seed_tensor(1, CPU)
    for arguments, text in (
        ((seed.float(), POSITIONS, 6, 4), "seed must be a .* Float"),
        ((seed.view(1), POSITIONS, 6, 4), "seed must be a"),
        ((seed, POSITIONS.int(), 6, 4), "positions must be .* Int"),
        ((seed, POSITIONS.view(1, -1), 6, 4), "positions must be"),
        ((seed.to("meta"), POSITIONS, 6, 4), "seed must be on"),
        ((seed, POSITIONS, -1, 4), "stream must be in"),
        ((seed, POSITIONS, 2**32, 4), "stream must be in"),
        ((seed, POSITIONS, 6, -1), "numel must be in"),
        ((seed, POSITIONS, 6, 2**34 + 1), "numel must be in"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=text):
            call(*arguments)


def test_compiled_code_keeps_the_operator() -> None:
    def draw(seed: Tensor, ids: Tensor, like: Tensor) -> Tensor:
        return philox.normal(seed, Stream.NOISE, ids, like.shape[1:].numel()).view(like.shape) + 1

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (5, 8):
        like, ids = torch.zeros(3, 2, size), torch.arange(3)
        eager = draw(seed_tensor(4, CPU), ids, like)
        assert torch.equal(compiled(seed_tensor(4, CPU), ids, like), eager)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the operators as they are called through `philox_cpu`."""
    seen: list[str] = []
    for name in ("words", "uniform", "normal"):
        original = getattr(philox_cpu, name)

        def record(*given, original=original, name=name) -> Tensor:
            seen.append(name)
            return original(*given)

        monkeypatch.setattr(philox_cpu, name, record)
    yield seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("given", ["data", "tokens", "moments"])
def test_a_step_has_the_same_bits_without_the_library(
    dtype: torch.dtype, given: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x1 = torch.randn(3, 4, 6, 6, generator=generator).to(dtype)
    data = Moments(x1, x1.square(), 0.5) if given == "moments" else x1
    mix = MixFlow(clock="data_at_1", seed=5, input_perturbation=0.1)

    def step() -> list[Tensor]:
        it = mix.prepare(
            data, torch.tensor([7, 2**40, 3]), patch_size=2 * (given == "tokens") or None
        )
        pred = torch.ones_like(it.x).requires_grad_()
        loss = mix.loss(pred, it)
        (gradient,) = torch.autograd.grad(loss, pred)
        return [it.x, it.t, it.slowed_t, it.x0(), it.x1, loss, gradient]

    fast = step()
    assert {"uniform", "normal"} == set(calls)
    monkeypatch.setattr(philox_cpu, "_is_loaded", lambda: False)
    calls.clear()
    for a, b in zip(fast, step(), strict=True):
        assert torch.equal(a, b)
    assert not calls


def test_functorch_gets_the_twin(calls: list[str]) -> None:
    """It can look into PyTorch's operations, not into ours."""
    ids = torch.arange(6).view(3, 2)

    def draw(some: Tensor) -> Tensor:
        return philox.normal(3, Stream.NOISE, some, 5)

    assert torch.equal(torch.vmap(draw)(ids), draw(ids.flatten()).view(3, 2, 5))
    assert calls == ["normal"]
