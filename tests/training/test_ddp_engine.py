"""The engine that keeps all state on every rank: same steps, same bits after a resume."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mixflow_fast.checkpoints.consolidate import consolidate
from mixflow_fast.checkpoints.ema_snapshots import extract
from mixflow_fast.checkpoints.resume import resharded_from
from mixflow_fast.checkpoints.run_folder import newest_checkpoint
from mixflow_fast.checkpoints.shards import full_states, read_layout
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.models import SiT
from mixflow_fast.training.ddp_engine import DDPEngine, MasterGradients
from mixflow_fast.training.trainer import Trainer, train
from tests.support.launchers import environment, on_ranks
from tests.support.runs import (
    ODD,
    ROOT,
    CountReads,
    Prefetched,
    assert_same_bits,
    assert_same_states,
    settings,
    tiny,
)
from tests.support.train_ranks import TINY

# As the recipes run DeepSpeed, and in float32.
HALF_AND_SINGLE = [("bf16", 2), pytest.param("fp32", 0, marks=pytest.mark.long)]
RANKS = "tests.support.communication_ranks"
DDP = ["train.engine=ddp", "train.zero_stage=0"]
# Two micro-batches a step on one rank and on two, a rate that changes, clipping, three averages.
HOW = ["train.microbatch_size=2", "train.global_batch_size=8", "train.keep_last=1"]
HOW += ["optim.warmup_images=12", "optim.grad_clip=0.5"]
HOW += ["optim.ema_decays=[0.9,0.99]", "optim.ema_sigma_rel=[0.1]"]


def ddp(precision: str, *more: str) -> list[str]:
    return [*DDP, f"train.precision={precision}", *HOW, *more]


SKIPPING = ["train.on_nonfinite=skip", *ODD]
RESUMED = [("fp32", []), ("bf16", SKIPPING)]
LONG = [("fp32", SKIPPING), ("bf16", [])]


@pytest.mark.parametrize(
    ("precision", "more"), [*RESUMED, *(pytest.param(*c, marks=pytest.mark.long) for c in LONG)]
)
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, precision: str, more: list[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny(whole, *ddp(precision, "train.images=32", *more)), quiet=True)
    train(tiny(parts, *ddp(precision, "train.images=16", *more)), quiet=True)
    resumed = Trainer(tiny(parts, *ddp(precision, "train.images=32", *more)), quiet=True)
    assert resumed.step == 2 and not resumed._start.resharded_from
    resumed.run()
    assert_same_bits(whole, parts)


def test_many_ranks(tmp_path: Path) -> None:
    """Two ranks: the same bits after a resume, with any buckets, and the losses of one rank, which
    may also go on alone.
    """
    cases, small = [], "train.reduce_bucket_size=4000"
    for precision in ("fp32", "bf16"):
        own = ddp(precision)
        cases.append((f"{precision}_whole", [*own, "train.images=32"]))
        cases += [(f"{precision}_parts", [*own, f"train.images={n}"]) for n in (16, 32)]
        cases.append((f"{precision}_small", [*own, small, "train.images=32"]))
    cases.append(("narrow", [*ddp("bf16"), "train.reduce_dtype=bf16", "train.images=32"]))
    cases.append(("left", [*ddp("bf16"), "train.images=16"]))
    on_ranks(2, RANKS, "runs", str(tmp_path), json.dumps(cases))
    for precision in ("fp32", "bf16"):
        whole = tmp_path / f"{precision}_whole"
        for other in ("parts", "small"):
            assert_same_bits(whole, tmp_path / f"{precision}_{other}")
        alone = tmp_path / f"{precision}_alone"
        train(tiny(alone, *ddp(precision, "train.images=32")), quiet=True)
        assert losses(whole) == pytest.approx(
            losses(alone), rel=1e-5 if precision == "fp32" else 2e-3
        )
    assert losses(tmp_path / "narrow") == pytest.approx(losses(tmp_path / "bf16_alone"), rel=1e-2)
    assert losses(tmp_path / "narrow") != losses(tmp_path / "bf16_whole")
    left = Trainer(tiny(tmp_path / "left", *ddp("bf16", "train.images=32")), quiet=True)
    assert left.step == 2 and not left._start.resharded_from
    left.run()
    assert losses(tmp_path / "left")[:2] == losses(tmp_path / "bf16_whole")[:2]
    assert losses(tmp_path / "left") == pytest.approx(losses(tmp_path / "bf16_alone"), rel=2e-3)


def test_mode_graph_on_two_ranks(tmp_path: Path) -> None:
    """The bits of mode eager, while DDP holds the gradients; the optimizer's steps are replays."""
    cases = [("fp32", ddp("fp32", "train.images=24")), ("bf16", ddp("bf16", "train.images=24"))]
    on_ranks(2, RANKS, "graphs", str(tmp_path), json.dumps(cases))
    for name, _ in cases:
        assert_same_bits(tmp_path / f"{name}_eager", tmp_path / f"{name}_graph")


