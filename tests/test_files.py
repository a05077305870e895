"""Files that are whole or not there."""

import json
import math
from pathlib import Path

import pytest

from mixflow_fast.files import write_json


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
