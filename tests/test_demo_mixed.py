"""The demo of learned sources at toy size: equal training, kept arms, slowing on top, numbers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixflow_fast.cli.main import main
from mixflow_fast.data import build_dataset, sample_index
from mixflow_fast.demo import (
    MIXED,
    SETTINGS,
    MixedSettings,
    aggregate,
    arms,
    both_arms,
    mixed_arms,
    run_demo,
)
from mixflow_fast.demo import measure as measuring
from mixflow_fast.demo.mixed import SWEEP, choice_note
from mixflow_fast.flow.source import MixedSource
from mixflow_fast.kernels.philox import Stream, normal
from mixflow_fast.models import load_model
from mixflow_fast.models.weights.sources import load_source
from mixflow_fast.objective import MixFlow
from mixflow_fast.reports.mixed_tables import HEALTH
from tests.support.pages import assert_loads_nothing

TOY = replace(
    MIXED,
    lam=0.3,
    fc_lam=3.0,
    base_images=320,
    post_images=128,
    steps=(1, 2),
    picture_steps=(2,),
    samples=70,
    trajectories=6,
    curvature_steps=4,
    toy_steps=20,
)
pytestmark = pytest.mark.filterwarnings("ignore:.*full-rank.*", "ignore:.*samples.*:UserWarning")


def make_cheap(patch: pytest.MonkeyPatch) -> None:
    """FD-EffLite0 takes seconds, and tests/test_demo.py has it; few crops make an aggregate."""
    patch.setattr(measuring, "has_effnet", lambda data: False)
    patch.setattr(aggregate, "IMAGES", 100)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    make_cheap(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demo of the method mixed."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("mixed") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        make_cheap(patch)
        run_demo(out, settings=TOY, method="mixed", quiet=True)
    return out


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def stored(folder: Path, arm: str) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(folder / "seed_0" / arm / "weights.pt", weights_only=True)


def curvature_by_definition(model: torch.nn.Module, count: int, steps: int) -> float:
    """(1/N) sum_k (1/D) || (z_N - z_0) - N (z_{k+1} - z_k) ||^2, as it is written."""
    ids = torch.arange(count)
    states = [normal(0, Stream.SAMPLE_NOISE, ids, 768).view(-1, 3, 16, 16)]
    with torch.no_grad():
        for k in range(steps):
            velocity = model(states[-1], torch.full((count,), k / steps), ids % 2)
            states.append(states[-1] + velocity / steps)
    z = torch.stack(states).double()
    gaps = (z[-1] - z[0]) - steps * (z[1:] - z[:-1])
    return gaps.square().mean(dim=(2, 3, 4)).mean().item()


def test_arms_differ_in_their_source_alone(folder: Path) -> None:
    found = report(folder)
    assert list(found["arms"]) == [
        "rf",
        "mix",
        "mix_own",
        "fc",
        "fc_own",
        "fc_tuned",
        "fc_tuned_own",
    ]
    trained = [name for name, arm in found["arms"].items() if "source" in arm]
    assert trained == ["rf", "mix", "fc", "fc_tuned"]
    configs = {name: found["config"][name] for name in trained}
    for config in configs.values():
        for section in ("model", "objective", "data", "optim", "train"):
            assert config[section] == configs["rf"][section]
        assert config["train"]["init"] is None and config["train"]["images"] == 320
    sources = {name: config["source"] for name, config in configs.items()}
    assert sources["rf"]["kind"] == "standard"
    assert [sources[n]["w"] for n in ("mix", "fc", "fc_tuned")] == ["uniform", 1.0, 1.0]
    assert [sources[n]["lam"] for n in ("mix", "fc", "fc_tuned")] == [0.3, 0.3, 3.0]
    assert all(sources[n]["kappa"] == "data" for n in ("mix", "fc", "fc_tuned"))
    # The same network before training, and after it others.
    assert len({found["arms"][n]["distances"]["frechet"]["2"] for n in configs}) == 4


def test_numbers_are_what_they_say(folder: Path) -> None:
    found = report(folder)
    for name, arm in found["arms"].items():
        if arm["weights_of"] is not None:
            assert "source" not in arm
            continue
        model = load_model(folder / "seed_0" / name / "weights.pt").eval()
        expected = curvature_by_definition(model, 6, 4)
        assert arm["source"]["curvature"] == pytest.approx(expected, rel=1e-4)
        assert 0 < arm["source"]["curvature_se"] < arm["source"]["curvature"]
        for metric in ("frechet", "frechet_random_conv"):
            assert list(arm["distances"][metric]) == ["1", "2"]
            solvers = arm["source"]["solvers"][metric]
            assert list(solvers) == list(found["solver_nfe"])
            assert all(value > 0 for value in solvers.values())
        assert arm["source"]["rk45_nfe"] >= 8
        assert arm["facts"][-1].startswith("sampled from N(0, I)")
        health = arm["source"]["health"]
        assert health.keys() == (set() if name == "rf" else health.keys() | HEALTH.keys())
    assert found["solver_nfe"] == {"Heun, 2 steps": 3, "Heun, 3 steps": 5, "Heun, 5 steps": 9}
    # A weaker KL lets the source go further from N(0, I).
    kl = {n: found["arms"][n]["source"]["health"]["kl_per_dim"] for n in ("fc", "fc_tuned")}
    assert kl["fc"] > kl["fc_tuned"] > 0
    (gaussian,) = found["references"].values()
    # Moments are what the distance of averaged pixels asks for, and not what the other does.
    assert gaussian["frechet"] < 3 * found["floor"]["frechet"]
    assert gaussian["frechet_random_conv"] > 3 * found["floor"]["frechet_random_conv"]
    toy = found["toy"]["arms"]
    assert len(toy) == 4 and all(len(arm["paths"]) >= 20 for arm in toy.values())


@pytest.mark.parametrize("w", ["uniform", 1.0])
def test_the_aggregate_has_the_moments_of_the_noise_ends(w: str | float) -> None:
    """Against draws of a source whose mean follows the image, of one class each."""
    photos = build_dataset("photos", size=4)

    def predictor(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.5 * x + 0.25, 0.5 * x - 1.0], dim=1)

    source = MixedSource(predictor, "data", "moments", w, lam=1.0)
    found = aggregate.moments_of(source, photos)
    index = sample_index(torch.arange(8000), len(photos), seed=0)
    batch = photos.get(index, index, 0)
    mix = MixFlow(gamma=0, timesteps="uniform", clock="data_at_1", source=source)
    draws = [mix.prepare(batch.x, ids=index + k * 10**6).x0().flatten(1) for k in range(8)]
    for label in (0, 1):
        own = torch.cat([x0[batch.y == label] for x0 in draws]).double()
        mean, cov = own.mean(0), own.T.cov()
        root = found.directions[label] * found.variances[label]
        assert (found.mean[label] - mean).abs().max() < 0.03
        assert (root @ found.directions[label].T - cov).abs().max() < 0.05
    # Where samples begin has these moments, too.
    eps = torch.randn(40_000, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    starts = found.begin(eps, torch.ones(len(eps), dtype=torch.int64)).flatten(1).double()
    assert (starts.mean(0) - found.mean[1]).abs().max() < 0.05
    assert (starts.T.cov() - root @ found.directions[1].T).abs().max() < 0.1
    assert found.largest_variance > 1.5 and found.w2_per_dim > 0.01


def test_the_aggregate_of_a_standard_source_is_standard() -> None:
    photos = build_dataset("photos", size=4)
    nothing = MixedSource(lambda x: torch.zeros(len(x), 6, 4, 4), "data", lam=1.0)
    found = aggregate.moments_of(nothing, photos)
    assert found.largest_variance == pytest.approx(1) and found.w2_per_dim == pytest.approx(0)
    eps = torch.randn(5, 3, 4, 4)
    assert torch.allclose(found.begin(eps, torch.tensor([0, 1, 1, 0, 1])), eps, atol=1e-6)


def test_the_page_and_its_tables(folder: Path) -> None:
    page = assert_loads_nothing((folder / "report.html").read_text())
    assert "In two dimensions" in page.text and "every trained arm is sampled" in page.words
    # A row and a grid of seven arms and of real crops.
    assert sum(tag == "img" for tag, _ in page.tags) == 16
    assert ["MixFlow, lambda 0.3, against rectified flow"] == [
        row[0] for row in page.rows if row[0].startswith("MixFlow, lambda 0.3, against rect")
    ][:1]
    text = (folder / "report.md").read_text()
    assert "largest variance (1)" in text and "Heun, 3 steps (5 NFE)" in text
    assert (folder / "arms.png").exists()


@pytest.mark.usefixtures("cheap")
def test_both_goes_on_from_the_arms_of_mixed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, calls = arms.evaluate, []

    def counted(*args):
        calls.append(Path(args[0]).name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(arms, "evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(folder, settings=TOY, method="both", quiet=True)
    run_demo(folder, settings=TOY, method="both", quiet=True)
    # rf and mix were there, and what the interruption left is not made again.
    trained = ["rf_plain", "rf_slowed", "mix_plain", "mix_plain", "mix_plain_own"]
    assert calls == [*trained, "mix_slowed", "mix_slowed_own"]
    found = report(folder)
    assert list(found["arms"]) == list(both_arms(TOY)) and found["method"] == "both"
    before = stored(folder, "mix")["source_ema"]
    for name in ("mix_plain", "mix_slowed"):
        after = stored(folder, name)
        assert before.keys() == after["source_ema"].keys() and before
        assert all(torch.equal(before[key], after["source_ema"][key]) for key in before)
        source = load_source(folder / "seed_0" / name / "weights.pt")
        assert source is not None and source.source.frozen
    plain, slowed = (found["config"][name] for name in ("mix_plain", "mix_slowed"))
    assert plain["source"] == slowed["source"] and slowed["source"]["frozen"]
    differing = {k for k in plain["objective"] if plain["objective"][k] != slowed["objective"][k]}
    assert differing == {"gamma", "timesteps"}
    for section in ("model", "data", "optim", "train"):
        assert plain[section] == slowed[section]
    text = (folder / "report.html").read_text()
    assert "the label t is where the sampler" in text and "the source frozen" in text


@pytest.mark.usefixtures("cheap")
def test_other_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"other settings \(lam: 0.3 -> 0.1\): choose"):
        run_demo(folder, settings=replace(TOY, lam=0.1), method="mixed", quiet=True)
    with pytest.raises(ValueError, match="other settings"):
        run_demo(folder, settings=SETTINGS["photos"], quiet=True)
    with pytest.raises(ValueError, match="MixedSettings for method='mixed', got Settings"):
        run_demo(tmp_path / "x", settings=SETTINGS["photos"], method="mixed")
    with pytest.raises(ValueError, match="has no sweep"):
        run_demo(tmp_path / "x", settings=TOY, method="both", sweep=True)
    for change, message in (
        ({"data": "digits"}, "shown on photos"),
        ({"picture_steps": (5,)}, "picture_steps must be of some of steps"),
        ({"samples": 1}, "samples must be >= 2"),
        ({"lam": -1.0}, "lam"),
    ):
        with pytest.raises(ValueError, match=message):
            run_demo(tmp_path / "x", settings=replace(TOY, **change), method="mixed")
    assert not (tmp_path / "x").exists()


def test_sweep_holds_both_sources_at_every_lambda() -> None:
    every = mixed_arms(MIXED, sweep=True)
    for w in ("uniform", 1.0):
        trained = [arm for arm in every.values() if arm.weights_of is None]
        lambdas = [arm.lam for arm in trained if arm.w == w]
        assert sorted(lambdas) == sorted({*SWEEP, MIXED.lam, MIXED.fc_lam})
    # Folded: exactly what the sweep adds.
    assert {n for n, arm in every.items() if not arm.folded} == set(mixed_arms(MIXED))
    same = mixed_arms(replace(MIXED, fc_lam=MIXED.lam))
    assert list(same) == ["rf", "mix", "mix_own", "fc", "fc_own"]


def test_the_note_on_the_choice_names_seeds_that_are_not_free_of_it() -> None:
    assert "on seed 110 alone" in choice_note(MIXED, [0, 1])
    assert choice_note(MIXED, [1, 110]).endswith("110 took part in that choice.")
    assert "other seeds" in choice_note(TOY, [0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lam", "0.1"], "--lam has no meaning for --method slowed"),
        (["--method", "mixed", "--gamma", "0.3"], "--gamma has no meaning for --method mixed"),
        (["--method", "both", "--fc-lam", "3"], "--fc-lam has no meaning for --method both"),
        (["--method", "both", "--data", "digits"], "--data digits has no meaning for --method"),
    ],
)
def test_options_of_another_method_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "x"), *words]) != 0
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_settings_of_the_demo_are_the_published_ones() -> None:
    assert MixedSettings() == MIXED
