"""Runs that train adapters alone, beside a frozen network that their files do not hold."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixflow_fast.checkpoints.consolidate import consolidate
from mixflow_fast.checkpoints.ema_snapshots import reconstruct
from mixflow_fast.config.loading import from_dict
from mixflow_fast.config.schema import Config
from mixflow_fast.config.validate import validate
from mixflow_fast.diagnostics.verify_resume import verify_resume
from mixflow_fast.models import load_model
from mixflow_fast.models.text_to_image.lora import lora_state
from mixflow_fast.models.text_to_image.network import TextToImage
from mixflow_fast.training.build import build_model
from mixflow_fast.training.rehearsal import checkpoint_bytes, rehearse
from mixflow_fast.training.trainer import Trainer
from tests.support import captioned
from tests.support.captioned import model_and_cache
from tests.support.runs import assert_same_bits
from tests.support.text_to_image import numbers, sd3, text

BF16 = {"train.precision": "bf16"}
DDP = {"train.engine": "ddp", "train.zero_stage": 0}
ENGINES = {
    "ZeRO 0": {"train.zero_stage": 0},
    "ZeRO 1": {"train.zero_stage": 1},
    "ZeRO 2": {"train.zero_stage": 2},
    "ZeRO 3": {"train.zero_stage": 3},
    "ddp": DDP,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_and_cache(tmp_path_factory.mktemp("lora"))


def tiny(root: Path, out: Path, **overrides: object) -> Config:
    lora = {"lora.rank": 4, "lora.alpha": 8, "optim.lr": 1e-2}
    return captioned.tiny(root, out, **lora | overrides)


def trained(config: Config) -> Tensor:
    """A run to its end; the losses of its steps."""
    trainer = Trainer(config, quiet=True)
    losses: list[Tensor] = []
    trainer.on_step = lambda step, made, means: losses.append(means[0].clone())
    assert trainer.run().finished
    return torch.stack(losses)


def weights(out: Path, which: str = "ema") -> dict[str, Tensor]:
    return torch.load(out / "weights.pt", weights_only=True)[which]


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    trained(tiny(root, root / "run"))
    return root / "run"


def velocity(network: torch.nn.Module) -> Tensor:
    x, t = numbers(2, 16, 8, 6, seed=9), torch.tensor([0.3, 0.8])
    cond = text(2)
    with torch.no_grad():
        return network(x, cond["prompt_embeds"], cond["pooled_prompt_embeds"], 1000 * t).sample


def test_files_hold_adapters_alone(root: Path, run: Path) -> None:
    for which in ("model", "ema"):
        state = weights(run, which)
        assert len(state) == 2 * 31 and all(".lora_" in name for name in state)
    assert any(t.any() for n, t in weights(run, "model").items() if "lora_B" in n)
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert torch.load(checkpoint / "frozen.pt", weights_only=True) == {}
    # The network of 135 thousand numbers is in no file of the run, the adapters' 9 thousand are.
    sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
    total = sum(t.numel() for t in weights(run).values())
    assert all(size < 4 * 4 * total + 60_000 for size in sizes.values()), sizes


def test_a_run_is_the_network_of_its_folder_with_its_adapters(root: Path, run: Path) -> None:
    net = load_model(run)
    assert isinstance(net, TextToImage) and net.has_adapters
    file = weights(run)
    own = {f"transformer.{n.replace('_A', '_A.default').replace('_B', '_B.default')}": t
           for n, t in lora_state(net.transformer).items()}  # fmt: skip
    assert own.keys() == file.keys() and all(torch.equal(own[n], file[n]) for n in own)
    for name, parameter in sd3().named_parameters():
        there = dict(net.transformer.named_parameters())
        value = there.get(name, there.get(name.replace(".weight", ".base_layer.weight")))
        if value is None:
            value = there[name.replace(".bias", ".base_layer.bias")]
        assert torch.equal(value, parameter), name
    assert not torch.equal(velocity(net.transformer), velocity(sd3()))


@pytest.fixture(scope="module")
def plain_losses(root: Path) -> Tensor:
    return trained(tiny(root, root / "plain"))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_trains_the_same(
    engine: str, root: Path, run: Path, plain_losses: Tensor, tmp_path: Path
) -> None:
    """The losses of three steps, whose weights move, and the adapters after them."""
    settings = ENGINES[engine] | {"model.checkpointing": "full"}
    losses = trained(tiny(root, tmp_path / "run", **settings))
    torch.testing.assert_close(losses, plain_losses, rtol=2e-6, atol=0)
    ours, theirs = weights(tmp_path / "run", "model"), weights(run, "model")
    assert ours.keys() == theirs.keys()
    # Three steps of Adam go 3e-2 whatever the size of a gradient, so rounding of small ones shows.
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-4)
    # Put together of the shards alone.
    consolidate(tmp_path / "run", tmp_path / "one.pt")
    again = torch.load(tmp_path / "one.pt", weights_only=True)
    assert all(torch.equal(again["ema"][n], t) for n, t in weights(tmp_path / "run").items())


@pytest.mark.parametrize("engine", ["ZeRO 3", "ddp"])
def test_bf16_has_float32_masters(engine: str, root: Path, plain_losses: Tensor) -> None:
    """The base is bf16 in memory; steps of 1e-2 of the masters survive, and more digits."""
    out = root / f"bf16 {engine}"
    trainer = Trainer(tiny(root, out, **ENGINES[engine], **BF16), quiet=True)
    frozen = [p for p in trainer.engine.module.parameters() if not p.requires_grad]
    assert frozen and all(p.dtype == torch.bfloat16 for p in frozen)
    losses: list[Tensor] = []
    trainer.on_step = lambda step, made, means: losses.append(means[0].clone())
    trainer.run()
    torch.testing.assert_close(torch.stack(losses), plain_losses, rtol=1e-2, atol=0)
    state = weights(out, "model")
    assert all(t.dtype == torch.float32 for t in state.values())
    assert any(not torch.equal(t, t.bfloat16().float()) for n, t in state.items() if "_A" in n)


def test_three_steps_are_those_of_peft_and_adamw(root: Path, run: Path, tmp_path: Path) -> None:
    """By hand: peft in diffusers' class and PyTorch's AdamW, on what the run's steps saw."""
    trainer = Trainer(tiny(root, tmp_path / "run"), quiet=True)
    seen: list[object] = []
    trainer.on_step = lambda step, made, means: seen.append((made[0].it, means[0].clone()))
    conditions: list[dict[str, Tensor]] = []
    trainer.engine.module.register_forward_pre_hook(lambda _, args: conditions.append(args[2]))
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".lora_" in n}
    trainer.run()

    import peft

    net = sd3()
    eight = [f"attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj",
                                   "add_v_proj", "to_add_out")]  # fmt: skip
    eight += [f"attn2.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")]
    net.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=eight))
    own = {f"transformer.{n}": p for n, p in net.named_parameters() if p.requires_grad}
    assert own.keys() == start.keys()
    for name, parameter in own.items():
        parameter.data.copy_(start[name])
    optimizer = torch.optim.AdamW(own.values(), lr=1e-2, weight_decay=0.0)
    for (it, loss), half in zip(seen, conditions, strict=True):
        cond = {name: tensor.float() for name, tensor in half.items()}
        made = net(it.x, cond["prompt_embeds"], cond["pooled_prompt_embeds"], 1000 * it.t).sample
        expected = trainer.mix.loss(made, it)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
    for name, tensor in weights(tmp_path / "run", "model").items():
        torch.testing.assert_close(tensor, own[name].detach(), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("engine", ["ZeRO 3", "ddp"])
def test_a_run_goes_on_to_the_bit(engine: str, root: Path, tmp_path: Path) -> None:
    """With the base from its folder, in one process; `verify_resume` below is with several."""
    settings = ENGINES[engine] | BF16 | {"train.keep_last": 1}
    trained(tiny(root, tmp_path / "whole", **settings))
    for images in (4, 12):
        trained(tiny(root, tmp_path / "parts", **settings, **{"train.images": images}))
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("engine", ["ZeRO 2", "ZeRO 3", "ddp"])
def test_verify_resume(engine: str, ranks: int, root: Path, tmp_path: Path) -> None:
    """Fresh processes; 2,000 pieces of state and of what the steps saw, 0 of them differ."""
    config = tiny(root, tmp_path / "unused", **ENGINES[engine], **BF16)
    rows = verify_resume(config, tmp_path / "runs", steps=4, ranks=ranks)
    assert rows and sum(row.numbers for row in rows) > 2000
    assert all(row.differing == 0 for row in rows), rows


@pytest.mark.long
@pytest.mark.parametrize("engines", [("ZeRO 3", "ddp"), ("ddp", "ZeRO 3"), ("ZeRO 2", "ZeRO 3")])
def test_a_run_changes_its_engine(
    engines: tuple[str, str], root: Path, run: Path, tmp_path: Path
) -> None:
    for engine, images in zip(engines, (8, 12), strict=True):
        trained(tiny(root, tmp_path / "run", **ENGINES[engine], **{"train.images": images}))
    ours, theirs = weights(tmp_path / "run", "model"), weights(run, "model")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-4)


