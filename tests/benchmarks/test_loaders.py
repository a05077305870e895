"""Loaders as rows; parts that cannot be measured, and parts that fail."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import loaders
from benchmarks.rows import read
from mixflow_fast.data import Batch
from mixflow_fast.data.throughput import Contestant


def _main(out: Path) -> int:
    return loaders.main(["--smoke", "--device", "cpu", "--out", str(out)])


def test_smoke_run(tmp_path, capsys) -> None:
    """Images by threads and DALI to the device, and latents in three layouts."""
    assert _main(tmp_path) == 0
    rows = read(tmp_path / "rows.jsonl")
    found = {(row["mode"], row["provider"]) for row in rows if row["metric"] == "examples_per_s"}
    assert {("latents", "mixflow_fast"), ("latents", "repa"), ("device-256", "threads")} <= found
    (ratio,) = (
        row["p50"]
        for row in rows
        if (row["provider"], row["metric"]) == ("mixflow_fast", "speedup_over_repa")
    )
    assert ratio > 1 and {row["op"] for row in rows} == {"loader"}
    assert "of repa" in capsys.readouterr().out


def _contestant(*_: object) -> dict[str, Contestant]:
    y = torch.zeros(2)
    return {name: Contestant(iter(lambda: Batch(y, y, y), None), 0) for name in ("a", "b")}


def test_parts_that_are_missing_or_fail_do_not_stop_the_others(
    tmp_path, monkeypatch, capsys
) -> None:
    made = {
        "images-256": lambda: 1 / 0,
        "latents": lambda: 1 / 0,
        "device-256": lambda: _contestant,
    }
    monkeypatch.setattr(loaders, "parts", lambda smoke: made)
    monkeypatch.setattr(loaders, "_is_there", lambda name: name != "nvidia.dali")
    assert _main(tmp_path) == 1
    said = capsys.readouterr().out
    assert "images-256: left out, not installed: nvidia.dali" in said
    assert "RED latents: ZeroDivisionError" in said
    assert {row["provider"] for row in read(tmp_path / "rows.jsonl")} == {"a", "b"}
