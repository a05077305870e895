"""DeepSpeed around a network: what is read from a checkpoint, and how."""

import ast
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixflow_fast.checkpoints import manifest
from mixflow_fast.checkpoints.run_folder import newest_checkpoint
from mixflow_fast.checkpoints.shards import full_states, layout_file
from mixflow_fast.config.schema import Config
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.training import engine
from mixflow_fast.training.build import build_model
from mixflow_fast.training.engine import DeepSpeedEngine, deepspeed_state
from mixflow_fast.training.trainer import Trainer, train
from tests.support.launchers import environment
from tests.support.runs import ODD, ROOT, assert_same_bits, assert_same_states, settings, tiny


class Harmful:
    """Runs code when an ordinary unpickler meets it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.target),))


def plant(shard: Path, target: Path) -> None:
    """Put what runs code into a file of a checkpoint, and let the manifest agree."""
    content = torch.load(shard, weights_only=False)  # this run's own
    torch.save(content | {"extra": Harmful(target)}, shard)
    rewrite_manifest(shard.parent)


def rewrite_manifest(folder: Path) -> None:
    files = {p.name: manifest.entry(p) for p in folder.iterdir() if p.name != manifest.NAME}
    manifest.write(folder, files)


SHARDS = [("bf16", 2, "mp_rank_00_model_states.pt"), ("bf16", 2, "*_optim_states.pt")]
SHARDS += [("fp32", 0, "mp_rank_00_model_states.pt"), ("fp32", 3, "*_optim_states.pt")]


@pytest.mark.parametrize(("precision", "stage", "name"), SHARDS)
def test_resuming_executes_nothing_of_a_checkpoint(
    tmp_path: Path, precision: str, stage: int, name: str
) -> None:
    out, target = tmp_path / "run", tmp_path / "ran"
    train(tiny(out, *settings(precision, stage), "train.images=8"), quiet=True)
    (shard,) = newest_checkpoint(out).glob(name)
    plant(shard, target)
    with pytest.raises(ValueError, match=rf"{shard.name} cannot be read \(it holds .*mkdir"):
        train(tiny(out, *settings(precision, stage), "train.images=16"), quiet=True)
    assert not target.exists()
    torch.load(shard, weights_only=False)
    assert target.exists()  # it would have


def test_going_back_executes_nothing_of_a_checkpoint(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    trainer = Trainer(tiny(tmp_path / "run", *settings("bf16", 2), "train.images=8"), quiet=True)
    folder = trainer.run().out / "checkpoints" / "step_00000001"
    sound = shutil.copytree(folder, tmp_path / "step_00000001")
    (shard,) = folder.glob("*_optim_states.pt")
    plant(shard, target)
    with pytest.raises(ValueError, match=f"{shard.name} cannot be read"):
        trainer.engine.load(folder)
    assert not target.exists()
    assert trainer.engine.load(sound)


def odd(out: Path, precision: str, stage: int, *overrides: str) -> Config:
    return tiny(out, *ODD, *settings(precision, stage), *overrides)


def addresses(trainer: Trainer) -> set[int]:
    """What is left of the addresses of the trained parameters, divided by 16."""
    parameters = trainer.engine.module.parameters()
    return {p.data_ptr() % 16 for p in parameters if p.requires_grad}


@pytest.mark.parametrize(("precision", "stage"), [("bf16", 2), ("fp32", 1), ("fp32", 2)])
def test_parameters_stand_at_multiples_of_16_bytes(
    tmp_path: Path, precision: str, stage: int
) -> None:
    """Before and after steps, and after a resume; consolidation does not see the gaps."""
    trainer = Trainer(odd(tmp_path, precision, stage, "train.images=16"), quiet=True)
    assert any(math.prod(shape) % 8 for shape in trainer.engine.shapes.values())
    assert addresses(trainer) == {0}
    weights = torch.load(trainer.run().weights, weights_only=True)
    assert addresses(trainer) == {0}
    whole = full_states(newest_checkpoint(tmp_path))
    for name, values in whole.items():
        assert torch.equal(values["weight"], weights["model"][name])
        assert torch.equal(values.get("ema", values["weight"]), weights["ema"][name])
    resumed = Trainer(odd(tmp_path, precision, stage, "train.images=24"), quiet=True)
    assert addresses(resumed) == {0}
    resumed.close()


def test_a_checkpoint_of_packed_parameters_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an earlier release wrote it: state to the bit, then steps that agree to rounding."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "alignment", lambda stage, precision: 1)
        trainer = Trainer(odd(out, "bf16", 2, "train.images=16"), quiet=True)
        assert addresses(trainer) != {0}
        trainer.run()
    folder = newest_checkpoint(out)
    layout = torch.load(layout_file(folder, 0), weights_only=True)
    assert layout.pop("alignment") == 1
    torch.save(layout, layout_file(folder, 0))
    rewrite_manifest(folder)
    before = full_states(shutil.copytree(folder, tmp_path / "before"))
    trainer = Trainer(odd(out, "bf16", 2, "train.images=32"))
    assert addresses(trainer) == {0}
    assert not trainer.engine.load(folder)  # DeepSpeed could not
    taken_up = trainer.save()
    assert_same_states(before, full_states(taken_up))
    assert trainer.engine.load(taken_up)
    assert_same_states(before, full_states(trainer.save()))
    trainer.run()
    said = capsys.readouterr().err
    assert "1 rank, ZeRO 2, of a release that did not align parameters in memory: " in said
    train(odd(tmp_path / "whole", "bf16", 2, "train.images=32"), quiet=True)
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (out, tmp_path / "whole")]
    losses = [[row["loss"] for row in run if "loss" in row] for run in rows]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_nothing_of_the_memory_before_is_left_in_a_resumed_run(tmp_path: Path) -> None:
    """A resumed network is not made with random weights first: all of it comes from the files."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(odd(whole, "bf16", 2, "train.images=32", "train.keep_last=1"), quiet=True)
    train(odd(parts, "bf16", 2, "train.images=16", "train.keep_last=1"), quiet=True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory without values is NaN then
    try:
        trainer = Trainer(odd(parts, "bf16", 2, "train.images=32", "train.keep_last=1"), quiet=True)
    finally:
        torch.use_deterministic_algorithms(False)
    trainer.run()
    assert_same_bits(whole, parts)


@pytest.mark.long
def test_host_memory_of_a_start(tmp_path: Path) -> None:
    """In multiples of the float32 network: one, and what DeepSpeed would have on the GPU."""
    sizes = ["model.depth=6", "model.hidden_size=768", "model.num_heads=12"]  # 66 M parameters
    found = {}
    for mode in ("make", "fresh", "resume"):
        command = [sys.executable, "-m", "tests.support.start_memory", str(tmp_path), mode, *sizes]
        result = subprocess.run(
            command, env=environment(), cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-3000:]
        found[mode] = json.loads(result.stdout or "{}")
    # A further copy of the network anywhere would add 1, one in bf16 0.5.
    most = {"fresh": (1.7, 4.9, 2.6), "resume": (0.8, 7.1, 5.6)}
    for mode, limits in most.items():
        for name, limit in zip(("before", "peak", "steady"), limits, strict=True):
            assert found[mode][name] < limit, (mode, found)


class Sums(TorchDispatchMode):
    """Counts the sums over ranks."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def test_one_rank_without_zero_sums_nothing(tmp_path: Path) -> None:
    """DeepSpeed would copy all gradients, add up one rank's and copy them back: the same bits."""
    weights, counts = [], []
    for way in ("ours", "DeepSpeed's"):
        trainer = Trainer(tiny(tmp_path / way[0], *settings("fp32", 0)), quiet=True)
        if way != "ours":
            del trainer.engine._engine.allreduce_and_copy
        with trainer.loader() as loader, Sums() as sums:
            trainer.train_step(loader)
            trainer.train_step(loader)
        counts.append(sums.count)
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
        trainer.close()
    assert counts[0] == 0 and counts[1] >= 2
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


# What training/engine.py uses of DeepSpeed without its documentation's promise, by its owner.
ENGINE = ("checkpoint_engine", "_copy_recovery_script", "get_global_grad_norm", "device")
ENGINE += ("allreduce_and_copy",)
LINKED = ("_lazy_init_hp_params_optimizer_state",)
MAPPING = ("hp_fragment_address", "lp_fragment_address", "param_group_index")
INTERNALS = {
    ("fp32", 0): {},
    ("bf16", 1): {"optimizer": LINKED, "parameter": ("_hp_mapping",), "mapping": MAPPING},
    ("bf16", 2): {
        "optimizer": (*LINKED, "_hp_optimizer_states_linked", "overflow"),
        "parameter": ("_hp_mapping",),
        "mapping": MAPPING,
    },
    ("fp32", 3): {
        "optimizer": ("fp32_partitioned_groups_flat", "grad_position", "get_param_id", "overflow"),
        "parameter": ("ds_tensor", "ds_numel"),
    },
}
FUNCTIONS = {
    "deepspeed.utils": ("safe_get_full_fp32_param", "safe_get_full_optimizer_state"),
    "deepspeed.runtime.checkpoint_engine": ("TorchCheckpointEngine",),
    "deepspeed.ops": ("__compatible_ops__",),
}


@pytest.mark.parametrize("how", INTERNALS, ids=str)
def test_deepspeeds_internals_are_there(tmp_path: Path, how: tuple[str, int]) -> None:
    trainer = Trainer(tiny(tmp_path, *settings(*how), "train.images=8"), quiet=True)
    own = trainer.engine._engine
    parameter = next(p for p in own.module.parameters() if p.requires_grad)
    objects = {"engine": own, "optimizer": own.optimizer, "parameter": parameter}
    objects["mapping"] = getattr(parameter, "_hp_mapping", None)
    names = {"engine": ENGINE, **INTERNALS[how]}
    gone = [f"{w}.{n}" for w, used in names.items() for n in used if not hasattr(objects[w], n)]
    for module, used in FUNCTIONS.items():
        found = importlib.import_module(module)
        gone += [f"{module}.{name}" for name in used if not hasattr(found, name)]
    trainer.close()
    assert not gone, f"DeepSpeed {deepspeed_state()[0]} has no {', '.join(gone)} any more"


def test_the_internals_are_those_that_are_used() -> None:
    """Private names of others in the engine's source, and those of DeepSpeed's in the table."""
    source = Path(engine.__file__).read_text(encoding="utf-8")
    tree = ast.walk(ast.parse(source))
    used = {n.attr for n in tree if isinstance(n, ast.Attribute) and ast.unparse(n.value) != "self"}
    strings = {n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant)}
    table = {*ENGINE, *(n for names in INTERNALS.values() for own in names.values() for n in own)}
    private = {name for name in used if name.startswith("_") and not name.startswith("__")}
    private |= {name for name in used if name.startswith("ds_")}
    assert private - table == set(), "used of DeepSpeed, but not in the table of this test"
    assert table - used - strings == set(), "in the table of this test, but not used"


def test_another_series_of_deepspeed_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path)
    model = build_model(config.model)
    DeepSpeedEngine(config.train, config.optim, 8, model)
    monkeypatch.setattr(importlib.import_module("deepspeed"), "__version__", "0.20.1")
    with pytest.warns(UserWarning, match=r"DeepSpeed 0.20.1 is not of the tested series 0.19: "):
        DeepSpeedEngine(config.train, config.optim, 8, model)
    wanted = re.findall(r'"(deepspeed[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert set(wanted) == {f"deepspeed>=0.19.8,=={engine.TESTED_DEEPSPEED}.*"}
