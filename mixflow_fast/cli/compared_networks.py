"""`mixflow-fast compare` of checkpoints: from options to what is sampled and measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mixflow_fast.cli import extractors
from mixflow_fast.cli.compared import chosen_features, labels_of, shown_command
from mixflow_fast.cli.of_classes import refuse_text_to_image
from mixflow_fast.cli.sampler_options import chosen_sampler
from mixflow_fast.cli.sources import chosen_source, describe_start, refuse_unused
from mixflow_fast.messages import shorten

if TYPE_CHECKING:
    from mixflow_fast.cli.picture_sets import Drawer
    from mixflow_fast.cli.sampler_options import SamplerChoice
    from mixflow_fast.comparison.plan import Arm, Plan
    from mixflow_fast.comparison.real_data import RealImages, SlowFlowPlan
    from mixflow_fast.config.schema import Config
    from mixflow_fast.evaluation.reference import Reference
    from mixflow_fast.models import Network
    from mixflow_fast.models.autoencoders.decoding import Decoder
    from mixflow_fast.models.weights.sources import StoredSource
    from mixflow_fast.sampling.source import SampleSource

_STEPS = (5, 10, 20, 50)
_NUM = 1000
_BATCH = 64
_STATES = 250  # of slow flow
_NETWORK = "network"
# Settings of a training that a control shares with what it is the control of.
_OF_BOTH = ("train.images", "train.global_batch_size", "train.label_dropout", "train.precision")
_PARTS_OF_BOTH = ("optim.", "data.")


@dataclass(frozen=True)
class _Checkpoint:
    """A network and what its file says.

    Attributes:
        model: on its device.
        sha256: of its weights.
        config: of its run; None where nothing says it.
        why: there is none.
        step: optimizer steps of the weights; None where nothing says them.
        trained_source: the mixed source that it was trained with; None for N(0, I).
        source: where its samples begin, on the same device; None is N(0, I).
    """

    model: Network
    sha256: str
    config: Config | None
    why: str
    step: int | None
    trained_source: StoredSource | None
    source: SampleSource | None


@dataclass(frozen=True)
class _Shared:
    """What all arms are sampled with, on the device."""

    guide: Network | None
    decoder: Decoder | None


# Of a network that was trained with a mixed source.
NO_SLOW_FLOW = (
    "the states on the true path are made of data and independent noise N(0, I), and a network "
    "with a mixed source was trained on others"
)
_REMEDY_NOTE = (
    "The remedy has the constants that were given, the same for every arm and number of steps. "
    "Chosen by these samples they look better than they are: choose them with another seed."
)


def plan_of_networks(options: argparse.Namespace, paths: Mapping[str, Path]) -> Plan:
    """Of checkpoints."""
    from mixflow_fast.comparison.plan import Plan

    device = extractors.device_of(options)
    choices = _choices(options)
    loaded = {key: _load(options, path, device) for key, path in paths.items()}
    refuse_unused(options.source_w, {key: one.trained_source for key, one in loaded.items()})
    allow = [field for field in options.allow_different if field != _NETWORK]
    notes = _check_networks(paths, loaded, _NETWORK in options.allow_different)
    notes += _control_notes(loaded)
    notes += [] if options.remedy is None else [_REMEDY_NOTE]
    notes += _source_notes(loaded)
    shared = _Shared(
        _guide(options, device),
        _decoder(options, paths["after"], loaded["after"].model, choices),
    )
    labels = labels_of(paths)
    drawers = _all_drawers(options, loaded, choices, shared)
    arms = {}
    for key, made in drawers.items():
        own = key.removesuffix("_remedy")
        remedy = next(iter(made.values())).chosen.remedy
        label = labels[own] if remedy is None else f"{labels[own]} + {remedy.describe()}"
        arms[key] = _arm(options, key, label, paths[own], loaded[own], made)
    shape = next(iter(drawers["after"].values())).shape
    reference, more = _reference(options, paths["after"], loaded["after"], shape)
    slow, slow_note = _slow_flow(options, loaded, labels, tuple(choices))
    sampler = [f"sampler: {chosen.sampler.describe()}" for chosen in choices.values()]
    sampler += next(iter(choices.values())).describe().split("\n")[1:]
    features = chosen_features(options, shape[1:], options.num or _NUM, reference)
    return Plan(
        arms=arms,
        extractors=features.extractors,
        aside=features.aside,
        reference=reference,
        allow=allow,
        slow=slow,
        slow_note=slow_note,
        device=device,
        sampler=sampler,
        notes=[*notes, *more],
        command=shown_command(options),
    )


def _all_drawers(
    options: argparse.Namespace,
    loaded: Mapping[str, _Checkpoint],
    choices: Mapping[int, SamplerChoice],
    shared: _Shared,
) -> dict[str, dict[int, Drawer]]:
    """What draws the samples of each arm, by number of steps; those with a remedy come last."""
    from mixflow_fast.sampling.remedies import parse_remedy

    remedy = None if options.remedy is None else parse_remedy(options.remedy)
    plain, remedied = {}, {}
    for key, checkpoint in loaded.items():
        path = checkpoint.model.path if options.path is None else None
        own = {steps: chosen.for_network(path) for steps, chosen in choices.items()}
        plain[key] = _drawers(options, checkpoint, own, shared)
        if remedy is not None and key != "before":
            corrected = {steps: replace(chosen, remedy=remedy) for steps, chosen in own.items()}
            remedied[f"{key}_remedy"] = _drawers(options, checkpoint, corrected, shared)
    return {**plain, **remedied}


def _choices(options: argparse.Namespace) -> dict[int, SamplerChoice]:
    """The sampler of each number of steps."""
    single = argparse.Namespace(**{**vars(options), "steps": None, "remedy": None})
    chosen = chosen_sampler(single)
    if chosen.sampler.nfe is None:
        raise ValueError(
            f"--method {chosen.sampler.method} chooses its steps itself, so nothing can be "
            "compared at a number of steps: choose a method with fixed steps"
        )
    counts: Sequence[int] = _STEPS if options.preset is None else (chosen.sampler.steps,)
    return {
        steps: replace(chosen, sampler=replace(chosen.sampler, steps=steps))
        for steps in options.steps or counts
    }


def _load(options: argparse.Namespace, path: Path, device: str) -> _Checkpoint:
    from mixflow_fast.models import load_model
    from mixflow_fast.models.weights.digest import weights_sha256
    from mixflow_fast.models.weights.files import WeightsFile
    from mixflow_fast.models.weights.sources import source_of

    average = options.weights or "ema"
    file = WeightsFile.open(path)
    refuse_text_to_image("compare", path, file, average)
    model = load_model(path, average, clock=options.clock)
    config, why = _recorded_config(path)
    stored = source_of(file, average)
    source = chosen_source(stored, options.source_w)
    if source is not None:
        source.source.predictor.to(device)
    sha256 = weights_sha256(model)
    return _Checkpoint(model.to(device), sha256, config, why, file.steps, stored, source)


def _source_notes(loaded: Mapping[str, _Checkpoint]) -> list[str]:
    """Where the samples of each network with a mixed source begin."""
    starts = {key: describe_start(each.trained_source, each.source) for key, each in loaded.items()}
    return [f"{key}: {text}." for key, text in starts.items() if text]


def _recorded_config(path: Path) -> tuple[Config | None, str]:
    """How a checkpoint was trained, by its run's folder or its own record; or why not."""
    from mixflow_fast.config.loading import from_dict, load_config
    from mixflow_fast.models.weights.files import WeightsFile

    try:
        if (path / "config.yaml").is_file():
            return load_config(str(path / "config.yaml")), ""
        metadata = WeightsFile.open(path).metadata
        if metadata is None or metadata.config is None:
            return None, f"{path} does not say how it was trained"
        return from_dict(json.loads(metadata.config)), ""
    except (ValueError, TypeError) as error:
        return None, f"what {path} says of its training cannot be read ({error})"


