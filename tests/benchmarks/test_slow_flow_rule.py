"""The table that holds the rule for gamma against the gamma that was best."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.slow_flow_rule import FRECHET, SLOWNESS, main, rows


def write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def test_a_table_of_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow = {"steps": 5, "deficit": 0.11, "fine_deficit": 0.035, "pair": {"low": [0.1, 0.34]}}
    seed = tmp_path / "seed_110"
    write(seed / "base" / SLOWNESS, {"slow_flow": {"steps": [flow]}})
    for gamma, value in ((0.0, 3.1), (0.15, 2.4), (0.3, 2.5)):
        write(seed / f"gamma_{gamma:g}" / FRECHET, {"frechet": {"5": value}})
    # A seed whose base was not measured yet, and one without arms, are left out.
    write(tmp_path / "seed_111" / "gamma_0" / FRECHET, {"frechet": {"5": 1.0}})
    write(tmp_path / "seed_112" / "base" / SLOWNESS, {"slow_flow": {"steps": [flow]}})
    (row,) = rows(tmp_path)
    assert (row.seed, row.steps, row.best, row.nearest) == (110, 5, 0.15, 0.15)
    assert row.rule == pytest.approx(0.15) and row.band == pytest.approx(0.66)
    main(["--report", "--out", str(tmp_path)])
    assert "| 110 | 5 | 0.15 | 0.66 | 3.10 | **2.40** | 2.50 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.json").read_text())[0]["distances"]["0.15"] == 2.4
