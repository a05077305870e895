"""Runs with a mixed source: it is trained, averaged, saved, resumed and frozen with the network."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from mixflow_fast.checkpoints.consolidate import consolidate
from mixflow_fast.data import BatchLoader
from mixflow_fast.data.label_dropout import LabelDropout
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.models import SiT, load_model
from mixflow_fast.models.weights.sources import load_source
from mixflow_fast.training.build import build_model
from mixflow_fast.training.source import FAR, SourceHealth
from mixflow_fast.training.step_record import StepOutput
from mixflow_fast.training.trainer import Trainer, TrainingDiverged, train
from tests.support.runs import (
    MIXED,
    CountReads,
    Prefetched,
    assert_same_bits,
    first_positions,
    run_ranks,
    settings,
    tiny,
    tiny_mixed,
)

TABLE = ["source.kappa=class", "source.predictor=table", "source.widths=null"]
TABLE += ["source.groups=null", "source.layers=null"]


def weights(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(out / "weights.pt", weights_only=True)


@pytest.mark.parametrize(
    ("precision", "stage"),
    [
        *(("fp32", 0), ("bf16", 2), ("fp32", 3), ("bf16", "ddp")),
        *(pytest.param("bf16", stage, marks=pytest.mark.long) for stage in (1, 3)),
    ],
)
def test_network_and_source_move_and_both_have_an_average(
    tmp_path: Path, precision: str, stage: int | str
) -> None:
    """After one step the EMA is decay * initial + (1 - decay) * new, for the source as well."""
    engine = ["train.engine=ddp", "train.zero_stage=0", f"train.precision={precision}"]
    how = engine if stage == "ddp" else settings(precision, stage)
    config = tiny_mixed(tmp_path, *how, "train.images=8", "optim.ema_decays=[0.75]")
    trainer = Trainer(config, quiet=True)
    initial = trainer.engine.full_states(stepped=False)[0]
    trainer.run()
    content = weights(tmp_path)
    official = build_model(config.model).state_dict().keys()
    assert content["model"].keys() == content["ema"].keys() == official
    assert content["source"].keys() == content["source_ema"].keys()
    for which, prefix in (("model", ""), ("source", "source.")):
        ema = content["ema" if which == "model" else "source_ema"]
        moved = 0
        for name, new in content[which].items():
            first = initial[prefix + name]
            torch.testing.assert_close(ema[name], 0.75 * first + 0.25 * new, rtol=1e-6, atol=1e-7)
            moved += not torch.equal(new, first)
        assert moved >= 2, which
    # The gradient comes through the network's input and the target: every tensor of the source has
    # one at once, but for what vanishes in its norms.
    assert (
        sum(not torch.equal(v, initial["source." + n]) for n, v in content["source"].items()) > 10
    )


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 2)])
def test_resume_is_bit_identical(tmp_path: Path, precision: str, stage: int) -> None:
    extra = [*settings(precision, stage), "train.keep_last=1", "train.microbatch_size=4"]
    train(tiny_mixed(tmp_path / "whole", *extra, "train.images=32"), quiet=True)
    train(tiny_mixed(tmp_path / "parts", *extra, "train.images=16"), quiet=True)
    train(tiny_mixed(tmp_path / "parts", *extra, "train.images=32"), quiet=True)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    # `consolidate` makes the same file of the shards, with the source.
    consolidate(tmp_path / "parts", tmp_path / "again.pt")
    again, online = torch.load(tmp_path / "again.pt"), weights(tmp_path / "parts")
    assert again.keys() == online.keys() and again["args"] == online["args"]
    for key in ("model", "ema", "source", "source_ema"):
        assert list(again[key]) == list(online[key])
        assert all(torch.equal(again[key][name], tensor) for name, tensor in online[key].items())


def test_another_stage_and_engine_take_the_source_over(tmp_path: Path) -> None:
    """ddp puts the source first, ZeRO last: shards are read by name."""
    whole = train(tiny_mixed(tmp_path / "whole", "train.images=32"), quiet=True)
    train(tiny_mixed(tmp_path / "parts", "train.images=16", *settings("fp32", 2)), quiet=True)
    ddp = ["train.engine=ddp", "train.zero_stage=0"]
    train(tiny_mixed(tmp_path / "parts", "train.images=24", *ddp), quiet=True)
    train(tiny_mixed(tmp_path / "parts", "train.images=32", "train.zero_stage=3"), quiet=True)
    one, other = weights(whole.out), weights(tmp_path / "parts")
    for key in ("model", "source", "source_ema"):
        for name, tensor in one[key].items():
            torch.testing.assert_close(other[key][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_ranks_see_the_same_draws(tmp_path: Path) -> None:
    common = [*MIXED, "train.images=16", "train.microbatch_size=4", "train.precision=fp32"]
    one = run_ranks(1, tmp_path / "d1", tmp_path / "one", *common)
    two = run_ranks(2, tmp_path / "d2", tmp_path / "two", *common)
    for key in ("ids", "t", "x1", "w"):
        assert torch.equal(one[key], two[key]), key
    assert torch.equal(one["x0"][:8], two["x0"][:8])  # before the first update
    torch.testing.assert_close(one["x0"], two["x0"], rtol=1e-4, atol=1e-5)  # sums of two ranks


def test_a_frozen_source_stays_to_the_bit(tmp_path: Path) -> None:
    """The method in two parts: source and network together, then slowed interpolation on top."""
    base = train(tiny_mixed(tmp_path / "base", "train.images=16"), quiet=True)
    config = tiny_mixed(
        *(tmp_path / "post", f"train.init={base.out}", "source.frozen=true", "source.lam=null"),
        *("objective.gamma=0.5", "objective.timesteps=beta21", "train.images=16"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer = Trainer(config, quiet=True)
    seen: list[StepOutput] = []
    trainer.on_step = lambda step, outputs, means: seen.extend(outputs)
    trainer.run()
    first, after = weights(base.out), weights(tmp_path / "post")
    for name, tensor in first["source_ema"].items():
        assert torch.equal(after["source"][name], tensor)
        assert torch.equal(after["source_ema"][name], tensor)
    assert any(not torch.equal(after["model"][n], t) for n, t in first["ema"].items())
    assert (seen[0].it.slowed_t < seen[0].it.t).all() and not seen[0].it.x.requires_grad
    assert seen[0].it.source.kl_weight == 0
    (start,) = (row for row in read_metrics(tmp_path / "post" / "metrics.jsonl", "start"))
    assert "frozen, so it has no KL" in start["source"] and str(base.out) in start["source"]
    # And it resumes, bit for bit as one run.
    train(config.replace(**{"out": str(tmp_path / "whole"), "train.images": 24}), quiet=True)
    train(config.replace(**{"train.images": 24}), quiet=True)
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "post")
    assert all(torch.equal(two["ema"][name], tensor) for name, tensor in one["ema"].items())


def test_starting_weights_with_and_without_a_source(tmp_path: Path) -> None:
    mixed = train(tiny_mixed(tmp_path / "mixed", "train.images=16"), quiet=True)
    plain = train(tiny(tmp_path / "plain", "train.images=16"), quiet=True)
    still = ["optim.lr=0", "train.images=8"]

    def start(name: str, init: Path, *overrides: str) -> tuple[dict, str]:
        config = tiny_mixed(tmp_path / name, f"train.init={init}", *still, *overrides)
        train(config, quiet=True)
        (row,) = read_metrics(tmp_path / name / "metrics.jsonl", "start")
        return weights(tmp_path / name), row["source"]

    found, said = start("carried", mixed.out)
    assert said.endswith(f"starts from the EMA source of {mixed.out}")
    for name, tensor in weights(mixed.out)["source_ema"].items():
        assert torch.equal(found["source"][name], tensor)
    found, said = start("own", plain.out)
    assert said.endswith(f"starts from its own first weights, as {plain.out} holds no source")
    fresh = Trainer(tiny_mixed(tmp_path / "fresh", *still), quiet=True)
    for name, tensor in fresh.model.source.state_dict().items():
        assert torch.equal(found["source"][name], tensor), name
    for name, tensor in weights(plain.out)["ema"].items():
        assert torch.equal(found["model"][name], tensor), name
    fresh.close()
    with pytest.warns(UserWarning, match="was trained with a source .mixed, kappa data"):
        train(tiny(tmp_path / "left", f"train.init={mixed.out}", *still), quiet=True)
    assert "source" not in weights(tmp_path / "left")
    with pytest.raises(ValueError, match=r"widths \[8\] instead of \[16\].*the same source"):
        start("other", mixed.out, "source.widths=[8]")
    with pytest.raises(ValueError, match="plain.* holds none: give a run with source.kind=mixed"):
        start("no", plain.out, "source.frozen=true")
    with pytest.raises(ValueError, match="otherwise: set source.mode=moments source.w=uniform, or"):
        start("mixes", mixed.out, "source.frozen=true", "source.mode=samples", "source.w=1")
    assert not any((tmp_path / name).exists() for name in ("other", "no", "mixes"))


def test_a_dropped_label_is_not_hidden_from_the_source(tmp_path: Path) -> None:
    """The network gets the null class where the loader would give it; the source every label."""
    config = tiny_mixed(tmp_path, *TABLE, "train.images=8", "train.label_dropout=0.5")
    trainer = Trainer(config, quiet=True)
    with torch.no_grad():
        rows = trainer.model.source.table.weight
        rows.copy_(torch.arange(1.0, len(rows) + 1)[:, None].expand_as(rows) / 8)
    seen: list[StepOutput] = []
    trainer.on_step = lambda step, outputs, means: seen.extend(outputs)
    trainer.run()
    indices, positions = first_positions(trainer)
    true = trainer.dataset.get(indices, positions, 0).y
    dropped = LabelDropout(trainer.dataset, 0.5, trainer.model.null_class)
    expected = dropped.get(indices, positions, 0).y
    assert torch.equal(seen[0].y, expected) and not torch.equal(expected, true)
    assert torch.equal(seen[0].it.source.mean[:, 0, 0, 0], (true + 1) / 8)


def test_a_table_begins_at_plain_flow_matching(tmp_path: Path) -> None:
    """Mean and log-variance are zero: the first step has the bits of a run with N(0, I)."""
    first = [*settings("fp32", 0), "train.images=8"]
    train(tiny_mixed(tmp_path / "mixed", *first, *TABLE), quiet=True)
    plain = ["objective.gamma=0", "objective.timesteps=uniform"]
    train(tiny(tmp_path / "plain", *first, *plain), quiet=True)
    one, two = weights(tmp_path / "mixed"), weights(tmp_path / "plain")
    assert all(torch.equal(one["model"][name], tensor) for name, tensor in two["model"].items())
    assert one["source"]["table.weight"].any()


def test_numbers_of_the_source_are_in_every_row(tmp_path: Path) -> None:
    train(tiny_mixed(tmp_path, "train.log_every=2", "train.images=24"), quiet=True)
    rows = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "source_kl" in r]
    assert [row["step"] for row in rows] == [2, 3]
    for row in rows:
        assert row["source_kl"] > 0 and 0.3 < row["source_sigma"] < 1.5
        assert row["source_distance"] >= 0 and 0.3 < row["source_aggregate_var"] < 2
    train(tiny(tmp_path / "plain", "train.images=8"), quiet=True)
    assert "source_kl" not in read_metrics(tmp_path / "plain" / "metrics.jsonl")[0]


def test_a_source_far_from_the_normal_is_said_once(tmp_path: Path) -> None:
    trainer = Trainer(tiny_mixed(tmp_path, "train.images=8"), quiet=True)
    source = trainer.mix.source
    health = SourceHealth(source, trainer.config.train, 8, trainer.host_group)
    row = {"source_distance": 2 * FAR, "source_aggregate_var": 0.5, "source_aggregate_mean": 0.1}
    near = row | {"source_distance": FAR / 2}
    said = [health.warning(r) for r in (row, near, row, row, row, near, row, row)]
    assert [bool(text) for text in said] == [False] * 3 + [True] + [False] * 4
    assert "variance 0.5 and mean 0.1" in said[3] and "source.lam" in said[3]
    source.kappa = "noise"  # samples begin at the source itself
    quiet = SourceHealth(source, trainer.config.train, 8, trainer.host_group)
    assert not any(quiet.warning(row) for _ in range(5))
    trainer.close()


def test_a_step_reads_nothing_from_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one whose source is looked at, as every step is here."""
    trainer = Trainer(tiny_mixed(tmp_path, *settings("bf16", 2), "train.microbatch_size=4"))
    loader = BatchLoader(trainer.examples, seed=0, global_batch_size=8, microbatch_size=4)
    ready = Prefetched(loader, 8)
    monkeypatch.setattr(SiT, "_check_inputs", lambda *_: None)
    for _ in range(3):
        trainer.train_step(ready)
    with CountReads() as counter:
        trainer.train_step(ready)
        assert counter.reads == 0
        row = trainer._source_health.row(trainer.step)
    assert row["source_kl"] > 0
    trainer.close()