def _check_networks(
    paths: Mapping[str, Path], loaded: Mapping[str, _Checkpoint], may_differ: bool
) -> list[str]:
    """Refuse networks that are not one network trained in several ways; notes for the page."""
    first, notes = loaded["before"].model, []
    for key, checkpoint in loaded.items():
        model = checkpoint.model
        for name in ("in_channels", "input_size", "num_classes"):
            ours, theirs = getattr(first, name), getattr(model, name)
            if ours != theirs:
                raise ValueError(
                    f"{paths['before']} has {name} {ours}, {paths[key]} has {theirs}: samples of "
                    "the same noise and labels need networks of one size and one number of classes"
                )
        mine, other = dict(first.config), dict(model.config)
        fields = sorted(k for k in mine.keys() | other.keys() if mine.get(k) != other.get(k))
        unlike = ", ".join(f"{k} {mine.get(k)} against {other.get(k)}" for k in fields)
        if type(model) is not type(first):
            unlike = f"{type(first).__name__} against {type(model).__name__}"
        if unlike and not may_differ:
            raise ValueError(
                f"{paths['before']} and {paths[key]} are different networks ({unlike}): their "
                "difference is not that of a training. If that is meant, --allow-different "
                f"{_NETWORK}"
            )
        if unlike:
            notes.append(f"Different networks by consent: {key} ({unlike}).")
        others = ("before", "control") if key.startswith("after") else ()
        same = [o for o in others if o in loaded and loaded[o].sha256 == checkpoint.sha256]
        notes += [f"Identical weights: {key} holds the weights of {other}." for other in same]
    return notes


