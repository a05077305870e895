"""Options of `sample` for samplers: what they stand for, what they refuse."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mixflow_fast.cli import sampler_options
from mixflow_fast.cli.sampler_options import SamplerChoice, add_sampler_options, chosen_sampler
from mixflow_fast.models import build, save_weights
from mixflow_fast.sampling.guidance import Guidance
from mixflow_fast.sampling.presets import PRESETS
from mixflow_fast.sampling.remedies import REMEDIES, LabelScale
from mixflow_fast.sampling.sampler import ALL_METHODS, Sampler
from mixflow_fast.sampling.sde import FORMS, LAST_STEPS
from mixflow_fast.sampling.solvers import Tolerances
from tests.support.command_line import run


def _choice(line: str) -> SamplerChoice:
    parser = argparse.ArgumentParser()
    add_sampler_options(parser)
    return chosen_sampler(parser.parse_args(line.split()))


def test_choices_are_those_of_the_package() -> None:
    assert sampler_options.METHODS == ALL_METHODS
    assert sampler_options.FORMS == FORMS and sampler_options.LAST_STEPS == LAST_STEPS
    assert sampler_options.REMEDIES == tuple(REMEDIES)


def test_options() -> None:
    nothing = _choice("")
    assert nothing == SamplerChoice(Sampler(), Guidance(), None, None, None)
    choice = _choice("--method sde_heun --steps 9 --shift 2 --sde-form linear --sde-last euler")
    assert choice.sampler == Sampler("sde_heun", 9, 2.0, form="linear", last="euler")
    choice = _choice("--grid-start 0.01 --grid-end 0.99 --last-size 0.1 --steps 5")
    assert choice.sampler == Sampler("euler", 5, start=0.01, end=0.99, last_size=0.1)
    choice = _choice("--cfg-scale 1.5 --cfg-channels all --cfg-interval 0.3 1")
    assert choice.guidance == Guidance(1.5, None, (0.3, 1.0))
    assert _choice("--remedy label_scale=0.9").remedy == LabelScale(0.9)
    assert "label_scale (kappa 0.9)" in _choice("--remedy label_scale=0.9").describe()


def test_presets_and_what_replaces_them() -> None:
    choice = _choice("--preset sit-paper-sde")
    preset = PRESETS["sit-paper-sde"]
    assert (choice.sampler, choice.guidance) == (preset.sampler, preset.guidance)
    changed = _choice("--preset sit-paper-sde --steps 50 --cfg-scale 1")
    assert "changed by options" in changed.describe() and "changed" not in choice.describe()
    assert changed.sampler == Sampler("sde_euler", 50) and changed.guidance == Guidance(1.0, 3)
    guided = _choice("--preset rae-ag --guide small.pt")
    assert guided.guidance.kind == "autoguidance" and guided.guide == Path("small.pt")
    assert _choice("--preset rae-ag --cfg-scale 1").guidance.kind == "cfg"
    # A scale that is given may be 1: a loop over scales keeps its interval.
    assert _choice("--cfg-scale 1 --cfg-interval 0.3 1").guidance.scale == 1.0
    assert _choice("--guide small.pt --cfg-scale 2").guidance == Guidance(2.0, kind="autoguidance")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--preset sit", "preset must be one of"),
        ("--preset rae-ag", "--guide CHECKPOINT"),
        ("--preset sit-paper-ode --guide small.pt", "guides otherwise"),
        ("--guide small.pt", "nothing at scale 1"),
        ("--cfg-interval 0.3 1", "nothing without guidance: give --cfg-scale"),
        ("--preset rae --cfg-channels all", "nothing without guidance: give --cfg-scale"),
        ("--sde-form linear", "no meaning for euler"),
        ("--remedy ssc=x", "with numbers"),
        ("--method dopri5 --steps 10", "--steps does nothing for dopri5"),
        ("--preset sit-paper-ode --method dopri5 --last-size 0.1", "--last-size does nothing for"),
        ("--method rk45 --steps 10", "--steps does nothing for rk45"),
        ("--method heun --rtol 1e-5", "rtol and atol have no meaning for heun"),
        ("--method rk45 --atol 0", "atol must be a number > 0"),
        ("--path gvp", "--path does nothing for euler"),
        ("--preset sit-paper-ode --path linear", "--path does nothing for heun"),
    ],
)
def test_refusals(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _choice(line)


def test_a_sampler_that_chooses_its_steps_has_none_in_its_record() -> None:
    """So sets of the same pictures have the same protocol."""
    one, two = Sampler("dopri5", 5), _choice("--preset sit-paper-ode --method dopri5").sampler
    assert one.to_record() == two.to_record() and one.to_record()["intervals"] is None
    assert Sampler("dopri5", end=0.9).to_record() != one.to_record()


def test_tolerances_of_an_adaptive_method() -> None:
    chosen = _choice("--method rk45 --rtol 1e-4 --atol 1e-7").sampler
    assert chosen == Sampler("rk45", rtol=1e-4, atol=1e-7)
    assert _choice("--method dopri5").sampler.tolerances == Tolerances(1e-3, 1e-6)


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_sampler_options(parser)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--list-presets"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for name, preset in PRESETS.items():
        assert f"{name}\n" in text and preset.sampler.describe() in text


def test_sampling_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stochastic preset under guidance, and autoguidance by another file."""
    for name, seed in (("main", 0), ("guide", 1)):
        torch.manual_seed(seed)
        model = build("SiT-S/8", input_size=8, depth=1, num_classes=3)
        torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
    found = {}
    for name, line in {
        "plain": "--steps 4",
        "preset": "--preset sit-paper-sde --steps 4",
        "guided": f"--steps 4 --guide {tmp_path / 'guide.pt'} --cfg-scale 2",
        "remedy": "--steps 4 --remedy ssc=0.2,1",
    }.items():
        out = tmp_path / f"{name}.npz"
        arguments = ["--num", "3", "--batch-size", "3", "--out", out, *line.split()]
        code, said, err = run("sample", tmp_path / "main.pt", *arguments, capsys=capsys)
        assert code == 0, err
        assert "sampler: " in said and "4 intervals" in said
        assert (PRESETS["sit-paper-sde"].note in said) == (name == "preset")
        found[name] = np.load(out)["x"]
    assert "remedy: ssc (a 0.2, b 1)" in said
    for name in ("preset", "guided", "remedy"):
        assert not np.allclose(found[name], found["plain"], rtol=1e-3)


