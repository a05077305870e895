"""The first half minute on a GPU: rows, wrong kernels, and the sweep of approximate functions."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import approximations, first_contact
from benchmarks.approximations import APPROXIMATIONS, COUNT, sweep
from benchmarks.rows import read
from mixflow_fast.diagnostics.kernel_checks import Finding

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_smoke_run(tmp_path, capsys) -> None:
    """The whole part on the CPU; of the kernels two, the others are `test_run.py`'s."""
    arguments = ["--smoke", "--device", "cpu", "--out", str(tmp_path), "--deadline", "600"]
    assert first_contact.main([*arguments, "--op", "gelu", "--op", "interpolate"]) == 0
    assert "flash_attn" in capsys.readouterr().out
    found = {(row["op"], row["metric"]): row for row in read(tmp_path / "rows.jsonl")}
    assert found["lg2.approx", "positive_results"]["p50"] == 0
    assert found["lg2.approx", "max_abs_error"]["p50"] < 1e-7
    for op in ("gelu", "interpolate"):
        assert (
            found[op, "first_call_ms"]["p50"] > 0 and "right" in found[op, "first_call_ms"]["note"]
        )
    assert found["optimizer", "first_call_ms"]["note"].endswith("right")
    assert {"copy", "matmul", *APPROXIMATIONS} <= {op for op, _ in found}
    assert all(row["note"].startswith("smoke") for row in found.values())


def test_a_wrong_kernel_is_red_and_the_others_are_asked(monkeypatch, tmp_path, capsys) -> None:
    wrong = {"gelu": ["y: 0.5, allowed 0.01"]}
    monkeypatch.setattr(first_contact, "verify", lambda cell, *_: wrong.get(cell.op, []))
    monkeypatch.setattr(first_contact, "write_rates", lambda *_: 1 / 0)
    arguments = ["--smoke", "--device", "cpu", "--out", str(tmp_path), "--deadline", "600"]
    assert first_contact.main([*arguments, "--op", "gelu", "--op", "interpolate"]) == 1
    said = capsys.readouterr().out
    assert "gelu full bias 2x3x33 bfloat16: y: 0.5, allowed 0.01" in said
    assert "rates: ZeroDivisionError" in said
    assert "interpolate" in {row["op"] for row in read(tmp_path / "rows.jsonl")}


def test_a_wrong_step_of_the_optimizer_is_red(monkeypatch, tmp_path, capsys) -> None:
    off = Finding("AdamWEMA", "graph replays", "ema", "float32", 0.25, 0.0)
    monkeypatch.setattr(first_contact, "optimizer_replays", lambda device: [off])
    monkeypatch.setattr(first_contact, "write_kernels", lambda *_: [])
    arguments = ["--smoke", "--device", "cpu", "--out", str(tmp_path), "--deadline", "600"]
    assert first_contact.main(arguments) == 1
    assert "optimizer: ValueError: ema is off by 0.25" in capsys.readouterr().out
    (row,) = (row for row in read(tmp_path / "rows.jsonl") if row["op"] == "optimizer")
    assert "ema is off by 0.25" in row["note"]


def test_the_sweep_asks_every_value_of_the_last_binade() -> None:
    x = APPROXIMATIONS["lg2.approx"].values(COUNT, CPU)
    assert float(x[0]) == 0.5 and float(x[-1]) == 1.0
    bits = x.view(torch.int32)
    # One place apart, to the 2^23 + 1 floats from 1/2 to 1.
    assert torch.equal(bits.diff(), torch.ones_like(bits[1:])) and len(x) == (1 << 23) + 1


def test_a_positive_logarithm_and_a_nan_are_found(monkeypatch) -> None:
    def faulty(name: str, x: torch.Tensor) -> torch.Tensor:
        out = APPROXIMATIONS[name].exact(x)
        out[-2], out[3] = 1e-8, math.nan
        return out

    monkeypatch.setattr(approximations, "approximate", faulty)
    found = sweep("lg2.approx", CPU, 129)
    assert found.positive == 1 and found.nan == 1 and found.largest == pytest.approx(1e-8)
    assert found.error == math.inf and found.at == float(
        APPROXIMATIONS["lg2.approx"].values(129, CPU)[3]
    )


def test_an_instruction_that_gives_nan_is_red(monkeypatch, tmp_path, capsys) -> None:
    def faulty(name: str, x: torch.Tensor) -> torch.Tensor:
        out = APPROXIMATIONS[name].exact(x)
        out[3] = math.nan if name == "sin.approx" else out[3]
        return out

    monkeypatch.setattr(approximations, "approximate", faulty)
    monkeypatch.setattr(first_contact, "write_kernels", lambda *_: [])
    arguments = ["--smoke", "--device", "cpu", "--out", str(tmp_path), "--deadline", "600"]
    assert first_contact.main(arguments) == 1
    assert "ValueError: sin.approx gave NaN for 1 of 4097 values" in capsys.readouterr().out
    assert {*APPROXIMATIONS} <= {row["op"] for row in read(tmp_path / "rows.jsonl")}


COMPILE = """
import torch
from benchmarks.approximations import APPROXIMATIONS, launch
from benchmarks.recorded_launches import recording, target_of
from mixflow_fast.kernels import runtime
from triton.compiler import ASTSource

with recording(90) as launches:
    for entry in APPROXIMATIONS.values():
        launch(entry.asm, torch.ones(4096))
for recorded, entry in zip(launches, APPROXIMATIONS.values(), strict=True):
    source = ASTSource(recorded.function, *recorded.source)
    ptx = runtime.triton.compile(source, target=target_of(90), options=recorded.options).asm["ptx"]
    assert entry.asm.split()[0] in ptx, ptx
print("compiled", len(launches))
"""


def test_the_instructions_compile_for_a_gpu() -> None:
    """Needs Triton without its interpreter, so a process of its own."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # The import of the rows chooses the interpreter where it is not said otherwise.
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "compiled 4" in done.stdout, done.stderr