@pytest.mark.long
def test_three_ranks_resume_to_the_bit(tmp_path: Path) -> None:
    """Sums of three depend on where an element stands in a bucket, so the buckets must not move."""
    cases = []
    for precision in ("fp32", "bf16"):
        own = [*ddp(precision), "train.global_batch_size=12", "train.reduce_bucket_size=4000"]
        cases.append((f"{precision}_whole", [*own, "train.images=48"]))
        cases += [(f"{precision}_parts", [*own, f"train.images={n}"]) for n in (24, 48)]
    on_ranks(3, RANKS, "runs", str(tmp_path), json.dumps(cases))
    for precision in ("fp32", "bf16"):
        assert_same_bits(tmp_path / f"{precision}_whole", tmp_path / f"{precision}_parts")


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize(("precision", "stage"), HALF_AND_SINGLE)
def test_deepspeed_makes_the_same_steps(tmp_path: Path, precision: str, stage: int) -> None:
    """To the last bit on one rank: the same gradients reach the same optimizer.

    Without clipping: ZeRO adds a flat partition's norm up in another order.
    """
    own = [f"train.precision={precision}", *HOW, "train.images=24", "optim.grad_clip=0"]
    train(tiny(tmp_path / "ddp", *own, *DDP), quiet=True)
    train(tiny(tmp_path / "zero", *own, f"train.zero_stage={stage}"), quiet=True)
    assert losses(tmp_path / "ddp") == losses(tmp_path / "zero")
    ours, theirs = (full_states(newest_checkpoint(tmp_path / n)) for n in ("ddp", "zero"))
    assert_same_states(ours, theirs)


@pytest.mark.parametrize(("precision", "stage"), HALF_AND_SINGLE)
def test_the_engine_may_change_on_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str, stage: int
) -> None:
    """The state moves to the bit, there and back."""
    out = tmp_path / "run"
    zero = [f"train.precision={precision}", f"train.zero_stage={stage}", *HOW]
    train(tiny(out, *zero, "train.images=16"), quiet=True)
    for number, own in enumerate((ddp(precision), zero)):
        before = shutil.copytree(newest_checkpoint(out), tmp_path / f"before_{number}")
        config = tiny(out, *own, "train.images=24")
        was = "the engine ddp" if number else f"ZeRO {stage}"
        assert resharded_from(before, config.train, 1) == f"1 rank, {was}"
        trainer = Trainer(config, quiet=True)
        assert not trainer.engine.load(before)
        assert_same_states(full_states(before), full_states(trainer.save()))
        trainer.close()
    train(tiny(out, *ddp(precision), "train.images=24"))
    assert f"its checkpoint is of 1 rank, ZeRO {stage}: " in capsys.readouterr().err
    train(tiny(tmp_path / "whole", *ddp(precision), "train.images=24"), quiet=True)
    assert_same_bits(out, tmp_path / "whole")


def test_going_back_and_what_the_network_computes_with(tmp_path: Path) -> None:
    """After steps, a way back, and a further step bf16 weights are the masters rounded."""
    trainer = Trainer(tiny(tmp_path, *ddp("bf16"), "train.images=32"), quiet=True)

    def assert_rounded() -> None:
        masters = dict(trainer.engine.gathered("model", stepped=True))
        for name, parameter in trainer.engine.module.named_parameters():
            if parameter.requires_grad:
                assert parameter.dtype == torch.bfloat16
                assert torch.equal(parameter, masters[name].bfloat16()), name

    assert_rounded()
    beginning = trainer.save()
    saved = full_states(shutil.copytree(beginning, tmp_path / "saved"))
    with trainer.loader() as loader:
        for _ in range(2):
            trainer.train_step(loader)
            assert_rounded()
        assert trainer.engine.load(beginning)
        assert_rounded()
        trainer.step = 0
        shutil.rmtree(beginning)
        assert_same_states(saved, full_states(trainer.save()))
        trainer.train_step(loader)
        assert_rounded()
    trainer.close()


