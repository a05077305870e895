"""A run goes on with another number of ranks or another ZeRO stage: nothing is lost on the way."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from mixflow_fast.checkpoints import manifest
from mixflow_fast.checkpoints.resume import resharded_from
from mixflow_fast.checkpoints.run_folder import newest_checkpoint, read_state
from mixflow_fast.checkpoints.shards import full_states, read_layout
from mixflow_fast.config.schema import Config
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.models.weights.places import weights_file
from mixflow_fast.training.trainer import Trainer, train
from tests.support.command_line import run
from tests.support.datasets import write_classes
from tests.support.launchers import ranks_of
from tests.support.resume_ranks import recording
from tests.support.runs import ODD, ROOT, assert_same_states, settings, tiny

FEW = [("fp32", 3), ("bf16", 2)]
OTHERS = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 3)]
# Two micro-batches a step on one rank, one on two: the sums are made otherwise.
COMMON = ["train.microbatch_size=4", "optim.grad_clip=0.5", "optim.ema_decays=[0.75]"]


def configured(out: Path, precision: str, stage: int, images: int) -> Config:
    # ZeRO 1 and 2 leave gaps between parameters of odd sizes; bf16 at ZeRO 3 takes no DiT-DH.
    network = [] if (precision, stage) == ("bf16", 3) else ODD
    return tiny(out, *COMMON, *network, *settings(precision, stage), f"train.images={images}")


@pytest.mark.parametrize("layouts", [FEW, pytest.param(OTHERS, marks=pytest.mark.long)], ids=len)
def test_one_rank_two_ranks_one_rank(tmp_path: Path, layouts: list[tuple[str, int]]) -> None:
    """2 + 2 + 2 steps on 1, 2, 1 ranks: state moves to the bit, losses agree to rounding."""
    recipes = []
    for precision, stage in layouts:
        out = tmp_path / f"{precision}_{stage}"
        train(configured(out, precision, stage, 16), quiet=True)
        shutil.copytree(newest_checkpoint(out), f"{out}.one")
        recipes.append(tmp_path / f"{out.name}.yaml")
        recipes[-1].write_text(configured(out, precision, stage, 32).to_yaml())
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        + ["-m", "tests.support.resume_ranks", *map(str, recipes)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for precision, stage in layouts:
        out = tmp_path / f"{precision}_{stage}"
        taken_up = Path(f"{out}.taken_up")
        assert read_layout(taken_up).ranks == 2
        assert_same_states(full_states(Path(f"{out}.one")), full_states(taken_up))
        two = newest_checkpoint(out)
        shutil.copytree(two, f"{out}.two")
        config = configured(out, precision, stage, 48)
        before = resharded_from(two, config.train, 1)
        assert before == ("" if stage == 0 else f"2 ranks, ZeRO {stage}")
        trainer = Trainer(config, quiet=True)
        assert_same_states(full_states(Path(f"{out}.two")), full_states(trainer.save()))
        last = recording(trainer)
        trainer.run()
        parts = [torch.load(f"{out}.seen_{rank}", weights_only=True) for rank in (0, 1)]
        for part, first in zip(parts, (16, 20), strict=True):
            assert sorted(part) == [*range(first, first + 4), *range(first + 8, first + 12)]
        whole = tmp_path / f"{out.name}.whole"
        trainer = Trainer(configured(whole, precision, stage, 48), quiet=True)
        seen = recording(trainer)
        trainer.run()
        assert parts[0] | parts[1] | last == {i: row for i, row in seen.items() if i >= 16}
        tolerance = 1e-5 if precision == "fp32" else 1e-3
        losses = [[row["loss"] for row in read_metrics(r / "metrics.jsonl")] for r in (out, whole)]
        assert len(losses[0]) == 6
        assert losses[0] == pytest.approx(losses[1], rel=tolerance), (precision, stage)
        if precision == "fp32":
            ours, theirs = (
                full_states(newest_checkpoint(out)),
                full_states(newest_checkpoint(whole)),
            )
            for name, values in theirs.items():
                torch.testing.assert_close(
                    ours[name]["weight"], values["weight"], rtol=1e-4, atol=2e-6
                )
                assert ours[name].get("step") == values.get("step")


def test_another_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The state moves to the bit from every stage to another; the run goes on as it would have."""
    out = tmp_path / "run"
    train(configured(out, "fp32", 0, 16), quiet=True)
    for number, stage in enumerate((3, 1, 2, 0)):
        before = shutil.copytree(newest_checkpoint(out), tmp_path / f"before_{number}")
        trainer = Trainer(configured(out, "fp32", stage, 24), quiet=True)
        assert_same_states(full_states(before), full_states(trainer.save()))
        trainer.close()
    train(configured(out, "fp32", 0, 24))
    assert "its checkpoint is of" not in capsys.readouterr().err
    train(configured(tmp_path / "whole", "fp32", 0, 24), quiet=True)
    whole = full_states(newest_checkpoint(tmp_path / "whole"))
    assert_same_states(whole, full_states(newest_checkpoint(out)))
    train(configured(out, "fp32", 2, 32))
    said = capsys.readouterr().err
    assert "its checkpoint is of 1 rank, ZeRO 0: the same examples and noise" in said


