"""What Triton's kernels compile to: no spills, no local memory, no atomics, 128-bit access.

Compiling needs Triton without its interpreter, so the report runs in processes of its own.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    *("op", "kernel", "variant", "arch", "triton", "ptxas", "num_warps", "registers"),
    *("spill_store_bytes", "spill_load_bytes", "stack_bytes", "shared_bytes"),
    *("global_access", "vector128", "atomics", "instructions", "seconds"),
}


def run_report(*arguments: str) -> tuple[int, str, str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def quick_rows():
    status, out, err = run_report("-m", "benchmarks.compile_report", "--json", "--quick")
    assert out, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0, [row for row in rows if row["atomics"] or row["stack_bytes"]] or err
    return rows


@pytest.fixture
def compile_report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.compile_report")


def test_rows_are_complete(quick_rows):
    assert all(set(row) == KEYS for row in quick_rows)
    assert all(row["registers"] > 0 and row["instructions"] > 0 for row in quick_rows)
    sm_80, sm_90, sm_100 = (
        sorted((row["op"], row["kernel"], row["variant"]) for row in quick_rows if row["arch"] == a)
        for a in ("sm_80", "sm_90", "sm_100")
    )
    assert sm_80 == sm_90 == sm_100
    assert len(quick_rows) == 3 * len(sm_80) > 0


def test_every_kernel_is_compiled(quick_rows):
    sources = "".join(path.read_text() for path in (ROOT / "kernels").rglob("*.py"))
    kernels = set(re.findall(r"^@jit\ndef (\w+_kernel)\(", sources, re.MULTILINE))
    assert len(kernels) > 3
    assert kernels == {row["kernel"] for row in quick_rows}


def test_no_spills_no_local_memory_no_atomics(quick_rows):
    for row in quick_rows:
        for name in ("spill_store_bytes", "spill_load_bytes", "stack_bytes", "atomics"):
            assert row[name] == 0, row


def test_data_moves_128_bits_at_once(quick_rows):
    plain = [f"{shape} {dtype}" for shape in ("rae", "sit") for dtype in ("bf16", "fp32")]
    chosen = [
        row
        for row in quick_rows
        if row["kernel"] in ("_interpolate_kernel", "_velocity_loss_kernel")
        and row["variant"] in plain
    ]
    assert len(chosen) == 2 * len(plain) * 3
    for row in chosen:
        assert row["vector128"], row
        # Not by having nothing to move: x1 in, x_m or the gradient out.
        for direction in ("load", "store"):
            widths = [int(k.split()[1]) for k in row["global_access"] if k.startswith(direction)]
            assert max(widths) >= 128, row


PLANTED = """
import torch
import triton
import triton.language as tl
from benchmarks.compile_report import Case, main

@triton.jit
def _clean_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at))

@triton.jit
def _narrow_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + 2 * at))

@triton.jit
def _atomic_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + at // 2, tl.load(x_ptr + at))

@triton.jit
def _spilling_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, x - tl.max(x, axis=0))

def case(kernel, block, **options):
    def call(mark):
        x = torch.empty(2 * block)
        _clean_kernel[(1,)](x, x, BLOCK=256)
        mark()
        # Once more with the same arguments is the same kernel.
        for grid in (1, 2):
            kernel[(grid,)](x, x, BLOCK=block, num_warps=4, **options)
    return Case("planted", kernel.fn.__name__, call)

cases = [
    case(_clean_kernel, 512),
    case(_narrow_kernel, 512),
    case(_atomic_kernel, 512),
    case(_spilling_kernel, 8192, maxnreg=32),
]
print("status", main(["--json", "--arch", "90"], cases))
print("status", main(["--arch", "90"], cases[:2]))
"""


def test_planted_faults_are_red(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    status, out, err = run_report(str(tmp_path / "planted.py"))
    assert status == 0, err
    lines = out.splitlines()
    rows = {(row := json.loads(line))["kernel"]: row for line in lines if line.startswith("{")}
    assert len(rows) == sum(line.startswith("{") for line in lines) == 4
    assert [line for line in lines if line.startswith("status")] == ["status 1", "status 0"]

    clean, narrow = rows["_clean_kernel"], rows["_narrow_kernel"]
    assert clean["global_access"] == {"load 128": 1, "store 128": 1} and clean["vector128"]
    assert narrow["global_access"] == {"load 32": 4, "store 128": 1} and not narrow["vector128"]
    atomic, spilling = rows["_atomic_kernel"], rows["_spilling_kernel"]
    assert atomic["atomics"] > 0 and not atomic["spill_store_bytes"]
    assert spilling["spill_store_bytes"] > 0 and spilling["stack_bytes"] > 0
    assert not any(row["atomics"] for row in (clean, narrow, spilling))

    table = lines[lines.index("status 1") + 1 :]
    assert table[0].split()[:4] == ["op", "kernel", "variant", "arch"]
    assert re.search(r"planted +narrow +_narrow_kernel +sm_90 .* no ", table[2])
    assert table[3] == "2 kernels, 0 with spills, local memory or atomics"


def test_refuses_the_interpreter(compile_report, monkeypatch, capsys):
    monkeypatch.setattr(compile_report.runtime, "interpreting", lambda: True)
    assert compile_report.main([]) == 2
    out, err = capsys.readouterr()
    assert not out and "TRITON_INTERPRET=1 is set: unset it" in err


PTX = """
.visible .entry _kernel(
	.param .u64 .ptr .global .align 1 _kernel_param_0
)
.maxntid 128
{
	.loc	1 5 0
	ld.param.b64 	%rd1, [_kernel_param_0];
	// begin inline asm
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	// end inline asm
	ld.global.L1::evict_last.L2::cache_hint.v2.b64 { %rd2, %rd3 }, [ %rd1 + 0 ], %rd9;
	@!%p2 st.global.b16 [ %rd1 + 0 ], { %rs1 };
	st.global.v8.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8 };
	st.shared.v4.b32 [%r1], {%r1, %r2, %r3, %r4};
	cp.async.cg.shared.global [ %r9 + 0 ], [ %rd1 + 0 ], 0x10, %r7;
	redux.sync.add.s32 %r1, %r2, 0xffffffff;  // atom.global.add
	red.global.add.f32 [%rd1], %f1;
	@%p1 atom.global.gpu.acq_rel.add.f32 %f2, [ %rd1 + 0 ], %f1;
$L__tmp1:
	ret;
}
	.file	1 "atom.red.py"
"""


def test_reading_ptx(compile_report):
    expected = {"load 128": 3, "store 16": 1, "store 256": 1}
    assert compile_report.global_access(PTX) == expected
    assert compile_report.narrow_accesses(expected) == 1
    assert compile_report.atomics(PTX) == 2
    assert compile_report.instructions(PTX) == 11


def test_reading_ptxas(compile_report):
    log = (
        "ptxas info    : Compiling entry function 'k' for 'sm_90a'\n"
        "    24 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 24 bytes cumulative stack size\n"
    )
    assert compile_report.ptxas_usage(log) == {
        "registers": 40,
        "spill_store_bytes": 8,
        "spill_load_bytes": 12,
        "stack_bytes": 24,
    }
    with pytest.raises(RuntimeError, match="ptxas -v did not report"):
        compile_report.ptxas_usage("")
