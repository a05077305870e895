"""`mixflow-fast sample` with a decoder, and sets of pictures by one process and by two."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixflow_fast.cli import picture_sets
from mixflow_fast.evaluation.protocol import Protocol, differences
from mixflow_fast.evaluation.sample_sets import read_set
from mixflow_fast.models import build, load_model
from mixflow_fast.models.weights.digest import weights_sha256
from tests.support.autoencoder import small_autoencoder, write_autoencoder
from tests.support.command_line import run
from tests.support.launchers import environment
from tests.support.sample_sets import content

STEPS = ["--steps", "2", "--batch-size", "4", "--seed", "3"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks of latents (4, 8, 8) and of pixels (3, 8, 8), and an autoencoder."""
    root = tmp_path_factory.mktemp("files")
    for name, channels in (("latents", 4), ("pixels", 3)):
        with torch.random.fork_rng():
            torch.manual_seed(channels)
            model = build("SiT-S/8", input_size=8, in_channels=channels, depth=1, num_classes=3)
            torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
        torch.save(model.state_dict(), root / f"{name}.pt")
    write_autoencoder(root / "vae")
    return root


@pytest.fixture(scope="module")
def truth(files: Path) -> np.ndarray:
    """diffusers' own pictures (9, 16, 16, 3) of the latents that the command writes as arrays."""
    out = files / "arrays.npz"
    assert picture_sets_run("sample", files / "latents.pt", "--out", out, "--num", "9", *STEPS) == 0
    with np.load(out) as arrays:
        assert sorted(arrays) == ["x", "y"] and arrays["x"].shape == (9, 4, 8, 8)
        assert arrays["x"].dtype == np.float32
        x = torch.from_numpy(arrays["x"])
    with torch.no_grad():
        images = small_autoencoder().decode(x / 0.18215).sample.double()
    return (127.5 * images + 128).clamp(0, 255).floor().movedim(1, -1).numpy()


def picture_sets_run(*arguments: object) -> int:
    from mixflow_fast.cli import main

    return main([str(argument) for argument in arguments])


