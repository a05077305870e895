"""What is checked at which level: every operator, dtype, path and prediction."""

import itertools

import pytest
import torch

from mixflow_fast.diagnostics import kernel_plan
from mixflow_fast.diagnostics.block_cases import BLOCK_OPS
from mixflow_fast.diagnostics.kernel_plan import NEEDS, SETTINGS, TIMED, tasks

LEVELS = ("timed", "smoke", "full")
OBJECTIVE = ("interpolate", "velocity_loss", "objective")


def names(level: str, device: str = "cpu", ops=tuple(BLOCK_OPS)) -> list[str]:
    return [task.name for task in tasks(torch.device(device), "triton", level, ops)]


def test_settings_cover_paths_predictions_and_clocks() -> None:
    paths, predictions = ("linear", "gvp", "vp"), ("velocity", "noise", "data", "score")
    assert {(s.path, s.prediction) for s in SETTINGS} == set(itertools.product(paths, predictions))
    for clock in ("data_at_1", "noise_at_1"):
        there = [s for s in SETTINGS if s.clock == clock]
        assert {s.path for s in there} == set(paths)
        assert {s.prediction for s in there} == set(predictions)
    dtypes = {torch.float32, torch.bfloat16, torch.float16}
    plan = kernel_plan._plan
    assert {d for s, d in plan("full")} == dtypes
    assert {d for s, d in plan("timed") if s == TIMED} == dtypes
    assert {s for s, d in plan("full") if d == torch.float32} == set(SETTINGS)
    with pytest.raises(ValueError, match="level must be"):
        plan("quick")


def test_levels_of_the_blocks() -> None:
    timed, full = names("timed"), names("full")
    assert full[: len(timed)] == timed and len(timed) == len(kernel_plan.CPU_TIMED)
    for op, dtype in itertools.product(BLOCK_OPS, ("bfloat16", "float16", "float32")):
        assert any(name.startswith(op) and name.endswith(dtype) for name in full)
        assert any(name.startswith(op) and name.endswith(dtype) for name in names("full", "cuda"))
    assert names("full", "cuda")[-1] == "torch.compile of a block"
    same_bits = {name.split()[2] for name in names("smoke") if name.startswith("same bits")}
    assert same_bits == set(BLOCK_OPS) - {"attention"}
    assert names("full", ops=("gelu",)) and all("gelu" in n for n in names("full", ops=("gelu",)))


def test_levels_of_the_objective() -> None:
    timed = names("timed", ops=OBJECTIVE)
    assert {"philox words", "philox normals", "times", "graph replays"} <= set(timed)
    assert any(name.startswith("same bits") for name in timed)
    assert names("full", "cuda", OBJECTIVE)[-1] == "torch.compile"
    assert "graph replays" not in names("full", ops=("interpolate",))
    # A training step needs all but the mixed source, which is no part of those that are timed.
    assert names("timed", ops=("step",)) == names("timed") + timed
    source = names("timed", ops=("mixed_source",))
    assert names("timed", ops=NEEDS) == names("timed") + timed + source[1:]


def test_levels_of_the_mixed_source() -> None:
    timed, smoke, full = (names(level, ops=("mixed_source",)) for level in LEVELS)
    assert timed[0] == "philox words" and set(timed) < set(smoke) < set(full)
    for level, words in ((smoke, ("samples", "float32", "tokens", "drawn")), (full, ("vp", "gvp"))):
        for word in words:
            assert any(word in name for name in level), word
    assert any("64x768x16x16" in name for name in names("timed", "cuda", ("mixed_source",)))
    assert [name.startswith("same bits") for name in full].count(True) == 2


def test_a_check_is_about_what_was_asked_for() -> None:
    found = [
        (task.ops, {finding.op for finding in task.run()})
        for task in tasks(torch.device("cpu"), "reference", "timed", ("interpolate",))
    ]
    assert all(set(ops) >= made_by for ops, made_by in found)
    assert set.union(*(made_by for _, made_by in found)) == {"normal", "interpolate"}
