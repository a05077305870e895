"""`mixflow-fast data compare` from the command line, on prepared sets and on folders."""

from __future__ import annotations

import re

import pytest

from mixflow_fast.cli import main
from mixflow_fast.data import dali
from tests.support.encoded_images import (
    odd_files,
    photos,
    plain_files,
    write_folder,
)

WINDOW = photos()[1].crop((200, 100, 281, 180))


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "raw", plain_files(WINDOW) | odd_files(WINDOW))


def prepared(folder, *options: str):
    out = folder.parent / "set"
    arguments = ["data", "prepare", str(folder), "--size", "32", "--out", str(out)]
    assert main([*arguments, "--classes", "folder", "--on-bad", "skip", *options]) == 0
    return out


def test_a_folder(folder, capsys) -> None:
    assert main(["data", "compare", str(folder), "--size", "32", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "Pillow against dali/" in out and out.count("JPEG 4:2:0") == 1
    assert re.search(r"by Pillow +- +13 +13 +0\.0000", out), out


def test_a_prepared_set_is_identical(folder, capsys) -> None:
    out = prepared(folder)
    assert main(["data", "compare", str(out), "--count", "10", "--device", "cpu"]) == 0
    assert re.search(r"WEBP +- +10 +10 +0\.0000 +0", capsys.readouterr().out)


def test_a_lossless_set_that_is_not_identical_is_an_error(folder, capsys, monkeypatch) -> None:
    out = prepared(folder)
    truth = dali.DaliLoader._run
    monkeypatch.setattr(
        dali.DaliLoader,
        "_run",
        lambda self, pipeline: truth(self, pipeline).map(lambda t: t + 1 if t.dim() == 4 else t),
    )
    assert main(["data", "compare", str(out), "--device", "cpu"]) == 1
    assert "use data.loader=threads" in capsys.readouterr().out


def test_raw_pixels_are_nothing_to_compare(folder, capsys) -> None:
    out = prepared(folder, "--format", "raw")
    assert main(["data", "compare", str(out)]) == 2
    assert "nothing to compare" in capsys.readouterr().err
