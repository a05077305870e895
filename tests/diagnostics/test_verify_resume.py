"""`mixflow-fast verify-resume`: real runs that go on to the bit, and differences that it sees."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from mixflow_fast.checkpoints.run_folder import newest_checkpoint
from mixflow_fast.cli.main import main
from mixflow_fast.config.schema import Config
from mixflow_fast.diagnostics import verify_resume
from mixflow_fast.diagnostics.verify_resume import Row, compare_checkpoints, compare_streams, table
from mixflow_fast.training.trainer import train
from tests.support.runs import MIXED, tiny
from tests.support.train_ranks import TINY

STAGES = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]
FEW = [("bf16", 2, 2)]  # as the recipes run it
ALL = [(precision, stage, ranks) for ranks in (1, 2) for precision, stage in STAGES]
# Without ZeRO.
ALL += [(precision, "ddp", ranks) for ranks in (1, 2, 3) for precision in ("fp32", "bf16")]
ALL += [("fp32", 2, 3), ("bf16", 3, 3)]  # parameters that three ranks cannot share equally
CASES = [*FEW, *(pytest.param(*c, marks=pytest.mark.long) for c in ALL if c not in FEW)]
# A rate that descends over the whole run, clipping, two micro-batches a step.
HOW = ["optim.schedule=cosine", "optim.warmup_images=12", "optim.grad_clip=0.5"]
HOW += ["train.global_batch_size=12"]
# Not for the runs here, which save at their ends.
HOW += ["train.save_every=2", "train.keep_every=4"]


@pytest.mark.parametrize(("precision", "stage", "ranks"), CASES)
def test_a_resumed_run_has_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str, stage: int | str, ranks: int
) -> None:
    out = tmp_path / "both"
    command = ["verify-resume", "photos", *TINY, *HOW, f"train.microbatch_size={6 // ranks}"]
    engine = ["train.engine=ddp", "train.zero_stage=0"]
    command += engine if stage == "ddp" else [f"train.zero_stage={stage}"]
    command += [f"train.precision={precision}"]
    code = main([*command, "--steps", "3", "--ranks", str(ranks), "--out", str(out)])
    said = capsys.readouterr()
    assert code == 0, said.out + said.err
    assert "the same bits" in said.out
    compared = {line[:34].strip(): line[34:].split() for line in said.out.splitlines()[3:]}
    for what in (
        "master weights",
        "optimizer exp_avg",
        "optimizer ema",
        "exported ema (weights.pt)",
    ):
        if (stage, what) != (0, "master weights"):  # ZeRO 0 trains the network's own
            assert int(compared[what][1].replace(",", "")) > 30_000, what
    for what in ("positions", "images", "labels", "t", "slowed time m", "network input", "loss"):
        assert compared[f"each step's {what}"] == [str(3 * ranks), str(3 * ranks), "0"]
    assert json.loads((newest_checkpoint(out / "parts") / "state.json").read_text())["step"] == 3


# Of those with a mixed source, the quickest.
FEW_MIXED = [("fp32", 0, 1)]
ALL_MIXED = [*FEW_MIXED, ("bf16", 2, 1), ("bf16", 2, 2), ("fp32", 3, 1), ("bf16", 3, 2)]
ALL_MIXED += [("bf16", "ddp", 1), ("fp32", "ddp", 2)]
MIXED_CASES = [
    *FEW_MIXED,
    *(pytest.param(*c, marks=pytest.mark.long) for c in ALL_MIXED if c not in FEW_MIXED),
]


@pytest.mark.parametrize(("precision", "stage", "ranks"), MIXED_CASES)
def test_a_resumed_run_with_a_mixed_source_has_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str, stage: int | str, ranks: int
) -> None:
    out = tmp_path / "both"
    command = ["verify-resume", "photos", *TINY, *HOW, *MIXED, f"train.precision={precision}"]
    command += ["train.microbatch_size=3", f"train.zero_stage={0 if stage == 'ddp' else stage}"]
    command += ["train.engine=ddp"] if stage == "ddp" else []
    code = main([*command, "--steps", "3", "--ranks", str(ranks), "--out", str(out)])
    said = capsys.readouterr()
    assert code == 0, said.out + said.err
    compared = {line[:34].strip(): line[34:].split() for line in said.out.splitlines()[3:]}
    for what in ("exported source (weights.pt)", "exported source_ema (weights.pt)"):
        assert int(compared[what][1].replace(",", "")) > 10_000, what
    assert compared["each step's network input"] == [str(3 * ranks), str(3 * ranks), "0"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(tiny(out, "train.images=16", "train.zero_stage=2", "train.precision=bf16"), quiet=True)
    return newest_checkpoint(out)


def differing(rows: list[Row]) -> dict[str, int]:
    return {row.what: row.differing for row in rows if row.differing}


def test_one_bit_is_seen(checkpoint: Path, tmp_path: Path) -> None:
    """In each kind of thing: a flipped lowest bit, a count, a missing tensor."""
    assert differing(compare_checkpoints(checkpoint, checkpoint)) == {}
    (shard,) = checkpoint.glob("*optim_states.pt")

    def changed(name: str, change: object) -> dict[str, int]:
        other = shutil.copytree(checkpoint, tmp_path / "other", dirs_exist_ok=True)
        content = torch.load(other / name, weights_only=False)
        change(content)
        torch.save(content, other / name)
        return differing(compare_checkpoints(checkpoint, other))

    def flip(tensor: torch.Tensor) -> None:
        tensor.view(-1).view(torch.uint8)[4] ^= 1

    def state(content: dict) -> dict:
        return content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]

    masters = "single_partition_of_fp32_groups"
    for key in ("exp_avg", "exp_avg_sq", "ema"):
        assert changed(shard.name, lambda c, k=key: flip(state(c)[k])) == {f"optimizer {key}": 1}
    found = changed(shard.name, lambda c: flip(c["optimizer_state_dict"][masters][0]))
    assert found == {"master weights": 1}
    assert changed(shard.name, lambda c: state(c).update(step=3)) == {"optimizer step": 1}
    assert changed(shard.name, lambda c: state(c).pop("ema")) == {"optimizer ema": 1}
    assert changed(shard.name, lambda c: state(c).update(more=1)) == {"optimizer more": 1}
    name = "mp_rank_00_model_states.pt"
    assert changed(name, lambda c: flip(c["module"]["x_embedder.proj.bias"])) == {"network": 1}
    assert changed(name, lambda c: c.update(global_steps=3)) == {"everything else": 1}
    found = changed("weights.pt", lambda c: flip(c["ema"]["x_embedder.proj.bias"]))
    assert found == {"exported ema (weights.pt)": 1}


def test_another_sample_is_seen() -> None:
    whole = {(0, step): {"t": f"a{step}", "loss": "b"} for step in (1, 2, 3)}
    assert differing(compare_streams(whole, dict(whole))) == {}
    repeated = whole | {(0, 3): whole[0, 2]}
    rows = compare_streams(whole, repeated)
    assert differing(rows) == {"each step's t": 1}
    assert "rank 0, step 3" in table(rows)
    lost = {key: value for key, value in whole.items() if key != (0, 2)}
    assert differing(compare_streams(whole, lost)) == {"each step's t": 1, "each step's loss": 1}


@pytest.mark.parametrize("ending", ["same", "differing", "failed", "refused", "interrupted"])
def test_runs_that_tell_nothing_more_are_removed(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs(config: Config, out: Path, *_: object, **__: object) -> list[Row]:
        if ending != "refused":
            (out / "whole.yaml").write_text("")
        if ending in ("failed", "refused"):
            raise ValueError(f"see {out}")
        if ending == "interrupted":
            raise KeyboardInterrupt
        return [Row("network", 1, 1, int(ending == "differing"))]

    monkeypatch.setattr(verify_resume, "verify_resume", runs)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = main(["verify-resume", "photos"])
    assert code == {"same": 0, "differing": 1, "interrupted": 130}.get(ending, 2)
    said = "".join(capsys.readouterr())
    left = [str(path) for path in tmp_path.iterdir()]
    assert bool(left) is (ending in ("differing", "failed"))
    assert all(path in said for path in left) and ("both runs" in said) is (ending == "differing")
    if ending == "same":
        assert main(["verify-resume", "photos", "--out", str(tmp_path)]) == 0
        assert f"the same bits (both runs: {tmp_path})" in capsys.readouterr().out
        assert (tmp_path / "whole.yaml").exists()


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    def refused(*extra: str) -> str:
        assert main(["verify-resume", "photos", *TINY, *extra]) == 2
        return capsys.readouterr().err

    (tmp_path / "mine").write_text("")
    assert "is not empty" in refused("--out", str(tmp_path))
    assert "--steps must be >= 2, got 1" in refused("--steps", "1")
    assert "--ranks must be >= 1, got 0" in refused("--ranks", "0")
    assert "multiple of the number of ranks" in refused("--ranks", "3", "--out", f"{tmp_path}/a")
    assert "gamma must be" in refused("objective.gamma=7", "--out", f"{tmp_path}/b")
    monkeypatch.setenv("RANK", "0")
    assert "no torchrun" in refused("--out", f"{tmp_path}/c")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
