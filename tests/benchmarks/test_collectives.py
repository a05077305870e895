"""What a step communicates and how often its host waits, as numbers that a change must restate.

The real trainer, engines and optimizer on stand-ins for the group and for CUDA: see
`benchmarks/recorded_step.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

from benchmarks.collectives import RECIPES, buckets, rows, step_collectives
from mixflow_fast.config.schema import TrainConfig
from tests.support.launchers import ROOT, environment

BUCKET = 250_000  # larger than the network's largest parameter, as in the recipes
P = 1_512_624  # trained parameters of the network
FROZEN = 3_072 / P  # the table of positions
LARGE = 1_253_376 / P  # what has more than 100,000 elements, which ZeRO 3 shards
BF16, FP32 = "bfloat16", "float32"
# (ranks, precision, stage, more of section train, micro-batches): what the engine's parts
# communicate, as (elements over P, calls), and where the host waits.
NORM, VOTE = ("step", "allreduce", FP32), ("vote", "allreduce", FP32)
Expected = dict[tuple[str, str, str], tuple[float, int]]
Waits = dict[str, dict[str, int]]
ONE = (1 / P, 1)
CASES: dict[tuple[int, str, int, str, int], tuple[Expected, Waits]] = {
    (8, "bf16", 2, "", 1): (
        {("backward", "allreduce", FP32): (1, 1), ("step", "allgather", BF16): (1, 1), NORM: ONE},
        {},
    ),
    (8, "bf16", 2, "reduce_dtype=bf16", 2): (
        {("backward", "allreduce", BF16): (2, 2), ("step", "allgather", BF16): (1, 1), NORM: ONE},
        {},
    ),
    (8, "bf16", 2, f"overlap_comm=true reduce_bucket_size={BUCKET}", 2): (
        {("backward", "allreduce", FP32): (2, 18), ("step", "allgather", BF16): (1, 1), NORM: ONE},
        {"backward": {"device.synchronize": 2}},
    ),
    (8, "fp32", 2, "", 1): (
        {("backward", "allreduce", FP32): (1, 1), ("step", "allgather", FP32): (1, 1), NORM: ONE},
        {},
    ),
    (8, "fp32", 1, f"overlap_comm=true reduce_bucket_size={BUCKET}", 2): (
        {("backward", "allreduce", FP32): (1, 9), ("step", "allgather", FP32): (1, 1), NORM: ONE},
        {"backward": {"device.synchronize": 1}},
    ),
    (64, "bf16", 2, f"reduce_bucket_size={BUCKET}", 1): (
        {("backward", "allreduce", FP32): (1, 9), ("step", "allgather", BF16): (1, 1), NORM: ONE},
        {},
    ),
    (64, "bf16", 1, "", 2): (
        {("backward", "allreduce", FP32): (1, 1), ("step", "allgather", BF16): (1, 1), NORM: ONE},
        {"step": {"read of a value": 1}},
    ),
    (8, "bf16", 0, f"engine=ddp reduce_bucket_size={BUCKET}", 2): (
        {("backward", "allreduce", FP32): (1, 5)},
        {},
    ),
    (8, "bf16", 0, "engine=ddp reduce_dtype=bf16", 1): (
        {("backward", "allreduce", BF16): (1, 1)},
        {},
    ),
    (64, "fp32", 0, f"engine=ddp reduce_bucket_size={BUCKET}", 1): (
        {("backward", "allreduce", FP32): (1, 5)},
        {},
    ),
    (64, "fp32", 0, "", 2): ({("backward", "allreduce", FP32): (1, 1)}, {}),
    (64, "bf16", 3, f"reduce_bucket_size={BUCKET}", 2): (
        {
            ("forward", "allgather", BF16): (2 * LARGE, 2),
            ("backward", "reduce_scatter", FP32): (2, 18),
            ("step", "allreduce", "float64"): ONE,
            ("step", "allgather", BF16): (1 - LARGE + FROZEN, 24),
        },
        {},
    ),
}


def settings_of(case: tuple[int, str, int, str, int]) -> list[str]:
    _, precision, stage, more, _ = case
    own = [f"precision={precision}", f"zero_stage={stage}", *more.split()]
    return [f"train.{text}" for text in own]


@pytest.fixture(scope="module")
def recorded() -> dict[tuple, dict]:
    """One process for each number of ranks, side by side."""
    found: dict[tuple, dict] = {}
    started = []
    for ranks in (8, 64):
        cases = [case for case in CASES if case[0] == ranks]
        given = [json.dumps([ranks, settings_of(case), case[-1]]) for case in cases]
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.recorded_step", *given],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append((cases, process))
    for cases, process in started:
        out, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors[-3000:]
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        found |= dict(zip(cases, lines, strict=True))
    return found


def summed(record: dict) -> tuple[Counter, Counter]:
    """(Elements, calls) by part of the step, kind and dtype."""
    elements, calls = Counter(), Counter()
    for one in record["collectives"]:
        key = one["phase"], one["kind"], one["dtype"]
        elements[key] += one["elements"]
        calls[key] += 1
        assert one["ranks"] == record["ranks"]
    return elements, calls


@pytest.mark.parametrize("case", CASES)
def test_what_a_step_communicates(case: tuple, recorded: dict[tuple, dict]) -> None:
    expected = {**CASES[case][0], VOTE: ONE}
    elements, calls = summed(recorded[case])
    assert calls == {key: count for key, (_, count) in expected.items()}
    for key, (share, _) in expected.items():
        # Padding: fewer than twice the ranks for each tensor that is sent.
        assert elements[key] / P == pytest.approx(share, abs=1.5e-4), key


@pytest.mark.parametrize("case", CASES)
def test_the_formula_says_what_is_communicated(case: tuple, recorded: dict[tuple, dict]) -> None:
    """Elements to the last one, padding too, and the number of calls."""
    ranks, _, _, _, microsteps = case
    fields = dict(text.removeprefix("train.").split("=") for text in settings_of(case))
    fields["overlap_comm"] = fields.get("overlap_comm") == "true"
    sizes, frozen = recorded[case]["trained"], recorded[case]["frozen"]
    assert sum(sizes) == P and max(sizes) < BUCKET
    elements, calls = summed(recorded[case])
    made = step_collectives(sizes, TrainConfig(**fields), ranks, microsteps, frozen)
    assert elements == {(c.phase, c.kind, c.dtype): c.elements for c in made}
    for c in made:
        assert c.calls in (None, calls[c.phase, c.kind, c.dtype]), c


@pytest.mark.parametrize("case", [case for case in CASES if "engine=ddp" in case[3]])
def test_all_but_the_last_sum_of_ddp_begins_before_the_last_gradient(
    case: tuple, recorded: dict[tuple, dict]
) -> None:
    """And all of them in the last micro-batch of the step, after the products of those before."""
    record, microsteps = recorded[case], case[-1]
    sums = [one for one in record["collectives"] if one["phase"] == "backward"]
    *early, last = [one["products"] for one in sums]
    assert last == record["products"] and all(one < last for one in early)
    assert all(one > last * (microsteps - 1) / microsteps for one in early)
    fields = dict(text.removeprefix("train.").split("=") for text in settings_of(case))
    formula, _ = step_collectives(record["trained"], TrainConfig(**fields), case[0], microsteps)
    assert formula.beside == sum(one["elements"] for one in sums[:-1])
    assert formula.beside > 0 or "reduce_dtype=bf16" in case[3]  # one bucket


@pytest.mark.parametrize("case", CASES)
def test_where_a_step_waits_for_the_device(case: tuple, recorded: dict[tuple, dict]) -> None:
    waits = recorded[case]["waits"]
    assert "own" not in waits  # nothing outside of DeepSpeed
    if case[2] == 3:  # in each part of its step, and more often the more buckets
        assert waits["step"]["device.synchronize"] == 1
        assert waits["step"]["read of a value"] == 1
    else:
        assert waits == CASES[case][1]


def test_a_row_of_metrics_is_one_exchange_on_the_host(recorded: dict[tuple, dict]) -> None:
    assert {record["objects"] for record in recorded.values()} == {1}


def test_parts_that_tensors_are_sent_in() -> None:
    assert buckets([], 10) == 0
    assert buckets([4, 6, 1], 10) == 2 and buckets([4, 7, 1, 9], 10) == 3
    assert buckets([4, 7, 1, 9], 10, at_once=True) == 2 and buckets([10], 10, at_once=True) == 1


def test_what_the_recipes_networks_communicate() -> None:
    """float32 sums of all parameters in tens of calls, bf16 weights in one; docs/many_gpus.md."""
    table = {(r.network, r.way, r.ranks, r.microsteps): r for r in rows()}
    one = table["SiT-XL/2 256", RECIPES, 8, 1]
    assert one.parameters == 674_834_720
    assert one.sums_gb == pytest.approx(4 * one.parameters / 1e9) and one.sums_calls == 15
    assert one.weights_gb == pytest.approx(2 * one.parameters / 1e9, rel=1e-6)
    assert one.sent_gb == pytest.approx((2 * one.sums_gb + one.weights_gb) * 7 / 8, rel=1e-6)
    two = table["SiT-XL/2 256", RECIPES, 8, 2]
    assert two.sums_gb == 2 * one.sums_gb and two.weights_gb == one.weights_gb
    overlapped = table["SiT-XL/2 256", "ZeRO 2, overlap_comm=true", 8, 1]
    assert one.beside_gb == 0 and 0.9 * one.sums_gb < overlapped.beside_gb < one.sums_gb
    for microsteps in (1, 2):
        whole = table["SiT-XL/2 256", "ddp", 8, microsteps]
        assert whole.sums_gb == one.sums_gb and whole.weights_gb == 0
        assert whole.sent_gb == pytest.approx(2 * one.sums_gb * 7 / 8, rel=1e-6)
        assert 0.9 * one.sums_gb < whole.beside_gb < one.sums_gb
    half = table["SiT-XL/2 256", "ZeRO 2, reduce_dtype=bf16", 8, 1]
    assert half.sums_gb == one.sums_gb / 2
