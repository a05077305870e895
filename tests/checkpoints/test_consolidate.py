"""One file from a checkpoint's shards: what the trainer writes online, to the bit."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixflow_fast.checkpoints import manifest
from mixflow_fast.checkpoints.consolidate import consolidate
from mixflow_fast.checkpoints.run_folder import newest_checkpoint
from mixflow_fast.checkpoints.shards import (
    Fragment,
    ShardLayout,
    frozen_file,
    full_states,
    iter_shards,
    layout_file,
    read_file,
    read_layout,
)
from mixflow_fast.cli.main import main
from mixflow_fast.models import load_model
from mixflow_fast.training.trainer import train
from tests.support.runs import ROOT, settings, tiny

STAGES = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]


def assert_same_file(first: Path, second: Path) -> None:
    a, b = (torch.load(file, weights_only=True) for file in (first, second))
    assert list(a) == list(b) and a["args"] == b["args"] and a["steps"] == b["steps"]
    for key in ("model", "ema"):
        assert list(a[key]) == list(b[key])
        for name, tensor in a[key].items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, b[key][name]), name
    assert not torch.equal(
        a["ema"]["final_layer.linear.weight"], a["model"]["final_layer.linear.weight"]
    )


def two_steps(out: Path, precision: str = "fp32", stage: int = 1) -> Path:
    """A checkpoint after two steps."""
    config = tiny(out, *settings(precision, stage), "train.images=16", "optim.ema_decays=[0.75]")
    train(config, quiet=True)
    return newest_checkpoint(out)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that is not to be changed."""
    out = tmp_path_factory.mktemp("kept")
    two_steps(out)
    return out


