"""The arms of the training step's benchmark, their optimizers, and the ladder of techniques."""

import dataclasses
import itertools
import sys
import types

import pytest
import torch

from benchmarks import step
from benchmarks import step_optimizers as optimizers
from benchmarks import step_variants as arms
from benchmarks.rows import Deadline, Writer, read
from benchmarks.step_rows import StepRows
from mixflow_fast.kernels.attention.backends import BACKENDS
from mixflow_fast.models.execution import Execution
from mixflow_fast.optim import apex
from tests.support import apex_stand_in

CPU = torch.device("cpu")
ENVIRONMENT = {"device": "here", "torch": "1", "triton": None, "cuda": None, "git_sha": "0" * 40}


def _weights() -> optimizers.Weights:
    return optimizers.Weights(arms.network(arms.workloads(smoke=True)[0], CPU))


def test_arms_train_the_same_weights() -> None:
    """Twins hold the very parameters, run on their own, and give the same numbers."""
    weights = _weights()
    half = weights.half
    fused = arms.twin(half, arms.RECIPES["mixflow_fast"])
    plain = arms.twin(half, arms.RECIPES["eager_bf16"])
    for p, q, r in zip(half.parameters(), fused.parameters(), plain.parameters(), strict=True):
        assert p is q is r and p.dtype == torch.bfloat16
    assert fused.execution.mode == "fused" and plain.execution.mode == "eager"
    assert half.execution == Execution()
    x, y = torch.randn(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64)
    torch.testing.assert_close(
        fused(x, torch.ones(2), y), plain(x, torch.ones(2), y), rtol=0.05, atol=0.05
    )
    rae = arms.network(arms.workloads(smoke=True)[1], CPU)
    modules = arms.twin(rae, arms.RECIPES["compile_unpadded"]).modules()
    assert [m.padded for m in modules if isinstance(m, arms.SwiGLU)] == [False, False]
    assert arms.backends(half, 2) in BACKENDS


def test_optimizers_of_bf16_weights_take_the_same_step(monkeypatch) -> None:
    """A small update is kept by the masters where bf16 weights would round it away."""
    torch.manual_seed(0)
    results = {}
    start = [p.detach().clone() for p in _weights().masters]
    gradients = [torch.randn_like(p).bfloat16() for p in start]
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex_stand_in)
    monkeypatch.setattr(apex, "detect_apex", lambda: "nvidia")
    for kind in optimizers.KINDS:
        weights = _weights()
        stepper = optimizers.OptimizerStep(kind, weights, half=True)
        before = [p.detach().clone() for p in weights.params]
        for _ in range(2):
            for p, gradient in zip(weights.params, gradients, strict=True):
                p.grad = gradient
            stepper.step()
        for p, master in zip(weights.params, weights.masters, strict=True):
            assert torch.equal(p, master.bfloat16())
        assert any((p == q).any() for p, q in zip(before, weights.params, strict=True))
        numel = sum(p.numel() for p in weights.masters)
        kept = {"plain": 2, "tuned": 3, "adamwema": 4, "apex": 3, "apex_adamwema": 4}[kind]
        assert optimizers.STATE_BYTES[kind] == 4 * kept
        # And the moments' step counters, of a few bytes.
        assert 4 * kept * numel <= stepper.state_bytes() < 4 * kept * numel + 2000
        # One EMA, wherever it is.
        parts = "", arms.RECIPES["mixflow_fast"], None, None, stepper, weights, 1, 1
        whole = 4 * (kept + 1 + (kind not in ("adamwema", "apex_adamwema"))) + 2
        buffers = sum(b.nbytes for net in (weights.single, weights.half) for b in net.buffers())
        frozen = 6 * sum(p.numel() for p in weights.single.parameters() if not p.requires_grad)
        held = arms.Arm(*parts).resident_bytes() - buffers - frozen
        assert whole * numel <= held < whole * numel + 2000
        results[kind] = [p.detach().clone() for p in weights.masters]
        stepper.forget()
        assert not stepper.state_bytes()
        for p, gradient in zip(weights.params, gradients, strict=True):
            p.grad = gradient
        stepper.step()
    for kind, masters in results.items():
        for p, q, first in zip(masters, results["plain"], start, strict=True):
            assert not torch.equal(p, first)
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=kind)


