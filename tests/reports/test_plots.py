"""Plots as SVG for reports."""

import re

import pytest

from mixflow_fast.reports.plots import grid_map


def test_a_change_that_rounds_to_nothing_has_no_sign() -> None:
    pytest.importorskip("matplotlib")
    before, grid = [[1.0, 2.0], [4.0, 1.0]], [[0.999, 2.001], [3.0, 1.5]]
    text = grid_map("change", grid, [0.25, 0.75], before=before)
    cells = re.findall(r">([-+−\d]+)</text>", text)
    assert [cell for cell in cells if cell in ("0", "-0", "+0")] == ["0", "0"]
    assert {"-25", "+50"} <= set(cells)
