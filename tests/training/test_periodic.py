"""Previews and validation during a run: training does not notice either."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from mixflow_fast.config.loading import load_config
from mixflow_fast.config.validate import validate
from mixflow_fast.data import build_dataset
from mixflow_fast.evaluation.validation_loss import (
    ValidationData,
    ValidationLoss,
)
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.models import load_model
from mixflow_fast.reports.previews import preview_file, write_preview
from mixflow_fast.training.periodic import Previews
from mixflow_fast.training.trainer import Trainer
from tests.support.configs import preview_options
from tests.support.runs import assert_same_bits, run_ranks, tiny

WATCHED = ["train.preview_every=2", "train.previews=3", "train.preview_steps=2",
           "train.validate_every=3", "train.validate_examples=5"]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Hundreds of tiny forward passes: threads that wait for each other are most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_settings_that_are_refused() -> None:
    for override, message in (
        ("train.preview_every=-1", "train.preview_every must be >= 0"),
        ("train.validate_examples=0", "train.validate_examples must be >= 1"),
        ("train={preview_cfg: 2.0, label_dropout: 0.0}", "train.preview_cfg = 2.0 needs a null"),
    ):
        with pytest.raises(ValueError, match=message):
            config = load_config("photos", ["model.class_dropout_prob=0", override])
            validate(config.replace(**{"train.label_dropout": 0.0}))
    with pytest.raises(ValueError, match="needs objective.prediction=velocity, got noise"):
        validate(load_config("photos", ["train.preview_every=5", "objective.prediction=noise"]))


@pytest.mark.parametrize(
    ("precision", "stage"), [("fp32", 0), ("fp32", 1), ("bf16", 2), ("fp32", 3)]
)
def test_training_does_not_notice_being_watched(tmp_path: Path, precision, stage) -> None:
    extra = [f"train.precision={precision}", f"train.zero_stage={stage}", "train.keep_last=1",
             "optim.ema_decays=[0.7]", "model.init_seed=3"]  # fmt: skip
    Trainer(tiny(tmp_path / "plain", *extra), quiet=True).run()
    state = torch.random.get_rng_state()
    trainer = Trainer(tiny(tmp_path / "watched", *extra, *WATCHED), quiet=True)
    trainer.run()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_same_bits(tmp_path / "plain", tmp_path / "watched")
    plain, watched = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("plain", "watched"))
    assert [row["loss"] for row in plain] == [row["loss"] for row in watched]

    rows = read_metrics(tmp_path / "watched" / "metrics.jsonl", kind="validation")
    assert [row["step"] for row in rows] == [0, 3, 6]
    assert rows[0]["ema"] == rows[0]["model"] and rows[2]["ema"] != rows[2]["model"]
    pictures = sorted((tmp_path / "watched" / "previews").iterdir())
    out = tmp_path / "watched"
    assert pictures == [preview_file(out, step) for step in (0, 2, 4, 6)]
    # What was looked at last are the weights that the run exported, in training's precision.
    saved = torch.load(out / "weights.pt", weights_only=True)
    own = dict(trainer.watched.net.named_parameters())
    assert own.keys() == saved["model"].keys()
    for name, value in own.items():
        assert value.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        assert torch.equal(value, saved["model"][name].to(value.dtype)), name
    net = load_model(out / "weights.pt", "ema").to(value.dtype)
    write_preview(net, preview_options(trainer.config), tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == preview_file(out, 6).read_bytes()
    heldout = build_dataset("photos", size=trainer.config.model.input_size, split="heldout")
    losses = ValidationLoss(
        ValidationData(heldout, ""), trainer.mix, torch.device("cpu"), examples=5, batch_size=8
    )
    assert asdict(losses(net)) == rows[2]["ema"]


def test_a_resumed_run_looks_when_the_whole_one_does(tmp_path: Path) -> None:
    Trainer(tiny(tmp_path / "whole", *WATCHED), quiet=True).run()
    for images in (24, 48):
        Trainer(tiny(tmp_path / "parts", *WATCHED, f"train.images={images}"), quiet=True).run()
    found = []
    for name in ("whole", "parts"):
        rows = read_metrics(tmp_path / name / "metrics.jsonl", kind="validation")
        found.append([{k: v for k, v in row.items() if k != "time"} for row in rows])
    assert found[0] == found[1] and [row["step"] for row in found[0]] == [0, 3, 6]
    starts = read_metrics(tmp_path / "parts" / "metrics.jsonl", kind="start")
    assert [row["step"] for row in starts] == [0, 3]
    last = (tmp_path / name / "previews" / "step_00000006.png" for name in ("whole", "parts"))
    assert len({path.read_bytes() for path in last}) == 1


def test_costs_of_a_window(tmp_path: Path) -> None:
    Trainer(tiny(tmp_path, "train.images=16"), quiet=True, recipe="photos").run()
    (start,) = read_metrics(tmp_path / "metrics.jsonl", kind="start")
    assert start["recipe"] == "photos" and start["environment"]["device"]
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        assert row["images_per_s"] == pytest.approx(8 / row["seconds"])
        expected = row["images_per_s"] * start["train_gflops_per_image"] / 1e3
        assert row["model_tflops"] == pytest.approx(expected)
        assert row["peak_tflops"] is None  # of a CPU
        assert 0 < row["data_wait_s"] < row["seconds"] and row["peak_memory_mib"] > 1


def test_time_spent_looking_is_not_trainings(tmp_path: Path, monkeypatch) -> None:
    import time

    class Slow(ValidationLoss):
        def __call__(self, net: Any) -> dict[str, Any]:
            time.sleep(0.5)
            return super().__call__(net)

    monkeypatch.setattr("mixflow_fast.training.periodic.ValidationLoss", Slow)
    extra = ["train.images=16", "train.log_every=2", "train.validate_every=1"]
    trainer = Trainer(tiny(tmp_path, *extra, "train.validate_examples=1"), quiet=True)
    started = time.perf_counter()
    trainer.run()
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["seconds"] + 3 * 2 * 0.5 < time.perf_counter() - started


def test_a_preview_that_fails_does_not_end_the_run(tmp_path: Path, capsys) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "previews").write_text("a file where the folder should be")
    config = tiny(tmp_path / "run", "train.images=16", "train.preview_every=2")
    config = config.replace(**{"train.preview_steps": 1, "train.previews": 1})
    assert Trainer(config).run().finished
    said = capsys.readouterr().err
    assert said.count("warning: no preview of step") == 2  # 0 and 2
    assert "FileExistsError" in said


def test_ranks_wait_for_a_preview_before_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host: rank 0 samples while no other rank is inside a step's collective."""
    trainer = Trainer(tiny(tmp_path, "train.images=16", "train.preview_every=1"), quiet=True)
    order = []
    monkeypatch.setattr(Previews, "draw", lambda self, step: order.append(f"preview {step}"))
    gather = trainer.host_group.all_gather
    monkeypatch.setattr(
        trainer.host_group, "all_gather", lambda mine: order.append("wait") or gather(mine)
    )
    trainer.on_step = lambda step, outputs, means: order.append("step")
    trainer.run()
    for at in [place for place, what in enumerate(order) if what.startswith("preview")]:
        assert order[at + 1] == "wait"
    assert order.count("step") == 2 and "preview 1" in order


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_two_ranks_do_not_notice_being_watched(tmp_path: Path, stage: int) -> None:
    common = ["train.images=32", "train.microbatch_size=4", f"train.zero_stage={stage}"]
    run_ranks(2, tmp_path / "d0", tmp_path / "plain", *common)
    run_ranks(2, tmp_path / "d1", tmp_path / "watched", *common, *WATCHED)
    assert_same_bits(tmp_path / "plain", tmp_path / "watched")
    Trainer(tiny(tmp_path / "one", *common, *WATCHED), quiet=True).run()
    two, one = (
        read_metrics(tmp_path / name / "metrics.jsonl", kind="validation")
        for name in ("watched", "one")
    )
    assert [row["step"] for row in two] == [row["step"] for row in one] == [0, 3, 4]
    for a, b in zip(two, one, strict=True):
        for which in ("ema", "model"):
            assert a[which]["loss_by_t"] == pytest.approx(b[which]["loss_by_t"], rel=1e-5)
    assert (tmp_path / "watched" / "previews" / "step_00000004.png").is_file()
