"""A run whose images come through DALI: the bits of a run whose images come through threads."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixflow_fast.data.dali import DaliLoader
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.training.trainer import Trainer
from tests.support.prepared import SIDE, write_prepared
from tests.support.runs import assert_same_bits, tiny


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A prepared set, two micro-batches a step, dropped labels."""
    root = write_prepared(tmp_path_factory.mktemp("set") / "set", "webp")
    model = [f"model.input_size={SIDE}", "model.num_classes=3", "train.label_dropout=0.3"]
    data = ["data.kind=images", f"data.path={root}", "data.size=null"]
    return [*model, *data, "train.microbatch_size=4", "train.images=32", "train.keep_last=1"]


def train(out: Path, *overrides: str) -> bool:
    """Train to the end of `train.images`; returns whether DALI gave the images."""
    trainer = Trainer(tiny(out, *overrides), quiet=True)
    with trainer.loader() as loader:
        through_dali = isinstance(loader, DaliLoader)
    trainer.run()
    return through_dali


def test_the_same_bits_and_resumed_in_turns(tmp_path, settings) -> None:
    assert not train(tmp_path / "threads", *settings)
    assert train(tmp_path / "dali", *settings, "data.loader=dali")
    assert_same_bits(tmp_path / "threads", tmp_path / "dali")
    # Half by one, then by the other.
    assert train(tmp_path / "both", *settings, "data.loader=dali", "train.images=16")
    assert not train(tmp_path / "both", *settings, "data.loader=threads")
    assert_same_bits(tmp_path / "threads", tmp_path / "both")
    starts = read_metrics(tmp_path / "both" / "metrics.jsonl", kind="start")
    assert [row["decoder"].partition("/")[0] for row in starts] == ["dali", "pil"]


def test_a_damaged_image_ends_the_run_with_its_name(tmp_path, settings) -> None:
    root = write_prepared(tmp_path / "set", "webp")
    shard = root / "shards" / "00000.tar"
    content = bytearray(shard.read_bytes())
    place = content.index(b"RIFF") + 100
    content[place : place + 400] = bytes(400)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"image 0 \(class0/000\.png\) in shard 00000"):
        train(tmp_path / "out", *settings, f"data.path={root}", "data.loader=dali")
