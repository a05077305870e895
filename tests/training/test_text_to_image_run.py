"""A run of a text-to-image network: the same engine, loop and files as for others."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mixflow_fast.checkpoints.consolidate import consolidate
from mixflow_fast.checkpoints.ema_snapshots import reconstruct
from mixflow_fast.data.bucket_order import BucketOrder
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.interpolate import sample_moments
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.models import load_model
from mixflow_fast.models.text_to_image.network import TextToImage
from mixflow_fast.objective.mixflow import MixFlow
from mixflow_fast.training.nonfinite_guard import TrainingDiverged
from mixflow_fast.training.rehearsal import rehearse
from mixflow_fast.training.step_record import StepOutput
from mixflow_fast.training.trainer import Trainer
from tests.support.caches import write_cache
from tests.support.captioned import model_and_cache, model_folder, tiny
from tests.support.runs import assert_same_bits
from tests.support.text_to_image import sd3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_and_cache(tmp_path_factory.mktemp("root"))


def trained(config: object) -> tuple[Trainer, list[Tensor], list[StepOutput]]:
    """A run to its end, the losses of its steps, and all that its steps made."""
    trainer = Trainer(config, quiet=True)
    losses: list[Tensor] = []
    outputs: list[StepOutput] = []

    def note(step: int, made: list[StepOutput], means: Tensor) -> None:
        losses.append(means[0].clone())
        outputs.extend(made)

    trainer.on_step = note
    assert trainer.run().finished
    return trainer, losses, outputs


def test_three_steps_are_those_of_a_loop_by_hand(root: Path, tmp_path: Path) -> None:
    """diffusers' class, PyTorch's AdamW, and the draws that MixFlow makes for these positions."""
    trainer, losses, outputs = trained(tiny(root, tmp_path / "run"))
    assert {made.it.x.shape[2:] for made in outputs} == {(8, 8), (8, 12)}  # both buckets
    net = sd3().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0)
    mix = MixFlow(gamma=0.8, clock="noise_at_1", shift=3.0, seed=0)
    ema = {n: p.detach().clone() for n, p in net.named_parameters()}
    order = BucketOrder(trainer.dataset.bucket_sizes, seed=0, global_batch_size=4)
    for step in range(3):
        positions = torch.arange(4 * step, 4 * step + 4)
        assert torch.equal(outputs[step].it.ids, positions)
        batch = trainer.dataset.get(order(positions), positions, 0)
        it = mix.prepare(batch.x, ids=positions, dtype=torch.float32)
        cond = batch.cond
        text = torch.zeros(4, 12, 32)
        text[:, :5, :8], text[:, :5, 8:20], text[:, 5:] = cond["clip_l"], cond["clip_g"], cond["t5"]
        pooled = torch.cat([cond["pooled_l"], cond["pooled_g"]], 1).float()
        loss = mix.loss(net(it.x, text, pooled, 1000 * it.t).sample, it)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(losses[step], loss.detach(), rtol=1e-6, atol=0)
        for name, parameter in net.named_parameters():
            ema[name].lerp_(parameter.detach(), 1 - 0.9999)
    file = torch.load(tmp_path / "run" / "weights.pt", weights_only=True)
    for name, parameter in net.named_parameters():
        own = file["model"][f"transformer.{name}"]
        torch.testing.assert_close(own, parameter.detach(), rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(file["ema"][f"transformer.{name}"], ema[name])


@pytest.mark.parametrize("settings", [{}, {"train.engine": "ddp", "train.zero_stage": 0}])
def test_the_label_reaches_the_sinusoid_in_float32(
    settings: dict[str, object], root: Path, tmp_path: Path
) -> None:
    """1000 s of float32, under bfloat16 weights: its digits are noise levels."""
    trainer = Trainer(tiny(root, tmp_path / "run", **settings, **BF16), quiet=True)
    seen: list[Tensor] = []
    outputs: list[StepOutput] = []
    module = trainer.engine.module
    assert module.product_dtype == torch.bfloat16
    module.transformer.time_text_embed.time_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].clone())
    )
    trainer.on_step = lambda step, made, means: outputs.extend(made)
    trainer.run()
    assert len(seen) == len(outputs) == 3
    for label, made in zip(seen, outputs, strict=True):
        assert label.dtype == torch.float32 and torch.equal(label, 1000 * made.it.t)
        assert not torch.equal(label, label.bfloat16().float())
        assert made.pred.dtype == torch.bfloat16


BF16 = {"train.precision": "bf16"}
WAYS = {
    "ZeRO 0": {"train.zero_stage": 0},
    "ZeRO 1": {"train.zero_stage": 1},
    "ZeRO 3": {"train.zero_stage": 3},
    "ZeRO 3, checkpointing": {"train.zero_stage": 3, "model.checkpointing": "full"},
    "checkpointing": {"model.checkpointing": "full"},
    "ddp": {"train.engine": "ddp", "train.zero_stage": 0},
    "micro-batches": {"train.microbatch_size": 1},
}


# DeepSpeed trains no bf16 without ZeRO.
IN_BF16 = ("ZeRO 1", "ZeRO 3, checkpointing", "ddp")


@pytest.fixture(scope="module")
def plain_losses(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return torch.stack(trained(tiny(root, tmp_path_factory.mktemp("run") / "plain"))[1])


@pytest.mark.parametrize("way", WAYS)
def test_every_engine_computes_the_same(
    way: str, root: Path, plain_losses: Tensor, tmp_path: Path
) -> None:
    """The losses of three steps; the second and third are of weights that moved."""
    losses = torch.stack(trained(tiny(root, tmp_path / "run", **WAYS[way]))[1])
    torch.testing.assert_close(losses, plain_losses, rtol=2e-6, atol=0)
    if way in IN_BF16:
        losses = torch.stack(trained(tiny(root, tmp_path / "bf16", **WAYS[way] | BF16))[1])
        torch.testing.assert_close(losses, plain_losses, rtol=1e-2, atol=0)


def test_files_of_a_run_say_the_network_and_start_others(root: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    trained(tiny(root, first))
    net = load_model(first)
    assert isinstance(net, TextToImage) and not net.training and net.clock == "noise_at_1"
    assert net.config["class"] == "SD3Transformer2DModel" and net.adapter.latents.shift == 0.0609
    file = torch.load(first / "weights.pt", weights_only=True)
    state = net.state_dict()
    assert state.keys() == file["ema"].keys() == file["model"].keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in file["ema"].items())

    # A run that starts from it reads no weights of the folder, which has none any more.
    bare = tmp_path / "bare"
    (bare / "transformer").mkdir(parents=True)
    (bare / "vae").mkdir()
    for name in ("transformer/config.json", "vae/config.json"):
        (bare / name).write_text((root / "model" / name).read_text())
    moved = {"model.folder": str(bare)}
    init = {"train.init": str(first)}
    second = Trainer(tiny(root, tmp_path / "second", **moved, **init), quiet=True)
    own = dict(second.model.named_parameters())
    assert all(torch.equal(own[name].detach(), file["ema"][name]) for name in own)
    second.close()
    with pytest.raises(ValueError, match="holds no diffusion_pytorch_model.safetensors"):
        Trainer(tiny(root, tmp_path / "third", **moved), quiet=True)
    # So does one that goes on.
    went_on = Trainer(tiny(root, first, **moved, **{"train.images": 16}), quiet=True)
    assert went_on.step == 3 and went_on.run().finished


def test_a_checkpoint_of_another_network_is_named(root: Path, tmp_path: Path) -> None:
    trained(tiny(root, tmp_path / "run"))
    large = model_folder(tmp_path / "large", large=True)
    with pytest.raises(ValueError, match=r"dual_attention_layers=\[0, 1\] instead of \[\]"):
        init = {"train.init": str(tmp_path / "run")}
        Trainer(tiny(root, tmp_path / "other", **{"model.folder": str(large)}, **init))


def test_dry_run(root: Path, tmp_path: Path) -> None:
    lines = rehearse(tiny(root, tmp_path / "run"))
    (model,) = [line for line in lines if line.startswith("model: ")]
    assert "SD3Transformer2DModel of" in model and "134,656 parameters, noise_at_1" in model
    assert "0.00948 GFLOPs an image and training step" in model
    assert f"start: the weights in {root / 'model'}" in lines
    (memory,) = [line for line in lines if line.startswith("    activations: ")]
    assert "for 4 latents of" in memory
    assert not (tmp_path / "run").exists()


def test_another_network_does_not_go_on(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trained(tiny(root, out))
    large = model_folder(tmp_path / "large", large=True)
    with pytest.raises(ValueError, match="another SD3Transformer2DModel than that in model.folder"):
        changes = {"train.images": 16, "model.folder": str(large)}
        Trainer(tiny(root, out, **changes), quiet=True)


def test_looking_at_a_run_does_not_change_it(root: Path, tmp_path: Path) -> None:
    """Validation, EMA snapshots, and what is put together of shards alone."""
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    looks = {"train.validate_every": 1, "train.validate_examples": 6}
    widths = {"optim.ema_sigma_rel": (0.1,), "optim.snapshot_every": 1}
    for out, more in ((plain, {}), (watched, looks)):
        trained(tiny(root, out, **{"cond.drop_each": ("t5:0.3",)}, **widths, **BF16, **more))
    assert_same_bits(plain, watched)
    row = read_metrics(watched / "metrics.jsonl", "validation")[-1]
    assert row["step"] == 3 and row["examples"] == 6
    for which in ("ema", "model"):
        losses = row[which]["loss_by_t"]
        assert len(losses) == 16 and all(math.isfinite(loss) and loss > 0 for loss in losses)

    consolidate(watched, tmp_path / "one.pt")
    reconstruct(watched, 0.1, tmp_path / "average.pt")
    own = torch.load(watched / "weights.pt", weights_only=True)
    again = torch.load(tmp_path / "one.pt", weights_only=True)
    for key in ("model", "ema"):
        assert all(torch.equal(again[key][name], own[key][name]) for name in own[key])
    assert isinstance(load_model(tmp_path / "average.pt"), TextToImage)
    # The table of positions is a buffer: training in bf16 rounds it, files keep its digits.
    table = own["ema"]["transformer.pos_embed.pos_embed"]
    assert torch.equal(table, sd3().pos_embed.pos_embed)
    assert not torch.equal(table, table.bfloat16().float())


def test_validation_is_the_loss_of_the_fixed_draws(root: Path, tmp_path: Path) -> None:
    """The velocity loss at one label, once more by hand; no encoder is dropped there."""
    drops = {"cond.drop": 0.9, "cond.drop_each": ("clip_l:0.5", "clip_g:0.5", "t5:0.5")}
    validates = {
        "train.validate_every": 1,
        "train.validate_examples": 4,
        "data.buckets": ("64x64",),
    }
    trainer = Trainer(tiny(root, tmp_path / "run", **drops, **validates), quiet=True)
    try:
        trainer.watched.take(trainer.engine, "model", 0)
        # In the engine's own clock, where 1 is the data: label 0.25 is a noise level of 0.75.
        (found,) = trainer._validation.at(trainer.watched.net, [(0.25, 0.25)])
        # Four of one bucket; of the other the shapes differ and the draws do not.
        positions = torch.arange(4)
        batch = trainer._validation._chunks[0]
        assert batch.cond["t5"].flatten(1).any(1).all()
        x1 = sample_moments(batch.x, 0, positions)
        noise = philox.normal(0, Stream.VALIDATION_NOISE, positions, x1[0].numel()).view(x1.shape)
        cond = trainer.conditions.layout.assemble(batch.cond)
        with torch.no_grad():
            velocity = sd3()(
                0.25 * x1 + 0.75 * noise,
                cond["prompt_embeds"].float(),
                cond["pooled_prompt_embeds"].float(),
                torch.full((4,), 750.0),
            ).sample
        expected = (velocity - (noise - x1)).square().mean()
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=0)
    finally:
        trainer.close()


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_that_is_not_finite_names_its_samples(
    stage: int, root: Path, tmp_path: Path
) -> None:
    cache = write_cache(tmp_path / "cache")
    # Row 6 is the caption of image 5, in the second file of six rows.
    stored = np.load(cache / "prompts/shards/00001/t5.npy", mmap_mode="r+")
    stored[0, 3, 7] = 0x7FC0  # a NaN of bfloat16
    stored.flush()
    settings = {"train.images": 16, "train.zero_stage": stage, "cond.drop": 0.0}
    with pytest.raises(TrainingDiverged, match="sample 5 of the data at position .* 1 of its num"):
        Trainer(
            tiny(tmp_path, tmp_path / "run", **settings, **{"model.folder": str(root / "model")}),
            quiet=True,
        ).run()


def test_an_input_that_the_network_makes_itself(root: Path, tmp_path: Path) -> None:
    """Scheduled sampling runs the network twice in a step, with the same prompts."""
    rolled = {"objective.rollout_steps": 4, "objective.gamma": 0.0}
    _, losses, _ = trained(tiny(root, tmp_path / "run", **rolled))
    assert all(torch.isfinite(loss) for loss in losses)


def test_a_run_that_was_stopped_goes_on_to_the_bit(root: Path, tmp_path: Path) -> None:
    """Both buckets, dropped prompts, bf16; on more ranks and engines it takes minutes."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    drops = {"cond.drop": 0.3, "cond.drop_each": ("t5:0.3",)}
    trained(tiny(root, whole, **drops, **BF16))
    trainer = Trainer(tiny(root, cut, **drops, **BF16), quiet=True)
    trainer.on_step = lambda *_: signal.raise_signal(signal.SIGTERM)
    assert trainer.run().step == 1
    trained(tiny(root, cut, **drops, **BF16, **{"train.keep_last": 1}))
    assert_same_bits(whole, cut)
