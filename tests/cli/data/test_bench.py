"""`mixflow-fast data bench` from the command line."""

from __future__ import annotations

import re

from mixflow_fast.cli import main
from tests.support.caches import write_cache
from tests.support.encoded_images import write_prepared

QUICK = ("--seconds", "0.05", "--rounds", "1", "--microbatch", "4", "--workers", "1")


def test_images_are_read_by_both_loaders(tmp_path, capsys) -> None:
    folder = write_prepared(tmp_path, 12)
    options = ("--size", "16", "--device", "cpu", "--need", "1")
    assert main(["data", "bench", str(folder), *options, *QUICK]) == 0
    out = capsys.readouterr().out
    assert re.search(r"threads +[\d,]+ images/s +[\d.]+ cpu-ms each +1\.00 x threads", out), out
    assert re.search(r"dali +[\d,]+ images/s .* x threads +enough for 1/s", out), out


def test_a_need_that_is_not_met_says_so(tmp_path, capsys) -> None:
    folder = write_prepared(tmp_path, 12)
    options = ("--size", "16", "--device", "cpu", "--need", "1e9")
    assert main(["data", "bench", str(folder), *options, *QUICK]) == 0
    assert capsys.readouterr().out.count("less than 1,000,000,000/s") == 2


def test_a_turn_needs_some_time(tmp_path, capsys) -> None:
    folder = write_prepared(tmp_path, 4)
    assert main(["data", "bench", str(folder), "--size", "16", "--rounds", "0"]) == 2
    assert "--rounds must be above 0, got 0" in capsys.readouterr().err


def test_a_cache_of_captioned_images_is_read(tmp_path, capsys) -> None:
    cache = write_cache(tmp_path / "c", buckets={"64x64": range(9), "96x48": range(9, 16)})
    assert main(["data", "bench", str(cache), "--device", "cpu", *QUICK]) == 0
    out = capsys.readouterr().out
    assert re.search(r"threads +[\d,]+ captioned latents/s", out), out
    assert "dali: DALI decodes image files, and captioned-c holds none" in out
