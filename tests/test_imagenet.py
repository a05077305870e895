"""From a folder of JPEGs to training by the commands of docs/imagenet.md, at 256 and 512 pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mixflow_fast.data.set_files import set_format
from mixflow_fast.metrics.metrics_file import read_metrics
from tests.support.autoencoder import EIGHT_TIMES, write_autoencoder
from tests.support.command_line import run
from tests.support.image_folders import write_folder
from tests.support.teacher import WIDTH, save_teacher

# Narrow networks for the shapes of the real ones.
SIT = "model={name: SiT-S/2, depth: 2, hidden_size: 32, num_heads: 2, num_classes: 2"
REPA = f"learn_sigma: false, z_dims: [{WIDTH}], encoder_depth: 1, projector_dim: 32"
RAE = "model={name: DiTDH-S, depth: [1, 1], hidden_size: [32, 32], num_heads: [2, 1]"
SHORT = ["train.images=8", "train.global_batch_size=4", "train.microbatch_size=4"]
SHORT += ["train.precision=fp32", "train.zero_stage=0", "train.init=null", "train.device=cpu"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of JPEGs, an autoencoder, a teacher, and RAE's encoder with its statistics."""
    root = tmp_path_factory.mktemp("imagenet")
    write_folder(root / "train", ("n01440764", "n01443537"), each=3)
    write_autoencoder(root / "vae", **EIGHT_TIMES)
    save_teacher(root / "dinov2", "dinov2")
    save_teacher(root / "dinov2-registers", "dinov2_with_registers")
    return root


@pytest.mark.parametrize("size", [256, 512])
def test_from_jpegs_to_training(
    tmp_path: Path, files: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*argv: object) -> str:
        code, out, err = run(*argv, capsys=capsys)
        assert code == 0, err
        return out

    def losses(recipe: str, out: str, *settings: str) -> list[float]:
        command("train", f"{recipe}-{size}", *SHORT, *settings, f"out={tmp_path / out}")
        (row,) = [row for row in read_metrics(tmp_path / out / "metrics.jsonl") if "loss" in row]
        return [row["loss"]]

    images, latents = tmp_path / "images", tmp_path / "latents"
    classes = ["--classes", "folder"]  # the two are of ImageNet's, and two are not all
    assert "6 in 2 classes" in command("data", "scan", files / "train", *classes)
    command("data", "prepare", files / "train", "--size", size, "--out", images, *classes)
    command("data", "encode", images, "--vae", files / "vae", "--out", latents)
    assert set_format(images) == "mixflow-images/1" and set_format(latents) == "mixflow-latents/1"
    for made in (images, latents):
        command("data", "verify", made)
        assert "6" in command("data", "info", made)

    side, of = size // 8, f"data.path={latents}"
    sit = losses("sit-xl2", "sit", f"{SIT}, input_size: {side}}}", of)
    assert np.isfinite(sit).all()
    repa = ["repa-xl2-256", *SHORT, f"{SIT}, {REPA}, input_size: {side}}}", of]
    repa += [f"data.images={images}", f"teacher.path={files / 'dinov2'}"]
    repa += [f"out={tmp_path / 'repa'}"]
    command("train", *repa)
    (row,) = [r for r in read_metrics(tmp_path / "repa" / "metrics.jsonl") if "loss" in r]
    assert np.isfinite(row["loss"]) and -1 <= row["alignment"] <= 1

    torch.save({"var": torch.full((WIDTH, size // 16, size // 16), 0.5)}, tmp_path / "stat.pt")
    rae = [f"{RAE}, input_size: {size // 16}, in_channels: {WIDTH}, num_classes: 2}}"]
    rae += [f"data.path={images}", f"encoder.path={files / 'dinov2-registers'}"]
    rae += [f"encoder.stats={tmp_path / 'stat.pt'}"]
    assert np.isfinite(losses("rae-xl", "rae", *rae)).all()

    # Damage is found, and says so by the exit code.
    shard = next((latents / "moments").iterdir())
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    code, out, err = run("data", "verify", latents, capsys=capsys)
    assert code == 1 and shard.name in out + err
