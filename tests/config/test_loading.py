"""Recipes and overrides: what they give, and what is no recipe or override."""

from pathlib import Path

import pytest

from mixflow_fast.config.loading import flatten, from_dict, load_config, recipe_names
from mixflow_fast.config.validate import validate
from mixflow_fast.training.build import build_model
from tests.support.configs import resolved


def test_every_recipe_is_there() -> None:
    assert set(recipe_names()) == {
        *("sit-b2-256", "sit-xl2-256", "sit-xl2-512", "repa-xl2-256", "rae-xl-256", "rae-xl-512"),
        *("photos", "digits"),
    }


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_resolve_validate_and_round_trip(name: str, tmp_path: Path) -> None:
    config = resolved(name)
    for ranks in (1, 8):
        validate(config, world_size=ranks)
        assert config.train.global_batch_size % (config.microbatch(ranks) * ranks) == 0
    assert config.out == f"runs/{name}"
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_config(str(file)) == config


@pytest.mark.parametrize("name", ["sit-b2-256", "sit-xl2-256", "sit-xl2-512", "repa-xl2-256"])
def test_recipes_match_the_published_models(name: str) -> None:
    """Spec tables: model, latent side, batch, learning rate, EMA, gamma, 500k steps."""
    c = resolved(name)
    assert c.model.name == ("SiT-B/2" if "b2" in name else "SiT-XL/2")
    assert c.model.input_size == (64 if "512" in name else 32)
    assert (c.train.global_batch_size, c.optim.lr, c.optim.ema_decays) == (256, 1e-4, (0.9999,))
    assert (c.objective.gamma, c.objective.timesteps, c.steps) == (0.8, "beta21", 500_000)
    assert c.optim.grad_clip == (1.0 if "repa" in name else 0.0)


@pytest.mark.parametrize(("name", "side"), [("rae-xl-256", 16), ("rae-xl-512", 32)])
def test_rae_recipes_match_the_published_model(name: str, side: int) -> None:
    """Spec tables: 200 epochs of ImageNet at batch 1024, the shift of the latent's size."""
    c = resolved(name)
    assert (c.model.name, c.model.input_size, c.model.in_channels) == ("DiTDH-XL", side, 768)
    assert c.objective.shift == pytest.approx((768 * side * side / 4096) ** 0.5, rel=1e-12)
    assert (c.objective.gamma, c.steps, c.optim.ema_decays) == (0.4, 250_000, (0.9995,))
    assert (c.optim.beta2, c.optim.grad_clip) == (0.95, 1.0)
    model = build_model(c.model, "meta")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 838_380_628


def test_post_training_recipes_ask_for_what_they_need() -> None:
    with pytest.raises(ValueError, match=r"data.path must be given: add data.path=VALUE"):
        load_config("sit-b2-256", ["train.init=null"])
    with pytest.raises(ValueError, match=r"train.init must be given"):
        load_config("sit-b2-256", ["data.path=x"])


def test_overrides_have_the_fields_type() -> None:
    c = load_config(
        "photos",
        ["optim.lr=1e-4", "train.images=1e6", "data.flip=true", "data.size=16", "out=a/b"],
    )
    assert (c.optim.lr, c.train.images, c.data.flip, c.out) == (1e-4, 1_000_000, True, "a/b")
    assert isinstance(c.train.images, int)
    assert load_config("photos", ["data.path="]).data.path is None


BAD = [
    ("photo", [], "did you mean 'photos'"),
    ("nowhere.yaml", [], "does not exist"),
    ("photos", ["train.sed=1"], "unknown key 'train.sed'; did you mean 'train.seed'"),
    ("photos", ["lr=1"], "did you mean 'optim.lr'"),
    ("photos", ["optm.lr=1"], "unknown key 'optm'; did you mean 'optim'"),
    ("photos", ["train.seed.x=1"], "train.seed"),
    ("photos", ["train"], "section.field=value"),
    ("photos", ["train=3"], "train must be a section"),
    ("photos", ["train.images=many"], "train.images must be int, got 'many'"),
    ("photos", ["train.images=1.5"], "train.images must be int"),
    ("photos", ["train.images=true"], "train.images must be int"),
    ("photos", ["optim.lr=fast"], "optim.lr must be float"),
    ("photos", ["data.flip=1"], "data.flip must be bool"),
    ("photos", ["train.init=3"], "train.init must be str or null"),
    ("photos", ["model.z_dims=[a]"], "model.z_dims"),
    ("photos", ["optim.lr=[1"], "not valid YAML"),
]


@pytest.mark.parametrize(("recipe", "overrides", "message"), BAD)
def test_bad_recipes_and_overrides(recipe: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        load_config(recipe, overrides)


@pytest.mark.parametrize("text", ["- a\n", "model: [", "model: 3", "optim.lr: 1.0e-4"])
def test_bad_recipe_files(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(
        ValueError, match="mine.yaml|model must be a section|optim.lr must stand below its section"
    ):
        load_config(str(file))


def test_a_value_left_open_is_asked_for_wherever_it_stands() -> None:
    with pytest.raises(ValueError, match="out must be given: add out=VALUE"):
        from_dict({"out": "???"})
    assert from_dict({"train": {"seed": 3}}).train.seed == 3


def test_nested_settings_by_dotted_name() -> None:
    tree = {"out": "x", "optim": {"lr": 1e-4, "ema_decays": (0.9,)}, "train": {"a": {"b": None}}}
    assert flatten(tree) == {
        "out": "x",
        "optim.lr": 1e-4,
        "optim.ema_decays": (0.9,),
        "train.a.b": None,
    }
