"""What files say of their weights: our record and official settings."""

import json
from dataclasses import replace

import pytest

from mixflow_fast.models.weights.metadata import Metadata, OfficialArgs

RECORD = Metadata(
    kwargs={"hidden_size": 96, "z_dims": [8]},
    clock="noise_at_1",
    prediction="noise",
    steps=7,
    images_seen=56,
    config=json.dumps({"objective": {"prediction": "noise"}}),
)


@pytest.mark.parametrize("record", [RECORD, replace(RECORD, config=None)])
def test_records_are_read_as_they_were_written(record: Metadata) -> None:
    written = record.to_record()
    assert Metadata.is_in(written) and Metadata.from_record(written, "a.pt") == record
    # A .safetensors header holds nothing but text.
    header = {name: str(value) for name, value in written.items()}
    assert Metadata.from_record(header, "a.safetensors") == record


def test_a_run_records_what_its_files_always_held() -> None:
    written = RECORD.to_record()
    assert list(written) == ["steps", "images_seen", "clock", "model", "config"]
    assert json.loads(written["model"]) == RECORD.kwargs | {"clock": "noise_at_1"}


def test_official_settings_are_no_record() -> None:
    args = {"model": "SiT-XL/2", "prediction": "v", "encoder_depth": 8}
    assert not Metadata.is_in(args)
    assert OfficialArgs.from_args(args) == OfficialArgs("velocity", 8)
    assert OfficialArgs.from_args({"prediction": "noise", "encoder_depth": True}) == OfficialArgs(
        "noise", None
    )


@pytest.mark.parametrize(
    ("written", "path"),
    [("Linear", "linear"), ("GVP", "gvp"), ("cosine", "gvp"), ("VP", "vp"), ("x", None), (3, None)],
)
def test_official_names_of_paths(written: object, path: str | None) -> None:
    assert OfficialArgs.from_args({"path_type": written}).path == path
    assert OfficialArgs.from_args({}).path is None


def test_the_path_is_that_of_the_run() -> None:
    assert Metadata(kwargs={}, clock=None).path is None
    assert Metadata(kwargs={}, clock=None, config="{}").path is None
    config = json.dumps({"objective": {"path": "gvp"}})
    assert Metadata(kwargs={}, clock=None, config=config).path == "gvp"


@pytest.mark.parametrize("damage", [{"model": "{"}, {"config": "{"}, {"config": "[]"}])
def test_damaged_records_are_refused(damage: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="what a.pt says of its network is damaged"):
        Metadata.from_record(RECORD.to_record() | damage, "a.pt")
