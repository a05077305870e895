"""`python -m benchmarks.saving`: two ways to save in turns, and what each takes per GB."""

import json
from pathlib import Path

import pytest

from benchmarks import saving


def test_each_way_takes_its_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert saving.main(["--mib", "4", "--rounds", "2", "--folder", str(tmp_path)]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert "cpu_s_per_gb" in last
    rows = [json.loads(row) for row in rows if row.startswith("{")]
    said = [(row["round"], row["way"], row["what"]) for row in rows]
    still, written = ("beside", "stands still"), ("beside", "written")
    assert said == [
        *((0, *what) for what in (still, written, ("waiting", "stands still"))),
        *((1, *what) for what in (("waiting", "stands still"), still, written)),
    ]
    assert all(row["gb"] == round(4 * 2**20 / 1e9, 3) for row in rows)
    assert list(tmp_path.iterdir()) == []