@pytest.fixture
def run(tmp_path: Path, kept: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(kept, tmp_path / "run")


@pytest.mark.parametrize(("precision", "stage"), STAGES)
def test_the_offline_file_is_the_trainers(tmp_path: Path, precision: str, stage: int) -> None:
    folder = two_steps(tmp_path / "run", precision, stage)
    metadata = consolidate(tmp_path / "run", tmp_path / "new" / "one.pt")
    assert (metadata.steps, metadata.images_seen) == (2, 16)
    assert_same_file(folder / "weights.pt", tmp_path / "new" / "one.pt")
    states = full_states(folder)
    assert states["x_embedder.proj.weight"]["step"] == 2
    for name, values in states.items():
        if "step" in values:
            shapes = {tuple(v.shape) for k, v in values.items() if k != "step"}
            assert shapes == {read_layout(folder).shapes[name]}
            assert {"exp_avg", "exp_avg_sq", "ema", "weight"} <= values.keys()
        else:
            assert list(values) == ["weight"]  # frozen
    moments = [values["exp_avg_sq"] for values in states.values() if "step" in values]
    assert sum(bool(moment.any()) for moment in moments) > 5


def test_frozen_tensors_keep_their_digits_under_bf16(tmp_path: Path) -> None:
    """bf16's module has them rounded; the file has what the run started from."""
    folder = two_steps(tmp_path / "run", "bf16", 2)
    frozen = read_file(frozen_file(folder))
    assert list(frozen) == ["pos_embed"]
    assert not torch.equal(frozen["pos_embed"], frozen["pos_embed"].bfloat16().float())
    consolidate(folder, tmp_path / "one.pt")
    model = load_model(tmp_path / "one.pt")
    assert torch.equal(model.pos_embed, frozen["pos_embed"])


def test_the_command_needs_no_deepspeed(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['deepspeed'] = None; from mixflow_fast.cli import main; "
        "code = main(sys.argv[1:]); import torch.distributed as d; "
        "sys.exit(code or d.is_initialized())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "consolidate", str(run), "--out", str(tmp_path / "one.pt")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'one.pt'}: 16 images, step 2\n"
    assert_same_file(run / "weights.pt", tmp_path / "one.pt")


def test_an_existing_file_is_replaced_only_if_asked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "one.pt"
    out.write_text("mine")
    command = ["consolidate", str(run), "--out", str(out)]
    assert main(command) == 2 and "--force" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main([*command, "--force"]) == 0
    assert_same_file(run / "weights.pt", out)
    assert main(["consolidate", str(tmp_path), "--out", str(tmp_path / "x.pt")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_damage_is_refused(run: Path, tmp_path: Path) -> None:
    folder, out = newest_checkpoint(run), tmp_path / "one.pt"
    (shard,) = folder.glob("*optim_states.pt")
    whole = shard.read_bytes()
    middle = len(whole) // 2
    for damaged in (
        whole[:middle],
        whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
    ):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"damaged .*{shard.name}"):
            consolidate(folder, out)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        consolidate(folder, out)
    with pytest.raises(ValueError, match="no shard of rank 0 of 1"):
        list(iter_shards(folder))
    assert not out.exists()


def test_weights_that_are_not_finite_are_refused(run: Path, tmp_path: Path) -> None:
    folder, out = newest_checkpoint(run), tmp_path / "one.pt"
    frozen = torch.load(frozen_file(folder))
    frozen["pos_embed"][0, 0, :2] = torch.nan
    torch.save(frozen, frozen_file(folder))
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    names.remove(manifest.NAME)
    manifest.write(folder, {name: manifest.entry(folder / name) for name in names})
    words = f"{folder}: pos_embed has 2 values that are not finite: take an older checkpoint"
    with pytest.raises(ValueError, match=words):
        consolidate(folder, out)
    assert not out.exists()


def test_a_checkpoint_that_does_not_hold_everything_is_refused(run: Path) -> None:
    folder = newest_checkpoint(run)
    layout = read_layout(folder)
    lost = layout.fragments[3]

    def claim(*fragments: Fragment, ranks: int = 1) -> None:
        claimed = dataclasses.replace(layout, ranks=ranks, fragments=fragments)
        torch.save(claimed.to_dict(), layout_file(folder, 0))

    claim(*layout.fragments[:3], *layout.fragments[4:])
    with pytest.raises(ValueError, match=f"does not hold all of {lost.name}"):
        list(iter_shards(folder))
    claim(*layout.fragments[:3], lost, *layout.fragments[3:])
    with pytest.raises(ValueError, match=f"does not hold all of {lost.name}"):
        list(iter_shards(folder))
    claim(*layout.fragments[:3], lost._replace(offset=10**9), *layout.fragments[4:])
    with pytest.raises(ValueError, match=f"of {lost.name} is cut off"):
        list(iter_shards(folder))
    claim(*layout.fragments, ranks=2)
    with pytest.raises(ValueError, match=r"layout_00001.pt does not exist"):
        list(iter_shards(folder))
    claim(*layout.fragments)
    assert len(list(iter_shards(folder))) == len(layout.fragments)


class Harmful:
    """Runs code when an ordinary unpickler meets it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.target, "ran"))


def test_nothing_in_a_shard_is_executed(run: Path, tmp_path: Path) -> None:
    folder, target = newest_checkpoint(run), tmp_path / "ran.txt"
    (shard,) = folder.glob("*optim_states.pt")
    content = torch.load(shard, weights_only=False)  # this run's own
    torch.save(content | {"extra": Harmful(target)}, shard)
    files = {p.name: manifest.entry(p) for p in folder.iterdir() if p.name != manifest.NAME}
    manifest.write(folder, files)
    with pytest.raises(ValueError, match=f"{shard.name} cannot be read"):
        consolidate(folder, tmp_path / "one.pt")
    assert not target.exists() and not (tmp_path / "one.pt").exists()
    torch.load(shard, weights_only=False)
    assert target.read_text() == "ran"  # it would have


def test_further_optimizer_states_come_along(tmp_path: Path) -> None:
    """Whatever the optimizer keeps for each element has its name in the result; scalars too."""
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    a, b = torch.arange(6.0).view(2, 3), torch.arange(10.0, 15.0)
    flat = torch.cat([a.flatten(), b, torch.zeros(1)])  # 12: two ranks of 6
    shapes = {"a": (2, 3), "fixed": (2,), "b": (5,)}
    for rank, fragments in enumerate([[("a", 0, 0, 0, 6)], [("b", 0, 0, 0, 5)]]):
        own = flat[6 * rank : 6 * rank + 6]
        layout = ShardLayout(2, 2, shapes, tuple(Fragment(*f) for f in fragments), 1)
        torch.save(layout.to_dict(), layout_file(folder, rank))
        state = {"step": 7, "ema": own + 1, "ema_power_0": own + 2, "count": torch.tensor(3.0)}
        content = {
            "single_partition_of_fp32_groups": [own[: 6 - rank]],
            "base_optimizer_state": {"state": {0: state}, "param_groups": []},
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": content}, folder / name)
    torch.save({"fixed": torch.tensor([8.0, 9.0])}, frozen_file(folder))
    found = full_states(folder)
    assert list(found) == ["a", "fixed", "b"]
    assert found["fixed"].keys() == {"weight"}
    for name, whole in (("a", a), ("b", b)):
        assert torch.equal(found[name]["weight"], whole)
        assert torch.equal(found[name]["ema_power_0"], whole + 2)
        assert found[name]["step"] == 7 and found[name]["count"] == 3
