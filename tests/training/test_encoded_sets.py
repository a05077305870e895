"""Training on an encoded set is training on its images with the encoder in the step."""

from pathlib import Path

import pytest
import torch

from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.data.preparation.encode import EncodeOptions, encode
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.models.autoencoders.sdvae import SDVAE
from mixflow_fast.training.trainer import Trainer, train
from tests.support.autoencoder import write_autoencoder
from tests.support.prepared import SIDE, write_prepared
from tests.support.runs import assert_same_bits
from tests.support.train_ranks import TINY


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set, an autoencoder, and the latents."""
    root = tmp_path_factory.mktemp("files")
    write_prepared(root / "images")
    vae = SDVAE(write_autoencoder(root / "vae"), SIDE)
    options = EncodeOptions(batch=4, shard_samples=3)
    encode(root / "images", root / "latents", vae, torch.device("cpu"), options, quiet=True)
    return root


def config(out: Path, data: str, *overrides: str) -> Config:
    """A tiny SiT on latents of 16 x 16 places."""
    tiny = [setting for setting in TINY if not setting.startswith("data.")]
    model = "model={name: SiT-S/4, input_size: 16, in_channels: 4, num_classes: 3, depth: 1}"
    given = ["model.hidden_size=32", "model.num_heads=2", "train.images=24", f"out={out}"]
    return load_config("photos", [model, *tiny, data, *given, *overrides])


DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl")]


def test_losses_are_those_of_the_encoder_in_the_step(tmp_path: Path, files: Path) -> None:
    """To the rounding of float16: the flips, the mirrors and the posterior are the same."""
    train(
        config(tmp_path / "set", f"data={{kind: latents, path: {files / 'latents'}}}"), quiet=True
    )
    online = [
        f"data={{kind: images, path: {files / 'images'}, size: {SIDE}, flip: true}}",
        f"encoder={{kind: sdvae, path: {files / 'vae'}}}",
    ]
    train(config(tmp_path / "online", *online), quiet=True)
    first, second = losses(tmp_path / "set"), losses(tmp_path / "online")
    assert len(first) == 3 and first == pytest.approx(second, rel=2e-4)
    # What would be off by much more: the image's own latent at every position.
    plain = f"data={{kind: latents, path: {files / 'latents'}, mirrors: 1}}"
    train(config(tmp_path / "plain", plain), quiet=True)
    assert losses(tmp_path / "plain") != pytest.approx(second, rel=2e-4)


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 2)])
def test_a_resumed_run_sees_the_same_latents(
    tmp_path: Path, files: Path, precision: str, stage: int
) -> None:
    data = f"data={{kind: latents, path: {files / 'latents'}}}"
    how = [f"train.precision={precision}", f"train.zero_stage={stage}", "train.microbatch_size=4"]
    how.append("train.keep_last=1")
    whole = Trainer(config(tmp_path / "whole", data, *how), quiet=True)
    seen = []
    whole.on_step = lambda step, made, means: seen.extend(made)
    whole.run()
    assert {made.it.x.dtype for made in seen} == {getattr(torch, DTYPES[precision])}
    assert all(made.it.x.isfinite().all() for made in seen)
    train(config(tmp_path / "parts", data, *how, "train.images=16"), quiet=True)
    train(config(tmp_path / "parts", data, *how, "data.workers=2"), quiet=True)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
