"""A run of a SongUNet from the recipe to samples: the same engine, loop and files as for others."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from mixflow_fast.checkpoints.inspect import inspect_file
from mixflow_fast.cli.inspect import as_text
from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.models import SongUNet, load_model
from mixflow_fast.sampling import sample
from mixflow_fast.training.build import build_model, check
from mixflow_fast.training.rehearsal import rehearse
from mixflow_fast.training.trainer import Trainer, train
from tests.support.runs import assert_same_bits

SONGUNET = [
    "model.name=SongUNet-CIFAR10",
    *("model.learn_sigma=null", "model.num_heads=null", "model.num_classes=1"),
    *("model.hidden_size=8", "model.depth=1", "model.channel_mult=[1,2]"),
    *("model.attn_resolutions=[4]", "model.input_size=8", "data.size=8", "model.dropout=0.2"),
    *("train.label_dropout=0", "train.images=24", "train.global_batch_size=8"),
    *("train.log_every=1", "train.save_every=0", "data.flip=true"),
]
MIXED = ["source.kind=mixed", "source.lam=0.3", "source.widths=[16]", "source.groups=8"]
MIXED += ["source.layers=1", "objective.gamma=0", "objective.timesteps=uniform"]


def tiny(out: Path, *overrides: str) -> Config:
    return load_config("photos", [*SONGUNET, f"out={out}", *overrides])


@pytest.mark.parametrize("overrides", [[], MIXED], ids=["standard", "mixed"])
def test_a_run_ends_in_samples_and_resumes_to_the_bit(overrides: list[str], tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(tiny(whole, *overrides, "train.preview_every=3"), quiet=True).finished
    saved = [*overrides, "train.save_every=1"]
    trainer = Trainer(tiny(cut, *saved), quiet=True)
    trainer.on_step = lambda *_: signal.raise_signal(signal.SIGTERM)
    first = trainer.run()
    assert first.step == 1 and not first.finished
    assert train(tiny(cut, *saved, "train.keep_last=1"), quiet=True).finished
    assert_same_bits(whole, cut)

    model = load_model(whole)
    assert isinstance(model, SongUNet) and not model.training
    assert (model.prediction, model.path) == ("velocity", "linear")
    assert model.config["dropout"] == 0.2
    drawn = sample(model, num=3, steps=2, seed=1)
    assert drawn.labels is None and drawn.x.shape == (3, 3, 8, 8)
    assert torch.isfinite(drawn.x).all() and drawn.x.std() > 0.1
    assert (whole / "previews" / "step_00000003.png").is_file()

    found = inspect_file(whole)
    assert found.fits and found.kind == "SongUNet" and found.tokens is None
    text = as_text(found)
    assert "SongUNet of widths 8, 16, 8 px" in text and "no classes" in text


def test_micro_batches_do_not_change_what_is_dropped(tmp_path: Path) -> None:
    """The losses of the same steps, in one micro-batch and in four."""
    losses = {}
    for size in (8, 2):
        trainer = Trainer(tiny(tmp_path / f"{size}", f"train.microbatch_size={size}"), quiet=True)
        seen: list[float] = []
        trainer.on_step = lambda step, outputs, means, seen=seen: seen.append(float(means[0]))
        trainer.run()
        losses[size] = torch.tensor(seen)
    torch.testing.assert_close(losses[8], losses[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.precision=bf16", "train.zero_stage=2"],
        ["train.zero_stage=3", "train.preview_every=3"],
        ["train.engine=ddp", "train.precision=bf16", "model.checkpointing=full"],
        ["model.checkpointing=full", "train.microbatch_size=4"],
    ],
    ids=["ZeRO 2, bf16", "ZeRO 3", "ddp, bf16, checkpointing", "checkpointing"],
)
def test_engines(overrides: list[str], tmp_path: Path) -> None:
    """Losses of three steps near those of ZeRO 0 in float32, which other masks would not give."""
    losses = {}
    for name, more in (("plain", []), ("other", overrides)):
        trainer = Trainer(tiny(tmp_path / name, *more), quiet=True)
        seen: list[float] = []
        trainer.on_step = lambda step, outputs, means, seen=seen: seen.append(float(means[0]))
        assert trainer.run().finished
        losses[name] = torch.tensor(seen)
    exact = not any("bf16" in override for override in overrides)
    tolerance = 1e-5 if exact else 0.02
    torch.testing.assert_close(losses["other"], losses["plain"], rtol=tolerance, atol=tolerance)


def test_a_rolled_out_input_is_made_with_the_same_masks(tmp_path: Path) -> None:
    """The network runs twice in a step."""
    rolled = ["objective.rollout_steps=4", "objective.gamma=0", "objective.timesteps=uniform"]
    assert train(tiny(tmp_path, *rolled), quiet=True).finished


def test_settings_make_the_network(tmp_path: Path) -> None:
    net = build_model(tiny(tmp_path).model)
    own = {k: net.config[k] for k in ("img_resolution", "model_channels", "channel_mult")}
    own |= {k: net.config[k] for k in ("num_blocks", "attn_resolutions", "dropout")}
    assert own == {
        "img_resolution": 8,
        "model_channels": 8,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [4],
        "dropout": 0.2,
    }
    plain = ["model.name=SongUNet-64", "model.input_size=64", "data.size=64"]
    plain += ["model.hidden_size=null", "model.depth=null", "model.channel_mult=null"]
    plain += ["model.attn_resolutions=null", "model.dropout=null"]
    published = build_model(tiny(tmp_path, *plain).model, "meta")
    assert sum(p.numel() for p in published.parameters()) == 61_804_419
    assert published.config["dropout"] == 0.05


def test_dry_run(tmp_path: Path) -> None:
    (line,) = [line for line in rehearse(tiny(tmp_path / "run")) if "SongUNet-CIFAR10" in line]
    assert "48,275 parameters, an input 3 x 8 x 8, data_at_1" in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.mode=fused", "model.mode=fused is not for SongUNet-CIFAR10"),
        ("model.mode=graph", "model.mode=graph is not for SongUNet-CIFAR10"),
        ("model.attention=flash", "model.attention=flash is not for SongUNet-CIFAR10"),
        ("model.checkpointing=selective", "model.checkpointing=selective is not for"),
        ("model.z_dims=[8]", "model.z_dims has no meaning for SongUNet-CIFAR10"),
        ("model.num_heads=2", "model.num_heads has no meaning for SongUNet-CIFAR10"),
        ("model.hidden_size=[8,8]", "model.hidden_size must be a number"),
        ("train.label_dropout=0.1", "train.label_dropout = 0.1 has no meaning for SongUNet"),
        ("train.preview_cfg=2", "train.preview_cfg = 2.0 has no meaning for SongUNet"),
        ("model.dropout=1.5", "model.dropout"),
        ("model.input_size=9", "img_resolution must be a multiple of 2"),
    ],
)
def test_refusals(override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        check(tiny(tmp_path, override))


def test_fields_of_songunet_mean_nothing_elsewhere() -> None:
    with pytest.raises(ValueError, match="model.channel_mult has no meaning for SiT-S/4"):
        load_config("photos", ["model.channel_mult=[1,2]"])


def test_classes_of_the_data_matter_to_the_source_alone(tmp_path: Path) -> None:
    """The photographs have two classes, this model's section one."""
    Trainer(tiny(tmp_path / "data"), quiet=True).close()
    of_class = [*MIXED, "source.kappa=class"]
    with pytest.raises(ValueError, match="data has 2 classes, the model only 1"):
        Trainer(tiny(tmp_path / "class", *of_class), quiet=True)
