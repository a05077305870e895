"""The suite of the training step: what it refuses, accumulates, and writes in which order."""

import dataclasses

import pytest
import torch

from benchmarks import step, timing
from benchmarks import step_variants as variants
from benchmarks.rows import Deadline, Writer, read
from benchmarks.step_optimizers import Weights
from mixflow_fast import MixFlow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU = torch.device("cpu")
ENVIRONMENT = {"device": "here", "torch": "1", "triton": None, "cuda": None, "git_sha": "0" * 40}


def _weights() -> Weights:
    return Weights(variants.network(variants.workloads(smoke=True)[0], CPU))


@pytest.mark.parametrize(("memory", "micro"), [(1e12, 8), (1e9, 4), (0.45e9, 2), (0.0, 1)])
def test_micro_batches_fit_the_memory_and_are_the_same(tmp_path, memory, micro) -> None:
    """Of all arms of a precision; float32 takes twice the memory."""
    workload = dataclasses.replace(variants.workloads(smoke=True)[0], batch=8, image_gb=0.2)
    suite = step.StepSuite(CPU, Writer(tmp_path / "rows.jsonl", ENVIRONMENT), Deadline(), "auto")
    assert suite._memory == float("inf")
    suite._memory = memory
    x1 = torch.randn(8, 4, 8, 8)
    cell, y = suite._cell(workload, list(x1.shape)), torch.zeros(8, dtype=torch.int64)
    made = suite._arms(workload, cell, _weights(), x1, y)
    half = {name: arm.micro for name, arm in made.items() if arm.recipe.half}
    assert set(half.values()) == {micro} and len(half) > 4
    assert made["eager_tf32"].micro == (8 if memory == 1e12 else max(micro // 2, 1))
    held = sum(p.numel() for p in _weights().masters) * (16 + sum((8, 8, 12, 16)))
    kinds = [("plain", False), ("plain", True), ("tuned", True), ("adamwema", True)]
    assert step._resident_bytes(_weights(), kinds) == held


def test_step_is_refused_where_the_objectives_disagree(monkeypatch, capsys, tmp_path) -> None:
    loss = MixFlow.loss
    monkeypatch.setattr(MixFlow, "loss", lambda *a, **k: loss(*a, **k) * 1.05)
    suite = step.StepSuite(
        CPU, Writer(tmp_path / "rows.jsonl", ENVIRONMENT), Deadline(), "reference", smoke=True
    )
    suite.run()
    assert suite.refused and "RED" in capsys.readouterr().out
    assert all(row["p50"] is None for row in read(tmp_path / "rows.jsonl"))


def test_step_accumulates_what_does_not_fit(monkeypatch, tmp_path) -> None:
    whole = variants.Arm.step

    def small_memory(self) -> None:
        if self.name == "eager_tf32" and self.micro > 1:
            raise torch.OutOfMemoryError("too much")
        whole(self)

    monkeypatch.setattr(variants.Arm, "step", small_memory)
    writer = Writer(tmp_path / "rows.jsonl", ENVIRONMENT)
    suite = step.StepSuite(CPU, writer, Deadline(), "reference", smoke=True)
    suite.run()
    notes = {row["provider"]: row["note"] for row in read(writer.path) if row["p50"]}
    assert not suite.refused
    assert "micro-batches of 1" in notes["eager_tf32"] and "micro" not in notes["eager_bf16"]


@pytest.mark.parametrize("other", ["", "ids", "seed"])
def test_step_is_refused_where_the_loss_takes_other_noise(monkeypatch, tmp_path, other) -> None:
    """With the kernels: the reference keeps the noise, and cannot take another."""
    loss = MixFlow.loss

    def of_others(self, pred, it, **options):
        if other == "ids" and it.ids is not None:
            it.ids.data.add_(100)  # where the objective's own check does not see it
        if other == "seed":
            it = dataclasses.replace(it, _seed=it._seed + 1)
        return loss(self, pred, it, **options)

    monkeypatch.setattr(MixFlow, "loss", of_others)
    device = torch.device(DEVICE)
    suite = step.StepSuite(device, Writer(tmp_path / "rows.jsonl", ENVIRONMENT), Deadline())
    net = variants.network(variants.workloads(smoke=True)[0], device)
    x1 = torch.randn(2, 4, 8, 8, device=device)
    recipe = dataclasses.replace(variants.RECIPES["mixflow_fast"], execution=variants.Execution())
    labels = torch.zeros(2, 2, dtype=torch.int64, device=device)
    made = variants.make_loss(recipe, net, x1, *labels, "triton")
    arm = variants.Arm("mixflow_fast", recipe, made, net, None, None, 1, 2)
    wrong = suite._compare({"mixflow_fast": arm}, x1)
    assert ("other noise" in "".join(wrong)) == bool(other), wrong


def test_ratios_of_the_step_are_written_before_memory(monkeypatch, tmp_path) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    writer = Writer(tmp_path / "rows.jsonl", ENVIRONMENT)
    suite = step.StepSuite(CPU, writer, Deadline())
    suite._on_gpu = True
    monkeypatch.setattr(suite, "_clear", lambda: None)
    monkeypatch.setattr(timing, "peaks_mib", interrupted)
    there = {
        name: variants.Arm(name, recipe, None, None, None, None, 4, 4)
        for name, recipe in variants.RECIPES.items()
    }
    workload = variants.workloads(smoke=True)[0]
    with pytest.raises(KeyboardInterrupt):
        suite._report(
            workload, suite._cell(workload, [4]), there, dict.fromkeys(there, [2.0, 3.0]), 1e9
        )
    metrics = {row["metric"] for row in read(writer.path)}
    assert {f"speedup_over_{name}" for name in variants.RECIPES if name != "mixflow_fast"} < metrics
    assert {"latency_ms", "images_per_s", "percent_of_989"} < metrics


def test_ladder_names_what_rows_that_are_left_out_add(capsys, tmp_path) -> None:
    workload = variants.workloads(smoke=False)[1]
    times = {name: [4.0, 2.0] for name in workload.arms}
    suite = step.StepSuite(CPU, Writer(tmp_path / "rows.jsonl", ENVIRONMENT), Deadline())
    step.add_ladder(suite._cell(workload, [32]), times, dict.fromkeys(times, ""))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  + ")]
    assert len(lines) == 6 and "fused AdamW, foreach EMA, no loss.item(), torch.compile" in lines[1]
    assert "fused operators, attention backend by test" in lines[2]
    assert "activations recomputed" in lines[-1] and "mixflow_fast_recompute" in lines[-1]


def test_arms_on_a_red_operator_are_left_out_and_the_others_timed(capsys, tmp_path) -> None:
    writer = Writer(tmp_path / "rows.jsonl", ENVIRONMENT)
    suite = step.StepSuite(CPU, writer, Deadline(), "reference", smoke=True, red={"gelu"})
    suite.run()
    assert not suite.refused and "gelu is RED" in capsys.readouterr().out
    rows = [row for row in read(writer.path) if row["metric"] == "latency_ms"]
    timed = {(row["variant"], row["provider"]) for row in rows if row["p50"] is not None}
    sit, head = "toy SiT", "toy DiT-DH"  # the second has no gelu
    assert {(sit, "eager_tf32"), (sit, "eager_bf16"), (head, "mixflow_fast")} < timed
    notes = {row["provider"]: row["note"] for row in rows if row["variant"] == sit}
    for name in ("fused", "fused_flash", "mixflow_fast", "mixflow_fast_recompute"):
        assert (sit, name) not in timed and "wrong results of gelu" in notes[name]
