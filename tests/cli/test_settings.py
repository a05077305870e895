"""`mixflow-fast settings` and `recipes`: what can be set can be found."""

import pytest

from mixflow_fast.recipes import recipe_names
from tests.support.command_line import run


def test_settings_of_a_section_and_one_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("settings", "optim", capsys=capsys)
    assert code == 0 and "optim.lr=0.0001   (a number, >= 0)\n    Learning rate.\n" in out
    assert "train.images=" not in out
    assert run("settings", "train.seed", capsys=capsys)[1].startswith("train.seed=0 ")
    assert "out=runs/default" in run("settings", capsys=capsys)[1]
    code, _, err = run("settings", "optimizer", capsys=capsys)
    assert code == 2 and "did you mean 'optim'" in err


def test_recipes_and_what_they_ask_for(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("recipes", capsys=capsys)
    assert code == 0 and all(f"\n{name}\n" in f"\n{out}" for name in recipe_names())
    assert "Needs data.path=...; train.init=..." in out


def test_help_of_train_names_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run("train", "--help", capsys=capsys)
    out = " ".join(capsys.readouterr().out.replace("-\n", "-").split())
    assert all(name in out.replace("- ", "-") for name in recipe_names())
