"""Text-to-image runs on several ranks, and resumed: the same examples, prompts and bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixflow_fast.diagnostics.verify_resume import table, verify_resume
from tests.support.captioned import model_and_cache, tiny
from tests.support.captioned_ranks import run_ranks

DROPS = {"cond.drop": 0.3, "cond.drop_each": ("clip_l:0.3", "t5:0.3")}
BF16 = {"train.precision": "bf16"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_and_cache(tmp_path_factory.mktemp("root"))


@pytest.mark.long
def test_ranks_and_micro_batches_train_on_the_same_stream(root: Path, tmp_path: Path) -> None:
    """Input, times and prompts of every position, in both buckets, on one rank and on two."""
    long = {"train.images": 32} | DROPS
    alone = run_ranks(1, tiny(root, tmp_path / "one", **long), tmp_path / "a")
    split = {"train.microbatch_size": 1}
    two = run_ranks(2, tiny(root, tmp_path / "two", **long, **split), tmp_path / "b")
    assert list(alone) == list(two) == list(range(32))
    assert {value["x"].shape for value in alone.values()} == {(16, 8, 8), (16, 8, 12)}
    for position, values in alone.items():
        assert values.keys() == two[position].keys() and len(values) == 5
        for name, value in values.items():
            assert torch.equal(value, two[position][name]), (position, name)
    without_t5 = [p for p, values in alone.items() if not values["prompt_embeds"][5:].any()]
    assert 0 < len(without_t5) < 32


CASES = {
    "ZeRO 0": (1, {"train.zero_stage": 0}),
    "ZeRO 1, two ranks": (2, {"train.zero_stage": 1}),
    "ZeRO 2, bf16": (1, BF16),
    "ZeRO 2, bf16, two ranks, checkpointing": (2, BF16 | {"model.checkpointing": "full"}),
    "ZeRO 3, bf16, checkpointing": (
        1,
        BF16 | {"train.zero_stage": 3, "model.checkpointing": "full"},
    ),
    "ZeRO 3, bf16, two ranks, checkpointing": (
        2,
        BF16 | {"train.zero_stage": 3, "model.checkpointing": "full"},
    ),
    "ddp, bf16, two ranks": (2, BF16 | {"train.engine": "ddp", "train.zero_stage": 0}),
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_same_to_the_bit(case: str, root: Path, tmp_path: Path) -> None:
    """Two processes of three steps against one of six, with both buckets and dropped prompts."""
    ranks, settings = CASES[case]
    split = {"train.microbatch_size": 1}
    config = tiny(root, tmp_path / "run", **DROPS, **split, **settings)
    rows = verify_resume(config, tmp_path / "out", steps=6, ranks=ranks)
    assert not any(row.differing for row in rows), table(rows)
    found = {row.what: row for row in rows}
    assert found["each step's prompts"].things == 6 * ranks
    assert found["exported ema (weights.pt)"].numbers > 130_000
