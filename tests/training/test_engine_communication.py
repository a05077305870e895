"""How the ranks' gradients are summed: in which dtype, in how many parts, beside what."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mixflow_fast.config.schema import OptimConfig, TrainConfig
from mixflow_fast.distributed import process_group
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.models import SiT
from mixflow_fast.training.engine import DeepSpeedEngine
from tests.support.launchers import on_ranks
from tests.support.runs import assert_same_bits, settings

RANKS = "tests.support.communication_ranks"
# Several buckets, some of them of a single parameter that is larger: see tests/benchmarks/
# test_collectives.py, which counts them.
SMALL = "train.reduce_bucket_size=1500"
MIDDLE = "train.reduce_bucket_size=9000"
OVERLAP = "train.overlap_comm=true"
WAYS = {
    "plain": [],
    "small": [SMALL],
    "middle": [MIDDLE],
    "overlap": [OVERLAP],
    "overlap_small": [OVERLAP, SMALL],
}


def assert_all_ways_agree(out: Path, precision: str, stage: int, ways: list[str]) -> None:
    """Runs of two ranks, three steps of two micro-batches, have the same losses and bits."""
    own = [*settings(precision, stage), "train.microbatch_size=2", "train.images=24"]
    own.append("train.keep_last=1")
    on_ranks(2, RANKS, "runs", str(out), json.dumps([(way, [*own, *WAYS[way]]) for way in ways]))
    first, *others = (
        [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(out / way / "metrics.jsonl")]
        for way in ways
    )
    assert len(first) == 3
    assert all(rows == first for rows in others)
    for way in ways[1:]:
        assert_same_bits(out / ways[0], out / way)


def test_overlap_and_buckets_leave_every_bit_as_it_is(tmp_path: Path) -> None:
    """The recipes' precision and stage; the others in the long test."""
    assert_all_ways_agree(tmp_path, "bf16", 2, ["plain", "overlap_small"])


@pytest.mark.long
@pytest.mark.parametrize(("precision", "stage"), [("fp32", 1), ("fp32", 2), ("bf16", 2)])
def test_every_way_of_summing_leaves_every_bit_as_it_is(
    tmp_path: Path, precision: str, stage: int
) -> None:
    assert_all_ways_agree(tmp_path, precision, stage, list(WAYS))


@pytest.mark.long
def test_buckets_leave_every_bit_of_zero_3_as_it_is(tmp_path: Path) -> None:
    assert_all_ways_agree(tmp_path, "bf16", 3, ["plain", "small", "middle"])


def assert_float32_sums_are_the_mean(file: Path, ranks: int, stages: list[int | str]) -> None:
    """What reaches the optimizer against the float64 mean of the ranks' bf16 gradients.

    float32 leaves rounding of its own size. bf16 has 8 bits: at most 2**-9 at each sum of two.
    """
    on_ranks(ranks, RANKS, "errors", str(file), json.dumps(stages))
    errors = json.loads(file.read_text())
    assert set(errors) == {f"{s} {d}" for s in stages for d in ("bf16", "fp32")}
    for case, error in errors.items():
        if case.endswith("fp32"):
            assert error < 1e-6, case
        else:
            assert 1e-3 < error < 2**-9 * (ranks - 1), case


@pytest.mark.long
def test_gradients_summed_in_float32_are_the_mean_of_two_ranks(tmp_path: Path) -> None:
    assert_float32_sums_are_the_mean(tmp_path / "errors.json", 2, [2, "ddp"])


@pytest.mark.long
def test_gradients_summed_in_float32_are_the_mean_of_four_ranks(tmp_path: Path) -> None:
    assert_float32_sums_are_the_mean(tmp_path / "errors.json", 4, ["ddp", 1, 2, 3])


def cpu_seconds(call: Callable[[torch.Tensor], None], loss: torch.Tensor) -> float:
    """Of this thread, which on a CPU runs the backward pass, too: other processes do not count."""
    begin = time.thread_time()
    call(loss)
    return time.thread_time() - begin


def test_deepspeed_does_not_make_the_backward_pass_much_dearer_for_the_host() -> None:
    """Its hooks, about 0.1 ms a tensor, are what a GPU waits for at small micro-batches.

    2.3 to 2.6 times the bare backward pass of the same network, with and without other work on the
    machine; so small a network is nearly all host work. The two take turns.
    """
    process_group.init_process_group("cpu")
    size = dict(input_size=4, patch_size=2, hidden_size=64, depth=6, num_heads=2, num_classes=10)
    bare, config = SiT(**size).bfloat16(), TrainConfig(global_batch_size=1, device="cpu")
    engine = DeepSpeedEngine(config, OptimConfig(), 1, SiT(**size))
    engine.start(None)
    ratios = []
    for _ in range(12):
        seconds = []
        for net, backward in ((bare, torch.Tensor.backward), (engine, engine.backward)):
            out = net(torch.randn(1, 4, 4, 4), torch.rand(1), torch.tensor([1]))
            seconds.append(cpu_seconds(backward, out.float().square().mean()))
        bare.zero_grad(set_to_none=True)
        engine.step()
        ratios.append(seconds[1] / seconds[0])
    engine.close()
    assert statistics.median(ratios[2:]) < 4
