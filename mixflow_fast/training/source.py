"""The mixed source of a run: its predictor inside of the network, and what it looks like.

The predictor is the submodule `source` of the network, so the engines train, average, shard, save
and resume it with the network, under `source.*`. The objective calls it before the network's own
forward pass; ZeRO 3 gathers its weights all the same, by the hooks that every submodule has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mixflow_fast.config.schema import ModelConfig, TrainConfig
from mixflow_fast.config.source_section import SourceConfig
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.flow.source import MixedSource
from mixflow_fast.models import Network
from mixflow_fast.models.weights.files import WeightsFile
from mixflow_fast.models.weights.source_record import SourceRecord, predictor_of
from mixflow_fast.models.weights.sources import record_of
from mixflow_fast.objective.mixflow import MixFlow
from mixflow_fast.objective.source_health import source_health
from mixflow_fast.training.step_record import StepOutput

# Squared Wasserstein distance, per channel, of the aggregate of all sources from N(0, 1): it is
# 0.008 for the closed-form mixture at lambda 0.6 (variance 0.83), whose samples from N(0, I) are
# good, and 0.06 without mixing (variance 0.58), where they lose (data of deviation 0.5). A variance
# outside of [0.74, 1.30], or a mean of 0.14, are 0.02.
FAR = 0.02
# Rows in a row that must be far before it is said: a row looks at one micro-batch a rank.
_FAR_ROWS = 2
# What a row of metrics calls the numbers of `source_health`.
_NAMES = {
    "kl_per_dim": "source_kl",
    "sigma": "source_sigma",
    "mean_rms": "source_mean_rms",
    "aggregate_mean": "source_aggregate_mean",
    "aggregate_var": "source_aggregate_var",
    "distance_to_normal": "source_distance",
    "mse_low_w": "source_mse_low_w",
    "mse_high_w": "source_mse_high_w",
}


def source_record(section: SourceConfig, model: ModelConfig) -> SourceRecord | None:
    """How the source of a configuration is built; None for N(0, I).

    Args:
        section: the section `source`.
        model: the network that the source is for, which has the size of its data.

    Raises:
        ValueError: sizes that do not fit together, or classes that are wanted and not there.
    """
    s = section
    if s.kind == "standard":
        return None
    classes = model.num_classes
    if s.kappa == "class" and not classes:
        raise ValueError(
            f"source.kappa=class needs classes, got model.num_classes = {classes}: set it to the "
            "data's, or source.kappa=data"
        )
    if s.predictor == "table":
        kwargs: dict[str, object] = {
            "num_classes": classes,
            "channels": model.in_channels,
            "size": model.input_size,
            "low_resolution": s.low_resolution,
        }
    else:
        kwargs = {"channels": model.in_channels, "zero_init": s.zero_init}
        given = {"widths": s.widths, "layers": s.layers, "groups": s.groups}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        if s.kappa == "data+noise":
            kwargs["in_channels"] = 2 * model.in_channels
        if s.kappa == "class":
            kwargs |= {"num_classes": classes, "size": model.input_size}
    # A source that is not trained has no KL, and needs no weight for it.
    lam = 0.0 if s.lam is None and s.beta is None else s.lam
    record = SourceRecord(
        predictor="SourceTable" if s.predictor == "table" else "SourceUNet",
        kwargs=kwargs,
        kappa=s.kappa,
        mode=s.mode,
        w=s.w,
        lam=lam,
        beta=s.beta,
        sample_w=s.sample_w,
    )
    try:
        record.source(nn.Identity())
    except ValueError as error:  # the weight is what is left to refuse, and is named first
        raise ValueError(f"source.{error}") from None
    try:
        config = dict(record.build_predictor("meta").config)
    except ValueError as error:
        raise ValueError(f"the section source: {error}") from None
    # With every default filled in: a later release may have others.
    return SourceRecord(**{**vars(record), "kwargs": config})


def carry_predictor(
    network: nn.Module, source: SourceRecord | None, frozen: bool, seed: int
) -> None:
    """Give a network the predictor of its source, with its first weights, on its own device.

    Args:
        network: gets the submodule `source`; without a source nothing is done.
        source: how it is built; None for N(0, I).
        frozen: it is not trained.
        seed: of its random first weights.
    """
    if source is None:
        return
    device = next(network.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predictor = source.build_predictor(device)
    network.source = predictor.requires_grad_(not frozen)


def mixed_source(
    source: SourceRecord | None, network: nn.Module, dropout: float
) -> MixedSource | None:
    """The source around the predictor that a network carries; None for N(0, I)."""
    return None if source is None else source.source(predictor_of(network), dropout)


def follow_network(mix: MixFlow, network: nn.Module) -> None:
    """Have the objective ask the predictor that another network carries: the one in training."""
    if mix.source is not None:
        mix.source.predictor = predictor_of(network)


def wants_labels(mix: MixFlow) -> bool:
    """Whether the source sees the class, which dropping a label must not hide from it."""
    return mix.source is not None and mix.source.needs_labels


def example_numel(network: Network) -> int:
    """D, the numbers in an example of a network's data."""
    return network.in_channels * network.input_size**2


