"""Where the samples of a checkpoint begin: `sample`, sets, previews, `compare` and `slowflow`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from mixflow_fast.cli.sources import add_source_option
from mixflow_fast.evaluation.sample_sets import read_set
from mixflow_fast.models import load_model
from mixflow_fast.models.weights.digest import weights_sha256
from mixflow_fast.models.weights.sources import load_source
from mixflow_fast.sampling import sample, sample_source
from tests.support.command_line import run
from tests.support.networks import relative
from tests.support.sources import train_kinds

STEPS = ["--steps", "2", "--batch-size", "4", "--seed", "3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return train_kinds(tmp_path_factory.mktemp("sources"))


def drawn(capsys, path: Path, out: Path, *options: object) -> tuple[torch.Tensor, str]:
    """Seven samples by the command, in batches of four, and what it said."""
    code, said, err = run("sample", path, "-n", 7, *STEPS, "--out", out, *options, capsys=capsys)
    assert code == 0, err
    with np.load(out) as arrays:
        return torch.from_numpy(arrays["x"]), said


@pytest.mark.parametrize(("kind", "w"), [("class", 0.5), ("noise", None)])
def test_known_kappa_is_used(capsys, tmp_path: Path, runs, kind: str, w: float | None) -> None:
    """With the run's sample_w, or another weight; 0 is N(0, I), and `train` draws it."""
    path = runs[kind]
    model, stored = load_model(path, "ema"), load_source(path, "ema")
    assert stored.sample_w == w
    plain = sample(model, num=7, steps=2, batch_size=4, seed=3, balanced=True).x
    texts = {None: w, "0": 0.0, "0.25": 0.25, "1": 1.0, "train": None}
    for number, (text, weight) in enumerate(texts.items()):
        option = [] if text is None else ["--source-w", text]
        found, said = drawn(capsys, path, tmp_path / f"{number}.npz", *option)
        source = sample_source(stored.source, weight)
        mine = sample(model, num=7, steps=2, batch_size=4, seed=3, balanced=True, source=source).x
        assert torch.equal(found, mine)
        assert torch.equal(found, plain) if weight == 0 else relative(found, plain) > 0.01
        assert f"source: {source.describe()}\n" in said


@pytest.mark.parametrize("kind", ["data", "standard"])
def test_unknown_kappa_begins_at_normal_noise(capsys, tmp_path: Path, runs, kind: str) -> None:
    """It is said once, with the reason; a weight that would have no effect is refused."""
    path = runs[kind]
    found, said = drawn(capsys, path, tmp_path / "x.npz")
    model = load_model(path, "ema")
    plain = sample(model, num=7, steps=2, batch_size=4, seed=3, balanced=True).x
    assert torch.equal(found, plain)
    reason = "its source sees the data (kappa data), which are not known when samples are made"
    assert said.count("source: N(0, I): " + reason) == (kind == "data")
    assert ("source:" in said) == (kind == "data")
    code, _, err = run(
        "sample", path, "--out", tmp_path / "y.npz", "--source-w", "0.5", capsys=capsys
    )
    assert code == 2 and not (tmp_path / "y.npz").exists()
    why = reason if kind == "data" else "it was trained without a mixed source"
    assert f"--source-w has no effect: {path}: {why}" in err


