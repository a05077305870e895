"""Recipes and overrides: what they give, and what is no recipe or override."""

import re
from pathlib import Path

import pytest
import torch

from mixflow_fast.config.data_sections import DataConfig, EncoderConfig
from mixflow_fast.config.loading import flatten, from_dict, load_config
from mixflow_fast.config.validate import validate
from mixflow_fast.recipes import FOLDER, recipe_names
from mixflow_fast.training.build import build_model, check
from mixflow_fast.training.source import example_numel, source_record
from tests.support.configs import resolved


def test_every_recipe_is_there() -> None:
    assert set(recipe_names()) == {
        *("sit-b2-256", "sit-xl2-256", "sit-xl2-512", "repa-xl2-256", "rae-xl-256", "rae-xl-512"),
        *("photos", "digits", "sd35-medium", "sd35-large"),
        "sd35-medium-lora",
        *("cifar10-mixed", "ffhq64-mixed", "afhqv2-64-mixed", "photos-mixed", "sit-b2-256-mixed"),
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

    images = (c.data.kind, c.data.flip, c.encoder.kind, c.encoder.precision)
    assert images == ("images", True, "rae", "fp32")


@pytest.mark.parametrize(
    ("name", "images", "warmup", "dropout", "lam", "parameters"),
    [
        ("cifar10-mixed", 500_000 * 128, 5_000 * 128, 0.13, 0.03072, 55_732_739),
        ("ffhq64-mixed", 800_000 * 256, 39_060 * 256, 0.05, 0.6144, 61_804_419),
        ("afhqv2-64-mixed", 800_000 * 256, 39_060 * 256, 0.25, 0.6144, 61_804_419),
    ],
)
def test_recipes_of_mixed_sources_match_the_released_configurations(
    name: str, images: int, warmup: int, dropout: float, lam: float, parameters: int
) -> None:
    """Spec, sections 2 and 3; the global batch of the two at 64 px is not published."""
    c = resolved(name)
    check(c)
    assert (c.train.images, c.optim.warmup_images, c.model.dropout) == (images, warmup, dropout)
    p = c.optim
    assert (p.lr, p.beta1, p.beta2, p.eps, p.weight_decay) == (2e-4, 0.9, 0.999, 1e-8, 0)
    assert (p.ema_decays, p.schedule, p.grad_clip) == ((0.9999,), "constant", 0)
    assert (c.train.precision, c.data.flip) == ("fp32", True)
    model = build_model(c.model, "meta")
    record = source_record(c.source, c.model)
    source = record.source(record.build_predictor("meta"))
    assert source.weights(example_numel(model))[0] == pytest.approx(lam)
    assert (source.kappa, source.mode, source.w) == ("data", "moments", "uniform")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in source.predictor.parameters()) == 1_899_910


@pytest.mark.parametrize("name", ["photos-mixed", "sit-b2-256-mixed"])
def test_recipes_of_our_own_mixed_sources_begin_at_the_normal(name: str) -> None:
    c = resolved(name)
    check(c)
    assert (c.source.lam, c.source.kind, c.objective.gamma) == (0.3, "mixed", 0)
    record = source_record(c.source, c.model)
    kappa = (
        torch.zeros(1, dtype=torch.int64) if c.source.kappa == "class" else torch.ones(1, 3, 16, 16)
    )
    assert not record.build_predictor()(kappa).any()


@pytest.mark.parametrize("name", ["rae-xl-256", "rae-xl-512"])
def test_rae_recipes_take_latents_that_are_encoded_already(name: str) -> None:
    given = ["data.kind=latents", "encoder.kind=none", "data.path=x", "train.init=null"]
    for overrides in (given, given[::-1]):
        c = load_config(name, overrides)
        assert (c.data, c.encoder) == (DataConfig(kind="latents", path="x"), EncoderConfig())
        validate(c)
    with pytest.raises(ValueError, match="data.path must be given"):
        load_config(name, ["data.kind=latents", "encoder.kind=none", "train.init=null"])
    with pytest.raises(ValueError, match="encoder.path must be given: add encoder.path=VALUE .a l"):
        load_config(name, ["data.path=x", "train.init=null"])


def test_another_kind_drops_what_the_recipe_says_for_its_own() -> None:
    """But nothing that was given with it, which is refused where it means nothing."""
    given = ["train.init=null", "data.path=x", "encoder.path=y", "encoder.kind=sdvae"]
    c = load_config("rae-xl-256", given)
    assert (c.encoder.kind, c.encoder.stats, c.data.flip) == ("sdvae", None, True)
    c = load_config(
        "rae-xl-256", [*given, "encoder.stats=z", "data.kind=latents", "data.flip=true"]
    )
    assert (c.encoder.stats, c.data.flip) == ("z", True)
    with pytest.raises(ValueError, match="data.flip has no meaning for data.kind=latents"):
        validate(c)
    with pytest.raises(ValueError, match="data.kind must be .* got 'latent'"):
        load_config("rae-xl-256", [*given, "data.kind=latent"])


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
    ("photos", ["optm.lr=1"], "unknown key 'optm.lr'; did you mean 'optim.lr'"),
    ("photos", ["train.seed.x=1"], "train.seed"),
    ("photos", ["train"], "section.field=value"),
    ("photos", ["train=3"], "train must be a section"),
    ("photos", ["train.images=many"], "train.images must be a whole number, got 'many'"),
    ("photos", ["train.images=1.5"], "train.images must be a whole number"),
    ("photos", ["train.images=true"], "train.images must be a whole number"),
    ("photos", ["optim.lr=fast"], "optim.lr must be a number"),
    ("photos", ["data.flip=1"], "data.flip must be true or false"),
    ("photos", ["out="], "out must name the folder of the run, got ''"),
    ("photos", ["model.z_dims=[a]"], "model.z_dims"),
    ("photos", ["optim.lr=[1"], "not valid YAML"),
]