def test_validation_draws_from_the_source(tmp_path: Path) -> None:
    """With a source that is N(0, I) the losses are those of plain flow matching at that noise."""
    watch = ["train.validate_every=1", "train.validate_examples=2", "train.images=8"]
    train(tiny_mixed(tmp_path / "a", *watch, "source.zero_init=true"), quiet=True)
    train(tiny_mixed(tmp_path / "b", *watch, "source.w=0", "source.zero_init=true"), quiet=True)
    a, b = (read_metrics(tmp_path / name / "metrics.jsonl", "validation") for name in ("a", "b"))
    assert a[0]["model"]["loss"] == b[0]["model"]["loss"] > 0  # zero_init: w does not matter yet
    assert a[1]["model"]["loss"] != b[1]["model"]["loss"]


def test_validation_has_the_kl_of_the_run_and_no_perturbed_input(tmp_path: Path) -> None:
    """The copy that is validated has no gradients, and its source is not frozen for that."""

    def first_loss(name: str, *overrides: str) -> float:
        watch = ["train.validate_every=2", "train.validate_examples=2", "train.images=8"]
        train(tiny_mixed(tmp_path / name, *watch, *overrides), quiet=True)
        return read_metrics(tmp_path / name / "metrics.jsonl", "validation")[0]["ema"]["loss"]

    without, once, twice = (first_loss(lam, f"source.lam={lam}") for lam in ("0", "0.5", "1"))
    assert once > without + 1e-3
    assert twice - once == pytest.approx(once - without, rel=1e-5)
    assert first_loss("noisier", "source.lam=0", "objective.input_perturbation=0.5") == without


