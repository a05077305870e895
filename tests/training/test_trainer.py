"""The trainer on real DeepSpeed: exact resume, ranks and micro-batches, EMA, refusals, kills."""

import importlib
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from mixflow_fast import folder_lock
from mixflow_fast.config.loading import load_config
from mixflow_fast.data import BatchLoader
from mixflow_fast.kernels import runtime
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.models import SiT, load_model
from mixflow_fast.objective.mixflow import MixFlow
from mixflow_fast.sampling.samples import sample
from mixflow_fast.training.build import build_model
from mixflow_fast.training.trainer import Trainer, TrainingDiverged, train
from tests.support.runs import (
    CountReads,
    Prefetched,
    assert_same_bits,
    first_positions,
    run_ranks,
    settings,
    start_cli,
    tiny,
    wait_for_step,
)

STAGES = [("fp32", 0), ("fp32", 1), ("bf16", 1), ("bf16", 2)]


@pytest.mark.parametrize(("precision", "stage"), STAGES)
def test_resume_is_bit_identical(tmp_path: Path, precision: str, stage: int) -> None:
    """6 steps = 3 steps + save + a new process's worth of state + 3 steps."""
    extra = [*settings(precision, stage), "train.keep_last=1", "optim.grad_clip=0.5"]
    train(tiny(tmp_path / "whole", *extra), quiet=True)
    half = train(tiny(tmp_path / "parts", *extra, "train.images=24"), quiet=True)
    assert (half.step, half.finished) == (3, True)
    rest = train(tiny(tmp_path / "parts", *extra), quiet=True)
    assert (rest.step, rest.images_seen) == (6, 48)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert [[r["step"], r["loss"]] for r in rows[0]] == [[r["step"], r["loss"]] for r in rows[1]]


@pytest.mark.parametrize(("precision", "stage"), [*STAGES, ("fp32", 3)])
def test_exported_ema_and_weights(tmp_path: Path, precision: str, stage: int) -> None:
    """After one step the EMA is decay * initial + (1 - decay) * new, under the official names."""
    config = tiny(
        tmp_path, *settings(precision, stage), "train.images=8", "optim.ema_decays=[0.75]"
    )
    initial = build_model(config.model).state_dict()
    content = torch.load(train(config, quiet=True).weights, weights_only=True)
    assert content["ema"].keys() == content["model"].keys() == initial.keys()
    moved = 0
    for name, new in content["model"].items():
        expected = 0.75 * initial[name] + 0.25 * new
        torch.testing.assert_close(content["ema"][name], expected, rtol=1e-6, atol=1e-7)
        moved += not torch.equal(new, initial[name])
    assert moved >= 2  # adaLN-Zero: the first step moves the last layer alone
    assert torch.equal(content["model"]["pos_embed"], initial["pos_embed"])


