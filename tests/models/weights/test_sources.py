"""Sources in weights files: kept apart from the network, read back, and refused where damaged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixflow_fast.checkpoints.export import export
from mixflow_fast.checkpoints.inspect import inspect_file
from mixflow_fast.models import SiT, load_model, save_weights
from mixflow_fast.models.weights.metadata import Metadata
from mixflow_fast.models.weights.source_record import SETTINGS, SourceRecord, split
from mixflow_fast.models.weights.sources import load_source
from tests.support.weights import network, same

RECORD = SourceRecord(
    predictor="SourceTable",
    kwargs={"num_classes": 3, "channels": 4, "size": 16, "low_resolution": 4},
    kappa="class",
    mode="samples",
    w="discrete(8)",
    lam=None,
    beta=1e-4,
    sample_w=0.5,
)


def states(shift: float) -> dict[str, Tensor]:
    """A network's and a predictor's weights by the names that they have in a run."""
    torch.manual_seed(1)
    table = RECORD.build_predictor()
    torch.nn.init.normal_(table.table.weight)
    own = network().state_dict() | {f"source.{n}": t for n, t in table.state_dict().items()}
    return {name: tensor + shift for name, tensor in own.items()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    config = network().config
    metadata = Metadata(kwargs=config, clock="data_at_1", steps=3, source=RECORD)
    path = tmp_path / "weights.pt"
    save_weights(path, states(0.0), states(1.0), metadata.to_record())
    return path


def test_official_names_stay_alone(file: Path) -> None:
    content = torch.load(file, weights_only=True)
    assert list(content) == ["model", "ema", "source", "source_ema", "args", "steps"]
    SiT(**network().config).load_state_dict(content["ema"], strict=True)
    own, source = split(states(1.0))
    assert same(content["ema"], own) and same(content["source_ema"], source)
    assert same(load_model(file).state_dict(), own)


def test_a_source_comes_back_with_its_settings(file: Path) -> None:
    for key, shift in (("ema", 1.0), ("model", 0.0)):
        stored = load_source(file, key)
        assert stored.record == RECORD and stored.sample_w == 0.5
        source = stored.source
        assert (source.kappa, source.mode, source.w) == ("class", "samples", "discrete(8)")
        assert (source.lam, source.beta) == (None, 1e-4)
        assert same(source.predictor.state_dict(), split(states(shift))[1])
        assert source.frozen and not source.predictor.training
    assert Metadata.from_record(torch.load(file)["args"], file).source == RECORD


def test_without_a_source_there_is_none(tmp_path: Path) -> None:
    state = network().state_dict()
    record = Metadata(kwargs=network().config, clock="data_at_1").to_record()
    save_weights(tmp_path / "plain.pt", state, state, record)
    assert load_source(tmp_path / "plain.pt") is None
    torch.save({"ema": state, "source": {"url": "x"}}, tmp_path / "theirs.pt")
    assert load_source(tmp_path / "theirs.pt") is None


def damage(file: Path, **changes: object) -> Path:
    content = torch.load(file, weights_only=True)
    for name, change in changes.items():
        content[name] = change(content[name])
    torch.save(content, file)
    return file


def test_a_damaged_source_is_refused_by_name(file: Path) -> None:
    bad = {"table.weight": torch.full_like(split(states(0))[1]["table.weight"], torch.inf)}
    with pytest.raises(ValueError, match="table.weight of its source has .* not finite: choose"):
        load_source(damage(file, source_ema=lambda _: bad))
    assert load_source(file, "model") is not None
    found = inspect_file(file)
    assert found.non_finite == ["source.table.weight"] and not found.fits
    with pytest.raises(ValueError, match="table.weight of its source does not fit SourceTable"):
        load_source(damage(file, source_ema=lambda s: {"other": s["table.weight"]}))
    found = inspect_file(file)
    assert (found.missing, found.unexpected) == (["source.table.weight"], ["source.other"])


def test_a_wrong_checksum_is_refused(file: Path) -> None:
    content = file.read_bytes()
    row = split(states(1.0))[1]["table.weight"].numpy().tobytes()
    assert content.count(row) == 1
    file.write_bytes(content.replace(row, row[:-1] + bytes([row[-1] ^ 1])))
    with pytest.raises(ValueError, match="table.weight of its source is not what was written"):
        load_source(file)
    load_model(file)  # the network is whole


def test_settings_that_cannot_be_read_are_refused(file: Path) -> None:
    later = json.dumps(dataclasses.asdict(RECORD) | {"more": 1})
    for text in (later, "{}", RECORD.to_json().replace("class", "colour")):
        damage(file, args=lambda args, text=text: args | {SETTINGS: text})
        with pytest.raises(ValueError, match=r"says of its source is damaged, or of another"):
            load_source(file)
    damage(file, args=lambda args: {n: v for n, v in args.items() if n != SETTINGS})
    with pytest.raises(ValueError, match="holds a source and does not say how it is built"):
        load_source(file)


def test_inspect_says_what_source_there_is(file: Path) -> None:
    found = inspect_file(file)
    assert found.fits and found.source == (
        "mixed, kappa class, mode samples, w discrete(8), SourceTable of 384 parameters, "
        "beta 0.0001"
    )
    assert found.parameters == sum(t.numel() for t in network().state_dict().values())


def test_exports_carry_it_where_they_can(file: Path, tmp_path: Path) -> None:
    done = export(file, "official", tmp_path / "official.pt", weights="model")
    assert not any("source" in note for note in done.notes)
    stored = load_source(tmp_path / "official.pt")
    assert stored.record == RECORD
    assert same(stored.source.predictor.state_dict(), split(states(0.0))[1])
    for to, out, options in (
        ("official", "bare.pt", {"bare": True}),
        ("ema", "ema.safetensors", {}),
    ):
        done = export(file, to, tmp_path / out, **options)
        assert any("mixed source, which this form cannot hold" in note for note in done.notes)
        assert load_source(tmp_path / out) is None


def test_differences_are_those_that_weights_cannot_bridge() -> None:
    other = dataclasses.replace(RECORD, kappa="noise", lam=3.0, beta=None, w=1.0)
    assert RECORD.differences(other) == ["kappa class instead of noise"]
    smaller = dataclasses.replace(RECORD, kwargs=RECORD.kwargs | {"low_resolution": 8})
    assert RECORD.differences(smaller) == ["low_resolution 4 instead of 8"]
    assert RECORD.differences(dataclasses.replace(RECORD, sample_w=None)) == []
