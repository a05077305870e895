"""`mixflow-fast data encode` as a user meets it."""

from __future__ import annotations

import pytest
import torch

from mixflow_fast.cli import main
from mixflow_fast.data.latents_store import LatentsStore
from mixflow_fast.data.preparation import encode as encode_module
from tests.support.autoencoder import write_autoencoder
from tests.support.prepared import write_prepared


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A prepared set of seven images, and an autoencoder."""
    root = tmp_path_factory.mktemp("files")
    write_prepared(root / "images", "webp")
    write_autoencoder(root / "vae")
    return root


def encode(files, out, *more):
    command = ["data", "encode", files / "images", "--vae", files / "vae", "--out", out, *more]
    return main(list(map(str, [*command, "--device", "cpu", "--threads", "2"])))


def test_a_set_is_encoded_and_looked_at(files, tmp_path, capsys):
    out = tmp_path / "latents"
    assert encode(files, out, "--batch", 4, "--shard-samples", 3) == 0
    printed = capsys.readouterr().out
    assert "encoded 7 images in " in printed and " images/s)" in printed
    assert f"{out}: complete, latents of 7 images" in printed
    assert f"data.kind=latents data.path={out}" in printed
    assert LatentsStore(out).shape == (14, 8, 16, 16)
    assert encode(files, out, "--batch", 4, "--shard-samples", 3) == 0
    assert "encoded 7" not in capsys.readouterr().out  # it is complete already
    assert main(["data", "verify", str(out)]) == 0 and main(["data", "info", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "whole, mixflow-latents/1" in printed and "scale: 0.18215" in printed


def test_ranks_of_a_launcher_share_the_work(files, tmp_path, capsys, monkeypatch):
    # A run in the same process, of another test, leaves its process group.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    for rank, words in ((0, "1 shards are left to the other processes"), (1, "complete")):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert encode(files, tmp_path / "out", "--shard-samples", 4, "--mirrors", 1) == 0
        assert words in capsys.readouterr().out
    assert LatentsStore(tmp_path / "out").shape == (7, 8, 16, 16)


def test_refusals_are_one_line(files, tmp_path, capsys):
    encode(files, tmp_path / "out", "--shard-samples", 3)
    capsys.readouterr()
    for more, message in (
        (["--shard-samples", 3, "--precision", "bf16"], "was begun with precision = "),
        (["--batch", 0], "--batch must be >= 1, got 0"),
        (["--batch", 3], "batch must be a multiple of the 2 mirrors, got 3"),
        (["--vae", tmp_path], f"--vae {str(tmp_path)!r} holds no config.json"),
    ):
        assert encode(files, tmp_path / "out", *more) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert encode(files, files / "images" / "latents") == 2
    assert "is inside of the images" in capsys.readouterr().err
    command = ["data", "encode", tmp_path, "--vae", files / "vae", "--out", tmp_path / "other"]
    assert main(list(map(str, command))) == 2
    assert "it is no set that `mixflow-fast data` has made" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(
            list(map(str, [*command[:2], files / "images", *command[3:], "--device", "cuda"]))
        )
        assert "torch sees no GPU" in capsys.readouterr().err


def test_a_stop_says_how_it_goes_on(files, tmp_path, capsys, monkeypatch):
    written = encode_module.ShardWriter.write
    calls = []

    def write(self, rows):
        calls.append(written(self, rows))
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(encode_module.ShardWriter, "write", write)
    assert encode(files, tmp_path / "out", "--batch", 4, "--shard-samples", 3) == 130
    error = capsys.readouterr().err
    assert "the same command goes on from here, 1 of 3 shards are done" in error
    monkeypatch.undo()
    assert encode(files, tmp_path / "out", "--batch", 4, "--shard-samples", 3) == 0
    assert "encoded 4 images" in capsys.readouterr().out