def _control_notes(loaded: Mapping[str, _Checkpoint]) -> list[str]:
    """Where the control was trained otherwise than in its objective: then it is no control."""
    from mixflow_fast.config.loading import flatten

    control, notes = loaded.get("control"), []
    for key, after in loaded.items():
        if control is None or not key.startswith("after"):
            continue
        apart = {"optimizer steps": (control.step, after.step)}
        if control.config is not None and after.config is not None:
            mine, theirs = flatten(control.config.to_dict()), flatten(after.config.to_dict())
            alike = [name for name in mine if name in _OF_BOTH or name.startswith(_PARTS_OF_BOTH)]
            apart |= {name: (mine[name], theirs.get(name)) for name in alike}
        unlike = [
            f"{name} {own} against {other}"
            for name, (own, other) in apart.items()
            if own != other and None not in (own, other)
        ]
        if unlike:
            notes.append(
                f"The control was not trained as {key} was apart from the objective, so their "
                f"difference is not that of the method alone: {shorten(unlike)}."
            )
    return notes


def _guide(options: argparse.Namespace, device: str) -> Network | None:
    """The other network of autoguidance."""
    from mixflow_fast.models import load_model

    if options.guide is None:
        return None
    return load_model(options.guide, options.weights or "ema", clock=options.clock).to(device)


def _decoder(
    options: argparse.Namespace,
    path: Path,
    model: Network,
    choices: Mapping[int, SamplerChoice],
) -> Decoder | None:
    from mixflow_fast.models.autoencoders.decoding import load_decoder

    latent = model.in_channels not in (1, 3)
    if options.decoder is None:
        if latent:
            raise ValueError(
                f"{path} makes {model.in_channels}-channel latents, not pictures: give the "
                "autoencoder that they were made by with --decoder FOLDER, and a --reference FILE"
            )
        return None
    if options.reference is None and latent:
        raise ValueError("a network on latents needs a --reference FILE of images beside --decoder")
    decoder = load_decoder(
        options.decoder,
        stats=options.decoder_stats,
        scale=options.decoder_scale,
        precision=options.decoder_precision or "fp32",
        quantisation=_rounding(options, next(iter(choices.values()))),
    )
    decoder.check((model.in_channels, model.input_size, model.input_size))
    return decoder.to(extractors.device_of(options))


def _rounding(options: argparse.Namespace, chosen: SamplerChoice) -> str:
    return options.quantise or ("round" if chosen.preset is None else chosen.preset.quantisation)


