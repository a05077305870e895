"""`python -m benchmarks.cpu_training` at toy sizes: its rows, and that both steps train alike."""

import json

import pytest
import torch

from benchmarks import cpu_training

TOY = cpu_training.Workload(
    "toy",
    4,
    dict(
        input_size=4, in_channels=3, patch_size=2, hidden_size=16, depth=1, num_heads=2,
        num_classes=2, learn_sigma=False,
    ),
)  # fmt: skip


def test_a_row_for_each_provider(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_training, "SHAPE", (2, 3, 4, 4))
    monkeypatch.setattr(cpu_training, "WORKLOADS", (TOY,))
    threads = torch.get_num_threads()
    try:
        assert cpu_training.main(["--rounds", "3"]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    cells = {(row["cell"].partition(" ")[0], row["provider"]) for row in rows}
    assert cells == {
        *(("normals", name) for name in ("torch.randn", "plain lines of ours", "mixflow_fast")),
        *(("objective", name) for name in ("plain lines", "mixflow_fast")),
        *(("step", name) for name in ("official SiT", "mixflow_fast")),
    }
    for row in rows:
        assert row["ms"] > 0 and row["rounds"] == 3
        if row["provider"] != "mixflow_fast":
            assert row["low95"] <= row["over_ours"] <= row["high95"]


def test_both_steps_move_the_weights_by_the_learning_rate() -> None:
    """AdamW's first step is +-lr wherever there is a gradient; the EMA follows."""
    for step in cpu_training.steps(TOY).values():
        before = [p.detach().clone() for p in step._net.parameters()]
        step()
        moved = [
            (p.detach() - b).abs().max()
            for p, b in zip(step._net.parameters(), before, strict=True)
            if p.requires_grad and p.grad is not None and p.grad.abs().max() > 1e-6
        ]
        assert moved
        for distance in moved:
            assert abs(distance - cpu_training.LR) < 0.05 * cpu_training.LR
