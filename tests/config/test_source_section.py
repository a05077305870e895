"""The section `source`: what goes together, and what is refused with a way out."""

import pytest

from mixflow_fast.config.loading import flatten, load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.config.source_section import SOURCE_FIELDS, SourceConfig
from mixflow_fast.config.validate import validate
from mixflow_fast.training.build import check

MIXED = ["source.kind=mixed", "source.lam=0.3"]
PLAIN = ["objective.gamma=0", "objective.timesteps=uniform"]


def test_every_field_belongs_to_a_kind() -> None:
    own = {name for name in flatten(Config().to_dict()) if name.startswith("source.")}
    assert own == {f"source.{name}" for name in ("kind", *SOURCE_FIELDS["mixed"])}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["source.lam=1"], "source.lam has no meaning for source.kind=standard.*add source.kind"),
        (["source.kind=mixed"], "needs the weight of its KL: add source.lam=0.3"),
        ([*MIXED, "source.beta=1e-5"], "two units of one weight .lam = beta D.: give one"),
        ([*MIXED, "source.low_resolution=8"], "low_resolution has no meaning for .*=unet"),
        ([*MIXED, "source.predictor=table"], "a row for each class, got source.kappa=data: set"),
        (
            [*MIXED, "source.predictor=table", "source.kappa=class", "source.widths=[8]"],
            "source.widths has no meaning for source.predictor=table",
        ),
        ([*MIXED, "source.sample_w=1"], "sample_w has no meaning for source.kappa=data"),
        ([*MIXED, "source.sample_w=1.5", "source.kappa=class"], r"sample_w must be in \[0, 1\]"),
        ([*MIXED, "source.kappa=label"], "source.kappa must be one of data, class, noise"),
        (["source.kind=mixed", "source.lam=-1"], "source.lam must be >= 0"),
        ([*MIXED, "source.width=[8]"], "did you mean 'source.widths'"),
    ],
)
def test_refused_with_the_section(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("photos", overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["source.predictor=table", "source.kappa=class"],
            {"source.widths=null", "source.layers=null", "source.zero_init=false"},
        ),
        (["model.name=SongUNet-CIFAR10"], {"model.learn_sigma=null", "model.num_heads=null"}),
    ],
)
def test_what_the_recipe_set_is_taken_back_as_the_message_says(
    overrides: list[str], expected: set[str]
) -> None:
    with pytest.raises(ValueError, match="has no meaning for .*: leave it out, or take") as refused:
        load_config("photos-mixed", overrides)
    said = str(refused.value).rpartition(" with ")[2].split()
    assert set(said) == expected
    load_config("photos-mixed", [*overrides, *said])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.gamma=0.4"], "objective.gamma=0 .*train.init=RUN source.frozen=true"),
        (["source.frozen=true"], "needs the weights of a trained source: add train.init=RUN"),
        (
            [*PLAIN, "model.mode=graph", "train.engine=ddp", "train.zero_stage=0"],
            "model.mode=graph records a network whose input needs no gradient",
        ),
        ([*PLAIN, "objective.rollout_steps=4"], "set objective.rollout_steps=0"),
    ],
)
def test_refused_with_other_sections(overrides: list[str], message: str) -> None:
    config = load_config("photos", [*MIXED, *overrides])
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_a_second_pass_of_the_teachers_term_is_refused() -> None:
    given = ["train.init=null", "data.path=x", "data.features=y", "objective.alignment_input=label"]
    config = load_config("repa-xl2-256", [*MIXED, *PLAIN, *given])
    with pytest.raises(ValueError, match="set objective.alignment_input=slowed"):
        validate(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["source.w=2"], "^source.w must be"),
        (["source.w=often"], "^source.w must be"),
        (["source.widths=[12]"], "the section source: .*multiple of groups"),
        (
            ["source.kappa=class", "source.predictor=table", "source.low_resolution=99"],
            "the section source: low_resolution must be at most size=16",
        ),
    ],
)
def test_refused_where_it_is_built(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(load_config("photos", [*MIXED, *PLAIN, *overrides]))


@pytest.mark.parametrize("kappa", ["data", "class", "noise", "data+noise"])
def test_what_is_not_refused(kappa: str) -> None:
    for w, value in (("uniform", "uniform"), ("discrete(8)", "discrete(8)"), ("0.5", 0.5)):
        config = load_config("photos", [*MIXED, *PLAIN, f"source.kappa={kappa}", f"source.w={w}"])
        assert config.source.w == value
        check(config)
    assert SourceConfig(kind="mixed", w=1, lam=1).w == 1.0


def test_a_frozen_source_may_be_slowed_and_recorded() -> None:
    given = ["source.frozen=true", "train.init=x", "objective.gamma=0.4", "model.mode=graph"]
    given += ["train.engine=ddp", "train.zero_stage=0"]
    validate(load_config("photos", [*MIXED, *given]))
    # Its KL would be a constant, so it needs no weight.
    validate(load_config("photos", ["source.kind=mixed", *given]))


def test_the_standard_kind_drops_what_a_recipe_says_for_the_mixed_one() -> None:
    config = load_config("photos-mixed", ["source.kind=standard"])
    assert config.source == SourceConfig()
    assert config.objective == load_config("photos-mixed").objective