def test_the_path_that_a_file_says_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("SiT-S/8", input_size=8, depth=1, num_classes=3, learn_sigma=False)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    args = {"clock": "data_at_1", "model": json.dumps(model.config)}
    args["config"] = json.dumps({"objective": {"path": "gvp"}})
    save_weights(tmp_path / "x.pt", model.state_dict(), model.state_dict(), args)
    arguments = ["--num", "2", "--batch-size", "2", "--out", tmp_path / "x.npz", "--steps", "4"]
    line = [*arguments, "--preset", "sit-paper-sde"]
    code, said, _ = run("sample", tmp_path / "x.pt", *line, capsys=capsys)
    assert code == 0 and "gvp path" in said
    line = [*arguments, "--force", "--method", "sde_euler", "--path", "linear"]
    code, _, err = run("sample", tmp_path / "x.pt", *line, capsys=capsys)
    assert code == 2 and "trained on 'gvp'" in err
    line = [*arguments, "--force", "--method", "heun", "--path", "vp"]
    code, _, err = run("sample", tmp_path / "x.pt", *line, capsys=capsys)
    assert code == 2 and "--path does nothing for heun" in err
    line = [*arguments, "--force", "--method", "dpmpp2m"]
    code, _, err = run("sample", tmp_path / "x.pt", *line, capsys=capsys)
    assert code == 2 and "dpmpp2m needs path='linear', got 'gvp'" in err