def describe_source(mix: MixFlow, record: SourceRecord, start: str, numel: int) -> str:
    """The mixed source of a run in words.

    Args:
        mix: the objective, whose source has the run's predictor.
        record: how the source is built.
        start: where its weights come from.
        numel: D, numbers in an example.
    """
    lam, beta = mix.source.weights(numel)
    trained = f"weight of its KL: lambda {lam:g} per dimension, beta {beta:g} of the sum"
    if mix.source.frozen:
        trained = "frozen, so it has no KL"
    return f"{record.describe()}; {trained} (D = {numel:,}); {start}"


def describe_start(init: str | None, resumed: bool) -> str:
    """Where the weights of a run's source come from.

    Args:
        init: checkpoint that starts a new run (`train.init`).
        resumed: the run goes on from a checkpoint of its own.
    """
    if resumed:
        return "goes on from the checkpoint"
    if init is None:
        return "starts from its own first weights"
    if record_of(WeightsFile.open(init)) is None:
        return f"starts from its own first weights, as {init} holds no source"
    return f"starts from the EMA source of {init}"


def build_health(
    mix: MixFlow, section: TrainConfig, steps: int, host_group: HostGroup
) -> SourceHealth | None:
    """What looks at the source of a run of `steps` steps; None where it is N(0, I)."""
    return None if mix.source is None else SourceHealth(mix.source, section, steps, host_group)


class SourceHealth:
    """What the source of a run looks like, once a row of metrics.

    Args:
        source: whose examples are looked at.
        section: the section `train`, for the steps between rows.
        total: optimizer steps of the run.
        host_group: the ranks, whose numbers are averaged.
    """

    def __init__(
        self, source: MixedSource, section: TrainConfig, total: int, host_group: HostGroup
    ) -> None:
        self._every, self._total, self._group = section.log_every, total, host_group
        # Where kappa is known at sampling, samples begin at the source itself.
        self._matters = source.needs_data
        self._latest: tuple[int, Tensor] | None = None
        self._far, self._said = 0, False

    def look(self, step: int, made: StepOutput) -> None:
        """Note a micro-batch where a row follows its step; nothing waits for the device."""
        if step % self._every == 0 or step == self._total:
            found = source_health(made.it, made.samples)
            self._latest = step, torch.stack([found[name] for name in _NAMES])

    def row(self, step: int) -> dict[str, float | None]:
        """The numbers of the step that a row is written for; every rank must call it.

        Returns:
            "source_kl" per dimension, "source_sigma" (mean deviation), "source_mean_rms"; of the
            noise ends as they were drawn, by channel: "source_aggregate_mean" (RMS),
            "source_aggregate_var" (mean), "source_distance" (squared Wasserstein from N(0, 1));
            "source_mse_low_w" and "source_mse_high_w", losses without the KL where w < 0.1 and
            w > 0.9. Means over the ranks' first micro-batches of the step; None where there was
            none or it is not finite. Empty where the step was not looked at.
        """
        latest, self._latest = self._latest, None
        own = latest[1].tolist() if latest is not None and latest[0] == step else None
        every = [numbers for numbers in self._group.all_gather(own) if numbers is not None]
        if not every:
            return {}
        columns = zip(_NAMES.values(), zip(*every, strict=True), strict=True)
        return {name: _mean(values) for name, values in columns}

    def warning(self, row: Mapping[str, object]) -> str:
        """A sentence, once a run, where the drawn noise ends are far from N(0, I); else ""."""
        distance = row.get("source_distance")
        far = self._matters and isinstance(distance, float) and distance > FAR
        self._far = self._far + 1 if far else 0
        if self._said or self._far < _FAR_ROWS:
            return ""
        self._said = True
        return (
            f"warning: what the source draws is far from N(0, I), which samples begin at: variance "
            f"{row['source_aggregate_var']:.3g} and mean {row['source_aggregate_mean']:.3g} by "
            f"channel, squared distance {distance:.3g}, more than {FAR}: samples of many steps "
            "suffer; raise source.lam (or source.beta)"
        )


def _mean(values: Sequence[float]) -> float | None:
    """Mean of what is finite: a micro-batch may hold no w of a range."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