def test_the_fused_objective_trains_like_the_reference(tmp_path: Path) -> None:
    """Real DeepSpeed, two micro-batches a step (its upstream gradient is 1/2), kernels resumed."""
    common = ["train.microbatch_size=4", "optim.grad_clip=0.3", "train.images=24"]
    found = []
    for impl in ("reference", "triton"):
        config = tiny(tmp_path / impl, *common, f"objective.impl={impl}")
        trainer = Trainer(config, quiet=True)
        assert (
            trainer.objective
            == {"reference": "PyTorch reference", "triton": "Triton kernels"}[impl]
        )
        found.append((trainer.run(), read_metrics(tmp_path / impl / "metrics.jsonl")))
    (plain, rows), (fused, fused_rows) = found
    for a, b in zip(rows, fused_rows, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
    plain, fused = (torch.load(r.weights, weights_only=True)["model"] for r in (plain, fused))
    for name, weight in plain.items():
        torch.testing.assert_close(fused[name], weight, rtol=1e-4, atol=1e-6)
    config = tiny(tmp_path / "triton", *common[:2], "train.images=32", "objective.impl=reference")
    assert train(config, quiet=True).step == 4  # the implementation may change between parts


def test_kernels_that_cannot_run_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_INTERPRETING", False)
    with pytest.raises(ValueError, match='impl="triton" needs a CUDA device'):
        Trainer(tiny(tmp_path / "run", "objective.impl=triton", "train.device=cpu"), quiet=True)
    assert not (tmp_path / "run").exists()


def test_stages_and_precisions_agree(tmp_path: Path) -> None:
    """ZeRO changes where numbers live: warm-up, decay, clipping and accumulation stay."""
    common = ["optim.grad_clip=0.3", "optim.weight_decay=0.1", "optim.warmup_images=24"]
    common += ["optim.ema_decays=[0.5]", "train.microbatch_size=4", "optim.schedule=cosine"]
    found = {}
    for precision, stage in (*(("fp32", stage) for stage in range(4)), ("bf16", 2)):
        out = tmp_path / f"{precision}_{stage}"
        result = train(tiny(out, *common, *settings(precision, stage)), quiet=True)
        found[precision, stage] = (
            torch.load(result.weights, weights_only=True)["ema"],
            read_metrics(out / "metrics.jsonl"),
        )
    truth, rows = found.pop(("fp32", 0))
    assert len({row["lr"] for row in rows}) == len(rows)
    assert max(row["grad_norm"] for row in rows) > 0.3  # clipping had something to do
    for (precision, stage), (ema, others) in found.items():
        tolerance = 1e-5 if precision == "fp32" else 2e-2
        for row, other in zip(rows, others, strict=True):
            for key in ("loss", "grad_norm", "lr"):
                assert other[key] == pytest.approx(row[key], rel=tolerance), (stage, key)
        if precision == "fp32":
            for name, value in truth.items():
                torch.testing.assert_close(ema[name], value, rtol=1e-4, atol=2e-6)


def test_ranks_and_microbatches_train_on_the_same_stream(tmp_path: Path) -> None:
    common = ["train.images=32", "train.zero_stage=1"]
    one = run_ranks(1, tmp_path / "d1", tmp_path / "r1", *common)
    assert one["ids"].tolist() == list(range(32))
    assert len(one["t"].unique()) == 32
    losses = [row["loss"] for row in read_metrics(tmp_path / "r1" / "metrics.jsonl")]
    weights = torch.load(tmp_path / "r1" / "weights.pt", weights_only=True)["ema"]
    for name, ranks, micro in (("micro", 1, 2), ("ranks", 2, 2)):
        stream = run_ranks(
            ranks,
            tmp_path / f"d_{name}",
            tmp_path / name,
            *common,
            f"train.microbatch_size={micro}",
        )
        for key, value in one.items():
            assert torch.equal(stream[key], value), (name, key)
        others = [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        assert others == pytest.approx(losses, rel=2e-6)
        ema = torch.load(tmp_path / name / "weights.pt", weights_only=True)["ema"]
        for key, value in weights.items():
            torch.testing.assert_close(ema[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_two_ranks_resume_bit_identically(tmp_path: Path) -> None:
    common = ["train.microbatch_size=4", "train.zero_stage=1", "train.keep_last=1"]
    run_ranks(2, tmp_path / "d0", tmp_path / "whole", *common, "train.images=32")
    run_ranks(2, tmp_path / "d1", tmp_path / "parts", *common, "train.images=16")
    second = run_ranks(2, tmp_path / "d2", tmp_path / "parts", *common, "train.images=32")
    assert second["ids"].tolist() == list(range(16, 32))
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


def test_post_training_starts_model_and_ema_from_the_ema(tmp_path: Path) -> None:
    base = train(tiny(tmp_path / "base", "optim.ema_decays=[0.5]"), quiet=True)
    content = torch.load(base.weights, weights_only=True)
    config = tiny(tmp_path / "post", f"train.init={base.out}", "optim.lr=0", "train.images=16")
    after = torch.load(train(config, quiet=True).weights, weights_only=True)
    for name, ema in content["ema"].items():
        assert torch.equal(after["model"][name], ema)
        torch.testing.assert_close(after["ema"][name], ema, rtol=1e-6, atol=1e-9)
    assert not torch.equal(
        content["ema"]["blocks.0.mlp.fc1.weight"], content["model"]["blocks.0.mlp.fc1.weight"]
    )


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("fp32", 1), ("bf16", 2)])
def test_a_step_reads_nothing_from_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, stage: int
) -> None:
    overrides = [*settings(precision, stage), "optim.grad_clip=0.5", "train.microbatch_size=4"]
    trainer = Trainer(tiny(tmp_path, *overrides), quiet=True)
    c = trainer.config.train
    loader = BatchLoader(
        trainer.examples, seed=0, global_batch_size=8, microbatch_size=c.microbatch_size
    )
    ready = Prefetched(loader, 8)
    # The label range is checked on the CPU only.
    monkeypatch.setattr(SiT, "_check_inputs", lambda *_: None)
    for _ in range(3):  # DeepSpeed's timer, if it is on, begins with the third
        trainer.train_step(ready)
    waits: list[object] = []
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    monkeypatch.setattr(accelerator, "synchronize", lambda *device: waits.append(device))
    with CountReads() as counter:
        trainer.train_step(ready)
        assert counter.reads == 0 and not waits
        trainer.engine.optimizer.grad_norm.item()
    assert counter.reads == 1  # the counter counts


def test_repa_with_alignment_loss_on_latents(tmp_path: Path) -> None:
    """REPA's SiT on moments with teacher features: loss is flow + 0.5 * alignment."""
    import numpy as np

    g = np.random.default_rng(0)
    np.savez(
        tmp_path / "set.npz",
        moments=np.abs(g.normal(size=(16, 8, 8, 8))).astype(np.float16),
        labels=np.arange(16) % 3,
    )
    np.save(tmp_path / "teacher.npy", g.normal(size=(16, 16, 12)).astype(np.float32))
    overrides = [
        "model={name: SiT-S/2, input_size: 8, in_channels: 4, num_classes: 3, depth: 2, "
        "hidden_size: 32, num_heads: 2, z_dims: [12], encoder_depth: 1, projector_dim: 16}",
        f"data={{kind: latents, path: {tmp_path / 'set.npz'}, moments: true, scale: 0.18215, "
        f"features: {tmp_path / 'teacher.npy'}}}",
        "train.images=32",
        "train.global_batch_size=8",
        "train.microbatch_size=8",
        "train.log_every=1",
    ]
    np.save(tmp_path / "short.npy", g.normal(size=(16, 9, 12)).astype(np.float32))
    with pytest.raises(ValueError, match=r"data.features must be \(N, 16, 12\)"):
        wrong = [*overrides, "objective.alignment_weight=1", f"out={tmp_path / 'no'}"]
        train(load_config("photos", [*wrong, f"data.features={tmp_path / 'short.npy'}"]))
    losses = {}
    for weight in (0.0, 0.5):
        out = tmp_path / f"run_{weight}"
        extra = [] if weight else ["data.features=null"]
        config = load_config(
            "photos", [*overrides, *extra, f"out={out}", f"objective.alignment_weight={weight}"]
        )
        trainer = Trainer(config, quiet=True)
        assert trainer.mix.clock == "noise_at_1"
        trainer.run()
        losses[weight] = read_metrics(out / "metrics.jsonl")[0]["loss"]
    # The first step's network and batch are the same: the difference is half the alignment loss.
    batch = trainer.examples.get(*first_positions(trainer), seed=0)
    model = build_model(config.model)
    it = MixFlow(0.0, "noise_at_1", timesteps="uniform").prepare(batch.x, ids=batch.positions)
    y = batch.y
    z = model(it.x, it.t, y)[1][0].double()
    cosine = torch.nn.functional.cosine_similarity(z, batch.features.double(), dim=-1).mean()
    assert losses[0.5] - losses[0.0] == pytest.approx(-0.5 * cosine.item(), rel=1e-4)


REFUSALS = [
    (["model.in_channels=4"], "shape"),
    (["model.num_classes=1"], "classes"),
    (["model.patch_size=3"], "unknown key"),
    (["model.name=SiT-M/4"], "SiT-"),
    (["model.num_heads=5"], "num_heads"),
    (["train.precision=fp16"], "precision"),
    (["train.precision=bf16", "train.zero_stage=0"], "zero_stage"),
    (["objective.gamma=2"], "gamma"),
    (["objective.timesteps=beta"], "timesteps"),
    (["objective.alignment_weight=0.5"], "z_dims"),
    (["train.init=nowhere.pt"], "nowhere.pt"),
    (["model.class_dropout_prob=0"], "null class"),
    (["data={kind: folder, path: nowhere, size: 16}"], "nowhere"),
    (["data={kind: latents}"], "data.path"),
    (["data.moments=true"], "moments"),
    (["data.flip=false", "data.size=12"], "size"),
]
if not torch.cuda.is_available():
    REFUSALS.append((["train.device=cuda"], "cuda"))


@pytest.mark.parametrize(("overrides", "message"), REFUSALS)
def test_refusals_come_before_anything_is_written(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny(tmp_path / "run", *overrides), quiet=True)
    assert not (tmp_path / "run").exists()


def test_wrong_checkpoint_is_refused(tmp_path: Path) -> None:
    base = train(tiny(tmp_path / "base", "train.images=8"), quiet=True)
    with pytest.raises(ValueError, match=r"is SiT of width 32, .* set model.hidden_size=32"):
        train(
            tiny(tmp_path / "wide", "model.hidden_size=64", f"train.init={base.weights}"),
            quiet=True,
        )
    (tmp_path / "broken.pt").write_bytes(base.weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="broken.pt"):
        train(tiny(tmp_path / "b", f"train.init={tmp_path / 'broken.pt'}"), quiet=True)
    assert not (tmp_path / "wide").exists() and not (tmp_path / "b").exists()


def test_another_configuration_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    train(tiny(tmp_path, "train.images=8"), quiet=True)
    with pytest.raises(ValueError, match=r"objective.gamma: 0.5 -> 0.9"):
        train(tiny(tmp_path, "objective.gamma=0.9"), quiet=True)
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny(tmp_path), resume="never", quiet=True)


