"""Optimizers of the training step: alone, and under DeepSpeed against a bare loop."""

import sys
import types

import pytest
import torch

from benchmarks import step, step_optimizers
from benchmarks import step_variants as variants
from benchmarks.rows import Deadline, Writer, read
from benchmarks.step_optimizers import KINDS, EngineSteps, OptimizerStep, Weights, time_deepspeed
from mixflow_fast.config.loading import load_config
from mixflow_fast.diagnostics.kernel_checks import Finding
from mixflow_fast.distributed import process_group
from mixflow_fast.optim import apex
from tests.support import apex_stand_in
from tests.support.recording import RecorderStandIn

CPU = torch.device("cpu")
ENVIRONMENT = {"device": "here", "torch": "1", "triton": None, "cuda": None, "git_sha": "0" * 40}
TINY = ["model.depth=1", "model.hidden_size=32", "model.num_heads=2", "train.global_batch_size=4"]


def _weights() -> Weights:
    return Weights(variants.network(variants.workloads(smoke=True)[0], CPU))


def test_optimizers_of_bf16_weights_take_the_same_step(monkeypatch) -> None:
    """A small update is kept by the masters where bf16 weights would round it away."""
    torch.manual_seed(0)
    results = {}
    start = [p.detach().clone() for p in _weights().masters]
    gradients = [torch.randn_like(p).bfloat16() for p in start]
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex_stand_in)
    monkeypatch.setattr(apex, "detect_apex", lambda: "nvidia")
    monkeypatch.setattr(step_optimizers, "CudaRecorder", RecorderStandIn)
    for kind in KINDS:
        weights = _weights()
        stepper = OptimizerStep(kind, weights, half=True)
        before = [p.detach().clone() for p in weights.params]
        for _ in range(2):
            for p, gradient in zip(weights.params, gradients, strict=True):
                p.grad = gradient
            stepper.step()
        for p, master in zip(weights.params, weights.masters, strict=True):
            assert torch.equal(p, master.bfloat16())
        assert any((p == q).any() for p, q in zip(before, weights.params, strict=True))
        numel = sum(p.numel() for p in weights.masters)
        kept = {"plain": 2, "tuned": 3, "apex": 3}.get(kind, 4)
        assert KINDS[kind].state_bytes == 4 * kept
        # And the moments' step counters, of a few bytes.
        assert 4 * kept * numel <= stepper.state_bytes() < 4 * kept * numel + 2000
        # One EMA, wherever it is.
        parts = "", variants.RECIPES["mixflow_fast"], None, None, stepper, weights, 1, 1
        whole = 4 * (kept + 1 + (KINDS[kind].name is None)) + 2
        buffers = sum(b.nbytes for net in (weights.single, weights.half) for b in net.buffers())
        frozen = 6 * sum(p.numel() for p in weights.single.parameters() if not p.requires_grad)
        held = variants.Arm(*parts).resident_bytes() - buffers - frozen
        assert whole * numel <= held < whole * numel + 2000
        results[kind] = [p.detach().clone() for p in weights.masters]
        stepper.reset()
        assert not stepper.state_bytes()
        for p, gradient in zip(weights.params, gradients, strict=True):
            p.grad = gradient
        stepper.step()
    for p, q in zip(results["captured"], results["adamwema"], strict=True):
        assert torch.equal(p, q)
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
    for place in (step_optimizers, apex):
        monkeypatch.setattr(
            place, "detect_apex", lambda: "absent" if found == "absent" else "nvidia"
        )
    monkeypatch.setattr(step_optimizers, "apex_message", lambda: f"apex: {found}")
    recorders: list[RecorderStandIn] = []

    def recorder(device: torch.device) -> RecorderStandIn:
        recorders.append(RecorderStandIn())
        return recorders[-1]

    monkeypatch.setattr(step_optimizers, "CudaRecorder", recorder)
    writer = Writer(tmp_path / "rows.jsonl", ENVIRONMENT)
    suite = step.StepSuite(CPU, writer, Deadline(), "reference", smoke=True)
    step_optimizers.time_optimizers(_weights(), writer, suite._rounds, 0.0, on_gpu=True)
    rows = [row for row in read(writer.path) if row["metric"] == "latency_ms"]
    both = {"apex", "mixflow_fast_apex"}
    ours = {"mixflow_fast", "mixflow_fast_captured"}
    expected = {"torch", *ours} | (both if found == "nvidia" else set())
    assert {row["provider"] for row in rows} == expected
    assert all("csrc" in row["note"] for row in rows if row["provider"] in ours)
    (one,) = recorders
    assert (one.rehearsals, one.recordings) == (1, 1) and one.steps > 1
    out = capsys.readouterr().out
    assert f"apex: {found}" in out
    assert ("requires cuda extensions" in out) == (found == "without kernels")