FILLS = """
from pathlib import Path
from mixflow_fast.checkpoints.resume import ResumePoint
from mixflow_fast.config.loading import load_config
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.training.build import FirstNetwork
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
out, group = {out!r}, HostGroup()
section = load_config(out + "/config.yaml").model
for case, (checkpoint, init, before) in enumerate({cases!r}):
    start = ResumePoint(checkpoint and Path(checkpoint), resharded_from=before)
    opened.clear()
    try:
        network = FirstNetwork(section, init, start)(group)
        torch.save(network.state_dict(), f"{{out}}.{{case}}.{{group.rank}}")
    except ValueError as error:
        print("REFUSED", error)
    print("OPENED", sum(name.startswith(checkpoint or init) for name in opened), flush=True)
dist.barrier()
"""


def test_one_rank_of_a_machine_reads_for_all(tmp_path: Path) -> None:
    """Weights that a new run starts from, and those of another layout; shards are each rank's own.

    A shard that one rank cannot read ends all.
    """
    out = tmp_path / "run"
    weights = str(train(configured(out, "fp32", 1, 16), quiet=True).weights)
    checkpoint = newest_checkpoint(out)
    damaged = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    (shard,) = damaged.glob("*zero_pp_rank_0_*_optim_states.pt")
    other = shard.with_name(shard.name.replace("rank_0_", "rank_1_"))
    other.write_bytes(shard.read_bytes()[:5000])
    cases = [(None, weights, ""), (str(checkpoint), None, "1 rank, ZeRO 1")]
    cases.append((str(damaged), None, ""))
    outputs = ranks_of(FILLS.format(out=str(out), cases=cases), timeout_s=60)
    assert [code for code, _ in outputs] == [0, 0], outputs
    counts = [[int(n) for n in re.findall(r"OPENED (\d+)", text)] for _, text in outputs]
    assert counts[0][0] > 0 and counts[0][1] > 0 and counts[1][:2] == [0, 0]
    assert min(counts[0][2], counts[1][2]) > 0
    assert all(f"REFUSED {other} cannot be read" in text for _, text in outputs), outputs
    content = torch.load(weights, weights_only=True)
    for case, key in enumerate(("ema", "model")):
        for rank in (0, 1):
            found = torch.load(f"{out}.{case}.{rank}", weights_only=True)
            assert found.keys() == content[key].keys()
            assert all(torch.equal(found[n], value) for n, value in content[key].items()), key


def test_saved_before_the_first_step(tmp_path: Path) -> None:
    trainer = Trainer(configured(tmp_path, "fp32", 1, 16), quiet=True)
    first = trainer.save()
    trainer.close()
    assert {tuple(values) for values in full_states(first).values()} == {("weight",)}
    assert train(configured(tmp_path, "fp32", 2, 16), quiet=True).step == 2


def test_weights_are_saved_when_asked(tmp_path: Path) -> None:
    for wanted, there in (("always", [1, 2]), ("end", [2]), ("never", [])):
        out = tmp_path / wanted
        options = {"train.save_weights": wanted, "train.save_every": 1}
        result = train(configured(out, "fp32", 1, 16).replace(**options), quiet=True)
        found = [int(p.parent.name[-1]) for p in sorted(out.glob("checkpoints/*/weights.pt"))]
        assert found == there and result.weights.exists() == bool(there)
    with pytest.raises(ValueError, match="mixflow-fast consolidate"):
        weights_file(out)
    # Neither is needed to go on.
    last = train(
        configured(out, "fp32", 1, 24).replace(**{"train.save_weights": "end"}), quiet=True
    )
    train(configured(tmp_path / "whole", "fp32", 1, 24), quiet=True)
    ours, theirs = (torch.load(p / "weights.pt") for p in (last.out, tmp_path / "whole"))
    for name, weight in theirs["ema"].items():
        assert torch.equal(ours["ema"][name], weight)
    with pytest.raises(ValueError, match="train.save_weights"):
        train(configured(out, "fp32", 1, 24).replace(**{"train.save_weights": "no"}), quiet=True)


