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
    *("spills", "issue_us", "bytes_us", "normals"),
}
PER_ELEMENT = {"loop_instructions_per_element", "prologue_instructions_per_element"}
OBJECTIVE = ("interpolate", "velocity_loss", "scale_gradient_")
COUNTED = {
    *("_residual_norm_forward_kernel", "_residual_norm_backward_kernel"),
    *("_qk_norm_forward_kernel", "_qk_norm_backward_kernel"),
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


@pytest.fixture
def machine_code(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.machine_code")


def test_rows_are_complete(quick_rows):
    for row in quick_rows:
        counted = row["op"] in OBJECTIVE or row["kernel"] in COUNTED
        assert set(row) == KEYS | (PER_ELEMENT if counted else set())
    assert all(row["registers"] > 0 and row["instructions"] > 0 for row in quick_rows)
    sm_80, sm_90, sm_100 = (
        sorted((row["op"], row["kernel"], row["variant"]) for row in quick_rows if row["arch"] == a)
        for a in ("sm_80", "sm_90", "sm_100")
    )
    assert sm_80 == sm_90 == sm_100
    assert len(quick_rows) == 3 * len(sm_80) > 0


def test_every_kernel_is_compiled(quick_rows):
    sources = "".join(path.read_text() for path in (ROOT / "kernels").rglob("*.py"))
    kernels = set(re.findall(r"^@jit[^@]*?\ndef (\w+_kernel)\(", sources, re.MULTILINE))
    assert len(kernels) > 3
    assert kernels == {row["kernel"] for row in quick_rows}


def test_no_spills_no_local_memory_no_atomics(quick_rows):
    for row in quick_rows:
        for name in ("spill_store_bytes", "spill_load_bytes", "stack_bytes", "atomics"):
            assert row[name] == 0, row


def test_data_moves_128_bits_at_once(quick_rows):
    # The latents of "sit" are served by the same kernels, so they have no rows.
    plain = ["rae bf16", "rae fp32"]
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


@pytest.mark.parametrize(
    ("kernel", "loop", "prologue", "bytes_of_bf16"),
    [("_interpolate_kernel", 24, 2, 4), ("_velocity_loss_kernel", 27, 4, 6)],
)
def test_the_objective_is_bound_by_bytes(
    quick_rows, kernel: str, loop: float, prologue: float, bytes_of_bf16: int
):
    """Few enough instructions that issuing them takes less time than moving the data."""
    rows = [r for r in quick_rows if r["kernel"] == kernel]
    for row in rows:
        if row["variant"] in ("rae bf16", "rae fp32"):
            assert 15 < row["loop_instructions_per_element"] <= loop, row
            assert 0 < row["prologue_instructions_per_element"] <= prologue, row
            assert 0 < row["issue_us"] < row["bytes_us"], row
            elements = 256 * 768 * 256
            width = bytes_of_bf16 * (2 if row["variant"] == "rae fp32" else 1)
            assert row["bytes_us"] == pytest.approx(width * elements / 4.3e6, rel=1e-3)
        elif "tokens" in row["variant"]:
            assert 15 < row["loop_instructions_per_element"] <= 32, row
    # On each of three architectures, so that a case by another name does not go unasked.
    asked = [row["variant"] for row in rows]
    assert asked.count("rae bf16") == asked.count("rae fp32") == 3
    assert sum("tokens" in variant for variant in asked) >= 3


# Instructions an element, in the loop where there is one: before a row lay in two parts they were
# 30 to 38, 44 to 57, 48 to 60, 20 to 26, 43 and 55.
XL = "layer per sample 256x256x1152 bfloat16"
TWO_PARTS = [
    ("residual_norm", "_residual_norm_forward_kernel", f"{XL} no h_bias", 22),
    ("residual_norm", "_residual_norm_backward_kernel", f"{XL} no h_bias", 33),
    ("residual_norm", "_residual_norm_backward_kernel", f"{XL} recompute", 37),
    ("modulated_norm", "_residual_norm_forward_kernel", XL, 16),
    ("attention", "_qk_norm_forward_kernel", "layer 32x256x16x72 bfloat16", 24),
    ("attention", "_qk_norm_backward_kernel", "layer 32x256x16x72 bfloat16", 31),
]


@pytest.mark.parametrize(("op", "kernel", "variant", "limit"), TWO_PARTS)
def test_no_lanes_without_work(quick_rows, op: str, kernel: str, variant: str, limit: float):
    """Widths that are no power of two cost instructions for what they hold, and no more."""
    rows = [r for r in quick_rows if (r["op"], r["kernel"], r["variant"]) == (op, kernel, variant)]
    assert len(rows) == 3
    for row in rows:
        once, loop = (row[f"{x}_instructions_per_element"] for x in ("prologue", "loop"))
        assert 10 < (loop or once) <= limit, row
        assert row["issue_us"] < row["bytes_us"], row
        if op == "attention":
            # Threads hold the same rows of both parts: nothing moves through shared memory but the
            # sums of programs, 8 warps of 64 elements.
            assert row["shared_bytes"] <= (2048 if "backward" in kernel else 0), row


def test_every_kernel_makes_the_same_noise(quick_rows):
    """The same float instructions from the words to the rounded product, read from machine code."""
    of_arch = {}
    for row in quick_rows:
        if row["kernel"] in ("_interpolate_kernel", "_velocity_loss_kernel", "_normal_kernel"):
            of_arch.setdefault(row["arch"], []).append(row)
    assert len(of_arch) == 3
    for arch, rows in of_arch.items():
        assert len(rows) >= 7 and {row["op"] for row in rows} >= {"interpolate", "normal"}
        first = rows[0]["normals"]
        assert all(row["normals"] == first for row in rows), arch
        # A cosine and a sine, each rounded by itself: nothing is added but zero.
        assert len(first) == 2 and all(formula.endswith(" + 0)") for formula in first), first
        assert sum("MUFU.COS(" in formula for formula in first) == 1
        assert all("|MUFU.LG2(" in formula for formula in first), first


ALIKE = """
import torch
from benchmarks.recorded_launches import recording
from mixflow_fast import MixFlow, Moments

def keys(x1, ids, pred=None, weight=None, reduction="mean", upstream=1.0):
    mix = MixFlow(clock="data_at_1", impl="triton")
    with recording(90) as launches:
        it = mix.prepare(x1, ids)
        pred = torch.empty(x1.shape, dtype=x1.dtype) if pred is None else pred
        losses = mix.loss(pred.requires_grad_(), it, weight=weight, reduction=reduction)
        losses.backward(torch.full_like(losses, upstream))
    return [(launch.kernel, launch.key) for launch in launches]

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype)

ids = torch.arange(600)
shape = 4, 32, 32
plain = keys(empty(16, *shape), ids[:16])
assert len(plain) == 4, plain  # interpolate, loss, sum and, in the backward pass, the scale
same = {
    "ids at an odd place": keys(empty(16, *shape), ids[3:19]),
    "a batch that 16 does not divide": keys(empty(7, *shape), ids[:7]),
    "a batch of one": keys(empty(1, *shape), ids[:1]),
    "a large batch": keys(empty(600, *shape), ids),
    "one whose stride is 1": keys(empty(*shape, 1).permute(3, 0, 1, 2), ids[5:6]),
    "data at an odd place": keys(empty(4 * 4096 + 1)[1:].view(4, *shape), ids[:4]),
    "rows apart by an odd step": keys(empty(4, 4097)[:, 1:].unflatten(1, shape), ids[:4]),
    "another upstream": keys(empty(16, *shape), ids[:16], upstream=3.0),
}
for name, found in same.items():
    assert found == plain, (name, [a for a, b in zip(found, plain) if a != b])
# The sum's tiles follow the number of partial sums, and nothing else the size of a sample.
larger = keys(empty(16, 768, 16, 16), ids[:16])
assert [a == b for a, b in zip(larger, plain, strict=True)] == [True, True, False, True]
odd = keys(empty(5, 7, 9, 5), ids[:5])
for name, found in {
    "one of them": keys(empty(5, 7, 9, 5)[3:4], ids[3:4]),
    "at an odd place": keys(empty(5 * 315 + 3)[3:].view(5, 7, 9, 5), ids[:5]),
    "another odd size": keys(empty(5, 7, 9, 3), ids[:5]),
}.items():
    assert found == odd, name
assert odd != plain
half = keys(Moments(*empty(3, 8, 32, 32).chunk(2, dim=1), 0.5), ids[:3], empty(3, *shape))
whole = keys(Moments(empty(3, *shape), empty(3, *shape), 0.5), ids[:3], empty(3, *shape))
assert half == whole != plain
print("alike")
"""


def test_no_recompilation_for_another_place_batch_or_size(tmp_path):
    """By Triton's own keys, without a GPU: one kernel, so also the same bits."""
    (tmp_path / "alike.py").write_text(ALIKE)
    status, out, err = run_report(str(tmp_path / "alike.py"))
    assert status == 0 and out.split() == ["alike"], err


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


def test_reading_ptx(machine_code):
    expected = {"load 128": 3, "store 16": 1, "store 256": 1}
    assert machine_code.global_access(PTX) == expected
    assert machine_code.narrow_accesses(expected) == 1
    assert machine_code.atomics(PTX) == 2
    assert machine_code.instructions(PTX) == 11


def test_reading_ptxas(machine_code):
    log = (
        "ptxas info    : Compiling entry function 'k' for 'sm_90a'\n"
        "    24 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 24 bytes cumulative stack size\n"
    )
    assert machine_code.ptxas_usage(log) == {
        "registers": 40,
        "spill_store_bytes": 8,
        "spill_load_bytes": 12,
        "stack_bytes": 24,
    }
    with pytest.raises(RuntimeError, match="ptxas -v did not report"):
        machine_code.ptxas_usage("")


SASS = """
	.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
        /*0020*/                   MOV R4, 0x3f000000 ;
.L_x_0:
        /*0030*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0040*/                   I2FP.F32.U32 R12, R8 ;
        /*0050*/                   MUFU.LG2 R12, R12 ;
        /*0060*/                   FMUL.FTZ R12, |R12|, R4.reuse ;
        /*0070*/                   MUFU.SQRT R12, R12 ;
        /*0080*/                   I2FP.F32.U32 R13, R9 ;
        /*0090*/                   MUFU.COS R13, R13 ;
        /*00a0*/                   FFMA R14, -R12, R13, RZ ;
        /*00b0*/                   FFMA R15, R13, R12, R4 ;
        /*00c0*/                   STG.E desc[UR4][R2.64], R14 ;
        /*00d0*/               @P1 BRA `(.L_x_0) ;
        /*00e0*/                   STG.E.U16 desc[UR4][R2.64], R15 ;
        /*00f0*/                   EXIT ;
.L_x_1:
        /*0100*/                   BRA `(.L_x_1);
        /*0110*/                   NOP;
"""


def test_reading_machine_code(machine_code):
    instructions = machine_code.parse(SASS)
    code = machine_code.split(instructions)
    assert len(instructions) == 18 and len(code.loop) == 11
    assert [one.name for one in code.once] == ["LDC", "EXIT", "MOV", "STG.E.U16", "EXIT"]
    assert code.once[1].predicate == "@!P0"
    assert machine_code.access_bits(code.loop) == [128, 32]
    assert machine_code.access_bits(code.once) == [16]
    straight = machine_code.split(machine_code.parse(SASS.replace("@P1 BRA", "@P1 EXIT")))
    assert not straight.loop and len(straight.once) == 16

    formulas = importlib.import_module("benchmarks.noise_code").normal_formulas(instructions)
    radius = "MUFU.SQRT(FMUL.FTZ(0.5 * |MUFU.LG2(I2F.U32(word))|))"
    product = f"MUFU.COS(I2F.U32(word)) * {radius}"
    # The second is what a fused sum looks like: the product was never rounded.
    assert formulas == sorted([f"FFMA(-{product} + 0)", f"FFMA({product} + 0.5)"])
    # The same on devices that have no operand with a minus there, and on those that compute pairs.
    flipped = SASS.replace(
        "FFMA R14, -R12, R13, RZ ;",
        "LOP3.LUT R6, R12, 0x80000000, RZ, 0x3c, !PT ;\n/*00a8*/ FFMA R14, R6, R13, RZ ;",
    )
    paired = SASS.replace("FFMA R15, R13, R12, R4", "NOP").replace(
        "FFMA R14, -R12, R13, RZ ;",
        "FFMA2 R16, R12.F32x2.HI_LO, R14.F32x2.HI_LO, RZ.F32 ;\n"
        "/*00a8*/ FFMA2 R18, R12.F32x2.HI_LO, R13.F32, R4.F32 ;",
    )
    normals = importlib.import_module("benchmarks.noise_code").normal_formulas
    assert normals(machine_code.parse(flipped)) == formulas
    assert normals(machine_code.parse(paired)) == [f"FFMA({product} + 0.5)"]
