"""Whole tensors out of the ranks' partitions: what is planned, and the bits on real ranks."""

import json
from pathlib import Path

import pytest

from mixflow_fast.checkpoints.shards import Fragment
from mixflow_fast.training.gathering import Share, plan
from tests.support.launchers import on_ranks

# A row of 5 + 7 + 2 elements, cut into partitions of 8.
NUMELS = {"a": 5, "b": 7, "c": 2}
FIRST = [Fragment("a", 0, 0, 0, 5), Fragment("b", 0, 5, 0, 3)]
SECOND = [Fragment("b", 0, 0, 3, 4), Fragment("c", 0, 4, 0, 2)]


def test_neighbours_share_a_buffer_and_each_rank_sends_its_part_of_it_once() -> None:
    (whole,) = plan(NUMELS, [FIRST, SECOND], most=14)
    assert whole.places == {"a": (0, 5), "b": (5, 12), "c": (12, 14)} and whole.numel == 14
    assert whole.shares == (Share(0, 0, 8, tuple(FIRST)), Share(1, 8, 14, tuple(SECOND)))


def test_buffers_are_bounded_but_for_a_larger_parameter() -> None:
    parts = plan(NUMELS, [FIRST, SECOND], most=6)
    assert [list(part.places) for part in parts] == [["a"], ["b"], ["c"]]
    assert [part.numel for part in parts] == [5, 7, 2]
    assert [[share.rank for share in part.shares] for part in parts] == [[0], [0, 1], [1]]
    assert [list(part.places) for part in plan(NUMELS, [FIRST, SECOND], most=9)] == [
        ["a"],
        ["b", "c"],
    ]


@pytest.mark.parametrize("second", [SECOND[:1], [Fragment("b", 0, 0, 2, 5), SECOND[1]]])
def test_partitions_that_miss_or_repeat_elements_are_refused(second: list[Fragment]) -> None:
    with pytest.raises(ValueError, match="do not hold [bc] exactly once"):
        plan(NUMELS, [FIRST, second])


def assert_same_bits_in_few_calls(file: Path, ranks: int, cases: list[tuple[str, int]]) -> None:
    on_ranks(ranks, "tests.support.communication_ranks", "gathered", str(file), json.dumps(cases))
    counts = json.loads(file.read_text())
    assert len(counts) == len(cases)
    # 32 parameters of 51,181 elements in buffers of 3,000, or of one parameter.
    assert all(15 < count < 32 for count in counts), counts


def test_weights_and_moments_have_the_bits_that_deepspeed_finds(tmp_path: Path) -> None:
    assert_same_bits_in_few_calls(tmp_path / "counts.json", 2, [("bf16", 2)])


@pytest.mark.long
def test_weights_and_moments_of_every_stage(tmp_path: Path) -> None:
    cases = [("bf16", 1), ("bf16", 2), ("fp32", 1), ("fp32", 2)]
    assert_same_bits_in_few_calls(tmp_path / "counts.json", 3, cases)