def test_no_read_and_no_gradient_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step reads nothing on the host and leaves the network's gradients empty."""
    monkeypatch.setattr(SiT, "_check_inputs", lambda *_: None)  # looks at labels, on a CPU only
    trainer = Trainer(tiny(tmp_path, *ddp("bf16")), quiet=True)
    with trainer.loader() as loader:
        batches = Prefetched(loader, 8)
        trainer.train_step(batches)
        with CountReads() as reads:
            trainer.train_step(batches)
    assert reads.reads == 0
    assert all(p.grad is None for p in trainer.engine.module.parameters())
    trainer.close()


def test_gradients_are_added_up_in_float32() -> None:
    """1 + 2^-10 has no bf16: a sum in the network's precision would lose the second part."""
    params = [nn.Parameter(torch.zeros(n, dtype=torch.bfloat16)) for n in (3, 5)]
    masters = [nn.Parameter(torch.zeros(n)) for n in (3, 5)]
    gradients = MasterGradients(masters, params)
    for more, value in enumerate((1.0, 2.0**-10)):
        for number, param in enumerate(params):
            param.grad = torch.full_like(param, value * (number + 1))
        gradients.add(more > 0)
    for number, master in enumerate(masters):
        assert torch.equal(master.grad, torch.full_like(master, (1 + 2.0**-10) * (number + 1)))
    # Neighbours, from the network's end on.
    assert torch.equal(gradients.place_of(params[::-1]), torch.cat([m.grad for m in masters[::-1]]))
    with pytest.raises(AssertionError, match="neighbours"):
        gradients.place_of(params)


def test_exports_are_those_of_any_run(tmp_path: Path) -> None:
    """weights.pt, `consolidate` and `ema` agree, and a checkpoint says who wrote it."""
    out = tmp_path / "run"
    train(tiny(out, *ddp("bf16"), "train.images=16"), quiet=True)
    layout = read_layout(newest_checkpoint(out))
    assert (layout.engine, layout.stage, layout.shards) == ("ddp", 0, 1)
    online = torch.load(out / "weights.pt", weights_only=True)
    consolidate(out, tmp_path / "offline.pt")
    extract(out, 0.99, tmp_path / "second.pt")
    offline, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("offline", "second")
    )
    states = full_states(newest_checkpoint(out))
    for name, value in online["model"].items():
        assert torch.equal(value, offline["model"][name])
        assert torch.equal(online["ema"][name], offline["ema"][name])
        assert torch.equal(second["ema"][name], states[name].get("ema_1", value))
    assert any(not torch.equal(online["ema"][n], second["ema"][n]) for n in second["ema"])
    assert (out / "ema" / "step_00000002.safetensors").exists()


WITHOUT = """
import sys
import torch.distributed as dist


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "deepspeed":
            raise ImportError("blocked")


sys.meta_path.insert(0, Blocked())
from mixflow_fast.cli.main import main

for more in (["--dry-run"], []):
    assert main(["train", "photos", *sys.argv[1:], *more]) == 0, more
assert not dist.is_initialized()
assert "deepspeed" not in sys.modules
assert main(["train", "photos", *sys.argv[1:], "train.engine=deepspeed", "train.images=99"]) == 2
"""


def test_a_run_needs_neither_deepspeed_nor_a_process_group(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, *TINY, *ddp("fp32"), "train.images=16"]
    done = subprocess.run(
        [*command, f"out={tmp_path}"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert newest_checkpoint(tmp_path).name == "step_00000002"
    assert "training needs DeepSpeed (blocked)" in done.stderr


def test_one_rank_needs_no_group_and_leaves_one_alone(tmp_path: Path) -> None:
    before = dist.is_initialized()
    trainer = Trainer(tiny(tmp_path, *ddp("fp32")), quiet=True)
    assert isinstance(trainer.engine, DDPEngine) and dist.is_initialized() == before
    trainer.close()


def test_the_settings_of_deepspeed_are_still_its_own() -> None:
    """What ddp takes over is refused there as before, with ddp as a way out."""
    with pytest.raises(ValueError, match="train.engine=ddp trains bf16 without ZeRO"):
        tiny(Path("x"), *settings("bf16", 0))
    with pytest.raises(ValueError, match=r"got train.zero_stage=2: add train.zero_stage=0"):
        tiny(Path("x"), "train.engine=ddp", "train.zero_stage=2")
    with pytest.raises(ValueError, match="train.overlap_comm=true has no meaning for train.engine"):
        tiny(Path("x"), *DDP, "train.overlap_comm=true")
