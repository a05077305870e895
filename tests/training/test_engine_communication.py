"""How the ranks' gradients are summed: in which dtype, in how many parts, beside what."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mixflow_fast.metrics.metrics_file import read_metrics
from tests.support.launchers import ROOT, environment
from tests.support.runs import assert_same_bits, settings

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


def on_ranks(ranks: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "-m", "tests.support.communication_ranks", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def assert_all_ways_agree(out: Path, precision: str, stage: int, ways: list[str]) -> None:
    """Runs of two ranks, three steps of two micro-batches, have the same losses and bits."""
    own = [*settings(precision, stage), "train.microbatch_size=2", "train.images=24"]
    own.append("train.keep_last=1")
    on_ranks(2, "runs", str(out), json.dumps([(way, [*own, *WAYS[way]]) for way in ways]))
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


def assert_float32_sums_are_the_mean(file: Path, ranks: int, stages: list[int]) -> None:
    """What reaches the optimizer against the float64 mean of the ranks' bf16 gradients.

    float32 leaves rounding of its own size. bf16 has 8 bits: at most 2**-9 at each sum of two.
    """
    on_ranks(ranks, "errors", str(file), json.dumps(stages))
    errors = json.loads(file.read_text())
    assert set(errors) == {f"{s} {d}" for s in stages for d in ("bf16", "fp32")}
    for case, error in errors.items():
        if case.endswith("fp32"):
            assert error < 1e-6, case
        else:
            assert 1e-3 < error < 2**-9 * (ranks - 1), case


def test_gradients_summed_in_float32_are_the_mean_of_two_ranks(tmp_path: Path) -> None:
    assert_float32_sums_are_the_mean(tmp_path / "errors.json", 2, [2])


@pytest.mark.long
def test_gradients_summed_in_float32_are_the_mean_of_four_ranks(tmp_path: Path) -> None:
    assert_float32_sums_are_the_mean(tmp_path / "errors.json", 4, [1, 2, 3])
