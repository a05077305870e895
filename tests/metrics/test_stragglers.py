"""The slowest rank: found, and named once."""

from __future__ import annotations

import re

import pytest

from mixflow_fast.metrics.stragglers import RankTime, StragglerWatch, find_straggler
from tests.support.launchers import RUN, run_ranks


def times(*own: float) -> list[RankTime]:
    return [RankTime(f"node{rank // 2}", s / 4, 3 * s / 4) for rank, s in enumerate(own)]


@pytest.mark.parametrize(
    ("own", "rank"),
    [
        ((5.0, 5.0, 9.0, 5.0), 2),
        ((5.0, 7.0), 1),
        ((5.0, 5.1, 5.9, 5.0), None),  # within 1.2
        ((0.001, 0.002, 0.001, 0.001), None),  # twice as slow, and nobody would notice
        ((4.0, 4.0, 9.0, 9.0), 2),  # by the others' median, not by their minimum
        ((5.0,), None),
    ],
)
def test_who_is_slow(own: tuple[float, ...], rank: int | None) -> None:
    found = find_straggler(times(*own), window_s=10.0)
    assert (None if found is None else found.rank) == rank


def test_a_slow_rank_is_named_once() -> None:
    watch, slow = StragglerWatch(), find_straggler(times(5.0, 5.0, 9.0, 5.0), 10.0)
    said = [watch.sentence(found) for found in (slow, None, slow, slow, slow)]
    assert said[:3] == [None] * 3 and said[4] is None
    assert said[3] == (
        "rank 2 on node1 is slower than the others, which wait for it: 1.8 x their median in its "
        "own part of a step (2.2 s waiting for data, 6.8 s in forward passes since the last row)"
    )


def test_ranks_that_are_slow_in_turns_are_named_once_each() -> None:
    """As on a machine that others use: the log would have a line for every two rows."""
    watch = StragglerWatch()
    first, second = (find_straggler(times(*own), 10.0) for own in ((9.0, 5.0), (5.0, 9.0)))
    said = [watch.sentence(found) for found in (first, first, second, second) * 3]
    assert [row for row, sentence in enumerate(said) if sentence] == [1, 3]


TRAINING = f"""
import sys, time
from mixflow_fast.config.loading import load_config
from mixflow_fast.distributed.process_group import rank
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.training.trainer import Trainer

overrides = {RUN[2:]!r} + ["train.images=48", "out=" + sys.argv[1]]
trainer = Trainer(load_config("photos", overrides))
forward = trainer.forward

def slow(net, batch):
    if rank() == 1:
        time.sleep(0.5)
    return forward(net, batch)

trainer.forward = slow
trainer.run()
if rank() == 0:
    rows = read_metrics(trainer.out / "metrics.jsonl")
    print("slowest:", *(row["slowest_rank"] for row in rows))
"""


@pytest.mark.long
def test_a_run_names_its_slow_rank(tmp_path: object) -> None:
    """Though the steps of both take the same time."""
    (code, text), (other, _) = run_ranks([[TRAINING, str(tmp_path)]] * 2)
    assert (code, other) == (0, 0), text
    assert len(re.findall(r"rank 1 on \S+ is slower than the others", text)) == 1
    assert "slowest: 1 1 1 1 1 1" in text
