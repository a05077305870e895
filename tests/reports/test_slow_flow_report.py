"""The slow-flow page: its numbers, its warnings, and that it loads nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mixflow_fast.evaluation.gamma import Choice, PilotArm, recommend_gamma
from mixflow_fast.evaluation.loss_surface import CUTS, LossSurface
from mixflow_fast.evaluation.slow_flow import (
    Band,
    MarginalPoint,
    Settings,
    SlowFlow,
    StepFlow,
)
from mixflow_fast.evaluation.slowed_times import Marginal
from mixflow_fast.reports.slow_flow_report import (
    LEAD,
    RULE,
    Measured,
    PilotTable,
    SlowFlowReport,
    overshoot_warnings,
    record,
    render,
)
from tests.support.pages import assert_loads_nothing

pytest.importorskip("matplotlib")
TIMES = (0.4, 0.6, 0.8, 1.0)


def points(ratio: float) -> tuple[MarginalPoint, ...]:
    influence = torch.linspace(-0.1, 0.1, 101, dtype=torch.float64)
    return tuple(MarginalPoint(t, Marginal(ratio * t, influence), 1.0, 0.001) for t in TIMES)


def network(name: str, coarse: float, fine: float, losses: bool = True) -> Measured:
    band = Band([0.2, 0.6, 1.0], [0.1, 0.3, 0.4], [0.15, 0.5, 0.8], [0.2, 0.6, 1.0])
    flows = {
        steps: StepFlow(steps, band, band, (0.05, 0.11), points(coarse), points(fine), band)
        for steps in (5, 20)
    }
    slow = SlowFlow(Settings(steps=(5, 20)), flows, 48, "examples <of> photos", 2000)
    times = [0.25, 0.75]
    surface = LossSurface(times, [[0.5, 0.4], [None, 0.3]], times, {c: [c, 1.0] for c in CUTS})
    return Measured(name, slow, surface if losses else None)


PILOT = PilotTable(
    steps=5,
    method="euler",
    images=8000,
    samples=2000,
    choice=Choice(
        0.15,
        0.3,
        (
            PilotArm(0.0, 4.0, 1.5, 1.0, 2.0, True),
            PilotArm(0.15, 2.6, 0.1, -0.1, 0.3, False),
            PilotArm(0.3, 2.5, 0.0, 0.0, 0.0, False),
        ),
    ),
    kid={0.0: (0.02, 0.001), 0.15: (0.01, 0.001), 0.3: (0.01, 0.001)},
    features="192 linear features",
)


def test_one_network() -> None:
    report = SlowFlowReport([network("network", 0.9, 0.96)], "mixflow-fast slowflow <x>")
    page = assert_loads_nothing(render(report))
    gamma = recommend_gamma(report.networks[0].slow, 5)
    assert gamma.value == pytest.approx(2 * 0.06)
    row = next(row for row in page.rows if row[:2] == ["network", "5"])
    assert row[2:4] == ["10.0%", "4.0%"] and row[4].startswith("0.12 (")
    assert "0.12" in page.bold and row[5] == "5.0% / 11.0%"
    assert LEAD in page.words and "examples <of> photos" in page.words
    assert "overshoots" not in page.words and "Pilot:" not in page.words
    # E1 of each number of steps, E2, E3, E4, a map and its cuts.
    assert sum(tag == "svg" for tag, _ in page.tags) == 2 + 3 + 2


def test_before_and_after_with_a_pilot() -> None:
    networks = [network("before", 0.9, 0.96), network("after", 1.03, 0.99)]
    report = SlowFlowReport(networks, "mixflow-fast slowflow a --after b --pilot", PILOT)
    page = assert_loads_nothing(render(report))
    (first, second) = overshoot_warnings(networks[1])
    assert overshoot_warnings(networks[0]) == []
    # The rule is about the training to come.
    assert [row[4] for row in page.rows if row[0] == "after"] == ["–", "–"]
    assert [n["gamma"] != [] for n in record(report)["networks"]] == [True, False]
    assert first.startswith("after overshoots at 5 steps") and "1.030" in first
    assert " ".join(first.split()) in page.words and " ".join(second.split()) in page.words
    # The pilot was run: nobody is told to run one.
    assert RULE in page.words and "option --pilot" not in page.words
    assert "Pilot: gamma 0.15 at 5 euler steps" in page.words
    arms = [row for row in page.rows if row and row[0].startswith("0")]
    assert [row[0] for row in arms] == ["0", "0.15 (recommended)", "0.3"]
    assert [row[3] for row in arms] == ["yes", "no", "no"]
    assert sum(tag == "svg" for tag, _ in page.tags) == 2 + 6 + 4


def test_the_record_has_the_numbers_and_is_json() -> None:
    networks = [network("before", 0.9, 0.96, losses=False)]
    found = json.loads(json.dumps(record(SlowFlowReport(networks, "x", PILOT))))
    (only,) = found["networks"]
    assert [g["steps"] for g in only["gamma"]] == [5, 20]
    steps = only["slow_flow"]["steps"][0]
    assert steps["deficit"] == pytest.approx(0.1) and steps["lag"]["high"] == 0.11
    assert found["pilot"]["choice"]["gamma"] == 0.15
    assert found["pilot"]["kid"]["0.15"] == [0.01, 0.001]
    assert found["pilot"]["recommended"] == 0.15 and found["pilot"]["doubt"] is None
    assert only["losses"] is None and found["note"] == RULE
    assert record(SlowFlowReport(networks, "x"))["note"] == LEAD


@pytest.mark.parametrize(
    ("pilot", "why"),
    [
        (replace(PILOT, updates=99), "each arm took 99 optimizer steps, fewer than 100"),
        (
            replace(PILOT, choice=replace(PILOT.choice, arms=PILOT.choice.arms[1:])),
            "no arm is significantly worse than the best one",
        ),
    ],
)
def test_a_pilot_that_tells_nothing_recommends_nothing(pilot: PilotTable, why: str) -> None:
    report = SlowFlowReport([network("network", 0.9, 0.96, losses=False)], "x", pilot)
    page = assert_loads_nothing(render(report))
    assert "Pilot: gamma cannot be told at 5 euler steps" in page.words
    assert f"No recommendation: {why}" in page.words and "(recommended)" not in page.words
    found = record(report)["pilot"]
    assert found["recommended"] is None and found["doubt"].startswith(why)
    assert pilot.verdict.startswith(f"gamma cannot be told: {why}")
    assert replace(PILOT, updates=100).verdict.startswith("gamma 0.15, the smallest that")