TEXTS = [
    ("out=/x/exp #1", "out", "/x/exp #1"),
    ("data.path=/x/a #2: [b", "data.path", "/x/a #2: [b"),
    ("data.path=no", "data.path", "no"),
    ("data.path=2026-11-30", "data.path", "2026-11-30"),
    ("data.path=010", "data.path", "010"),
    ("data.path=null", "data.path", None),
    ("data.path=", "data.path", None),
    ("out=null", "out", "null"),
    ("data={kind: folder, path: no, size: 010}", "data.path", "no"),
    ("data={kind: folder, path: no, size: 010}", "data.size", 10),
    ("train.images=010", "train.images", 10),
    ("train.images=160_000", "train.images", 160_000),
    ("train.seed=9223372036854775807", "train.seed", 2**63 - 1),
    ("data.flip=no", "data.flip", False),
    ("data.flip=Yes", "data.flip", True),
    ("optim.ema_decays=[0.9, 1e-3]", "optim.ema_decays", (0.9, 1e-3)),
]


@pytest.mark.parametrize(("override", "name", "value"), TEXTS)
def test_a_value_is_what_its_text_says(override: str, name: str, value: object) -> None:
    """YAML 1.1 would cut at #, read 010 as 8, 1:30 as 90, no as false and a day as a date."""
    found = flatten(load_config("photos", [override]).to_dict())[name]
    assert (list(found) if isinstance(found, list) else found) == (
        list(value) if isinstance(value, tuple) else value
    )


@pytest.mark.parametrize("text", ["1:30", "0x10", "0o10", "12 # twelve", "1e", "1,000"])
def test_a_number_that_yaml_would_change_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"train.images must be a whole number, got '{text}'"):
        load_config("photos", [f"train.images={text}"])


def test_a_recipe_file_is_text_too_and_survives_its_own_configuration(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data: {kind: folder, path: no, size: 010, flip: on}\nout: 2026-11-30\n")
    config = load_config(str(file), ["train.init=a: b #c"])
    assert (config.data.path, config.data.size, config.data.flip) == ("no", 10, True)
    assert (config.out, config.train.init) == ("2026-11-30", "a: b #c")
    file.write_text(config.to_yaml())
    assert load_config(str(file)) == config


def test_a_key_that_stands_twice_in_a_recipe_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {images: 5, images: 6}\n")
    with pytest.raises(ValueError, match="the key 'images' stands there twice"):
        load_config(str(file))


NEAR = [
    ("steps=5", "counted in images: train.images=N"),
    ("train.epochs=5", "counted in images: train.images=N"),
    ("batch_size=8", "train.global_batch_size=N is .* train.microbatch_size=N"),
    ("learning-rate=1e-4", "optim.lr=1e-4"),
    ("lr=1e-4", "did you mean 'optim.lr'"),
    ("train.lr=1e-4", "did you mean 'optim.lr'"),
    ("train.ema_decay=0.99", r"optim.ema_decays=\[0.99\]"),
    ("optim.ema_decays=0.99", r"must be a list of numbers, as \[0.9\], got '0.99'"),
    ("train.loggers=wandb", r"a list of names out of tensorboard, wandb, as \[tensorboard\]"),
    ("output_dir=x", "out=x"),
]


@pytest.mark.parametrize(("override", "message"), NEAR)
def test_near_misses_that_people_type_get_the_right_answer(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("photos", [override])


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


@pytest.mark.parametrize("name", ["sd35-medium", "sd35-large", "sd35-medium-lora"])
def test_recipes_of_sd35(name: str) -> None:
    """What the paper says (10k steps), and what the specification chose where it says nothing."""
    c = resolved(name)
    assert (c.objective.gamma, c.objective.timesteps, c.objective.shift) == (0.8, "beta21", 3)
    assert (c.steps, c.train.global_batch_size, c.train.precision) == (10_000, 256, "bf16")
    p = c.optim
    assert (p.beta1, p.beta2, p.grad_clip, p.weight_decay) == (0.9, 0.95, 1.0, 0)
    assert (p.lr, c.lora.rank) == ((1e-4, 16) if "lora" in name else (1e-5, 0))
    assert (p.ema_decays, p.schedule, p.warmup_images) == ((0.999,), "constant", 500 * 256)
    assert (c.cond.drop, c.train.zero_stage, c.model.checkpointing) == (0.1, 2, "full")
    with pytest.raises(ValueError, match="model.folder must be given: add model.folder=VALUE"):
        load_config(name, ["data.path=cache"])
    with pytest.raises(ValueError, match="data.path must be given: .*mixflow-fast encode"):
        load_config(name, ["model.folder=sd35"])


@pytest.mark.parametrize("name", ["sd35-medium", "sd35-large", "sd35-medium-lora"])
def test_control_arms_are_in_the_recipes_file(name: str) -> None:
    """The commands in its comments, as they are pasted."""
    text = " ".join(line[2:] for line in (FOLDER / f"{name}.yaml").read_text().splitlines())
    arms = re.findall(r"out=runs/sd35-control-\w+(?: objective\.[\w.]+=[\w-]+)+", text)
    given = ["model.folder=sd35", "data.path=cache"]
    beta, plain = (load_config(name, [*given, *arm.split()]) for arm in arms)
    for arm in (beta, plain):
        validate(arm)
        assert (arm.objective.gamma, arm.objective.shift) == (0, 3)
    assert (beta.objective.timesteps, plain.objective.timesteps) == ("beta21", "logit-normal")
    assert beta.train == plain.train == resolved(name).train and beta.out != plain.out
