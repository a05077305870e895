"""The registry of the benchmarks: cells, bytes, and providers that compute the same."""

import importlib.machinery
import itertools
import sys
import types
from dataclasses import replace

import pytest
import torch

from benchmarks import ops
from benchmarks.checks import verify
from benchmarks.ops import (
    BLOCK_OPS,
    FAMILIES,
    KERNEL_OPS,
    MAIN_SHAPES,
    MODES,
    OBJECTIVE_OPS,
    RAE,
    REGISTRY,
    SIT,
    Cell,
    NotThere,
    kernel_cells,
)
from benchmarks.plain import plain_modulated_norm
from mixflow_fast.diagnostics import kernel_plan
from mixflow_fast.diagnostics.block_cases import VARIANTS

CPU = torch.device("cpu")
EVERY = kernel_cells(KERNEL_OPS)
BLOCKS = [cell for cell in EVERY if cell.op in BLOCK_OPS]


def _cell(op: str, variant: str | None = None, mode: str = "full", **options) -> Cell:
    if op in FAMILIES["objective"]:
        return Cell(op=op, mode=mode, shape=(512, 4, 2, 2), **options)
    first = next(cell.variant for cell in BLOCKS if cell.op == op)
    shape = (4, 9, 2, 16) if op in ("attention", "qk_norm_rope") else (4, 8, 64)
    return Cell(op=op, mode=mode, variant=variant or first, shape=shape, **options)


def test_cells_of_the_objective_cover_shapes_and_modes_main_ones_first() -> None:
    chosen = kernel_cells(OBJECTIVE_OPS)
    assert len(chosen) == len(set(chosen))
    for batches, sample in (
        ((32, 256), (4, 32, 32)),
        ((32, 256), (4, 64, 64)),
        ((64, 256), (768, 16, 16)),
        ((64, 256), (768, 32, 32)),
        ((64,), (3, 256, 256)),
    ):
        for batch, op in itertools.product(batches, OBJECTIVE_OPS):
            assert any(c.shape == (batch, *sample) and c.op == op for c in chosen)
    every = [*chosen, *kernel_cells(("mixed_source",))]
    for op, modes in MODES.items():
        assert {c.mode for c in every if c.op == op} == set(modes)
        assert {c.dtype for c in every if c.op == op} == {torch.bfloat16, torch.float32}
    assert {c.shape for c in chosen[:6]} == set(MAIN_SHAPES) == {(256, *RAE), (256, *SIT)}
    assert {c.op for c in kernel_cells(("interpolate", "step"))} == {"interpolate"}
    single = [c.dtype is torch.float32 for c in chosen]
    assert single == sorted(single) and any(single)  # float32 data come last


