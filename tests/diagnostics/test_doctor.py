"""`mixflow-fast doctor`: what it finds, what it lets pass, and that one check stops no other."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from mixflow_fast import environment
from mixflow_fast.cli.main import main
from mixflow_fast.diagnostics import block_cases, doctor, kernel_checks
from mixflow_fast.diagnostics.block_cases import BLOCK_OPS
from mixflow_fast.diagnostics.doctor import Check, Diagnosis, diagnose, stale_locks
from mixflow_fast.kernels import runtime
from mixflow_fast.training import engine
from tests.support.compiling import compiler
from tests.support.kernels import DEVICE

ROOT = Path(__file__).resolve().parents[2]
KERNELS = re.compile(r"^@jit[^@]*?\ndef (\w+_kernel)\(", re.MULTILINE)


def statuses(found: Diagnosis, section: str) -> dict[str, str]:
    return {check.name: check.status for check in found.sections[section]}


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch):
    """Leaves those sections alone in the diagnosis."""

    def keep(*names: str) -> None:
        monkeypatch.setattr(doctor, "SECTIONS", {name: doctor.SECTIONS[name] for name in names})

    return keep


@pytest.mark.skipif(not runtime.interpreting(), reason="launches are recorded in the interpreter")
def test_every_kernel_is_launched_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    launched = set()
    call = GridExecutor.__call__

    def recording(self, *args, **kwargs):
        launched.add(self.fn.__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", recording)
    findings = kernel_checks.check_kernels(DEVICE)
    assert [f for f in findings if not f.passed] == []
    assert {f.dtype for f in findings} == {"bfloat16", "float32", "int32"}
    sources = [path.read_text() for path in (ROOT / "kernels").rglob("*.py")]
    assert launched == {name for source in sources for name in KERNELS.findall(source)}


def test_a_wrong_kernel_is_found_and_the_others_are_still_checked(
    monkeypatch: pytest.MonkeyPatch, only, capsys: pytest.CaptureFixture[str]
) -> None:
    ops = ("gelu", "modulated_norm", "swiglu", "attention")
    whole = {name: BLOCK_OPS[name].ours for name in ops}

    def plant(name: str, ours) -> None:
        monkeypatch.setitem(block_cases.BLOCK_OPS, name, replace(BLOCK_OPS[name], ours=ours))

    def off_in_one_gradient(x, shift, scale, **options):
        return whole["modulated_norm"](x, shift, scale * 0.9 + scale.detach() * 0.1, **options)

    def broken(x, bias, impl):
        raise RuntimeError("out of resources: shared memory")

    plant("gelu", lambda x, bias, impl: whole["gelu"](x, bias, impl=impl) * 1.02)
    plant("modulated_norm", off_in_one_gradient)
    plant("swiglu", broken)
    every = kernel_checks.small_cases
    some = [case for case in every(DEVICE) if case.ops[0] in ops]
    monkeypatch.setattr(kernel_checks, "small_cases", lambda device: some)
    only("versions", "kernels against float64")
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["healthy"]
    checks = {check["name"]: check for check in found["sections"]["kernels against float64"]}
    assert {n for n, c in checks.items() if c["status"] == "fail"} == {
        "gelu",
        "modulated_norm",
        "swiglu",
    }
    assert "(out)" in checks["gelu"]["found"] and "(dscale)" in checks["modulated_norm"]["found"]
    assert "out of resources" in checks["swiglu"]["found"]
    assert checks["attention"]["status"] == "ok" and "impl=reference" in checks["gelu"]["do"]

    plant("gelu", lambda x, bias, impl: whole["gelu"](x, bias, impl=impl) + torch.nan)
    some = [case for case in every(DEVICE) if case.ops == ("gelu",) and case.mode == "full"]
    found = kernel_checks.check_kernels(DEVICE)
    assert all(f.passed for f in found if f.op != "gelu") and "normal" in {f.op for f in found}
    assert not any(f.passed for f in found if f.op == "gelu" and f.tensor == "out")


def test_the_command_on_a_plain_cpu() -> None:
    """As a user calls it: one object on stdout, nothing else, exit code 0, in less than 30 s."""
    hidden = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "mixflow_fast.cli", "doctor", "--json"],
        cwd=ROOT,
        env=os.environ | hidden | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = json.loads(result.stdout)
    assert result.returncode == 0 and found["healthy"], result.stdout
    assert result.stderr == ""
    assert found["seconds"] < 30 and time.monotonic() - started < 90
    assert list(found["sections"]) == list(doctor.SECTIONS)
    triton, *kernels = found["sections"]["kernels against float64"]
    assert "on a CPU its kernels are not used" in triton["found"]
    assert len(kernels) > 8 and {check["status"] for check in kernels} == {"ok"}
    names = {check["name"] for check in found["sections"]["attention backends"]}
    assert {"bf16", "fp32", "  math"} <= names
    assert {"name", "status", "found", "do"} == kernels[0].keys()


def test_a_check_that_ends_badly_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raising() -> Iterator[Check]:
        print("chatter of a library")
        yield Check("first", "ok", "fine")
        raise OSError("libcuda.so.1: cannot open shared object file")

    def leaving() -> Iterator[Check]:
        raise SystemExit(3)
        yield

    sections = {"a": raising, "b": leaving, "c": lambda: iter([Check("last", "warn", "low", "do")])}
    monkeypatch.setattr(doctor, "SECTIONS", sections)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "chatter" not in out
    assert "  ok    first  fine\n" in out
    assert "  FAIL  a      the check itself ended with OSError: libcuda.so.1" in out
    assert "  FAIL  b  the check itself ended with SystemExit: 3" in out
    assert "  warn  last  low  -> do\n" in out
    assert "NOT healthy: 2 failures, 1 warning (" in out


def test_warnings_leave_it_healthy(
    monkeypatch: pytest.MonkeyPatch, only, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "detect_apex", lambda: "unrelated")
    only("optional packages", "room")
    monkeypatch.setattr(doctor, "LOW_SHM_GIB", 1e9)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    apex = next(line for line in out.splitlines() if line.startswith("  warn  apex"))
    assert "is not NVIDIA's" in apex and "-> pip uninstall apex" in apex
    assert re.search(r"warn  shared memory  .*/dev/shm  -> .*--shm-size", out)
    assert "\nhealthy, 2 warnings (" in out


def backward_that_leaves_out(rows: int) -> Callable[..., object]:
    """A backend whose backward pass forgets a part of the modulation's gradient at that batch."""

    def backward(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        def run(*arguments: torch.Tensor) -> object:
            of_batch = any(
                isinstance(x, torch.Tensor) and x.shape == (rows, 4, 32) for x in arguments
            )
            made = graph(*arguments)
            for gradient in made:
                # Six vectors, of which one stays as the memory was.
                if of_batch and gradient is not None and gradient.shape == (6 * 32,):
                    gradient[64:96] = 0.25
            return made

        return make_boxed_func(run)

    return aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=backward)


