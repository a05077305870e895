"""What can be set: every field has a text, and docs/settings.md is current."""

from pathlib import Path

import pytest

from mixflow_fast.config.describe import recipes, settings, settings_markdown
from mixflow_fast.config.loading import flatten, load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.recipes import recipe_names

ROOT = Path(__file__).resolve().parents[2]


def test_every_setting_has_a_text_and_a_default_that_can_be_written() -> None:
    every = settings()
    assert [s.name for s in settings("train")] == [s.name for s in every if "train." in s.name]
    assert {s.name for s in every} == flatten(Config().to_dict()).keys()
    assert [s.name for s in every if not s.text.endswith((".", ".)"))] == []
    # The recipe's values are replaced by the defaults, read back from their text.
    assert load_config("digits", [f"{s.name}={s.default}" for s in every]) == Config()


def test_the_page_of_settings_is_what_the_source_says() -> None:
    assert (ROOT / "docs/settings.md").read_text() == settings_markdown(), (
        "mixflow-fast settings --markdown > docs/settings.md"
    )


def test_a_setting_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown key 'optim.l'; did you mean 'optim.lr'"):
        settings("optim.l")


def test_recipes_say_what_they_train_and_ask_for() -> None:
    found = {recipe.name: recipe for recipe in recipes()}
    assert list(found) == recipe_names() and all(recipe.text for recipe in found.values())
    assert found["photos"].asks_for == () and "photographs" in found["photos"].text
    assert found["sit-xl2-256"].asks_for == ("data.path", "train.init")