@pytest.mark.parametrize("text", ["-0.1", "1.5", "nan", "half"])
def test_weights_that_are_none(text: str, capsys) -> None:
    parser = argparse.ArgumentParser()
    add_source_option(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--source-w={text}"])
    assert "must be a number in 0 .. 1 or train" in capsys.readouterr().err


def test_sets_record_the_source(capsys, tmp_path: Path, runs) -> None:
    """In the protocol, and its weights in the origin; N(0, I) has one protocol for all."""
    found = {}
    for kind in runs:
        arguments = ["sample", runs[kind], "-n", 5, *STEPS, "--out", tmp_path / kind]
        code, _, err = run(*arguments, capsys=capsys)
        assert code == 0, err
        found[kind] = read_set(tmp_path / kind)
    records = {kind: each.protocol.record for kind, each in found.items()}
    assert records["class"]["source"] == {
        "kind": "mixed", "kappa": "class", "mode": "moments", "w": 0.5,
    }  # fmt: skip
    assert records["noise"]["source"]["w"] == "uniform"
    assert found["standard"].protocol == found["data"].protocol
    assert "source" not in records["data"] and "source_sha256" not in found["data"].origin
    predictor = load_source(runs["class"], "ema").source.predictor
    assert found["class"].origin["source_sha256"] == weights_sha256(predictor)
    again = ["sample", runs["class"], "-n", 5, *STEPS, "--out", tmp_path / "class"]
    code, _, err = run(*again, "--source-w", "1", capsys=capsys)
    assert code == 2 and "source.w = 0.5 against 1" in err
    assert run(*again, capsys=capsys)[0] == 0


def test_sets_of_batches_that_do_not_divide(capsys, tmp_path: Path, runs) -> None:
    """The last batch of two has its own classes."""
    pictures = {}
    for size in (2, 4, 6):
        out = tmp_path / f"b{size}"
        arguments = ["sample", runs["class"], "-n", 6, "--steps", 2, "--batch-size", size]
        assert run(*arguments, "--label", 1, 0, 1, "--out", out, capsys=capsys)[0] == 0
        pictures[size] = read_set(out).pictures.astype(int)
    for size in (4, 6):
        assert np.abs(pictures[size] - pictures[2]).max() <= 1


def test_previews_begin_there(tmp_path: Path) -> None:
    """A run's own, against the same pictures from its weights file."""
    from PIL import Image

    from mixflow_fast.reports.previews import SEED, preview_file, preview_labels
    from mixflow_fast.training.trainer import train
    from tests.support.runs import tiny_mixed
    from tests.support.sources import TABLE

    config = tiny_mixed(
        tmp_path, *TABLE, "source.sample_w=1.0", "source.lam=0", "train.preview_every=6",
        "train.previews=4", "train.preview_steps=1", "optim.lr=0.03", "optim.ema_decays=[0.1]",
    )  # fmt: skip
    train(config, quiet=True)
    stored, model = load_source(tmp_path), load_model(tmp_path)
    begins = [None, sample_source(stored.source, stored.sample_w)]
    options = {"steps": 1, "seed": SEED, "batch_size": 4, "shift": config.objective.shift}
    plain, own = (
        sample(model, labels=preview_labels(4, 2), source=source, **options).x for source in begins
    )
    assert relative(own, plain) > 0.01
    steps = max(int(p.stem.split("_")[1]) for p in (tmp_path / "previews").glob("*.png"))
    with Image.open(preview_file(tmp_path, steps)) as image:
        shown = torch.from_numpy(np.array(image)).float()
    from mixflow_fast.reports.images import save_grid

    for x, same in ((own, True), (plain, False)):
        save_grid(tmp_path / "again.png", x, columns=2, scale=64 // x.shape[-1])
        with Image.open(tmp_path / "again.png") as image:
            again = torch.from_numpy(np.array(image)).float()
        assert (float((again - shown).abs().max()) <= 1) == same


def test_compare_says_where_samples_begin(capsys, tmp_path: Path, runs) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "page.html"
    small = ["-n", 100, "--steps", "1", "--pixels", "--states", 100, "--out", out]
    code, said, err = run("compare", runs["standard"], runs["data"], *small, capsys=capsys)
    assert code == 0, err
    assert "note: after: source: N(0, I): its source sees the data (kappa data)" in said
    words = out.read_text()
    assert "Left out: the states on the true path are made of data and independent noise" in words
    code, _, err = run(
        "compare", runs["standard"], runs["data"], *small, "--source-w", "1", capsys=capsys
    )
    assert code == 2 and "--source-w has no effect: before: it was trained without" in err
    other = ["compare", runs["standard"], runs["class"], *small[:-1], tmp_path / "other.html"]
    code, _, err = run(*other, capsys=capsys)
    assert code == 2 and "source.kappa = None against 'class'" in err
    assert "--allow-different source." in err


@pytest.mark.parametrize("after", [False, True])
def test_slow_flow_of_a_source_is_refused(capsys, tmp_path: Path, runs, after: bool) -> None:
    paths = [runs["standard"], "--after", runs["data"]] if after else [runs["data"]]
    out = tmp_path / "slow.html"
    code, _, err = run("slowflow", *paths, "--out", out, capsys=capsys)
    assert code == 2 and f"slow flow of {runs['data']} cannot be measured" in err
    assert "`mixflow-fast curvature`" in err and not out.exists()