def test_a_decoded_set_is_that_of_diffusers(
    tmp_path: Path, files: Path, truth: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", files / "latents.pt", "--decoder", files / "vae", "--num", "9", *STEPS]
    code, said, err = run(*command, "--out", tmp_path / "a" / "set", capsys=capsys)
    found = read_set(tmp_path / "a" / "set")
    assert code == 0, err
    assert f"{found.path}: 9 pictures, protocol {found.protocol.short}" in said
    assert "sampler: euler, 2 intervals" in said
    assert found.pictures.shape == truth.shape == (9, 16, 16, 3)
    assert abs(found.pictures - truth).max() <= 1 and (found.pictures != truth).mean() < 1e-3
    assert found.labels.tolist() == [i % 3 for i in range(9)]
    network = load_model(files / "latents.pt", "ema")
    assert found.origin == {"weights_sha256": weights_sha256(network), "average": "ema"}
    record = found.protocol.record
    assert record["set"] == {"n": 9, "seed": 3, "ids": "0..n-1", "labels": "balanced", "K": 3}
    assert record["sampler"]["method"] == "euler" and record["sampler"]["nfe"] == 2
    assert record["image"] == {"size": 16, "quantisation": "round"}
    assert record["decoder"]["kind"] == "sdvae" and record["precision"]["decode"] == "fp32"
    assert record["guidance"]["channels"] == 3  # what "auto" is for this network
    assert Image.open(tmp_path / "a" / "set" / "grid.png").size == (8 * 66 - 2, 2 * 66 - 2)

    # A .npz of pictures is the same set; again: nothing is made; with other settings: refused.
    whole = content(tmp_path / "a" / "set")
    state = torch.load(files / "latents.pt")
    torch.save({"ema": state, "train_steps": 40}, tmp_path / "run.pt")
    from_run = ["sample", tmp_path / "run.pt", *command[2:], "--out", tmp_path / "c" / "set"]
    code, _, err = run(*from_run, capsys=capsys)
    assert code == 0 and read_set(tmp_path / "c" / "set").origin == {**found.origin, "step": 40}
    code, _, _ = run(*command, "--out", tmp_path / "b" / "set.npz", capsys=capsys)
    assert code == 0 and content(tmp_path / "b" / "set") == whole
    code, _, _ = run(*command, "--out", tmp_path / "b" / "set.npz", capsys=capsys)
    assert code == 0 and content(tmp_path / "b" / "set") == whole
    for change, words in (
        (["--steps", "3"], "sampler.intervals = 2 against 3; sampler.network_calls = 2 against 3"),
        (["--quantise", "floor"], "image.quantisation = 'round' against 'floor'"),
        (["--weights", "model"], "was begun with origin"),
    ):
        out = ["--out", tmp_path / "a" / "set"]
        code, _, err = run(*command, *change, *out, capsys=capsys)
        assert code == 2 and words in err and content(tmp_path / "a" / "set") == whole


def test_two_ranks_make_the_bytes_of_one(
    tmp_path: Path,
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By launchers' variables, one after the other; shards for both. They need not meet."""
    command = ["sample", files / "pixels.pt", "-n", "1001", "--steps", "1", "--batch-size", "250"]
    assert run(*command, "--out", tmp_path / "1/a", capsys=capsys)[0] == 0
    # Another test of this process may have left a group of its own.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    torchrun, srun = ("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    for rank, (number, ranks) in ((1, torchrun), (0, srun)):
        for name in torchrun:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(number, str(rank))
        monkeypatch.setenv(ranks, "2")
        code, said, err = run(*command, "--out", tmp_path / "2/a", capsys=capsys)
        assert code == 0, err
        assert ("sampler: euler" in said) == (rank == 0)
        assert ("1,001 pictures" in said) == (rank == 0)
        assert (tmp_path / "2/a.npz").exists() == (rank == 0)
    assert content(tmp_path / "1/a") == content(tmp_path / "2/a")
    code, _, err = run(*command, "--out", tmp_path / "x.png", capsys=capsys)
    assert code == 2 and "2 processes make a set of pictures together" in err


@pytest.mark.long
def test_under_torchrun(tmp_path: Path, files: Path) -> None:
    arguments = ["sample", str(files / "pixels.pt"), "-n", "1500", "--steps", "1"]
    arguments += ["--batch-size", "250", "--keep-shards"]
    env = environment()
    one = [sys.executable, "-m", "mixflow_fast.cli", *arguments, "--out", str(tmp_path / "1/a")]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two += [*one[1:-1], str(tmp_path / "2/a")]
    for command in (one, two):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("sampler: euler") == 1
        assert done.stdout.count("1,500 pictures, protocol") == 1
    first, second = content(tmp_path / "1/a"), content(tmp_path / "2/a")
    assert first == second and {"a/shards/00000.npy", "a/shards/00001.npy"} < first.keys()


def test_a_picture_of_decoded_latents(
    tmp_path: Path, files: Path, truth: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", files / "latents.pt", "--num", "9", *STEPS, "--out", tmp_path / "x.png"]
    code, _, err = run(*command, capsys=capsys)
    assert code == 2 and "give the autoencoder that they were made by with --decoder" in err
    code, said, _ = run(*command, "--decoder", files / "vae", capsys=capsys)
    pixels = np.asarray(Image.open(tmp_path / "x.png"))[::4, ::4]
    assert code == 0 and "undo data.scale" not in said
    assert abs(pixels[:16, :16] - truth[0]).max() <= 1


def test_a_set_of_pixels_is_rounded_by_the_rule(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", files / "pixels.pt", "--num", "5", *STEPS, "--label", "2", "0"]
    assert run(*command, "--out", tmp_path / "x.npz", capsys=capsys)[0] == 0
    x = np.load(tmp_path / "x.npz")["x"].astype(np.float64)
    assert run(*command, "--out", tmp_path / "a", capsys=capsys)[0] == 0
    floor = ["--quantise", "floor", "--out", tmp_path / "b.npz"]
    assert run(*command, *floor, capsys=capsys)[0] == 0
    expected = {
        "a": (127.5 * x + 128).clip(0, 255),
        "b": (127.5 * (x + 1)).clip(0, 255),
    }
    for name, values in expected.items():
        found = read_set(tmp_path / f"{name}.npz")
        assert np.mean(found.pictures != np.floor(values).transpose(0, 2, 3, 1)) < 1e-3
        assert found.labels.tolist() == [2, 0, 2, 0, 2]
        assert found.protocol.record["decoder"] == {"kind": "none"}
        assert found.protocol.record["set"]["labels"] == [2, 0]
    changed = differences([Protocol(read_set(tmp_path / n).protocol.record) for n in "ab"])
    assert [d.field for d in changed] == ["image.quantisation"]
    # A preset's own rule: REPA's is floor. In a picture, too.
    preset = ["--preset", "repa-ode", "--cfg-scale", "1", "--cfg-channels", "auto"]
    for out in ("c", "c.png"):
        code, _, err = run(*command, *preset, "--out", tmp_path / out, capsys=capsys)
        assert code == 0, err
    found = read_set(tmp_path / "c")
    assert np.array_equal(found.pictures, read_set(tmp_path / "b").pictures)
    assert found.protocol.record["image"]["quantisation"] == "floor"
    grid = np.asarray(Image.open(tmp_path / "c.png"))[::8, ::8]
    assert np.array_equal(grid[:8, :8], found.pictures[0])


def test_the_time_of_a_long_set_is_predicted(
    tmp_path: Path,
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["sample", files / "pixels.pt", "--num", "8", *STEPS, "--out"]
    assert "take about" not in run(*command, tmp_path / "a", capsys=capsys)[1]
    monkeypatch.setattr(picture_sets, "_SHORT", 1)
    # Each call of the network takes a second, by a clock of its own.
    seconds = iter(range(0, 100, 3))
    monkeypatch.setattr(picture_sets.time, "perf_counter", lambda: float(next(seconds)))
    said = run(*command, tmp_path / "b", capsys=capsys)[1]
    # 3 s for three steps, 3 s for the pixels, 2 batches of 2 steps: 2 (2 * 1 + 3).
    assert "8 pictures take about 10 s (0.8 pictures/s, from 3 steps)" in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--out x.jpg", "must end in .png .picture. or .npz .array., or be a folder's name"),
        ("--out x --force", "a set is never replaced: leave --force out"),
        ("--out x.npz --keep-shards", "--keep-shards belongs to a set of pictures"),
        ("--out x.png --decoder-stats s.pt", "--decoder-stats needs --decoder FOLDER"),
        ("--out x --decoder {vae}", "decoder takes latents of .4, 8, 8., the network makes .3, 8"),
        ("--out x --decoder none", "--decoder none does not exist"),
        ("--out x.png --png", "--png belongs to a set of pictures"),
        ("--out x.png --keep-latents", "--keep-latents belongs to a set of pictures"),
        ("--out x --keep-latents", "--keep-latents keeps what --decoder decodes"),
        ("--out x --evaluate --pixels", "--evaluate needs --reference FILE"),
        ("--out x --reference r.npz", "--reference does nothing without --evaluate"),
        ("--out x --effnet-side 64", "--effnet-side does nothing without --evaluate"),
        ("--out x --evaluate --reference r.npz --pixels", "reference r.npz does not exist"),
    ],
)
def test_refusals(
    tmp_path: Path,
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = line.format(vae=files / "vae").split()
    code, _, err = run("sample", files / "pixels.pt", "--num", "2", *arguments, capsys=capsys)
    assert code == 2 and re.search(message, err), err
    assert list(tmp_path.iterdir()) == []


def test_what_is_made_beside_a_set(
    tmp_path: Path, files: Path, truth: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    """Latents, image files, and the numbers that `evaluate` gives of the set."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=noise)
    line = ["reference", tmp_path / "real.npz", "--pixels", "--out", tmp_path / "r.npz"]
    assert run(*line, capsys=capsys)[0] == 0
    command = ["sample", files / "latents.pt", "--decoder", files / "vae", "--num", "9", *STEPS,
               "--out", tmp_path / "set"]  # fmt: skip
    extras = ["--keep-latents", "--png", "--evaluate", "--reference", tmp_path / "r.npz"]
    code, said, err = run(*command, *extras, "--pixels", capsys=capsys)
    assert code == 0, err
    latents = np.load(tmp_path / "set" / "latents" / "00000.npy")
    with np.load(files / "arrays.npz") as arrays:
        assert latents.dtype == np.float16 and np.allclose(latents, arrays["x"], atol=5e-3)
    assert len(list((tmp_path / "set" / "png").iterdir())) == 9
    first = np.asarray(Image.open(tmp_path / "set" / "png" / "000000.png"))
    assert np.array_equal(first, read_set(tmp_path / "set").pictures[0])
    assert not (tmp_path / "set" / "features").exists()
    (row,) = map(json.loads, (tmp_path / "set.metrics.jsonl").read_text().splitlines())
    assert re.search(r"fd_pooled_pixels .*se .*protocol", said)
    line = ["evaluate", tmp_path / "set", "--reference", tmp_path / "r.npz", "--pixels"]
    kept = tmp_path / "set.features" / "pooled_pixels.features.npy"
    stamp = kept.stat().st_mtime_ns
    code, _, err = run(*line, "--out", tmp_path / "again.jsonl", capsys=capsys)
    assert code == 0 and kept.stat().st_mtime_ns == stamp
    again = json.loads((tmp_path / "again.jsonl").read_text())
    assert again["metrics"] == row["metrics"] and again["protocol"] == row["protocol"]
    # Again, of a set that is there: image files that are gone, and other features.
    (tmp_path / "set" / "png" / "000003.png").unlink()
    (tmp_path / "set.features" / "random_conv.json").unlink()
    code, _, err = run(*command, *extras, "--pixels", capsys=capsys)
    assert code == 0 and (tmp_path / "set" / "png" / "000003.png").is_file(), err
    rows = list(map(json.loads, (tmp_path / "set.metrics.jsonl").read_text().splitlines()))
    assert len(rows) == 2 and rows[1]["metrics"] == row["metrics"]