def another(root: Path, folder: Path, cut: bool = False) -> Path:
    """The model's folder once more, with one number changed, or only stored otherwise."""
    shutil.copytree(root / "model", folder / "model")
    (folder / "cache").symlink_to(root / "cache")
    transformer = folder / "model" / "transformer"
    file = transformer / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    if not cut:
        state["proj_out.bias"][0] += 1
        save_file(state, file, {"format": "pt"})
        return folder
    file.unlink()
    sd3().save_pretrained(transformer, max_shard_size="200KB")
    assert len(list(transformer.glob("*.safetensors"))) > 2
    return folder


def test_another_base_is_refused_and_the_same_one_elsewhere_is_not(
    root: Path, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    more = {"train.images": 16}
    with pytest.raises(ValueError, match="beside another network .* model.folder .* export RUN"):
        Trainer(tiny(another(root, tmp_path / "other"), tmp_path / "run", **more), quiet=True)
    with pytest.raises(ValueError, match="another network .* than the one that the adapters were"):
        load_model(run, base=tmp_path / "other" / "model")
    again = another(root, tmp_path / "again", cut=True)
    trained(tiny(again, tmp_path / "run", **more))
    state = load_model(run, base=again / "model").state_dict()
    assert all(torch.equal(state[n], t) for n, t in load_model(run).state_dict().items())


def test_a_base_that_is_gone_is_named(root: Path, run: Path, tmp_path: Path) -> None:
    moved = another(root, tmp_path / "moved", cut=True)
    trained(tiny(moved, tmp_path / "run", **{"train.images": 4}))
    shutil.rmtree(moved / "model")
    with pytest.raises(ValueError, match="moved/model, is not there: put it back, or give it to"):
        load_model(tmp_path / "run")
    assert isinstance(load_model(tmp_path / "run", base=root / "model"), TextToImage)


def test_a_run_starts_from_adapters(root: Path, run: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny(root, tmp_path / "next", **{"train.init": str(run)}), quiet=True)
    own, file = dict(trainer.model.named_parameters()), weights(run)
    assert all(torch.equal(own[name].detach(), file[name]) for name in file)
    trainer.close()
    for settings, match in (
        ({"lora.rank": 8}, r"other adapters \(lora.rank=4, now 8\).*export RUN --to diffusers"),
        ({"lora.alpha": 4}, r"other adapters \(lora.alpha=8.0, now 4.0\)"),
        ({"lora.rank": 0, "lora.alpha": None}, r"adapters \(lora.rank=4\), and lora.rank is 0"),
    ):
        config = tiny(root, tmp_path / "bad", **{"train.init": str(run)}, **settings)
        with pytest.raises(ValueError, match=match):
            Trainer(config, quiet=True)
    whole = {"lora.rank": 0, "lora.alpha": None}
    trained(tiny(root, tmp_path / "whole", **whole, **{"train.images": 4}))
    config = tiny(root, tmp_path / "bad", **{"train.init": str(tmp_path / "whole")})
    with pytest.raises(ValueError, match="a run that trained the whole network"):
        Trainer(config, quiet=True)


@pytest.mark.parametrize(
    "engine", [*(pytest.param(e, marks=pytest.mark.long) for e in ("ZeRO 2", "ZeRO 3")), "ddp"]
)
def test_looking_at_a_run_does_not_change_it(engine: str, root: Path, tmp_path: Path) -> None:
    """Validation, and snapshots of other averages; the base is there twice with ZeRO 3 alone."""
    looks = {"train.validate_every": 2, "train.validate_examples": 4, "optim.snapshot_every": 3}
    settings = {"optim.ema_sigma_rel": (0.1,), **BF16, **ENGINES[engine]}
    trained(tiny(root, tmp_path / "plain", **settings))
    trainer = Trainer(tiny(root, tmp_path / "watched", **settings, **looks), quiet=True)
    own = {name: p.data_ptr() for name, p in trainer.engine.module.named_parameters()}
    shared = {n for n, p in trainer.watched.net.named_parameters() if p.data_ptr() == own[n]}
    every = {name for name in own if ".lora_" not in name}
    assert shared == (every if engine != "ZeRO 3" else set())
    trainer.run()
    assert_same_bits(tmp_path / "plain", tmp_path / "watched")
    reconstruct(tmp_path / "watched", 0.1, tmp_path / "average.pt")
    assert isinstance(load_model(tmp_path / "average.pt"), TextToImage)


def test_dry_run(root: Path, run: Path, tmp_path: Path) -> None:
    """Sizes are of the adapters, memory of what is trained and of what is not."""
    config = tiny(root, tmp_path / "run")
    lines = rehearse(config)
    trained = sum(t.numel() for t in weights(run).values())
    (model,) = [line for line in lines if line.startswith("model: ")]
    assert f"{134_656 + trained:,} parameters, {trained:,} of them in adapters" in model
    assert not (tmp_path / "run").exists()
    (checkpoint,) = (run / "checkpoints").iterdir()
    written = sum(file.stat().st_size for file in checkpoint.iterdir())
    planned = checkpoint_bytes(build_model(config.model, "meta", config.lora), config.train,
                               config.optim)  # fmt: skip
    assert 0 < written - planned < 200_000


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lora.rank": 0}, "lora.alpha has no meaning for lora.rank=0"),
        ({"lora.alpha": 0}, "lora.alpha must be > 0"),
        ({"lora.rank": -1}, "lora.rank must be >= 0"),
        ({"lora.targets": ("attn.to_qq",)}, "did you mean 'attn.to_q'"),
    ],
)
def test_settings_that_do_not_fit(
    settings: dict[str, object], match: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=match):
        Trainer(tiny(root, tmp_path / "run", **settings), quiet=True)


def test_other_networks_have_no_adapters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora.rank = 4 has no meaning for SiT-S/8"):
        validate(from_dict({"model": {"name": "SiT-S/8"}, "lora": {"rank": 4}}))
