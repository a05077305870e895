"""`mixflow-fast compare` from end to end on tiny networks, and on wrong input."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mixflow_fast.cli.main import main
from mixflow_fast.config.loading import load_config
from mixflow_fast.evaluation.metrics import Gaussian, frechet
from mixflow_fast.folder_lock import FolderLock
from mixflow_fast.models import build, load_model, save_weights
from mixflow_fast.training.trainer import train
from tests.support.command_line import run
from tests.support.pages import assert_loads_nothing

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
SMALL = ["-n", "200", "--steps", "1,2", "--pixels"]
FAST = [*SMALL, "--no-slow-flow"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a base, and with two that were trained further, on 8 x 8 crops of photographs."""
    folder = tmp_path_factory.mktemp("compare")
    settings = ["model.depth=1", "model.hidden_size=32", "train.images=32", "data.size=8",
                "train.global_batch_size=16", "train.microbatch_size=16", "model.input_size=8",
                "train.validate_examples=8", f"out={folder / 'base'}"]  # fmt: skip
    base = load_config("photos", settings)
    train(base, quiet=True)
    for name, gamma in (("control", 0.0), ("mixflow", 0.5)):
        further = {"out": str(folder / name), "train.init": str(folder / "base" / "weights.pt")}
        more = {"objective.gamma": gamma, "optim.lr": 0.01, "optim.ema_decays": [0.1]}
        train(base.replace(**further, **more), quiet=True)
    return folder


def arguments(runs: Path, *names: str) -> list[Path | str]:
    before, after, *control = names
    found: list[Path | str] = [runs / before, runs / after]
    return ["compare", *found, *(["--control", runs / control[0]] if control else [])]


@pytest.fixture(scope="module")
def page(runs: Path) -> Path:
    """The page of all three, with slow flow."""
    out = runs / "page" / "report.html"
    command = arguments(runs, "base", "mixflow", "control")
    assert main([str(a) for a in [*command, *SMALL, "--states", "100", "--out", out]]) == 0
    return out


def test_the_page_says_all_that_a_reader_needs(page: Path, runs: Path) -> None:
    shown = assert_loads_nothing(page.read_text())
    words = shown.words
    assert "after: mixflow against control" in words and "no control" not in words
    assert "5,000 held-out examples of photos-8-heldout" in words
    for part in ("Verdict by FD of pooled pixels", "Against network evaluations", "By class",
                 "Ids 0 to 15, fixed in advance", "differ most between", "so not typical",
                 "which time do the states look like? (E3)", "change in percent, blue is better",
                 "objective.gamma", "They do not cover another training"):  # fmt: skip
        assert part in words, part
    # Every caption says how many; the figures of slow flow have a count of their own.
    captions = re.findall(r"<h3>.*?</h3>|<figcaption>[^<]*bias[^<]*</figcaption>", page.read_text())
    assert len(captions) > 6
    config = next(row for row in shown.rows if row[:1] == ["objective.gamma"])
    assert config == ["objective.gamma", "0.0", "0.0", "0.5"]
    assert not re.search(r"\d{4}-\d\d-\d\d|seconds|UTC", words)


def test_the_numbers_are_those_of_the_samples(page: Path, runs: Path) -> None:
    """Read back from the files: the distance of the kept features to the kept reference."""
    found = json.loads(page.with_suffix(".json").read_text())
    files = page.with_name("report_files")
    assert found["n"] == 200 and found["steps"] == [1, 2] and found["control"] is True
    real = np.load(files / "reference.features" / "pooled_pixels.features.npy")
    mine = np.load(files / "after_2.features" / "pooled_pixels.features.npy")
    expected = frechet(mine, Gaussian.of(real))
    row = next(r for r in found["numbers"] if (r["arm"], r["steps"]) == ("after", 2))
    value = row["metrics"]["fd_pooled_pixels"]
    assert value["value"] == pytest.approx(expected.value, rel=1e-12) and row["nfe"] == 2
    theirs = np.load(files / "control_2.features" / "pooled_pixels.features.npy")
    other = frechet(theirs, Gaussian.of(real))
    apart = next(
        v
        for v in found["verdicts"]
        if (v["a"], v["b"], v["steps"], v["metric"]) == ("after", "control", 2, "fd_pooled_pixels")
    )
    assert apart["value"] == pytest.approx(expected.value - other.value)
    half = 1.959964 * (expected.influence - other.influence).std(ddof=1) / 200**0.5
    assert apart["high"] - apart["low"] == pytest.approx(2 * half)
    model = load_model(runs / "mixflow")
    assert next(a for a in found["arms"] if a["key"] == "after")["path"] == str(runs / "mixflow")
    assert model.in_channels == 3 and len(found["protocols"]) == 2
    assert [s["name"] for s in found["slow_flow"]] == ["before: base", "control", "after: mixflow"]