def test_a_bad_sample_is_named(tmp_path: Path) -> None:
    """The examination runs the source once more, and looks at its gradients."""
    trainer = Trainer(tiny_mixed(tmp_path, "train.images=16"), quiet=True)
    made = trainer.forward

    def spoiled(net: object, batch: object) -> StepOutput:
        out = made(net, batch)
        samples = torch.where(out.it.ids == 3, torch.nan, out.samples)
        return StepOutput(out.it, out.y, out.pred, out.alignment, out.loss * torch.nan, samples)

    trainer.forward = spoiled
    with pytest.raises(TrainingDiverged, match="at position 3"):
        trainer.run()
    (report,) = (tmp_path / "nonfinite").glob("step_*/report.json")
    norms = json.loads(report.read_text())["ranks"][0]["grad_norm_by_module"]
    assert any(name.startswith("source.") for name in norms)


def test_the_files_of_a_run_load_without_its_source(tmp_path: Path) -> None:
    """What stands under "ema" is the network alone, for loaders that know nothing of a source."""
    run = train(tiny_mixed(tmp_path, "train.images=8"), quiet=True)
    config = load_model(run.out).config
    SiT(**config).load_state_dict(weights(run.out)["ema"], strict=True)
    stored = load_source(run.out)
    assert stored.source.kappa == "data" and stored.source.weights(768) == (0.3, 0.3 / 768)
    for name, tensor in stored.source.predictor.state_dict().items():
        assert torch.equal(tensor, weights(run.out)["source_ema"][name])