def test_cells_of_the_blocks_name_every_op_most_telling_first() -> None:
    main = {row[0] for row in ops.BLOCK_MAIN}
    assert main == {row[0] for row in ops.BLOCK_SMOKE} == set(BLOCK_OPS)
    assert len(set(BLOCKS)) == len(BLOCKS)
    assert {cell.op for cell in BLOCKS if cell.mode == "forward"} == set(BLOCK_OPS)
    assert {c.op for c in BLOCKS if c.mode == "recompute"} == {"gelu", "swiglu"}
    norms = {(cell.variant, cell.shape) for cell in BLOCKS if cell.op == "residual_norm"}
    assert {
        *(("layer per sample", (B, N, 1152)) for B, N in ((256, 256), (32, 256), (64, 1024))),
        ("rms per sample", (64, 256, 1152)),
        ("rms per token", (64, 256, 2048)),
    } == norms
    inner = {cell.shape[-1] // 2 for cell in BLOCKS if cell.op == "swiglu"}
    assert inner == {3072, 5461, 5504}
    heads = {(c.shape[1], c.shape[3]) for c in BLOCKS if c.op == "attention" and c.mode == "full"}
    assert heads == set(itertools.product((256, 1024), (72, 128, 64)))
    assert {cell.op for cell in kernel_cells(("gelu", "interpolate"))} == {"gelu", "interpolate"}
    # The very widths that are timed are checked.
    widths = {(op, variant, shape[2:]) for op, _, variant, shape in ops.BLOCK_MAIN}
    assert {(op, v, shape[2:]) for op, _, v, shape in kernel_plan.GPU_TIMED} == widths


def test_bytes_of_the_objective_are_those_of_the_dtypes() -> None:
    def per_element(op: str, mode: str, dtype: torch.dtype) -> float:
        cell = Cell(op=op, mode=mode, shape=(2, 3, 4, 5), dtype=dtype)
        return cell.algorithmic_bytes / 120

    half, single = torch.bfloat16, torch.float32
    assert per_element("interpolate", "forward", half) == 4
    assert per_element("velocity_loss", "forward", half) == 4
    assert per_element("velocity_loss", "full", half) == 6
    assert per_element("velocity_loss", "backward", half) == 6
    assert per_element("objective", "full", half) == 10
    assert per_element("interpolate", "forward", single) == 8
    assert per_element("objective", "full", single) == 16
    # A float32 source of mean and log-variance, and x0 stored in float32.
    assert per_element("mixed_source", "forward", half) == 2 + 8 + 2 + 4
    assert per_element("mixed_source", "full", half) == 16 + 2 + 4 + 8 + 8
    assert per_element("mixed_source", "full", single) == 20 + 24


def test_bytes_of_the_blocks_are_those_of_one_pass() -> None:
    def units(op: str, mode: str, shape: tuple[int, ...], variant: str | None = None) -> float:
        cell = replace(_cell(op, variant, mode), shape=shape)
        return cell.algorithmic_bytes / (2 * cell.elements)

    # Vectors, statistics and partial sums are the rest.
    assert units("residual_norm", "forward", (256, 256, 1152)) == pytest.approx(4, rel=0.02)
    assert units("residual_norm", "full", (256, 256, 1152)) == pytest.approx(4 + 6, rel=0.06)
    assert units("modulated_norm", "full", (256, 256, 1152)) == pytest.approx(2 + 3, rel=0.06)
    # shift, scale and gate of each token, and their gradients
    per_token = units("residual_norm", "full", (64, 256, 2048), "rms per token")
    assert per_token == pytest.approx(4 + 6 + 3 + 5, rel=0.06)
    assert units("gelu", "full", (256, 256, 4608)) == pytest.approx(2 + 3, rel=0.02)
    assert units("swiglu", "full", (64, 256, 11008)) == pytest.approx(1.5 + 2.5, rel=0.03)
    # Upstream gradient, input, its gradient, and the output recomputed.
    assert units("gelu", "recompute", (256, 256, 4608)) == pytest.approx(4, rel=0.02)
    assert units("swiglu", "recompute", (64, 256, 11008)) == pytest.approx(3, rel=0.03)
    assert units("qk_norm_rope", "forward", (2, 4, 2, 8)) == 4
    assert units("qk_norm_rope", "full", (2, 4, 2, 8), "rope") == 4 + 5
    assert units("qk_norm_rope", "full", (2, 4, 2, 8), "rms, rope") == 4 + 7
    assert units("attention", "full", (2, 4, 2, 8)) == 4 + 8
    attention = replace(_cell("attention"), shape=(2, 4, 3, 8))
    # q k^T and p v, and twice as many products in the backward pass, two FLOPs a multiply-add.
    assert attention.flops == 3 * 2 * (2 * 3 * (4 * 4 * 8 * 2))
    assert _cell("gelu").flops is None


OBJECTIVE = [(op, None, mode) for op, modes in MODES.items() for mode in modes]
VARIANTS_TIMED = sorted({(cell.op, cell.variant) for cell in BLOCKS})
FULL = [(op, variant, mode) for op, variant in VARIANTS_TIMED for mode in ("full", "forward")]
RECOMPUTE = [(op, "bias", "recompute") for op in ("gelu", "swiglu")]


@pytest.mark.parametrize(("op", "variant", "mode"), [*OBJECTIVE, *FULL, *RECOMPUTE])
def test_providers_agree_with_float64(op, variant, mode) -> None:
    """What torch.compile is given adds the bias itself; eager's was added before."""
    entry = REGISTRY[op]
    for dtype in (torch.bfloat16, torch.float32):
        cell = _cell(op, variant, mode, dtype=dtype)
        inputs = entry.inputs(cell, CPU)
        calls = {
            "eager": entry.plain(cell, inputs),
            "compile": entry.plain(cell, inputs, lambda function: function),
            "mixflow_fast": entry.ours(cell, inputs, "reference")[0],
        }
        for name, call in calls.items():
            # Plain lines in float32 are those of our reference: only the precision differs.
            made = call()
            assert verify(cell, inputs, made, name) == []
            has_gradients = any(tensor.startswith("d") for tensor in made)
            assert has_gradients == (mode != "forward")
            tensors = [v for v in made.values() if isinstance(v, torch.Tensor)]
            assert op in OBJECTIVE_OPS or not any(v.requires_grad for v in tensors)
            if mode == "recompute":
                assert set(made) == {"out", "dx", "dbias"}
                for tensor in made:
                    wrong = made | {tensor: made[tensor] * 1.05}
                    assert verify(cell, inputs, wrong, name) != []


def test_notes_say_how_ours_is_set_up() -> None:
    def note(op: str, mode: str) -> str:
        cell = _cell(op, mode=mode)
        return REGISTRY[op].ours(cell, REGISTRY[op].inputs(cell, CPU), "reference")[1]

    assert note("gelu", "recompute") == "gelu_recompute(impl='reference')"
    assert note("gelu", "full") == "gelu(impl='reference')"
    assert note("objective", "full") == "MixFlow(impl='reference')"
    assert note("attention", "full").startswith("attention(backend=\"auto\", impl='reference'): ")


def test_backends_and_liger_that_are_not_there_say_why(monkeypatch) -> None:
    cell, attention = _cell("attention"), REGISTRY["attention"]
    inputs = attention.inputs(cell, CPU)
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotThere, match="not installed"):
        attention.other("flash2", cell, inputs, "reference")
    with pytest.raises(NotThere, match="needs a CUDA device"):
        attention.other("cudnn", cell, inputs, "reference")
    call, note = attention.other("flash", cell, inputs, "reference")
    assert "ok" in note and verify(cell, inputs, call(), "flash") == []
    with pytest.raises(NotThere, match="liger_kernel is not installed"):
        REGISTRY["swiglu"].other("liger", _cell("swiglu", mode="forward"), inputs, "reference")


