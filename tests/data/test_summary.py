"""The fingerprint of data, and how two of them differ in words."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mixflow_fast.data import Digits, Photos
from mixflow_fast.data.summary import DataSummary, sample_rows

NOW = DataSummary(unit="images", examples=1_200_000, classes=2, shape=(3, 8, 8), digest="ab",
                  class_names=("ant", "cat"))  # fmt: skip


def test_the_same_data_have_no_changes_whatever_was_passed_over():
    record = json.loads(json.dumps(replace(NOW, notes=("n",), warnings=("w",)).to_record()))
    assert NOW.changes(record) == ""
    assert NOW.changes({}) == ""
    assert NOW.changes(record | {"of a later release": 1}) == ""


@pytest.mark.parametrize(
    ("former", "words"),
    [
        (
            {"examples": 1_281_167, "class_names": ("cat", "dog")},
            "1,281,167 examples of 2 classes -> 1,200,000 examples of 2 classes; classes added: "
            "ant; classes removed: dog",
        ),
        ({"digest": "cd"}, "other files or labels (digest cd -> ab)"),
        ({"shape": (3, 9, 9)}, "shape [3, 9, 9] -> [3, 8, 8]"),
        ({"classes": 0, "class_names": ()}, "1,200,000 examples -> 1,200,000 examples of 2 cl"),
        ({"classes": 1, "class_names": ("ant",)}, "of 1 class -> 1,200,000 examples of 2 classes; "
         "classes added: cat"),
    ],
)  # fmt: skip
def test_changes_in_words(former, words):
    assert words in NOW.changes(json.loads(json.dumps(replace(NOW, **former).to_record())))


def test_sample_rows_are_spaced_evenly():
    assert sample_rows(3, 256) == [0, 1, 2] and sample_rows(0, 256) == []
    rows = sample_rows(1_281_167, 256)
    assert len(set(rows)) == 256 and rows[-1] < 1_281_167
    assert {b - a for a, b in zip(rows, rows[1:], strict=False)} <= {5004, 5005}


def test_embedded_sets_have_a_summary():
    photos, digits = Photos(size=8).summary(), Digits(split="heldout").summary()
    assert photos.class_names == ("china", "flower") and photos.shape == (3, 8, 8)
    assert digits.describe() == "359 images, 10 classes, 1 x 8 x 8"
    found = (Photos(size=8), Photos(size=9), Photos("all", 8), Digits(), Digits(split="heldout"))
    assert len({dataset.summary().digest for dataset in found}) == 5
