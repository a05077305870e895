"""The CUDA source: compiled for three generations of GPUs; run and compared where there is one."""

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mixflow_fast import extension
from mixflow_fast.optim.step_calls import CONSTANTS
from tests.support.csrc_library import (
    SETTINGS,
    assert_same_bits,
    call,
    copy_of,
    make_tensors,
    require_library,
)

SOURCE = extension.sources_folder() / "adamw_ema_cuda.cu"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
# float, uint16_t; averages; constants among the arguments or in memory.
KERNELS = set(itertools.product("ft", ("n1", "0", "1", "2", "3"), "01"))


def nvcc(*arguments: str, cwd: Path) -> str:
    command = [NVCC, "-std=c++17", *extension.NVCC_FLAGS, *arguments, str(SOURCE)]
    environment = {**os.environ, "TMPDIR": str(cwd)}
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_nvcc
@pytest.mark.parametrize("arch", extension.GPU_ARCHITECTURES)
def test_compiles_without_spills(arch: str, tmp_path: Path) -> None:
    flags = ("-c", "-Xptxas", "-v", "-Werror", "all-warnings")
    text = nvcc(*flags, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", "x.o", cwd=tmp_path)
    found = re.findall(
        r"adamw_ema_kernelI([ft])Li(n?\d)ELb(\d)E.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        text,
        re.DOTALL,
    )
    assert {(t, k, stored) for t, k, stored, *_ in found} == KERNELS, text
    for t, k, stored, *numbers, registers in found:
        assert numbers == ["0", "0", "0"], (t, k, stored, numbers)
        # Three blocks of 256 threads on a multiprocessor, and so 24 warps with their loads out.
        assert int(registers) <= 80, (t, k, stored, registers)


@needs_nvcc
def test_contracts_nothing_and_reads_wide(tmp_path: Path) -> None:
    nvcc("-ptx", "-arch=compute_80", "-o", "x.ptx", cwd=tmp_path)
    bodies = (tmp_path / "x.ptx").read_text().split(".entry ")[1:]
    bodies = [body for body in bodies if "adamw_ema_kernel" in body.partition("(")[0]]
    assert len(bodies) == len(KERNELS)
    for body in bodies:
        name = re.search(r"adamw_ema_kernelI([ft])Li(n?\d)ELb(\d)E", body).groups()
        assert not re.search(r"\bfma\.", body), f"{name}: multiply and add in one"
        assert "div.rn.f32" in body and "sqrt.rn.f32" in body, f"{name}: approximate"
        assert not re.search(r"\batom\.|\bred\.|st\.local", body), name
        # p, m, v and each average, and the gradient (of bfloat16: half as wide).
        wide = len(re.findall(r"ld\.(?:global\.)?v4\.(?:f32|b32|u32)", body))
        averages = 1 if name[1] == "n1" else int(name[1])
        assert wide >= 3 + averages + (name[0] == "f"), (name, wide)


@needs_nvcc
def test_binding_compiles_with_its_cuda_part(tmp_path: Path) -> None:
    """Against this PyTorch's headers: of a CPU build, too, which lack one generated file."""
    include = Path(torch.__file__).parent / "include"
    toolkit = Path(os.path.realpath(NVCC)).parent.parent
    if not (toolkit / "include" / "cuda_runtime_api.h").is_file():
        toolkit = Path("/usr/local/cuda")
    if not (include / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h").is_file():
        stub = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
        stub.parent.mkdir(parents=True)
        stub.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    command = ["c++", "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-DMIXFLOW_WITH_CUDA"]
    command += [f"-I{tmp_path}", "-fopenmp"]
    for folder in (include, include / "torch/csrc/api/include", toolkit / "include"):
        command += ["-isystem", str(folder)]
    subprocess.run([*command, str(extension.sources_folder() / "binding.cpp")], check=True)


@needs_gpu
@pytest.mark.parametrize("emas", [0, 1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_has_the_cpus_bits(emas: int, dtype: torch.dtype) -> None:
    if not require_library().cuda:
        pytest.skip(f"the library has no CUDA part: {extension.cuda_toolkit()[1]}")
    sizes = [1, 3, 0, 1023, 65_537, *range(5, 120, 2)]
    lists = make_tensors(sizes, emas, dtype)
    there = {name: [x.cuda() for x in tensors] for name, tensors in lists.items()}
    copies = [torch.zeros(n, dtype=torch.bfloat16) for n in sizes]
    others = [c.cuda() for c in copies]
    call(lists, torch.tensor(0.25), copies)
    call(there, torch.tensor(0.25, device="cuda"), others)
    assert_same_bits(lists, {name: [x.cpu() for x in xs] for name, xs in there.items()})
    assert all(torch.equal(a, b.cpu()) for a, b in zip(copies, others, strict=True))


@needs_gpu
def test_gpu_runs_in_a_captured_graph() -> None:
    if not require_library().cuda:
        pytest.skip(f"the library has no CUDA part: {extension.cuda_toolkit()[1]}")
    lists = {k: [x.cuda() for x in xs] for k, xs in make_tensors((1023, 65_537), 2).items()}
    expected, scale = copy_of(lists), torch.tensor(0.5, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(lists, scale)
    for factor in (0.5, 0.25):  # read from memory at each replay
        scale.fill_(factor)
        graph.replay()
        call(expected, scale)
    assert_same_bits(expected, lists)


@needs_gpu
def test_gpu_makes_new_steps_in_a_captured_graph() -> None:
    """Step number, learning rate and decays are read from memory at each replay."""
    if not require_library().cuda:
        pytest.skip(f"the library has no CUDA part: {extension.cuda_toolkit()[1]}")
    lists = {k: [x.cuda() for x in xs] for k, xs in make_tensors((1023, 65_537), 2).items()}
    expected, constants = copy_of(lists), torch.zeros(CONSTANTS, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.mixflow_fast.adamw_ema_from_constants_(
            *lists.values(), [], None, constants=constants
        )
    for step in range(1, 20):  # no wait in between: each replay has its own numbers
        own = {**SETTINGS, "step": step, "lr": 0.01 / step, "ema_decays": [1 - 1 / step, 0.5]}
        torch.ops.mixflow_fast.adamw_constants_(constants, **own)
        graph.replay()
        call(expected, **own)
    assert_same_bits(expected, lists)


@needs_gpu
def test_gpu_leaves_out_a_step_in_a_captured_graph() -> None:
    """The norm is read from memory at each replay, and never on the host."""
    if not require_library().cuda:
        pytest.skip(f"the library has no CUDA part: {extension.cuda_toolkit()[1]}")
    lists = {k: [x.cuda() for x in xs] for k, xs in make_tensors((1023, 65_537), 2).items()}
    expected, norm = copy_of(lists), torch.tensor(1.0, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(lists, grad_norm=norm)
    for value in (1.0, float("nan"), float("inf"), 2.0):
        norm.fill_(value)
        graph.replay()
        if value < 3:
            call(expected)
        assert_same_bits(expected, lists)