@pytest.mark.parametrize("found", ["nvidia", "without kernels", "absent"])
def test_apex_is_a_row_where_it_is_installed(monkeypatch, capsys, tmp_path, found) -> None:
    class WithoutKernels:
        def __init__(self, *_, **__) -> None:
            raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")

    module = types.ModuleType("apex.optimizers")
    module.FusedAdam = apex_stand_in.FusedAdam if found == "nvidia" else WithoutKernels
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    for place in (step, apex):
        monkeypatch.setattr(
            place, "detect_apex", lambda: "absent" if found == "absent" else "nvidia"
        )
    monkeypatch.setattr(step, "apex_message", lambda: f"apex: {found}")
    writer = Writer(tmp_path / "rows.jsonl", ENVIRONMENT)
    suite = step.StepSuite(CPU, writer, Deadline(), "reference", smoke=True)
    suite._on_gpu = True
    suite._time_optimizers(_weights())
    rows = [row for row in read(writer.path) if row["metric"] == "latency_ms"]
    both = {"apex", "mixflow_fast_apex"}
    expected = {"torch", "mixflow_fast"} | (both if found == "nvidia" else set())
    assert {row["provider"] for row in rows} == expected and not suite.refused
    out = capsys.readouterr().out
    assert f"apex: {found}" in out
    assert ("requires cuda extensions" in out) == (found == "without kernels")


def test_ladder_adds_one_technique_a_row() -> None:
    recipes = [arms.RECIPES[name] for name in arms.LADDER]
    fields = ("execution", "objective", "optimizer", "half", "reads_loss", "padded")
    for before, after in itertools.pairwise(recipes):
        changed = {f for f in fields if getattr(before, f) != getattr(after, f)}
        # The optimizer's row takes `loss.item()` away, compilation has the objective's lines, too.
        assert len(changed - {"reads_loss"}) == 1 or changed == {"execution", "objective"}
        assert after.adds
    shown = {name for w in arms.workloads(smoke=False) for name in w.arms}
    assert shown == set(arms.RECIPES)
    tuned = [r for r in arms.RECIPES.values() if r.execution.mode != "eager"]
    assert {r.optimizer for r in tuned} == {"tuned", "adamwema"} and all(r.half for r in tuned)


def test_ladder_names_what_rows_that_are_left_out_add(capsys, tmp_path) -> None:
    workload = arms.workloads(smoke=False)[1]
    times = {name: [4.0, 2.0] for name in workload.arms}
    rows = StepRows(Writer(tmp_path / "rows.jsonl", ENVIRONMENT), smoke=False)
    rows.write_ladder(workload, [32], times, dict.fromkeys(times, ""))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  + ")]
    assert len(lines) == 6 and "fused AdamW, foreach EMA, no loss.item(), torch.compile" in lines[1]
    assert "fused operators, attention backend by test" in lines[2]
    assert "activations recomputed" in lines[-1] and "mixflow_fast_recompute" in lines[-1]


@pytest.mark.parametrize(("memory", "micro"), [(1e12, 8), (1e9, 4), (0.45e9, 2), (0.0, 1)])
def test_micro_batches_fit_the_memory_and_are_the_same(tmp_path, memory, micro) -> None:
    """Of all arms of a precision; float32 takes twice the memory."""
    workload = dataclasses.replace(arms.workloads(smoke=True)[0], batch=8, image_gb=0.2)
    suite = step.StepSuite(CPU, Writer(tmp_path / "rows.jsonl", ENVIRONMENT), Deadline(), "auto")
    assert suite._memory == float("inf")
    suite._memory = memory
    x1 = torch.randn(8, 4, 8, 8)
    made = suite._arms(workload, _weights(), x1, torch.zeros(8, dtype=torch.int64))
    half = {name: arm.micro for name, arm in made.items() if arm.recipe.half}
    assert set(half.values()) == {micro} and len(half) > 4
    assert made["eager_tf32"].micro == (8 if memory == 1e12 else max(micro // 2, 1))
    held = sum(p.numel() for p in _weights().masters) * (16 + sum((8, 8, 12, 16)))
    kinds = [("plain", False), ("plain", True), ("tuned", True), ("adamwema", True)]
    assert step._resident_bytes(_weights(), kinds) == held


def test_activations_are_recomputed_in_their_arm_only() -> None:
    made = {n for n, r in arms.RECIPES.items() if r.execution.checkpointing != "none"}
    assert made == {"mixflow_fast_recompute"}
    assert "checkpointing elementwise" in arms.RECIPES["mixflow_fast_recompute"].note
    # Where the batch fits at once, so that peak memory compares, the row before is there, too.
    both = {"mixflow_fast_adamwema", "mixflow_fast_recompute"}
    assert all(both <= set(workload.arms) for workload in arms.workloads(smoke=False)[:2])