def test_twice_the_same_bytes(page: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kept, made again, and in another folder; a page of the same command is replaced."""
    first = page.read_bytes(), page.with_suffix(".json").read_bytes()
    command = [*arguments(runs, "base", "mixflow", "control"), *SMALL, "--states", "100"]
    made = (page.with_name("report_files") / "after_2.npz").stat().st_mtime_ns
    code, said, err = run(*command, "--out", page, capsys=capsys)
    assert code == 0, err
    assert (page.with_name("report_files") / "after_2.npz").stat().st_mtime_ns == made
    assert (page.read_bytes(), page.with_suffix(".json").read_bytes()) == first
    assert said.rstrip().endswith(f"{page}\n{page.with_suffix('.json')}")
    assert "1 steps (1 NFE): after: mixflow against before: base: " in said
    code, _, err = run(*command, "--fresh", "--out", page, capsys=capsys)
    assert code == 0, err
    assert (page.with_name("report_files") / "after_2.npz").stat().st_mtime_ns != made
    assert (page.read_bytes(), page.with_suffix(".json").read_bytes()) == first
    other = runs / "elsewhere" / "x.html"
    assert run(*command, "--out", other, capsys=capsys)[0] == 0
    assert (other.read_bytes(), other.with_suffix(".json").read_bytes()) == first


def test_a_folder_of_other_weights_or_settings_is_refused(
    page: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    shutil.copytree(page.with_name("report_files"), tmp_path / "report_files")
    for command, text in (
        ([*arguments(runs, "base", "control"), *FAST], "other weights of after"),
        ([*arguments(runs, "base", "mixflow"), *FAST, "--seed", "3"], "number, seed and labels"),
        (
            [*arguments(runs, "base", "mixflow"), *FAST, "--shift", "2"],
            "sampler of before",
        ),
    ):
        code, _, err = run(*command, "--out", out, capsys=capsys)
        assert code == 2 and text in err and "--fresh" in err, err
    assert not out.exists()
    # More steps and a remedy only add to it.
    more = [*arguments(runs, "base", "mixflow", "control"), "-n", "200", "--steps", "1,3"]
    more += ["--pixels", "--no-slow-flow", "--remedy", "ssc=0.2,1", "--out", out]
    code, said, err = run(*more, capsys=capsys)
    assert code == 0, err
    found = json.loads(out.with_suffix(".json").read_text())
    keys = [arm["key"] for arm in found["arms"]]
    assert keys == ["before", "control", "after", "control_remedy", "after_remedy"]
    assert "against control + ssc (a 0.2, b 1)" in said
    assert "choose them with another seed" in said
    shown = assert_loads_nothing(out.read_text())
    assert "after: mixflow + ssc (a 0.2, b 1)" in shown.words
    protocols = found["protocols"].values()
    remedies = {json.dumps(p["sampler"]["remedy"], sort_keys=True) for p in protocols}
    assert remedies == {"null", '{"a": 0.2, "b": 1, "name": "ssc"}'}


def test_the_same_weights_differ_by_exactly_nothing(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "same.html"
    command = ["compare", runs / "base", runs / "base" / "weights.pt", *FAST, "--out", out]
    code, said, err = run(*command, capsys=capsys)
    assert code == 0, err
    assert "note: Identical weights: after holds the weights of before." in said
    assert "no control: this difference includes plain further training" in said
    found = json.loads(out.with_suffix(".json").read_text())
    for verdict in found["verdicts"]:
        assert verdict["verdict"] == "identical weights"
        assert verdict["value"] == verdict["low"] == verdict["high"] == 0.0
    # Nothing differs, so nothing is shown as differing most.
    assert found["pictures"] and all(each["chosen"] is None for each in found["pictures"])


def test_what_too_few_samples_cannot_tell_does_not_decide(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pooled pixels have 192 dimensions, random convolutions 128."""
    out = tmp_path / "few.html"
    command = [*arguments(runs, "base", "mixflow"), "--steps", "1", "--pixels", "--no-slow-flow"]
    code, said, err = run(*command, "-n", "150", "--out", out, capsys=capsys)
    assert code == 0, err
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["primary"] == "fd_random_conv" and "cannot be relied on" not in said
    (warning,) = [text for text in found["warnings"] if "does not decide" in text]
    assert warning.startswith("FD of pooled pixels: too few samples")
    code, said, err = run(*command, "-n", "120", "--out", tmp_path / "fewer.html", capsys=capsys)
    assert code == 0, err
    assert "note: FD of pooled pixels decides here, from 120 samples in more dimensions" in said


def test_a_control_that_is_none_is_named(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained half as long, at another learning rate: the page says so above the numbers."""
    settings = load_config(str(runs / "control" / "config.yaml"), ["train.images=16"])
    train(settings.replace(**{"out": str(tmp_path / "short"), "optim.lr": 0.02}), quiet=True)
    command = ["compare", runs / "base", runs / "mixflow", "--control"]
    more = ["-n", "10", "--steps", "1", "--pixels", "--no-slow-flow", "--out", tmp_path / "x.html"]
    code, said, err = run(*command, tmp_path / "short", *more, capsys=capsys)
    assert code == 0, err
    (note,) = [line for line in said.splitlines() if "was not trained as after was" in line]
    assert note.endswith(
        "optimizer steps 1 against 2, optim.lr 0.02 against 0.01, train.images 16 against 32."
    )
    code, said, err = run(*command, runs / "control", *more, "--fresh", capsys=capsys)
    assert code == 0, err
    assert "was not trained" not in said


def test_fresh_deletes_nothing_that_is_not_its_own(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "x_files" / "settings.json"
    mark.parent.mkdir()
    mark.write_text('{"mine": 1}')
    used = tmp_path / "used_files" / "settings.json"
    used.parent.mkdir()
    used.write_text('{"format": "mixflow-comparison/1", "arms": {}}')
    command = [*arguments(runs, "base", "mixflow"), *FAST, "--fresh"]
    code, _, err = run(*command, "--out", tmp_path / "x.html", capsys=capsys)
    assert code == 2 and "was not written by a comparison" in err
    assert mark.read_text() == '{"mine": 1}'
    with FolderLock(used.parent):
        code, _, err = run(*command, "--out", tmp_path / "used.html", capsys=capsys)
    assert code == 2 and "is in use by another run" in err and used.exists()


def test_sets_of_samples(
    runs: Path, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps come from their protocols; others than alike are refused, or by consent not judged."""
    sets = {}
    for name, steps in (("base", 2), ("mixflow", 2), ("control", 3)):
        sets[name] = tmp_path / f"{name}{steps}"
        command = ["sample", runs / name, "--steps", steps, "-n", "200", "--out", sets[name]]
        assert run(*command, capsys=capsys)[0] == 0
    reference = page.with_name("report_files") / "reference.npz"
    command = ["compare", sets["base"], f"{sets['mixflow']}.npz", "--out", tmp_path / "sets.html"]
    code, _, err = run(*command, capsys=capsys)
    assert code == 2 and "does not say which data its network was trained on" in err
    command += ["--reference", reference]
    code, said, err = run(*command, capsys=capsys)
    assert code == 0, err
    by_sets = json.loads((tmp_path / "sets.json").read_text())
    by_networks = json.loads(page.with_suffix(".json").read_text())
    assert by_sets["steps"] == [2] and by_sets["slow_flow"] == []
    mine, theirs = (
        next(
            row["metrics"]["fd_pooled_pixels"]["value"]
            for row in found["numbers"]
            if (row["arm"], row["steps"]) == ("after", 2)
        )
        for found in (by_sets, by_networks)
    )
    assert mine == pytest.approx(theirs, rel=1e-6)
    for more, text in (
        (["--steps", "5"], "is a set of samples, which was made with its own steps and number"),
        (["--control", sets["control"]], "have different protocols"),
        (["--control", runs / "control"], "give checkpoints only, or sets only"),
    ):
        out = tmp_path / "wrong.html"
        wrong = [*command[:3], "--out", out, "--reference", reference, *more]
        code, _, err = run(*wrong, capsys=capsys)
        assert code == 2 and text in err and not out.exists(), err
    wrong = [*wrong[:-2], "--control", sets["control"]]
    consent = ["--allow-different", "sampler.intervals", "sampler.nfe", "sampler.network_calls"]
    code, said, err = run(*wrong, *consent, capsys=capsys)
    assert code == 0, err
    assert "different by consent: sampler.intervals = 2 against 3 against 2" in said
    found = json.loads((tmp_path / "wrong.json").read_text())
    judged = {(v["a"], v["b"]): v for v in found["verdicts"] if v["primary"]}
    assert judged["after", "control"]["verdict"] == "not judged"
    assert judged["after", "control"]["low"] is None
    assert judged["after", "before"]["low"] is not None
    assert "These differ by consent" in assert_loads_nothing(
        (tmp_path / "wrong.html").read_text()
    ).words  # fmt: skip


def test_wrong_input(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    networks = {
        "official": build("SiT-S/4", input_size=8, in_channels=3, depth=1, num_classes=2),
        "classes": build("SiT-S/4", input_size=8, in_channels=3, depth=1, num_classes=3),
        "latents": build("SiT-S/4", input_size=8, depth=1, num_classes=2),
    }
    for name, network in networks.items():
        state = network.state_dict()
        save_weights(tmp_path / f"{name}.pt", state, state, {})
    base, out = runs / "base", tmp_path / "x.html"
    taken = tmp_path / "taken.html"
    taken.write_text("mine")
    official, latents = tmp_path / "official.pt", tmp_path / "latents.pt"
    for words, text in (
        ([base, base, "--out", tmp_path / "x.pdf"], "--out must end in .html"),
        ([base, base, "--out", taken], "taken.html exists: choose another --out"),
        ([base, runs / "mixfow"], "did you mean 'mixflow'"),
        ([base, base, "--control", "nothing.pt"], "nothing.pt does not exist"),
        ([base, base, "-n", "1"], "--num must be >= 2, got 1"),
        ([base, tmp_path / "classes.pt"], "num_classes 2"),
        ([base, official], "are different networks (decoder_hidden_size 32 against 384"),
        ([official, official], "does not say how it was trained, so there are no images"),
        ([latents, latents], "4-channel latents, not pictures: give the autoencoder"),
        ([base, base, "--decoder-scale", "2"], "--decoder-scale needs --decoder"),
        ([base, base, "--method", "dopri5"], "chooses its steps itself"),
        ([base, base, "--remedy", "scc"], "remedy must be one of ssc"),
        ([base, base, "--allow-different", "sampler.methud"], "sampler.methud"),
        ([base, base, "--no-slow-flow", "--states", "100"], "--states has no meaning"),
        ([base, base, "--reference", tmp_path / "no.npz"], "no.npz does not exist"),
    ):
        options = [] if "--out" in words else ["--out", out]
        code, _, err = run("compare", *words, *options, capsys=capsys)
        assert code == 2 and text in err, (words, err)
    assert not out.exists() and taken.read_text() == "mine"
    assert not (tmp_path / "x_files").exists()
    for steps, text in (("5,5", "must be different numbers"), ("5;10", "is not a list of whole")):
        with pytest.raises(SystemExit):
            run("compare", base, base, "--steps", steps, capsys=capsys)
        assert text in capsys.readouterr().err
    (tmp_path / "x_files").mkdir()
    (tmp_path / "x_files" / "mine.txt").write_text("mine")
    code, _, err = run("compare", base, base, *FAST, "--out", out, capsys=capsys)
    assert code == 2 and "is not empty and holds no comparison" in err