def test_a_run_of_before_the_settings_of_communication_goes_on(tmp_path: Path) -> None:
    """Its config.yaml has none of them and is read with the defaults; they may change, too."""
    out, names = tmp_path / "run", ("reduce_dtype", "reduce_bucket_size", "overlap_comm")
    train(configured(out, "bf16", 2, 8), quiet=True)
    lines = (out / "config.yaml").read_text().splitlines()
    older = [line for line in lines if not line.strip().startswith(names)]
    assert len(older) == len(lines) - 3
    (out / "config.yaml").write_text("\n".join(older) + "\n")
    assert train(configured(out, "bf16", 2, 16), quiet=True).step == 2
    others = {"train.reduce_dtype": "bf16", "train.overlap_comm": True}
    others |= {"train.reduce_bucket_size": 2000}
    assert train(configured(out, "bf16", 2, 24).replace(**others), quiet=True).step == 3


def on_folder(out: Path, folder: Path, images: int = 16, *overrides: str) -> Config:
    data = f"data={{kind: folder, path: {folder}, size: 16}}"
    return tiny(out, *COMMON, data, f"train.images={images}", *overrides)


def test_other_data_are_refused_or_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = write_classes(tmp_path / "set", 16, cat=6, dog=2), tmp_path / "run"
    train(on_folder(out, folder), quiet=True)
    recorded = read_state(newest_checkpoint(out)).data
    assert recorded["examples"] == 8 and recorded["class_names"] == ["cat", "dog"]
    # The same data in another place are the same data.
    folder = folder.rename(tmp_path / "mounted")
    assert train(on_folder(out, folder, 24), quiet=True).step == 3
    assert "other data" not in capsys.readouterr().err

    shutil.rmtree(folder / "dog")
    write_classes(folder, 16, ant=1)
    changes = (
        "8 examples of 2 classes -> 7 examples of 2 classes; classes added: ant; classes removed: "
        "dog"
    )
    with pytest.raises(ValueError) as refused:
        train(on_folder(out, folder, 32), quiet=True)
    assert f"{out} holds a run on other data ({changes}): " in str(refused.value)
    assert "--allow-data-change" in str(refused.value)
    assert newest_checkpoint(out).name == "step_00000003"
    assert train(on_folder(out, folder, 32), allow_data_change=True).step == 4
    said = capsys.readouterr().err
    assert f"goes on with other data ({changes}): the order of examples is another one" in said
    # From then on these are its data.
    assert train(on_folder(out, folder, 40), quiet=True).step == 5


def test_the_same_number_of_other_files(tmp_path: Path) -> None:
    folder, out = write_classes(tmp_path / "set", 16, cat=2, dog=2), tmp_path / "run"
    train(on_folder(out, folder), quiet=True)
    (folder / "dog/1.png").rename(folder / "dog/2.png")
    with pytest.raises(ValueError, match=r"other files or labels \(digest \w+ -> \w+\)"):
        train(on_folder(out, folder, 24), quiet=True)


def test_a_flag_of_the_command_allows_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        write_classes(tmp_path / name, 16, cat=2, **{name: 2})
    config = on_folder(tmp_path / "run", tmp_path / "a")
    train(config, quiet=True)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    command = ["train", tmp_path / "run.yaml", "train.images=24", f"data.path={tmp_path / 'b'}"]
    code, _, err = run(*command, capsys=capsys)
    assert code == 2 and "classes added: b; classes removed: a" in err
    code, _, err = run(*command, "--allow-data-change", capsys=capsys)
    assert code == 0 and "the order of examples is another one from here" in err


def test_checkpoints_of_before_the_data_were_recorded_go_on(tmp_path: Path) -> None:
    """On the data of the same path, which is all that is known of them."""
    folder, out = write_classes(tmp_path / "set", 16, cat=2), tmp_path / "run"
    train(on_folder(out, folder), quiet=True)
    rewrite_state(newest_checkpoint(out), lambda state: state.pop("data"))
    with pytest.raises(ValueError, match="data.path: .*set' -> .*other'"):
        train(on_folder(out, write_classes(tmp_path / "other", 16, cat=2), 24), quiet=True)
    assert train(on_folder(out, folder, 24), quiet=True).step == 3


REFUSES = """
from mixflow_fast.cli.errors import leave_at_once
from mixflow_fast.config.loading import load_config
from mixflow_fast.training.trainer import Trainer
try:
    Trainer(load_config({recipe!r}), quiet=True)
except ValueError as error:
    print("REFUSED", error)
leave_at_once(0)
"""


def test_all_ranks_refuse_other_data(tmp_path: Path) -> None:
    folder, out = write_classes(tmp_path / "set", 16, cat=2), tmp_path / "run"
    train(on_folder(out, folder), quiet=True)
    write_classes(folder, 16, dog=1)
    (tmp_path / "run.yaml").write_text(on_folder(out, folder, 24).to_yaml())
    for code, output in ranks_of(REFUSES.format(recipe=str(tmp_path / "run.yaml")), timeout_s=60):
        assert code == 0 and "REFUSED" in output, output
        assert "2 examples of 1 class -> 3 examples of 2 classes; classes added: dog" in output