def _drawers(
    options: argparse.Namespace,
    checkpoint: _Checkpoint,
    choices: Mapping[int, SamplerChoice],
    shared: _Shared,
) -> dict[int, Drawer]:
    """What draws the samples of a network, by number of steps."""
    from mixflow_fast.cli.picture_sets import Drawer

    return {
        steps: Drawer(
            model=checkpoint.model,
            chosen=chosen,
            guide=shared.guide,
            weights=options.weights or "ema",
            seed=options.seed or 0,
            labels=None,
            balanced=chosen.preset is None or chosen.preset.labels == "balanced",
            batch_size=options.batch_size or _BATCH,
            decoder=shared.decoder,
            quantisation=_rounding(options, chosen),
            source=checkpoint.source,
        )
        for steps, chosen in choices.items()
    }


def _arm(
    options: argparse.Namespace,
    key: str,
    label: str,
    path: Path,
    checkpoint: _Checkpoint,
    drawers: Mapping[int, Drawer],
) -> Arm:
    from mixflow_fast.comparison.plan import SHARD, Arm, ToSample
    from mixflow_fast.config.loading import flatten
    from mixflow_fast.evaluation.sample_sets import SetPlan
    from mixflow_fast.reports.comparison_result import ArmRecord

    average = options.weights or "ema"
    config = None if checkpoint.config is None else flatten(checkpoint.config.to_dict())
    sets = {}
    origin = next(iter(drawers.values())).origin()
    for steps, drawer in drawers.items():
        protocol = drawer.protocol(options.num or _NUM)
        plan = SetPlan(protocol=protocol, shape=drawer.shape, origin=origin, shard=SHARD)
        sets[steps] = ToSample(plan=plan, make=drawer.pictures, batch_size=drawer.batch_size)
    record = ArmRecord(
        key=key,
        label=label,
        path=str(path),
        sha256=checkpoint.sha256,
        average=average,
        config=config,
    )
    return Arm(record=record, sets=sets)


def _reference(
    options: argparse.Namespace, path: Path, after: _Checkpoint, shape: tuple[int, int, int]
) -> tuple[Reference | RealImages, list[str]]:
    """What to measure against, and notes on it."""
    from mixflow_fast.comparison.real_data import missing_data, real_images
    from mixflow_fast.evaluation.reference import read_reference

    if options.reference is not None:
        return read_reference(options.reference), []
    if after.config is None:
        raise ValueError(
            f"{after.why}, so there are no images of its data to compare with: give --reference "
            "FILE (`mixflow-fast reference` makes one of images)"
        )
    config = after.config
    if (missing := missing_data(config.data, config.model, config.encoder)) is not None:
        raise ValueError(
            f"the data that {path} was trained on cannot be opened: {missing}: give --reference "
            "FILE (`mixflow-fast reference` makes one of images)"
        )
    samples = options.num or _NUM
    images = real_images(config.data, config.model, config.encoder, shape, samples)
    note = (
        "The reference is training images, which the network has seen: a network that repeats them "
        "would look good. Give --reference FILE of images that it has not seen."
    )
    return images, [note] if images.training else []


def _slow_flow(
    options: argparse.Namespace,
    loaded: Mapping[str, _Checkpoint],
    labels: Mapping[str, str],
    steps: Sequence[int],
) -> tuple[SlowFlowPlan | None, str]:
    """What is measured of slow flow, or why nothing is."""
    from mixflow_fast.comparison.real_data import SlowFlowPlan, missing_data, slow_flow_settings

    if options.no_slow_flow:
        return None, "Left out by --no-slow-flow."
    if any(each.trained_source is not None for each in loaded.values()):
        return None, f"Left out: {NO_SLOW_FLOW}."
    after = loaded["after"]
    if after.config is None:
        return None, f"Left out: {after.why}, and it is measured on training data."
    config = after.config
    if (missing := missing_data(config.data, config.model, config.encoder)) is not None:
        return None, f"Left out: its data cannot be opened: {missing}"
    states, method = options.states or _STATES, options.method or "euler"
    settings = slow_flow_settings(config.objective, steps, states, method, options.seed or 0)
    networks = {labels[key]: checkpoint.model for key, checkpoint in loaded.items()}
    return SlowFlowPlan(networks=networks, config=config, settings=settings), ""
