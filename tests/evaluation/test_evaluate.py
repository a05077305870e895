"""Which numbers come of which features and references, their row, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mixflow_fast.evaluation.evaluate import METRICS, evaluate
from mixflow_fast.evaluation.features.extractor import ExtractorId, Features
from mixflow_fast.evaluation.metrics import Gaussian, frechet, inception_score, kid
from mixflow_fast.evaluation.precision_recall import precision_recall
from mixflow_fast.evaluation.protocol import Protocol
from mixflow_fast.evaluation.reference import Reference
from mixflow_fast.metrics.metrics_file import read_metrics

INCEPTION = ExtractorId("inception", "6726825d", "none")


def features(seed: int = 0, count: int = 60, extractor: ExtractorId = INCEPTION) -> Features:
    g = np.random.default_rng(seed)
    dims = {"pool": 6, "logits": 5, "spatial": 4} if extractor.name == "inception" else {"cls": 3}
    arrays = {k: g.normal(size=(count, d)).astype(np.float32) for k, d in dims.items()}
    return Features(arrays, np.arange(count), extractor)


def reference(extractors: tuple = (), with_features: bool = True) -> Reference:
    made = features(1, 80)
    gaussians = {f"inception.{k}": Gaussian.of(made.arrays[k]) for k in ("pool", "spatial")}
    kept = {"inception.pool": made.arrays["pool"]} if with_features else {}
    return Reference(Path("ref.npz"), "f" * 64, gaussians, kept, extractors=extractors)


def test_all_numbers_are_those_of_their_functions() -> None:
    mine, theirs = features(), reference()
    found = evaluate([mine], theirs)
    assert tuple(found.estimates) == ("fid", "sfid", "is", "precision", "recall", "kid")
    pool, kept = mine.arrays["pool"], theirs.features["inception.pool"]
    expected = {
        "fid": frechet(pool, theirs.gaussians["inception.pool"]),
        "sfid": frechet(mine.arrays["spatial"], theirs.gaussians["inception.spatial"]),
        "is": inception_score(mine.arrays["logits"]),
        **precision_recall(pool, kept)._asdict(),
        "kid": kid(pool, kept),
    }
    for name, each in expected.items():
        assert found.estimates[name].value == each.value
        assert np.array_equal(found.estimates[name].influence, each.influence)


def test_what_is_not_there_is_left_out_or_named() -> None:
    mine, theirs = features(), reference(with_features=False)
    assert tuple(evaluate([mine], theirs).estimates) == ("fid", "sfid", "is")
    assert tuple(evaluate([mine], theirs, ["is"]).estimates) == ("is",)
    cases = [
        (["kid"], "kid needs features inception.pool in the reference"),
        (["fd_dinov2"], "fd_dinov2 needs features dinov2.cls"),
        (["fidd"], "unknown metric 'fidd'; did you mean 'fid'"),
    ]
    for metrics, message in cases:
        with pytest.raises(ValueError, match=message):
            evaluate([mine], theirs, metrics)
    dinov2 = features(extractor=ExtractorId("dinov2", None, ""))
    with pytest.raises(ValueError, match="fd_dinov2 needs moments of dinov2.cls in the reference"):
        evaluate([dinov2], theirs, ["fd_dinov2"])
    with pytest.raises(ValueError, match="nothing in common"):
        evaluate([dinov2], theirs)
    both = [mine, dinov2]
    assert "dinov2: no number, as the reference ref.npz was made without it" in (
        evaluate(both, theirs).warnings
    )
    for found in (evaluate(both, theirs, ["fid"]), evaluate([mine], theirs)):
        assert not any("no number" in line for line in found.warnings)
        assert not any("kid" in line for line in found.warnings)


def test_unlike_features_are_refused() -> None:
    other = replace(INCEPTION, sha256="cd34")
    with pytest.raises(ValueError, match="sha256 '6726825d' against 'cd34'"):
        evaluate([features()], reference((other.to_record(),)))
    evaluate([features()], reference((INCEPTION.to_record(),)))
    dinov2 = ExtractorId("dinov2", None, "")
    with pytest.raises(ValueError, match="inception and dinov2 are of different sets"):
        evaluate([features(), features(count=59, extractor=dinov2)], reference())
    with pytest.raises(ValueError, match="at least one"):
        evaluate([], reference())


def test_row_is_one_of_metrics_jsonl(tmp_path: Path) -> None:
    found = evaluate([features()], reference(), fid_inf=True)
    weights = {"sha256": "00", "average": "ema", "step": 7}
    of_set = Protocol({"set": {"n": 60}})
    row = found.to_row("a.npz", of_set, weights=weights, features="a.features")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row, allow_nan=False) + "\n")
    (again,) = read_metrics(tmp_path / "metrics.jsonl", "evaluation")
    assert again["step"] == 7 and again["protocol"] == of_set.sha256 and again["n"] == 60
    # The hash beside a number can be checked from the row alone.
    parts = {"metrics": {"ddof": 1, "splits": 5000, "k": 3, "pr_fp16": False}}
    parts |= {"extractors": again["extractors"]}
    parts |= {"reference": {name: again["reference"][name] for name in ("sha256", "n")}}
    whole = Protocol(again["pictures"]).with_sections(parts)
    assert again["metrics"]["fid"]["protocol"] == whole.sha256 != of_set.sha256
    assert list(again["metrics"]) == [name for name in METRICS if name in found.estimates]
    fid = again["metrics"]["fid"]
    assert {"value", "bias", "se", "low", "high", "mean_term", "cov_term", "inf"} <= set(fid)
    assert again["reference"]["sha256"] == "f" * 64
    assert again["extractors"] == [{"id": "inception", "sha256": "6726825d", "dtype": "float32",
                                    "resize": "none"}]  # fmt: skip
    assert read_metrics(tmp_path / "metrics.jsonl") == []  # no row of training
    plain = found.to_row("a.npz", of_set)
    assert plain["weights"] is None and plain["step"] == 0


def test_protocol_of_the_numbers_is_that_of_the_set_and_more() -> None:
    found = evaluate([features()], reference())
    of_set = Protocol({"set": {"n": 60}})
    whole = found.protocol(of_set, "fid")
    assert whole.record["set"] == {"n": 60} and whole.record["metrics"]["ddof"] == 1
    assert whole.record["extractors"] == [INCEPTION.to_record()]
    assert whole.part("sampling") == of_set
    other = evaluate([features()], replace(reference(), sha256="0" * 64))
    assert other.protocol(of_set, "fid").sha256 != whole.sha256
    renamed = evaluate([features()], replace(reference(), path=Path("copy.npz")))
    assert renamed.protocol(of_set, "fid") == whole
    with pytest.raises(ValueError, match="metric must be of fid, .*got 'fd_dinov2'"):
        found.protocol(of_set, "fd_dinov2")


def test_protocol_of_a_number_has_its_own_extractor_alone() -> None:
    dinov2 = features(extractor=ExtractorId("dinov2", None, ""))
    both = replace(reference(), gaussians={
        **reference().gaussians, "dinov2.cls": Gaussian.of(dinov2.arrays["cls"])
    })  # fmt: skip
    of_set = Protocol({"set": {"n": 60}})
    alone, together = evaluate([features()], both), evaluate([dinov2, features()], both)
    for name in ("fid", "is", "kid", "precision"):
        assert alone.protocol(of_set, name) == together.protocol(of_set, name)
    other = together.protocol(of_set, "fd_dinov2")
    assert other != together.protocol(of_set, "fid")
    assert other.record["extractors"] == [dinov2.extractor.to_record()]
    assert len(together.protocol(of_set).record["extractors"]) == 2


def test_warnings() -> None:
    said = evaluate([replace(features(), constant=(3, 5))], reference()).warnings
    assert any("2 images have a single colour, ids 3, 5" in line for line in said)
    assert any("compares only with those of as many" in line for line in said)
    assert any("one split of 60 images" in line for line in said)
    assert not any("no full rank" in line for line in said)
    said = evaluate([features(count=6)], reference(), ["fid"]).warnings
    assert any("fid: 6 samples in 6 dimensions" in line for line in said)
    other = replace(INCEPTION, sha256="ab12")
    said = evaluate([features(extractor=other)], reference(), ["fid"]).warnings
    assert any("not FID's" in line for line in said)
    said = evaluate([features(count=5_002)], reference(), ["is"]).warnings
    assert any("is: the last of 2 splits has 2 images" in line for line in said)
    many = evaluate([features(count=10_000)], reference(), ["fid", "is"])
    assert many.warnings == []


def test_the_caller_s_tf32_setting_stays() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    evaluate([features()], reference(), ["kid"])
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_reconstructions_and_samples_have_references_of_their_own() -> None:
    of_set = Protocol({"set": {"n": 60}})
    unsaid, train, val = (replace(reference(), split=split) for split in (None, "train", "val"))
    for theirs in (unsaid, train):
        with pytest.raises(ValueError, match="reconstructions are measured against the validation"):
            evaluate([features()], theirs, reconstructions=True)
    with pytest.raises(ValueError, match="ref.npz is of validation images.*--split train"):
        evaluate([features()], val)
    plain, again = evaluate([features()], unsaid), evaluate([features()], train)
    assert plain.protocol(of_set, "fid") == again.protocol(of_set, "fid")
    r_fid = evaluate([features()], val, reconstructions=True)
    assert r_fid.protocol(of_set, "fid") != plain.protocol(of_set, "fid")
