"""`python -m benchmarks.cpu_sharing`: a run is timed, and ended, beside busy loops that end too."""

import json

import pytest

from benchmarks import cpu_sharing


def test_a_turn_of_each_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    monkeypatch.setattr(cpu_sharing, "images_per_s", lambda way, seconds: seen.append(way) or 64.0)
    options = ["--rounds", "2", "--load", "2", "--ways", "default", "chosen"]
    assert cpu_sharing.main(options) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert last == "2 busy loops, chosen: 64 images/s, 1.00 of alone"
    rows = [json.loads(row) for row in rows if row.startswith("{")]
    assert [row["busy"] for row in rows] == [0, 0, 1, 1, 2, 2] * 2
    assert seen[0] != seen[6] and seen[0] == seen[7]  # the ways take turns


def test_a_run_is_timed_from_its_first_step() -> None:
    assert cpu_sharing.images_per_s(cpu_sharing.WAYS["passive"], seconds=0.1) > 1


def test_steps_of_rows() -> None:
    assert cpu_sharing.step_of('{"step": 3, "images_per_s": 5.0}') == 3
    assert cpu_sharing.step_of('{"step": 3, "event": "start"}') == 0
    assert cpu_sharing.step_of('{"step": 3, "imag') == 0
