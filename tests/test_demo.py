"""The demo at toy size: files and schema, same seed same bits, interruption, several seeds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mixflow_fast import demo
from mixflow_fast.demo import SETTINGS, arms_of, run_demo

TOY = replace(
    SETTINGS["photos"],
    base_images=1600,
    post_images=640,
    steps=(2, 10),
    picture_steps=2,
    samples=40,
)
pytestmark = pytest.mark.filterwarnings("ignore:.*full-rank.*", "ignore:.*samples.*:UserWarning")


def weights(out: Path, arm: str) -> dict[str, torch.Tensor]:
    return torch.load(out / "seed_0" / arm / "weights.pt", weights_only=True)["ema"]


def test_demo_files_schema_and_repeatability(tmp_path: Path) -> None:
    result = run_demo(tmp_path / "a", settings=TOY, quiet=True)
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert list(report["arms"]) == ["base", "control", "mixflow"]
    for arm in report["arms"].values():
        assert list(arm["frechet"]) == ["2", "10"]
        assert all(isinstance(value, float) and value > 0 for value in arm["frechet"].values())
    assert report["seed"] == 0 and report["seconds"] > 0
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # three arms and the real crops
    four, one = (Image.open(tmp_path / "a" / name) for name in ("arms.png", "real.png"))
    assert four.size == (2 * one.width + 12, 2 * (one.height + 30) + 12)
    last = four.crop((four.width - one.width, four.height - one.height, *four.size))
    assert last.tobytes() == one.tobytes()
    again = run_demo(tmp_path / "b", settings=TOY, quiet=True)
    for arm in result["arms"]:
        assert again["arms"][arm]["frechet"] == result["arms"][arm]["frechet"]
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
    evaluate, calls = demo._evaluate, []

    def interrupted(*args):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(args[0])
        return evaluate(*args)

    monkeypatch.setattr(demo, "_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "a", settings=TOY, quiet=True)
    assert not (tmp_path / "a" / "report.json").exists()
    calls.clear()
    monkeypatch.setattr(demo, "_evaluate", lambda *a: (calls.append(a[0]), evaluate(*a))[1])
    result = run_demo(tmp_path / "a", settings=TOY, quiet=True)
    assert [Path(c).name for c in calls] == ["control", "mixflow"]  # the base was done
    with pytest.raises(ValueError, match=r"other settings \(gamma: .* -> 0.9\): choose"):
        run_demo(tmp_path / "a", settings=replace(TOY, gamma=0.9), quiet=True)
    calls.clear()
    assert run_demo(tmp_path / "a", settings=TOY, quiet=True)["arms"] == result["arms"]
    assert calls == []  # nothing that is finished is lost or done again
    again = run_demo(tmp_path / "a", settings=TOY, quiet=True, fresh=True)
    assert len(calls) == 3 and again["arms"] == result["arms"]
    calls.clear()
    more = run_demo(tmp_path / "a", seeds=(0, 1), settings=TOY, quiet=True)
    assert len(calls) == 3 and all("seed_1" in str(call) for call in calls)
    kept = more["arms"]["base"]["frechet"]["10"]["values"][0]
    assert kept == result["arms"]["base"]["frechet"]["10"]


def test_several_seeds_give_mean_and_spread(tmp_path: Path) -> None:
    toy = replace(TOY, data="digits", size=8, base_images=256, post_images=128)
    result = run_demo(tmp_path / "a", seeds=(3, 4), settings=toy, quiet=True)
    cell = result["arms"]["control"]["frechet"]["10"]
    one, two = cell["values"]
    assert cell["mean"] == pytest.approx((one + two) / 2)
    assert cell["std"] == pytest.approx(abs(one - two) / 2**0.5)
    assert one != two


def test_sweep_holds_the_gammas_and_the_ablation_rows() -> None:
    arms = arms_of(SETTINGS["photos"], sweep=True).values()
    distributions = {(arm.gamma, arm.timesteps, arm.interval) for arm in arms}
    assert {(g, "beta21", "shifted") for g in (0.0, 0.3, 0.5, 0.8, 1.0)} <= distributions
    assert (1.0, "uniform", "shifted") in distributions
    assert {(None, distribution, "full") for distribution in ("uniform", "beta21")} <= distributions
    assert len(distributions) == len(arms)


def test_bad_folders_and_seeds(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="holds no demo"):
        run_demo(tmp_path, settings=TOY)
    assert (tmp_path / "file").read_text() == "mine"
    for seeds in ((), (1, 1), (-1,)):
        with pytest.raises(ValueError, match="seeds"):
            run_demo(tmp_path / "x", seeds=seeds, settings=TOY)