def test_liger_only_where_it_computes_the_same(monkeypatch) -> None:
    with_liger = {
        (c.op, c.mode, VARIANTS[c.variant].norm) for c in BLOCKS if "liger" in c.providers
    }
    assert with_liger == {
        ("modulated_norm", "full", "rms"),
        ("modulated_norm", "forward", "rms"),
        ("swiglu", "forward", None),
    }

    class Modulated:
        @staticmethod
        def apply(x, weight, scale, shift, eps, offset, casting_mode, in_place):
            assert (offset, casting_mode, in_place) == (0.0, "llama", False)
            return plain_modulated_norm(x, shift, scale, weight)

    class SiluMul:
        apply = staticmethod(lambda a, b: torch.nn.functional.silu(a) * b)

    package = types.ModuleType("liger_kernel")
    package.__spec__ = importlib.machinery.ModuleSpec("liger_kernel", None)
    liger_ops = types.ModuleType("liger_kernel.ops")
    liger_ops.LigerModulatedRMSNormFunction = Modulated
    liger_ops.LigerSiLUMulFunction = SiluMul
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", liger_ops)
    for cell in (_cell("modulated_norm"), _cell("swiglu", mode="forward")):
        inputs = REGISTRY[cell.op].inputs(cell, CPU)
        call, _ = REGISTRY[cell.op].other("liger", cell, inputs, "reference")
        assert verify(cell, inputs, call(), "liger") == []
