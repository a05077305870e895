"""Real data of a run: images to measure against, and the slow flow of networks on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixflow_fast.config.data_sections import DataConfig, EncoderConfig
from mixflow_fast.config.schema import Config, ModelConfig, ObjectiveConfig
from mixflow_fast.data.dataset import take, without_flips
from mixflow_fast.evaluation.examples import Examples, read_examples
from mixflow_fast.evaluation.loss_surface import loss_surface
from mixflow_fast.evaluation.slow_flow import METHODS, Settings, slow_flow
from mixflow_fast.evaluation.validation_loss import ValidationLoss
from mixflow_fast.models import Network
from mixflow_fast.models.autoencoders.decoding import quantise
from mixflow_fast.reports.slow_flow_report import Measured
from mixflow_fast.training.build import (
    build_data,
    build_encoder,
    build_objective,
    build_validation,
)
from mixflow_fast.training.inputs import Inputs

# Images of a run's own data: so many times the samples, within these bounds. A reference has a bias
# of its own, by its number, that should be small beside the samples'.
_TIMES, _LEAST, _MOST = 5, 5_000, 50_000
GRID = 8  # rows of the map of losses
_ROWS = 250
_BATCH = 64  # states of slow flow at a time: few, so that progress can be seen


@dataclass(frozen=True, kw_only=True)
class RealImages:
    """Images of a run's data, to measure against.

    Attributes:
        description: for people.
        training: whether the run saw them.
        source: fingerprint.
        count: how many.
        batches: gives them as (B, 3, H, W) uint8.
    """

    description: str
    training: bool
    source: str
    count: int
    batches: Callable[[], Iterator[Tensor]]


def missing_data(data: DataConfig, model: ModelConfig, encoder: EncoderConfig) -> str | None:
    """Why the data of a run, or the encoder before them, cannot be opened; None if they can."""
    try:
        build_data(data, model, encoder)
        build_encoder(encoder, model)
    except ValueError as error:
        return str(error)
    return None


def real_images(
    data: DataConfig,
    model: ModelConfig,
    encoder: EncoderConfig,
    shape: tuple[int, int, int],
    samples: int,
) -> RealImages:
    """Held-out images of a run's data where they have some, else training images.

    Args:
        data, model, encoder: sections of the run's configuration.
        shape: (C, H, W) of the pictures that are measured.
        samples: how many of them.

    Raises:
        ValueError: data that are not there, that are latents, or of another shape.
    """
    dataset = build_data(data, model, encoder)
    chosen = build_validation(data, model, dataset)
    images = chosen.dataset
    way_out = "give --reference FILE (`mixflow-fast reference` makes one of images)"
    if data.kind == "latents":
        raise ValueError(f"the run's data are latents and no images to compare with: {way_out}")
    if tuple(images.shape) != tuple(shape):
        raise ValueError(
            f"the run's data give images of shape {tuple(images.shape)}, the samples are {shape}: "
            f"{way_out}"
        )
    count = min(len(images), max(_LEAST, _TIMES * samples), _MOST)
    index = torch.arange(count) * len(images) // count

    def batches() -> Iterator[Tensor]:
        for places in torch.arange(count).split(_ROWS):
            batch = take(images, index[places], places, 0)
            rows = quantise(batch.x) if batch.images is None else batch.images
            yield rows.expand(-1, 3, -1, -1).contiguous()

    training = chosen.description == "training examples"
    return RealImages(
        description=f"{count:,} {chosen.description} of {images.name}",
        training=training,
        source=f"{images.summary().digest} {images.name} {count} of {len(images)}",
        count=count,
        batches=batches,
    )


@dataclass(frozen=True, kw_only=True)
class SlowFlowPlan:
    """Slow flow and losses of networks on the data of a run.

    Attributes:
        networks: by label, the one before first; on their device.
        config: of the run.
        settings: what is measured.
    """

    networks: Mapping[str, Network]
    config: Config
    settings: Settings


def slow_flow_settings(
    objective: ObjectiveConfig, steps: Sequence[int], states: int, method: str, seed: int
) -> Settings:
    """What is measured of slow flow; only one-step methods that it knows, else Euler."""
    return Settings(
        steps=tuple(steps),
        states=states,
        method=method if method in METHODS else "euler",
        shift=objective.shift,
        seed=seed,
        path=objective.path,
        batch_size=_BATCH,
    )


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What networks are measured on: the data of the run that made them.

    Attributes:
        examples: training examples as the network takes them, on the device.
        losses: of validation examples at fixed times and noise.
    """

    examples: Examples
    losses: ValidationLoss


def run_data(
    config: Config, clock: str, device: torch.device, states: int, batch_size: int
) -> RunData:
    """The data of a run, to measure networks on.

    Args:
        config: of the run.
        clock: of the networks.
        device: where they are.
        states: training examples to read, at most.
        batch_size: of the validation losses.

    Raises:
        ValueError: data or an encoder that are not there or do not fit.
    """
    dataset = without_flips(build_data(config.data, config.model, config.encoder))
    inputs = Inputs(build_encoder(config.encoder, config.model))
    inputs.move_encoder(device)
    words = f"training examples of {dataset.name}"
    return RunData(
        examples=read_examples(dataset, inputs, device, states, words),
        losses=ValidationLoss(
            build_validation(config.data, config.model, dataset),
            build_objective(config.objective, clock, config.train.seed),
            device,
            inputs,
            examples=config.train.validate_examples,
            batch_size=batch_size,
        ),
    )


def slow_flows(plan: SlowFlowPlan, log: Callable[[str], None]) -> list[Measured]:
    """Slow flow and losses of each network, on the data of the run."""
    settings = plan.settings
    first = next(iter(plan.networks.values()))
    device = next(first.parameters()).device
    data = run_data(plan.config, first.clock, device, settings.states, settings.batch_size)
    found = []
    for name, network in plan.networks.items():
        log(f"slow flow of {name}: {settings.states:,} states")
        slow = slow_flow(network, data.examples, settings, progress=True)
        found.append(Measured(name, slow, loss_surface(data.losses, network, GRID)))
    return found
