"""Files that are whole or not there."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixflow_fast.files import remove_partial, write_json


def test_write_json(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    value = {"é": [1, 2.5, None, {"x": "y"}]}
    write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == value
    for bad in ({"x": math.nan}, {"x": object()}):
        with pytest.raises(ValueError, match="b.json"):
            write_json(path, bad)
    assert json.loads(path.read_text(encoding="utf-8")) == value
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    """Under a name of its own, which no later write would replace; a living writer keeps its."""
    code = "import os; print(os.getpid())"
    dead = int(subprocess.run([sys.executable, "-c", code], capture_output=True).stdout)
    left, folder = tmp_path / f".step_4.safetensors.{dead}.tmp", tmp_path / f".exported.{dead}.tmp"
    folder.mkdir()
    kept = [tmp_path / f".metrics.jsonl.{os.getpid()}.tmp", tmp_path / ".lock", tmp_path / "x.tmp"]
    for path in (left, folder / "weights", *kept):
        path.write_text("half")
    remove_partial(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    remove_partial(tmp_path / "missing")
