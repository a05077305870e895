"""The table of mixed sources in the plane: what is finished is kept, and adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import mixed_source_toy
from benchmarks.mixed_source_toy import main


def test_more_seeds_only_add(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []
    train = mixed_source_toy.train_toy

    def counted(arm, settings, seed):
        trained.append((arm.name, seed))
        return train(arm, settings, seed)

    monkeypatch.setattr(mixed_source_toy, "train_toy", counted)
    out = tmp_path / "toy.json"
    words = ["--lambdas", "0.3", "--steps", "10", "--out", str(out)]
    main([*words, "--seeds", "3"])
    names = ["rectified flow", "kappa-FC, lambda 0.3", "MixFlow, lambda 0.3"]
    assert trained == [(name, 3) for name in names]
    capsys.readouterr()
    trained.clear()
    main([*words, "--seeds", "3", "4"])
    assert trained == [(name, 4) for name in names]
    rows = json.loads(out.read_text())["rows"]
    one, two = (row["result"]["curvature"] for row in rows if row["arm"] == names[2])
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith(f"| {names[2]} |"))
    mean, std = line.split("|")[2].split("±")
    assert float(mean) == pytest.approx((one + two) / 2, rel=0.1)
    assert float(std) == pytest.approx(abs(one - two) / 2**0.5, rel=0.1)
    with pytest.raises(ValueError, match="is of other settings"):
        main([*words, "--steps", "11"])
