"""The names of `mixflow_fast` itself, which come with torch and only when one is asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

import mixflow_fast

ROOT = Path(__file__).resolve().parents[1]


def test_the_package_loads_torch_with_the_first_name() -> None:
    source = """
import sys
import mixflow_fast
assert "torch" not in sys.modules
assert {"MixFlow", "mixflow_loss", "Moments", "Interpolation"} <= set(dir(mixflow_fast))
from mixflow_fast import MixFlow, Moments
assert "torch" in sys.modules and mixflow_fast.MixFlow is MixFlow
import mixflow_fast.objective
assert mixflow_fast.objective.MixFlow is MixFlow
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'mixflow_fast' has no attribute 'Mixflow'"):
        _ = mixflow_fast.Mixflow
    assert not hasattr(mixflow_fast, "__wrapped__")