def test_a_wrong_replay_has_no_speed(monkeypatch, capsys, tmp_path) -> None:
    off = Finding("AdamWEMA", "graph replays", "ema", "float32", 0.25, 0.0)
    monkeypatch.setattr(step_optimizers, "optimizer_replays", lambda device: [off])
    writer = Writer(tmp_path / "rows.jsonl", ENVIRONMENT)
    suite = step.StepSuite(CPU, writer, Deadline(), "reference", smoke=True)
    step_optimizers.time_optimizers(_weights(), writer, suite._rounds, 0.0, on_gpu=True)
    providers = {row["provider"] for row in read(writer.path)}
    assert "mixflow_fast" in providers and "mixflow_fast_captured" not in providers
    assert "ema is off by 0.25: RED" in capsys.readouterr().out


@pytest.mark.parametrize(("precision", "stage", "limit"), [("fp32", 0, 1e-5), ("bf16", 2, 1e-3)])
def test_all_arms_train_alike(precision, stage, limit) -> None:
    overrides = [f"train.precision={precision}", f"train.zero_stage={stage}", "optim.lr=1e-4"]
    config = load_config("photos", [*TINY, *overrides])
    pair = EngineSteps(config, process_group.init_process_group("cpu"))
    weights = pair.weights
    before = [p.detach().clone() for p in weights.masters]
    for _ in range(4):
        pair.deepspeed()
        pair.ddp()
        pair.bare()
    names = [n for n, p in weights.single.named_parameters() if p.requires_grad]
    moved = sum((a - b).square().sum() for a, b in zip(weights.masters, before, strict=True))
    for engine in (pair.engine, pair.ddp_engine):
        theirs = dict(engine.gathered("model", stepped=True))
        apart = sum(
            (theirs[name].view_as(p) - p).square().sum()
            for name, p in zip(names, weights.masters, strict=True)
        )
        assert moved > 0 and (apart / moved).sqrt() < limit
    pair.engine.close()


def test_rows_of_deepspeed(capsys, tmp_path) -> None:
    config = load_config("photos", [*TINY, "train.zero_stage=1"])
    writer = Writer(tmp_path / "rows.jsonl", ENVIRONMENT)
    time_deepspeed(config, CPU, writer, smoke=True)
    found = {(row["provider"], row["metric"]): row for row in read(writer.path)}
    assert {*found} == {
        ("deepspeed", "latency_ms"),
        ("ddp", "latency_ms"),
        ("bare", "latency_ms"),
        ("bare", "speedup_over_deepspeed"),
        ("bare", "speedup_over_ddp"),
        ("ddp", "speedup_over_deepspeed"),
    }
    for row in found.values():
        assert (row["op"], row["variant"], row["dtype"]) == ("deepspeed", "SiT-S/4", "float32")
        assert row["p50"] > 0 and row["shape"] == [4, 3, 16, 16]
    assert "ZeRO 1" in found["deepspeed", "latency_ms"]["note"]
    assert "no speed" in capsys.readouterr().out
    assert torch.nn.functional.linear is torch._C._nn.linear