def test_killed_and_interrupted_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    """kill -9, then Ctrl-C, then to the end: as if nothing had happened."""
    length = ["train.images=640", "train.save_every=5", "train.keep_last=1"]
    killed = start_cli(tmp_path / "run", "train.images=1000000", *length[1:])
    wait_for_step(killed, tmp_path / "run", 12)
    killed.kill()
    killed.communicate()
    interrupted = start_cli(tmp_path / "run", "train.images=1000000", *length[1:])
    wait_for_step(interrupted, tmp_path / "run", 25)
    interrupted.send_signal(signal.SIGINT)
    _, errors = interrupted.communicate(timeout=120)
    assert interrupted.returncode == 0, errors[-3000:]
    assert "the same command resumes" in errors
    state = json.loads(next((tmp_path / "run").glob("checkpoints/step_*/state.json")).read_text())
    assert 25 <= state["step"]
    length[0] = f"train.images={8 * (state['step'] + 10)}"
    for name in ("run", "whole"):
        process = start_cli(tmp_path / name, *length)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    assert_same_bits(tmp_path / "run", tmp_path / "whole")
    steps = [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == list(range(1, state["step"] + 11))
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing_*"))


def test_zero_3_exports_parameters_that_it_really_shards(tmp_path: Path) -> None:
    """Above 1e5 elements ZeRO 3 empties a parameter; pos_embed (256 x 400) is frozen and large."""
    wide = ["model.hidden_size=400", "model.num_heads=2", "model.name=SiT-S/2", "data.size=32"]
    wide += ["model.input_size=32", "train.images=8", "train.zero_stage=3"]
    config = tiny(tmp_path, *wide, "optim.ema_decays=[0.75]")
    initial = build_model(config.model).state_dict()
    content = torch.load(train(config, quiet=True).weights, weights_only=True)
    for name, new in content["model"].items():
        expected = 0.75 * initial[name] + 0.25 * new
        torch.testing.assert_close(content["ema"][name], expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(content["model"]["final_layer.linear.weight"], torch.zeros(12, 400))


def test_divergence_stops_the_run_and_saves_nothing_of_it(tmp_path: Path) -> None:
    options = ["optim.lr=1e30", "train.save_every=1", "train.save_weights=always"]
    with pytest.raises(TrainingDiverged, match="positions"):
        train(tiny(tmp_path, "train.images=800", *options), quiet=True)
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        assert torch.isfinite(torch.tensor(row["loss"]))
    content = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(value.isfinite().all() for value in content["ema"].values())


def test_checkpoints_say_how_their_network_was_built(tmp_path: Path) -> None:
    base = train(tiny(tmp_path / "base", "train.images=8"), quiet=True)
    with pytest.raises(ValueError, match="num_heads=2, this model has 4"):
        train(tiny(tmp_path / "x", "model.num_heads=4", f"train.init={base.out}"), quiet=True)
    noise = train(tiny(tmp_path / "n", "train.images=8", "objective.prediction=noise"), quiet=True)
    with pytest.raises(ValueError, match="'noise'"):
        sample(load_model(noise.weights), num=1, steps=1, batch_size=1)


def test_weights_without_checkpoints_are_not_overwritten(tmp_path: Path) -> None:
    result = train(tiny(tmp_path, "train.images=8"), quiet=True)
    result.weights.unlink()
    train(tiny(tmp_path, "train.images=8"), quiet=True)  # finished: puts weights.pt back
    kept = result.weights.read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="checkpoints are gone"):
        train(tiny(tmp_path, "train.images=8"), quiet=True)
    assert result.weights.read_bytes() == kept


@pytest.mark.filterwarnings("ignore:.* is in use by another run")
def test_one_folder_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "WAIT_S", 0.2)
    first = Trainer(tiny(tmp_path), quiet=True)
    with pytest.raises(ValueError, match="in use by another run"):
        Trainer(tiny(tmp_path), quiet=True)
    assert first.run().finished


def test_a_descending_rate_fixes_the_length(tmp_path: Path) -> None:
    cosine = "optim.schedule=cosine"
    train(tiny(tmp_path, "train.images=8", cosine), quiet=True)
    with pytest.raises(ValueError, match="train.images: 8 -> 80"):
        train(tiny(tmp_path, "train.images=80", cosine), quiet=True)


def test_full_disk_keeps_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny(tmp_path, "train.images=8"), quiet=True)

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mixflow_fast.training.saving.save_weights", full)
    with pytest.raises(OSError, match="could not be written.*No space left"):
        train(tiny(tmp_path, "train.images=16"), quiet=True)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    monkeypatch.undo()
    assert train(tiny(tmp_path, "train.images=16"), quiet=True).step == 2