def rewrite_state(folder: Path, change: Callable[[dict], object]) -> None:
    """Change a checkpoint's state.json, and what its manifest says of it."""
    state = json.loads((folder / "state.json").read_text())
    change(state)
    (folder / "state.json").write_text(json.dumps(state))
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    entries = {n: manifest.entry(folder / n) for n in names if n != "manifest.json"}
    manifest.write(folder, entries)


def test_what_a_later_release_adds_to_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    train(configured(tmp_path, "fp32", 0, 16), quiet=True)
    folder = newest_checkpoint(tmp_path)
    rewrite_state(folder, add_future)
    assert train(configured(tmp_path, "fp32", 0, 24), quiet=True).step == 3


def add_future(state: dict) -> None:
    state["future"] = state["safety"]["future"] = state["data"]["future"] = 1


def test_a_start_that_fails_lets_go_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its very end, too: the same process may try again."""
    train(configured(tmp_path, "fp32", 0, 16), quiet=True)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no guard"):
        patch.setattr(Trainer, "_build_guard", fail)
        Trainer(configured(tmp_path, "fp32", 0, 24), quiet=True)
    assert train(configured(tmp_path, "fp32", 0, 24), quiet=True).step == 3


def fail(_: Trainer) -> None:
    raise RuntimeError("no guard")


def test_a_start_removes_what_a_killed_run_left_half_written(tmp_path: Path) -> None:
    train(configured(tmp_path, "fp32", 0, 16), quiet=True)
    code = "import os; print(os.getpid())"
    dead = int(subprocess.run([sys.executable, "-c", code], capture_output=True).stdout)
    (tmp_path / "ema").mkdir()
    left = [tmp_path / "ema" / f".step_00000004.safetensors.{dead}.tmp"]
    left.append(tmp_path / f".config.yaml.{dead}.tmp")
    for path in left:
        path.write_text("half")
    train(configured(tmp_path, "fp32", 0, 24), quiet=True)
    assert not any(path.exists() for path in left)


LARGE_STEPS = ("train.global_batch_size=520", "train.microbatch_size=520")


def content(out: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and bytes of every file of a run; `.lock` says who holds the folder."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]
    return {
        str(path.relative_to(out)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    train(tiny(out, "train.images=1040", *LARGE_STEPS))
    return out


@pytest.mark.parametrize(
    "changed", [[], ["train.images=1039"], ["train.zero_stage=0", "train.on_nonfinite=rollback"]]
)
def test_a_finished_run_is_left_as_it_is(
    finished: Path, changed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(finished)
    again = ["train.images=1040", *LARGE_STEPS, "train.preview_every=1", *changed]
    result = train(tiny(finished, *again))
    assert result.finished and (result.step, result.images_seen) == (2, 1040)
    wanted = "1,039" if "train.images=1039" in changed else "1,040"
    assert (
        f"{finished} is finished: 1,040 of {wanted} images; raise train.images to go on, or choose "
        "another out=\n"
    ) in capsys.readouterr().err
    assert content(finished) == before


def test_fewer_images_than_were_done_are_refused(finished: Path) -> None:
    before = content(finished)
    again = ["train.images=520", "train.global_batch_size=520", "train.microbatch_size=520"]
    with pytest.raises(
        ValueError, match=r"has done 1,040 images, more than train.images=520: raise"
    ):
        train(tiny(finished, *again), quiet=True)
    assert content(finished) == before


def test_a_finished_run_whose_rate_descended_cannot_be_made_longer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    config = tiny(Path("~", tmp_path.name), "train.images=8", "optim.schedule=cosine")
    assert train(config, quiet=True).out == tmp_path and newest_checkpoint(tmp_path)
    train(config)
    assert (
        f"is finished: 8 of 8 images; train.init={tmp_path} in another out= goes on from its "
        "weights\n"
    ) in capsys.readouterr().err


def test_a_run_of_before_the_data_said_what_they_are_goes_on(tmp_path: Path) -> None:
    """Its config.yaml has defaults of then, and lacks fields and a section of now."""
    train(tiny(tmp_path, "train.images=16"), quiet=True)
    file = tmp_path / "config.yaml"
    written = yaml.safe_load(file.read_text())
    for name in ("mirrors", "loader", "depth", "resident"):
        written["data"].pop(name)
    written.pop("encoder")
    written["data"] |= {"moments": False, "scale": 1.0, "workers": 0}
    file.write_text(yaml.safe_dump(written))
    assert train(tiny(tmp_path, "train.images=24"), quiet=True).step == 3
    written["data"]["scale"] = 0.5
    file.write_text(yaml.safe_dump(written))
    with pytest.raises(ValueError, match=r"data.scale: 0.5 -> None"):
        train(tiny(tmp_path, "train.images=32"), quiet=True)