@pytest.mark.parametrize("rows", [None, 1, 2])
def test_a_wrong_gradient_of_a_compiled_block_is_found(
    monkeypatch: pytest.MonkeyPatch, rows: int | None
) -> None:
    backend = backward_that_leaves_out(-1 if rows is None else rows)
    monkeypatch.setattr(torch, "compile", compiler(backend))
    found = list(doctor.compiled_gradients(torch.device("cpu")))
    assert [check.name for check in found] == ["batch 1", "batch 2"]
    assert [check.status for check in found] == ["fail" if n == rows else "ok" for n in (1, 2)]
    for check in found:
        assert ("model.mode=eager" in check.do) == (check.status == "fail")
        if check.status == "fail":
            assert "adaLN_modulation" in check.found


def test_without_deepspeed_it_is_not_healthy(monkeypatch: pytest.MonkeyPatch, only) -> None:
    def absent() -> None:
        raise ValueError("training needs DeepSpeed (No module named 'deepspeed')")

    monkeypatch.setattr(engine, "deepspeed_state", absent)
    only("DeepSpeed")
    found = diagnose()
    assert not found.healthy and statuses(found, "DeepSpeed")["deepspeed"] == "fail"


def test_a_lock_that_a_killed_build_left_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only
) -> None:
    """PyTorch's lock is a file; a build that is going on is younger."""
    for name, age_s in (("py311_cpu/shm_comm", 3600), ("fused", 7200), ("young", 60)):
        lock = tmp_path / name / "lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (time.time() - age_s,) * 2)
    assert [lock.parent.name for lock, _ in stale_locks(tmp_path)] == ["fused", "shm_comm"]
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    only("DeepSpeed")
    found = diagnose()
    locks = [check for check in found.sections["DeepSpeed"] if check.name == "build lock"]
    assert [check.status for check in locks] == ["warn", "warn"] and found.healthy
    assert f"rm {tmp_path / 'fused' / 'lock'}" in locks[0].do and "120 minutes" in locks[0].found
