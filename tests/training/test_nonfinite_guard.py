"""Steps that are not finite: found on the device, named, skipped or gone back from."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mixflow_fast.checkpoints.run_folder import checkpoint_name
from mixflow_fast.checkpoints.shards import full_states
from mixflow_fast.checkpoints.writing import CheckpointWriter
from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.data import sample_index
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.objective.mixflow import MixFlow
from mixflow_fast.training.build import build_model
from mixflow_fast.training.saving import Checkpoints
from mixflow_fast.training.step_record import T_BUCKETS
from mixflow_fast.training.trainer import Trainer, TrainingDiverged, train
from tests.support.runs import assert_same_bits, run_ranks, settings
from tests.support.train_ranks import TINY

SIZE, BATCH = 16, 4
NET = "model={name: SiT-S/2, input_size: 4, in_channels: 4, num_classes: 3, class_dropout_prob: 0.1"
NET += ", depth: 1, hidden_size: 32, num_heads: 2}"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on several, and much slower where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def latents(folder: Path, bad_steps: tuple[int, ...] = (), value: float = np.nan) -> list[int]:
    """A set of 16 latents; for each step of the first epoch named, one of its samples is spoilt."""
    g = np.random.default_rng(0)
    x = g.normal(size=(SIZE, 4, 4, 4)).astype(np.float32)
    positions = torch.tensor([(step - 1) * BATCH + 2 for step in bad_steps], dtype=torch.int64)
    indices = sample_index(positions, SIZE, 0).tolist()
    for index in indices:
        x[index, 1, 2, 3] = value
    np.savez(folder / "set.npz", latents=x, labels=np.arange(SIZE) % 3)
    return indices


def overrides(folder: Path, *more: str) -> list[str]:
    return [
        *TINY,
        NET,
        f"data={{kind: latents, path: {folder / 'set.npz'}}}",
        f"train.global_batch_size={BATCH}",
        "train.microbatch_size=2",
        "train.keep_last=20",
        "optim.grad_clip=0.5",
        "optim.ema_decays=[0.75]",
        "optim.weight_decay=0.1",
        *more,
    ]


def configured(folder: Path, name: str, steps: int, *more: str) -> Config:
    own = [f"out={folder / name}", f"train.images={steps * BATCH}"]
    return load_config("photos", overrides(folder, *own, *more))


def states(config: Config, step: int) -> dict[str, dict]:
    return full_states(Path(config.out) / "checkpoints" / checkpoint_name(step))


def differing(a: dict[str, dict], b: dict[str, dict]) -> set[str]:
    """Kinds of state (weight, exp_avg, ema, ...) that have a different number somewhere."""
    assert a.keys() == b.keys()
    return {
        key
        for name, values in a.items()
        for key in values.keys() | b[name].keys()
        if not (
            torch.equal(values[key], b[name][key])
            if isinstance(values.get(key), torch.Tensor) and key in b[name]
            else values.get(key) == b[name].get(key)
        )
    }


def rows(config: Config) -> list[dict]:
    return read_metrics(Path(config.out) / "metrics.jsonl")


@pytest.mark.parametrize("precision", [("fp32", 0), ("bf16", 2), ("fp32", 3)], ids=str)
def test_the_sample_is_named_and_a_report_is_left(tmp_path: Path, precision: tuple) -> None:
    """Found late, at the end of the window: the step and the sample are still the right ones."""
    (index,) = latents(tmp_path, (2,))
    more = [*settings(*precision), "train.log_every=4"]
    config = configured(tmp_path, "run", 4, *more)
    with pytest.raises(TrainingDiverged) as caught:
        train(config, quiet=True)
    text = str(caught.value)
    assert "at step 2 (samples at positions 4 to 7)" in text
    assert f"sample {index} of the data at position 6" in text
    assert "1 of its numbers are not finite" in text and "train.on_nonfinite=skip" in text
    folder = tmp_path / "run" / "nonfinite" / checkpoint_name(2)
    assert str(folder) in text and [p.name for p in folder.parent.iterdir()] == [folder.name]
    content = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    (rank,) = content["ranks"]
    assert content["step"] == 2 and rank["micro_batch"] == 1
    (sample,) = rank["samples"]
    assert (sample["index"], sample["position"], sample["loss"]) == (index, 6, "nan")
    assert sample["data_not_finite"] == 1
    tensors = torch.load(folder / "rank_0.pt", weights_only=True)
    assert tensors["positions"].tolist() == [6, 7]
    assert tensors["loss"].isnan().tolist() == [True, False]
    # Times are those that the step had: functions of the position.
    mix = MixFlow(0.5, "data_at_1")
    it = mix.prepare(torch.zeros(2, 4, 4, 4), ids=torch.tensor([6, 7]))
    assert torch.equal(tensors["t"], it.t) and torch.equal(tensors["slowed_t"], it.slowed_t)
    assert sample["t"] == float(it.t[0]) and sample["m"] == float(it.slowed_t[0])
    if precision[1] < 3:
        assert {"x_embedder.proj", "final_layer.linear"} <= rank["grad_norm_by_module"].keys()
        # The step had spoilt the weights; the examination took others.
        assert rank["weights_not_finite"] and "began with" in content["examined_with"]
        assert tensors["loss_recomputed"].isnan().tolist() == [True, False]
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_weights_that_overflow_are_the_cause_and_no_sample(tmp_path: Path) -> None:
    """Finite numbers in the checkpoint, too large to compute with."""
    latents(tmp_path)
    config = configured(tmp_path, "run", 1, *settings("fp32", 0))
    state = build_model(config.model).state_dict()
    state["final_layer.linear.weight"] = torch.full_like(state["final_layer.linear.weight"], 1e38)
    state["final_layer.adaLN_modulation.1.bias"] = torch.ones(64)
    init = tmp_path / "huge.pt"
    torch.save({"ema": state}, init)
    with pytest.raises(TrainingDiverged) as caught:
        train(
            configured(tmp_path, "run", 1, f"train.init={init}", *settings("fp32", 0)), quiet=True
        )
    text = str(caught.value)
    assert "at step 1 (samples at positions 0 to 3). Not finite: the loss of every sample" in text
    assert f"the cause is the weights of this step, of train.init={init}, and not a sample" in text
    assert "Choose another checkpoint as train.init" in text and "Mend or remove" not in text


def test_a_gradient_alone_and_the_older_checkpoint(tmp_path: Path, monkeypatch) -> None:
    """All losses are finite, the gradient is not: said so; norms by module, of finite weights."""
    latents(tmp_path)
    config = configured(tmp_path, "run", 6, "train.save_every=2", "train.log_every=6")
    trainer = Trainer(config, quiet=True)
    forward = trainer.forward

    def spoilt(net, batch):
        made = forward(net, batch)
        if int(batch.positions[0]) == 8 and net is trainer.engine:  # step 3, as it was trained
            made.pred.register_hook(lambda g: g * torch.inf)
        return made

    monkeypatch.setattr(trainer, "forward", spoilt)
    with pytest.raises(TrainingDiverged, match="at step 3.*Every sample's loss was finite"):
        trainer.run()
    folder = tmp_path / "run" / "nonfinite" / checkpoint_name(3)
    content = json.loads((folder / "report.json").read_text())
    assert content["examined_with"] == "weights of the checkpoint step_00000002"
    norms = content["ranks"][0]["grad_norm_by_module"]
    assert norms["final_layer.linear"] > 0 and all(np.isfinite(list(norms.values())))


@pytest.mark.parametrize(
    "precision", [("fp32", 0), ("fp32", 1), ("bf16", 1), ("bf16", 2), ("fp32", 3)], ids=str
)
def test_a_skipped_step_changes_nothing(tmp_path: Path, precision: tuple) -> None:
    latents(tmp_path, (2,))
    more = [*settings(*precision), "train.on_nonfinite=skip", "train.save_every=1"]
    config = configured(tmp_path, "run", 3, *more)
    train(config, quiet=True)
    assert differing(states(config, 1), states(config, 2)) <= {"step"}
    after = differing(states(config, 2), states(config, 3))
    assert {"weight", "exp_avg", "exp_avg_sq", "ema"} <= after
    found = rows(config)
    assert [row["skipped"] for row in found] == [0, 1, 1]
    assert found[1]["loss"] is None and found[1]["grad_norm"] is None
    assert sum(found[1]["count_by_t"]) == 0 and sum(found[2]["count_by_t"]) == BATCH
    assert np.isfinite(found[2]["loss"]) and found[2]["grad_norm"] > 0


def test_a_run_with_skips_resumes_to_the_bit_and_fails_after_too_many(tmp_path: Path) -> None:
    latents(tmp_path, (2, 3), np.inf)
    more = [
        "train.on_nonfinite=skip",
        "train.zero_stage=1",
        "train.keep_last=1",
        "train.max_skips=2",
    ]
    train(configured(tmp_path, "whole", 4, *more), quiet=True)
    train(configured(tmp_path, "parts", 2, *more), quiet=True)
    train(configured(tmp_path, "parts", 4, *more), quiet=True)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    last = [rows(configured(tmp_path, name, 4, *more))[-1] for name in ("whole", "parts")]
    assert last[0]["loss"] == last[1]["loss"] and last[0]["skipped"] == last[1]["skipped"] == 2
    # One skip of the two in a row was before the resume.
    train(configured(tmp_path, "few", 2, *more, "train.max_skips=1"), quiet=True)
    with pytest.raises(TrainingDiverged, match="in a row: 2, more than train.max_skips = 1"):
        train(configured(tmp_path, "few", 4, *more, "train.max_skips=1"), quiet=True)


def test_no_snapshot_of_a_bad_step_is_written(tmp_path: Path) -> None:
    latents(tmp_path, (2,))
    more = ["optim.ema_sigma_rel=[0.1]", "optim.snapshot_every=1", "train.log_every=4"]
    with pytest.raises(TrainingDiverged, match="at step 2"):
        train(configured(tmp_path, "run", 4, *more), quiet=True)
    files = [path.name for path in (tmp_path / "run" / "ema").iterdir()]
    assert files == ["step_00000001.safetensors"]


def test_skipping_costs_no_bit_where_all_is_finite(tmp_path: Path) -> None:
    latents(tmp_path)
    for mode in ("stop", "skip"):
        train(configured(tmp_path, mode, 3, f"train.on_nonfinite={mode}"), quiet=True)
    assert_same_bits(tmp_path / "stop", tmp_path / "skip")


@pytest.mark.parametrize(
    ("precision", "bad"), [(("fp32", 0), 3), (("fp32", 1), 1), (("bf16", 2), 3)], ids=str
)
def test_going_back_is_a_run_without_that_step(tmp_path: Path, precision: tuple, bad: int) -> None:
    """The same bits as a run that was told from its start to leave the step out."""
    latents(tmp_path, (bad,))
    more = [*settings(*precision), "train.on_nonfinite=rollback", "train.log_every=4"]
    more += ["train.save_every=2"]
    config = configured(tmp_path, "back", 4, *more)
    result = train(config, quiet=True)
    assert result.finished
    told = Trainer(configured(tmp_path, "told", 4, *more), quiet=True)
    told.guard.left_out = [bad]
    told.run()
    other = configured(tmp_path, "told", 4, *more)
    for step in (2, 4):
        assert not differing(states(config, step), states(other, step))
    files = [torch.load(tmp_path / n / "weights.pt", weights_only=True) for n in ("back", "told")]
    for key in ("model", "ema"):
        for name, value in files[0][key].items():
            assert torch.equal(value, files[1][key][name]) and value.isfinite().all()
    last = rows(config)[-1]
    assert (last["skipped"], last["rollbacks"], last["step"]) == (1, 1, 4)
    folder = tmp_path / "back" / "checkpoints" / checkpoint_name(4)
    guard = json.loads((folder / "state.json").read_text())["safety"]
    assert guard["left_out"] == [bad] and guard["rollbacks"] == 1


def test_going_back_too_often_and_after_a_resume(tmp_path: Path) -> None:
    latents(tmp_path, (2, 3))
    more = ["train.on_nonfinite=rollback", "train.save_every=1", "train.max_rollbacks=2"]
    train(configured(tmp_path, "run", 2, *more), quiet=True)
    config = configured(tmp_path, "run", 4, *more)
    train(config, quiet=True)
    assert rows(config)[-1]["rollbacks"] == 2
    state = json.loads(
        (tmp_path / "run" / "checkpoints" / checkpoint_name(4) / "state.json").read_text()
    )
    assert state["safety"]["left_out"] == [2, 3]
    with pytest.raises(TrainingDiverged, match="went back 1 times already, train.max_rollbacks"):
        train(configured(tmp_path, "few", 4, *more, "train.max_rollbacks=1"), quiet=True)


def test_two_ranks_agree_where_one_has_the_bad_sample(tmp_path: Path) -> None:
    latents(tmp_path, (2,))
    common = ["train.on_nonfinite=skip", "train.images=16", "train.zero_stage=1"]
    own = overrides(tmp_path, *common)
    two = run_ranks(2, tmp_path / "d", tmp_path / "two", *own)
    assert two["ids"].unique().tolist() == list(range(16))
    one = load_config("photos", [*own, f"out={tmp_path / 'one'}"])
    train(one, quiet=True)
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("one", "two")
    ]
    assert losses[0][1] is None and losses[1][1] is None
    for place in (0, 2, 3):
        assert losses[1][place] == pytest.approx(losses[0][place], rel=2e-6)
    folder = tmp_path / "two" / "nonfinite" / checkpoint_name(2)
    assert {p.name for p in folder.iterdir()} == {"report.json", "rank_0.pt", "rank_1.pt"}
    ranks = json.loads((folder / "report.json").read_text())["ranks"]
    assert [rank["samples_not_finite"] for rank in ranks] == [0, 1]


def test_losses_by_t_add_up_to_the_loss(tmp_path: Path) -> None:
    latents(tmp_path)
    config = configured(tmp_path, "run", 4, "train.log_every=2", "objective.impl=triton")
    trainer = Trainer(config, quiet=True)
    times: list[torch.Tensor] = []
    prepare = trainer.mix.prepare

    def recording(x, ids, dtype, y):
        times.append(prepare(x, ids=ids, dtype=dtype, y=y).t)
        return prepare(x, ids=ids, dtype=dtype, y=y)

    trainer.mix.prepare = recording
    trainer.run()
    whole = torch.cat(times).view(2, 2 * BATCH)
    for row, t in zip(rows(config), whole, strict=True):
        expected = torch.histc(t, T_BUCKETS, 0, 1).int().tolist()
        assert row["count_by_t"] == expected and sum(expected) == 2 * BATCH
        pairs = zip(row["loss_by_t"], row["count_by_t"], strict=True)
        total = sum(loss * count for loss, count in pairs if count)
        assert total / sum(expected) == pytest.approx(row["loss"], rel=1e-6)
        assert [loss is None for loss in row["loss_by_t"]] == [not n for n in expected]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_float32_under_bf16(tmp_path: Path, stage: int) -> None:
    latents(tmp_path)
    trainer = Trainer(
        configured(tmp_path, "run", 2, *settings("bf16", stage), "train.on_nonfinite=skip"),
        quiet=True,
    )
    trained = [p for p in trainer.engine.module.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.bfloat16}
    made: list[torch.Tensor] = []
    optimizer = trainer.engine.optimizer
    step = optimizer.step

    def looking() -> None:
        step()
        made.extend(p.grad for group in optimizer.param_groups for p in group["params"])

    optimizer.step = looking
    trainer.run()
    masters = trainer.engine._partitions()
    assert masters and {p.dtype for p in masters} == {torch.float32}
    assert made and {g.dtype for g in made} == {torch.float32}
    assert len(optimizer.state) == len(masters)
    for state in optimizer.state.values():
        tensors = {k: v.dtype for k, v in state.items() if isinstance(v, torch.Tensor)}
        assert tensors.keys() == {"exp_avg", "exp_avg_sq", "ema"}
        assert set(tensors.values()) == {torch.float32}
    norm = torch.as_tensor(trainer.engine.grad_norm())  # ZeRO 3: of DeepSpeed
    assert norm.dtype == (torch.float64 if stage == 3 else torch.float32)
    record = trainer.guard.record
    assert record._rows.dtype == torch.float32
    content = torch.load(tmp_path / "run" / "weights.pt", weights_only=True)
    for key in ("model", "ema"):
        assert {value.dtype for value in content[key].values()} == {torch.float32}
        # Not bfloat16 values in a float32 tensor.
        weight = content[key]["blocks.0.mlp.fc1.weight"]
        assert not torch.equal(weight, weight.bfloat16().float())


def test_refused_settings(tmp_path: Path) -> None:
    for wrong, message in (
        ("train.on_nonfinite=ignore", "train.on_nonfinite must be one of"),
        ("train.max_skips=-1", "train.max_skips must be >= 0"),
        ("train.max_rollbacks=-1", "train.max_rollbacks must be >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(configured(tmp_path, "x", 1, wrong), quiet=True)


def test_an_examination_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU may be too full for a second backward pass."""

    def hungry(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    latents(tmp_path, (2,))
    monkeypatch.setattr(torch.autograd, "grad", hungry)
    result = train(configured(tmp_path, "skip", 4, "train.on_nonfinite=skip"), quiet=True)
    assert result.finished
    report = json.loads((result.out / "nonfinite" / "step_00000002" / "report.json").read_text())
    (rank,) = report["ranks"]
    assert rank["error"] == "OutOfMemoryError: out of memory"
    assert [sample["position"] for sample in rank["samples"]] == [BATCH + 2]
    message = rf"position {BATCH + 2}.*could not run it once more"
    with pytest.raises(TrainingDiverged, match=message):
        train(configured(tmp_path, "stop", 4), quiet=True)


@pytest.mark.parametrize("mode", ["stop", "rollback"])
def test_a_bad_step_waits_for_the_checkpoint_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The search reads the newest checkpoint, and a run goes back to it."""
    latents(tmp_path, (2,))
    may_write, plain_settle, plain = threading.Event(), Checkpoints.settle, CheckpointWriter.commit

    def commit(self: CheckpointWriter, *args: object, **kwargs: object) -> Path:
        if self.step == 1:
            assert may_write.wait(60)
        return plain(self, *args, **kwargs)

    def settle(self: Checkpoints) -> None:
        if trainer.step == 2:
            may_write.set()
        plain_settle(self)

    monkeypatch.setattr(CheckpointWriter, "commit", commit)
    monkeypatch.setattr(Checkpoints, "settle", settle)
    more = ["train.save_every=1", "train.keep_last=1", f"train.on_nonfinite={mode}"]
    trainer = Trainer(configured(tmp_path, "run", 3, *more), quiet=True)
    if mode == "stop":
        with pytest.raises(TrainingDiverged, match="at step 2"):
            trainer.run()
    else:
        assert trainer.run().finished
        assert trainer.guard.state.left_out == [2]
    report = tmp_path / "run" / "nonfinite" / checkpoint_name(2) / "report.json"
    assert checkpoint_name(1) in report.read_text()
