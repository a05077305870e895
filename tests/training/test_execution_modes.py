"""Training in the modes eager, compile and fused, of SiT and of DiT-DH."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mixflow_fast.checkpoints import manifest
from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.models import DiTDH, load_model, load_weights
from mixflow_fast.training.build import build_model
from mixflow_fast.training.trainer import Trainer, train
from tests.support.compiling import compiler
from tests.support.runs import assert_same_bits, tiny

DITDH = [
    "model.name=DiTDH-S",
    "model.learn_sigma=null",
    "model.depth=[1, 1]",
    "model.hidden_size=[32, 48]",
    "model.num_heads=[2, 2]",
    "model.input_size=8",
    "data.size=8",
]


@pytest.fixture(autouse=True)
def quick_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without its C++ compiler: seconds instead of a minute."""
    monkeypatch.setattr(torch, "compile", compiler("aot_eager"))


def configured(out: Path, network: list[str], *overrides: str) -> Config:
    return tiny(out, *network, "train.images=32", *overrides)


@pytest.mark.parametrize("network", [[], DITDH], ids=["SiT", "DiT-DH"])
@pytest.mark.parametrize("precision", [("fp32", 1), ("bf16", 2)], ids=str)
def test_every_mode_trains_alike(
    tmp_path: Path, network: list[str], precision: tuple[str, int]
) -> None:
    how = [f"train.precision={precision[0]}", f"train.zero_stage={precision[1]}"]
    losses = {}
    for mode in ("eager", "compile", "fused"):
        config = configured(tmp_path / mode, network, *how, f"model.mode={mode}")
        train(config, quiet=True)
        losses[mode] = [row["loss"] for row in read_metrics(tmp_path / mode / "metrics.jsonl")]
        assert len(losses[mode]) == 4
    tolerance = {"fp32": 1e-5, "bf16": 2e-2}[precision[0]]
    assert losses["compile"] == pytest.approx(losses["eager"], rel=tolerance)
    assert losses["fused"] == pytest.approx(losses["eager"], rel=tolerance)
    loaded = load_model(tmp_path / "fused" / "weights.pt")
    assert isinstance(loaded, DiTDH) == bool(network)


def test_fused_resume_keeps_bits_and_backend(tmp_path: Path) -> None:
    """2 + 2 steps are 4; the attention that the first part chose is taken again."""
    options = [*DITDH, "model.mode=fused", "model.checkpointing=selective", "train.keep_last=1"]
    train(configured(tmp_path / "whole", options), quiet=True)
    out = tmp_path / "parts"
    train(configured(out, [*options, "train.images=16"]), quiet=True)
    (folder,) = (out / "checkpoints").glob("step_*")
    state = json.loads((folder / "state.json").read_text())
    assert state["attention"] == ["flash", "flash"]
    resumed = Trainer(configured(out, options), quiet=True)
    assert [choice.backend for choice in resumed.attention] == ["flash", "flash"]
    resumed.run()
    assert_same_bits(tmp_path / "whole", out)


def test_the_recorded_backend_wins_over_the_fastest(tmp_path: Path) -> None:
    train(configured(tmp_path, ["model.mode=fused", "train.images=16"]), quiet=True)
    (folder,) = (tmp_path / "checkpoints").glob("step_*")

    def record(name: str) -> None:
        file = folder / "state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"attention": [name]}))
        files = [path for path in folder.rglob("*") if path.is_file()]
        names = [str(path.relative_to(folder)) for path in files]
        entries = {n: manifest.entry(folder / n) for n in names if n != "manifest.json"}
        manifest.write(folder, entries)

    record("math")
    resumed = Trainer(configured(tmp_path, ["model.mode=fused"]), quiet=True)
    assert [choice.backend for choice in resumed.attention] == ["math"]
    assert "attention math (ok" in resumed.describe_network()
    resumed.close()
    # What this machine does not have gives way, and the run says so.
    record("flash3")
    elsewhere = Trainer(configured(tmp_path, ["model.mode=fused"]), quiet=True)
    assert [choice.backend for choice in elsewhere.attention] == ["flash"]
    assert "not flash3 as before, which does not pass here" in elsewhere.describe_network()
    elsewhere.close()
    named = ["model.mode=fused", "model.attention=flash"]
    assert Trainer(configured(tmp_path, named), quiet=True).attention[0].backend == "flash"


def test_frozen_tensors_of_ditdh_keep_their_digits_under_bf16(tmp_path: Path) -> None:
    """Frequencies, positions and angles are neither rounded nor trained."""
    config = configured(
        tmp_path, DITDH, "train.precision=bf16", "train.zero_stage=2", "model.mode=fused"
    )
    trainer = Trainer(config, quiet=True)
    before = build_model(config.model).state_dict()
    assert trainer.engine.initial.keys() < before.keys()
    assert trainer.model.t_embedder.W.dtype == torch.float32
    trainer.run()
    for key in ("model", "ema"):
        after = load_weights(tmp_path / "weights.pt", key)
        assert list(after) == list(before)
        for name in ("pos_embed", "t_embedder.W", "dec_feat_rope.freqs_sin"):
            assert torch.equal(after[name], before[name])
        assert not torch.equal(
            after["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"]
        )


def test_the_mode_may_change_between_parts_of_a_run(tmp_path: Path) -> None:
    train(configured(tmp_path, ["model.mode=eager", "train.images=16"]), quiet=True)
    result = train(configured(tmp_path, ["model.mode=fused"]), quiet=True)
    assert result.finished and result.step == 4


def test_auto_is_eager_on_a_cpu(tmp_path: Path) -> None:
    trainer = Trainer(load_config("photos", [f"out={tmp_path}"]), quiet=True)
    assert trainer.model.execution.mode == "eager" and trainer.attention == []


def test_what_is_compiled_at_once_is_a_setting(tmp_path: Path) -> None:
    """It may change on a resume, is said, and is refused where nothing is compiled."""
    own, whole = ["train.zero_stage=0"], "model.compile_unit=all_blocks"
    with pytest.raises(ValueError, match="got eager, which auto is here: set model.mode"):
        Trainer(configured(tmp_path / "run", [], *own, whole), quiet=True)
    train(configured(tmp_path / "run", [], *own, "train.images=16"), quiet=True)
    more = [*own, whole, "model.mode=compile", "model.depth=2"]
    with pytest.raises(ValueError, match="model.depth: 1 -> 2"):
        Trainer(configured(tmp_path / "run", [], *more), quiet=True)
    trainer = Trainer(configured(tmp_path / "run", [], *more[:-1]), quiet=True)
    assert trainer.step == 2
    assert trainer.describe_network().startswith("mode compile, all blocks compiled at once")
    trainer.run()
