"""The before/after page from made-up numbers: losses as plain as wins, consent on top."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mixflow_fast.comparison.plan import pairs_of
from mixflow_fast.evaluation.evaluate import Evaluation
from mixflow_fast.evaluation.paired import class_strip, paired
from mixflow_fast.evaluation.protocol import Difference, Protocol
from mixflow_fast.evaluation.reference import Reference
from mixflow_fast.evaluation.uncertainty import Estimate
from mixflow_fast.reports.comparison_report import render
from mixflow_fast.reports.comparison_result import (
    ArmRecord,
    Cell,
    Comparison,
    Pictures,
    config_differences,
    record,
    verdict_words,
)
from mixflow_fast.reports.images import save_grid
from tests.support.pages import assert_loads_nothing

pytest.importorskip("matplotlib")
N = 200
VALUES = {("before", 5): 4.0, ("after", 5): 3.0, ("before", 50): 1.0, ("after", 50): 2.0}


def estimates(value: float, seed: int) -> dict[str, Estimate]:
    influence = 0.3 * np.random.default_rng(seed).standard_normal(N)
    found = Estimate(value, N, influence - influence.mean(), bias=0.25)
    share = Estimate(1 / (1 + value), N, (influence - influence.mean()) / 100)
    return {"precision": share, "fid": found}


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    reference = Reference(tmp_path / "ref.npz", "ab" * 32, {})
    arms, cells = {}, {}
    for seed, key in enumerate(("before", "after")):
        config = {"out": key, "objective.gamma": 0.3 * seed, "optim.lr": 1e-3}
        arms[key] = ArmRecord(key=key, label=f"{key}: <{key}>", path=f"runs/{key}", sha256="c" * 64,
                              average="ema", config=config)  # fmt: skip
        for steps in (5, 50):
            found = Evaluation(N, estimates(VALUES[key, steps], seed), [], [], reference, 1.0)
            protocol = Protocol({"sampler": {"intervals": steps}})
            cells[key, steps] = Cell(2 * steps, protocol, found)
    save_grid(tmp_path / "x.png", torch.zeros(16, 3, 4, 4), columns=4)
    pairs = pairs_of(list(arms))
    (pair,) = pairs
    between = {
        (pair, steps, metric): paired(
            metric,
            cells["after", steps].found.estimates[metric],
            cells["before", steps].found.estimates[metric],
        )
        for steps in (5, 50)
        for metric in ("fid", "precision")
    }
    a, b = (cells[key, 5].found.estimates["fid"] for key in ("after", "before"))
    strip = class_strip(a, b, np.arange(N) % 4)
    assert strip is not None
    files = dict.fromkeys(arms, tmp_path / "x.png")
    return Comparison(
        arms=arms,
        pairs=pairs,
        steps=[5, 50],
        n=N,
        primary="fid",
        cells=cells,
        differences=between,
        strips={(pair, 5): strip},
        pictures=[Pictures(5, range(16), files), Pictures(5, [3, 9], files, "The 2 samples")],
        slow=[],
        slow_note="Left out by --no-slow-flow.",
        reference="ref.npz",
        sampler=["heun"],
        allowed=[],
        notes=[],
        warnings=["few <samples>"],
        hashes=[("decoder", "d" * 64)],
        command="mixflow-fast compare runs/before runs/after",
    )


def test_a_loss_is_said_as_plainly_as_a_win(comparison: Comparison) -> None:
    shown = assert_loads_nothing(render(comparison))
    verdicts = [row for row in shown.rows if row[0] in ("510 NFE", "50100 NFE")]
    assert [row[2] for row in verdicts] == ["better", "worse"]
    assert verdicts[0][1] == "after: <after>against before: <before>"
    assert verdicts[0][4:] == ["3.000", "4.000"] and verdicts[1][3].startswith("+1")
    assert "No control: this difference includes plain further training." in shown.words
    assert shown.words.count("They do not cover another training") == 1
    assert shown.words.count("of twenty between equal networks one is to be expected") == 1
    # Precision falls where the distance grows: lower is worse there.
    row = [r for r in shown.rows if r[0] == "after: <after> − before: <before>"][1]
    assert "better" in row[1] and "worse" in row[2]
    assert "few <samples>" in shown.words and "d" * 64 in shown.words
    words = [verdict_words(comparison, comparison.pairs[0], steps) for steps in (5, 50)]
    assert words[0].startswith(
        "5 steps (10 NFE): after: <after> against before: <before>: better; FID 3.000 against 4.000"
    )
    assert ": worse; FID 2.000 against 1.000, difference +1 (95% +" in words[1]


def test_the_json_twin_holds_the_numbers_of_the_page(comparison: Comparison) -> None:
    found = json.loads(json.dumps(record(comparison), allow_nan=False))
    values = {(r["arm"], r["steps"]): r["metrics"]["fid"]["value"] for r in found["numbers"]}
    assert values == VALUES and {row["nfe"] for row in found["numbers"]} == {10, 100}
    assert [v["verdict"] for v in found["verdicts"] if v["primary"]] == ["better", "worse"]
    assert found["configuration"]["different"] == {"objective.gamma": [0.0, 0.3]}
    assert found["classes"][0]["values"] == sorted(found["classes"][0]["values"])
    assert found["pictures"][1] == {
        "steps": 5, "ids": [3, 9], "arms": ["before", "after"], "chosen": "The 2 samples"
    }  # fmt: skip


def test_consent_stands_above_every_number(comparison: Comparison) -> None:
    apart = [Difference("sampler.method", ("euler", "heun"))]
    text = render(replace(comparison, allowed=apart))
    assert text.index("sampler.method = ") < text.index("<table")


def test_who_is_compared_with_whom() -> None:
    keys = ["before", "control", "after", "after_2", "control_remedy", "after_remedy"]
    found = [(pair.a, pair.b) for pair in pairs_of(keys) if pair.main]
    assert found == [
        (key, other)
        for key in ("after", "after_2")
        for other in ("before", "control", "control_remedy")
    ]
    others = {(pair.a, pair.b) for pair in pairs_of(keys) if not pair.main}
    assert others == {("control", "before"), ("control_remedy", "control"),
                      ("after_remedy", "after"), ("after_remedy", "control_remedy")}  # fmt: skip


def test_settings_of_arms_that_say_nothing_are_passed_over(comparison: Comparison) -> None:
    silent = replace(comparison.arms["before"], config=None)
    arms = {**comparison.arms, "control": silent}
    assert config_differences(arms) == [("objective.gamma", [0.0, 0.3])]
    shown = assert_loads_nothing(render(replace(comparison, arms={**comparison.arms,
                                                                   "before": silent})))  # fmt: skip
    assert "Not recorded: how before: <before> came about." in shown.words
