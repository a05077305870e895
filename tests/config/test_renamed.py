"""Former names of keys and values are refused with the new name."""

from pathlib import Path

import pytest

from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config, check_key
from mixflow_fast.training.trainer import train
from tests.support.runs import tiny

FORMER = [
    ("train", "keep", 3, "train.keep is now train.keep_last"),
    ("train", "mirrors", ["wandb"], "train.mirrors is now train.loggers"),
    ("optim", "ema_decay", 0.9, "optim.ema_decay is now the first of .* optim.ema_decays="),
    ("optim", "ema_more_decays", [0.9], "optim.ema_more_decays is now .* optim.ema_decays="),
    ("model", "checkpointing", "blocks", "=blocks is now model.checkpointing=full"),
    ("model", "checkpointing", "activation", "=activation is now model.checkpointing=elementwise"),
]


@pytest.mark.parametrize(("section", "name", "value", "message"), FORMER)
def test_recipes_and_overrides_with_former_names(
    tmp_path: Path, section: str, name: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("photos", [f"{section}.{name}={value}"])
    with pytest.raises(ValueError, match=message):
        Config().replace(**{f"{section}.{name}": value})
    file = tmp_path / "mine.yaml"
    file.write_text(f"{section}: {{{name}: {value}}}")
    with pytest.raises(ValueError, match=f"mine.yaml: .*{message}"):
        load_config(str(file), ["train.seed=1"])


def test_new_names_are_keys() -> None:
    for name in ("train.keep_last", "train.loggers", "optim.ema_decays"):
        check_key(name)


def test_resuming_a_run_whose_configuration_has_former_names(tmp_path: Path) -> None:
    train(tiny(tmp_path, "train.images=8"), quiet=True)
    file = tmp_path / "config.yaml"
    text = file.read_text()
    assert "keep_last: 2" in text
    file.write_text(text.replace("keep_last: 2", "keep: 2"))
    config = tiny(tmp_path, "train.images=16")
    with pytest.raises(ValueError, match=r"config.yaml: train.keep is now train.keep_last"):
        train(config, quiet=True)
    file.write_text(text)
    assert train(config, quiet=True).images_seen == 16