def test_the_kernels_train_like_the_reference(tmp_path: Path) -> None:
    found = []
    for impl in ("reference", "triton"):
        out = tmp_path / impl
        own = [f"objective.impl={impl}", "train.microbatch_size=4", "train.images=24"]
        train(tiny_mixed(out, *own, *settings("fp32", 0), "source.groups=2"), quiet=True)
        found.append((read_metrics(out / "metrics.jsonl"), weights(out)))
    (rows, plain), (fused_rows, fused) = found
    for a, b in zip(rows, fused_rows, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
        assert b["source_kl"] == pytest.approx(a["source_kl"], rel=1e-4)
    trainer = Trainer(tiny_mixed(tmp_path / "first", "source.groups=2"), quiet=True)
    initial = trainer.engine.full_states(stepped=False)[0]
    trainer.close()
    for key, prefix in (("model", ""), ("source", "source.")):
        # Softmax does not see a shift of all keys: Adam makes steps of that gradient's rounding.
        names = [n for n in plain[key] if not n.endswith("to_k.bias")]
        moved = torch.cat([(plain[key][n] - initial[prefix + n]).flatten() for n in names])
        apart = torch.cat([(fused[key][n] - plain[key][n]).flatten() for n in names])
        assert apart.norm() < 1e-3 * moved.norm(), key


def test_dropped_sources_are_plain_noise_on_examples_of_their_own(tmp_path: Path) -> None:
    """w = 0 by a stream of its own: neither the other weights nor the labels change with it."""

    def seen(name: str, *overrides: str) -> StepOutput:
        common = ["train.images=64", "train.global_batch_size=64", "train.microbatch_size=64"]
        config = tiny_mixed(tmp_path / name, *TABLE, *common, "train.label_dropout=0.5", *overrides)
        trainer, found = Trainer(config, quiet=True), []
        trainer.on_step = lambda step, outputs, means: found.extend(outputs)
        trainer.run()
        return found[0]

    plain, some = seen("plain"), seen("some", "source.dropout=0.5")
    dropped = some.it.source.w == 0
    assert 16 < int(dropped.sum()) < 48 and not (plain.it.source.w == 0).any()
    assert torch.equal(some.it.source.w[~dropped], plain.it.source.w[~dropped])
    assert torch.equal(some.y, plain.y)
    both = dropped & (some.y == 2)
    assert 4 < int(both.sum()) < int(dropped.sum()) - 4  # independent of the labels' dropout
