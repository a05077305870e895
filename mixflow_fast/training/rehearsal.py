"""A run up to its first step, without a step and without a trace: `mixflow-fast train --dry-run`.

Data, encoder, teacher, starting weights and checkpoint are opened as the run would open them, so it
fails as the run would. Sizes of checkpoints follow from the numbers of parameters; memory is an
estimate.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from mixflow_fast.checkpoints.resume import find
from mixflow_fast.checkpoints.run_folder import RunFolder
from mixflow_fast.config.data_sections import EncoderConfig
from mixflow_fast.config.schema import Config, ModelConfig, OptimConfig, TrainConfig
from mixflow_fast.config.validate import validate
from mixflow_fast.data import BatchLoader, Dataset
from mixflow_fast.distributed import process_group
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.files import user_path
from mixflow_fast.models import Network
from mixflow_fast.models.autoencoders import Encoder
from mixflow_fast.models.text_to_image.network import TextToImage
from mixflow_fast.models.weights.source_record import split
from mixflow_fast.training.build import FirstNetwork, RunParts, build_run
from mixflow_fast.training.costs import run_flops, shapes_and_cond
from mixflow_fast.training.data_report import describe_data
from mixflow_fast.training.determinism import Determinism, describe_determinism
from mixflow_fast.training.encoders import describe_encoder
from mixflow_fast.training.engine import import_deepspeed
from mixflow_fast.training.loading import loader_workers
from mixflow_fast.training.memory import describe_memory, in_units, memory_table
from mixflow_fast.training.source import describe_source, describe_start, example_numel

# How long examples are read to see how fast they come.
_READING_S = 1.0


def rehearse(config: Config, resume: str = "auto", allow_data_change: bool = False) -> list[str]:
    """Open everything that a run needs, and say what was found. One rank does it for all.

    Args:
        config: configuration of the run.
        resume, allow_data_change: as for `train`.

    Returns:
        lines for people.

    Raises:
        ValueError: whatever would end the run before its first step.
    """
    ranks = process_group.world_size()
    validate(config, ranks)
    if config.train.engine == "deepspeed":
        import_deepspeed()
    device = process_group.local_device(config.train.device)
    parts = build_run(config, device)
    data = describe_data(parts.dataset, config.data, config.model)
    group = HostGroup.alone()
    folder = RunFolder(user_path(config.out), group, rehearsal=True)
    try:
        start = find(config, folder, ranks, data.summary, resume, allow_data_change)
        frozen = config.source.frozen
        first = FirstNetwork(
            config.model,
            config.train.init,
            start,
            parts.source,
            frozen,
            config.lora,
            config.train.precision,
        )
        first(group)
    finally:
        folder.close()
    c, microbatch = config.train, config.microbatch(ranks)
    workers = loader_workers(config.data)
    rate = _reading_rate(parts.dataset, microbatch, workers)
    return [
        *data.lines,
        *_describe_encoder(config.encoder, parts.inputs.encoder),
        f"model: {_describe_model(config.model, parts)}",
        *_describe_source(parts, config.train.init, start.checkpoint is not None),
        f"length: {_describe_length(c, config.steps, ranks, microbatch)}",
        *_describe_determinism(c.deterministic, device),
        f"reading: {rate * ranks:,.0f} images/s over all ranks with data.workers={workers}, as "
        "measured here for a second",
        *start.describe(folder.out, config.steps, first.weights),
        *_describe_disk(c, config.optim, folder.out, parts.model, (ranks, config.steps)),
        *_describe_memory(c, config.optim, parts, (ranks, microbatch)),
    ]


def _describe_encoder(section: EncoderConfig, encoder: Encoder | None) -> Iterator[str]:
    if encoder is not None:
        yield f"encoder: {describe_encoder(section, encoder)}"


def _describe_source(parts: RunParts, init: str | None, resumed: bool) -> Iterator[str]:
    if parts.source is not None:
        numel, how = example_numel(parts.model), describe_start(init, resumed)
        yield f"source: {describe_source(parts.mix, parts.source, how, numel)}"


def _describe_determinism(wanted: bool, device: torch.device) -> Iterator[str]:
    if wanted:
        Determinism(wanted)  # refuses what the run would refuse
        yield f"deterministic: {describe_determinism(wanted, device)}"


def checkpoint_bytes(
    model: Network, train: TrainConfig, optim: OptimConfig, last: bool = True
) -> int:
    """Size of a resumable checkpoint, with weights.pt where one is written.

    Args:
        model: the network, on any device.
        train, optim: sections of the configuration.
        last: of the run's last checkpoint.
    """
    every = _saved_numel(model)
    weights = train.save_weights == "always" or (last and train.save_weights == "end")
    return sum(_state_bytes(model, train, optim)) + (8 * every if weights else 0)


def _saved_numel(model: Network) -> int:
    """Numbers of the parameters that a run's files hold."""
    saved = model.saved_state()
    return sum(p.numel() for name, p in model.named_parameters() if name in saved)


def _state_bytes(model: Network, train: TrainConfig, optim: OptimConfig) -> tuple[int, int]:
    """Of a checkpoint: what ZeRO shards, and what rank 0 alone writes."""
    every = _saved_numel(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Master weights, two moments and the averages, float32.
    state = 4 * trained * (3 + len(optim.ema_decays) + len(optim.ema_sigma_rel))
    # ZeRO 1 and 2 save the network beside its master weights, in the precision that it runs in.
    network = (2 if train.precision == "bf16" else 4) * every if train.zero_stage in (1, 2) else 0
    return state, network


def _describe_model(section: ModelConfig, parts: RunParts) -> str:
    model, flops = parts.model, run_flops(parts.model, parts.conditions, parts.dataset)
    cost = "" if flops is None else f", {flops / 1e9:,.3g} GFLOPs an image and training step"
    network, _ = split(dict(model.named_parameters()))
    parameters = sum(p.numel() for p in network.values())
    if isinstance(model, TextToImage):
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        adapters = f", {trained:,} of them in adapters and trained" if model.has_adapters else ""
        return (
            f"{type(model.transformer).__name__} of {section.folder}, {parameters:,} parameters"
            f"{adapters}, {model.clock}{cost}"
        )
    cut = "" if model.tokens is None else f"{model.tokens} tokens of "
    return (
        f"{section.name}, {parameters:,} parameters, {cut}an input "
        f"{model.in_channels} x {model.input_size} x {model.input_size}, {model.clock}{cost}"
    )


def _describe_length(c: TrainConfig, steps: int, ranks: int, microbatch: int) -> str:
    accumulated = c.global_batch_size // (microbatch * ranks)
    whole = steps * c.global_batch_size
    rounded = f" (whole steps: {whole:,})" if whole != c.images else ""
    rate = c.images / 86400
    needed = f"; {rate:,.0f} images/s would end it in 24 hours" if rate >= 1 else ""
    return (
        f"{c.images:,} images{rounded}, {steps:,} steps of {c.global_batch_size} "
        f"({ranks} rank{'s' * (ranks > 1)} x {microbatch} images x {accumulated} "
        f"micro-batch{'es' * (accumulated > 1)}){needed}"
    )


def _describe_disk(
    c: TrainConfig, p: OptimConfig, out: Path, model: Network, length: tuple[int, int]
) -> Iterator[str]:
    """Bytes of the checkpoints, and of the copy that each takes.

    Args:
        c, p: sections of the configuration.
        out: run folder.
        model: the network.
        length: number of ranks, and of optimizer steps.
    """
    ranks, steps = length
    there = next(path for path in (out, *out.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    # A checkpoint is whole before the oldest one goes.
    kept = c.keep_last + 1 + (steps // c.keep_every if c.keep_every else 0)
    each, last = (checkpoint_bytes(model, c, p, end) for end in (False, True))
    needed = (kept - 1) * each + last
    more = f" (the last one {in_units(last)}, with weights.pt)" if last > each else ""
    yield (
        f"checkpoint: {in_units(each)} each{more}, at most {kept} at a time: {in_units(needed)}; "
        f"{in_units(free)} free at {there}"
    )
    sharded, alone = _state_bytes(model, c, p)
    copied = sharded / (ranks if c.zero_stage else 1) + alone
    yield (
        f"saving: training waits while its state is copied into host memory, up to "
        f"{in_units(copied)} per rank, and goes on while that is written"
    )
    held = sum(file.stat().st_size for file in (out / "checkpoints").rglob("*") if file.is_file())
    # Those of a run that goes on give their room to new ones.
    if (missing := needed - held - free) > 0:
        yield (
            f"warning: {there} has not enough room for the checkpoints: free "
            f"{in_units(missing)}, or lower train.keep_last, or set train.save_weights=never"
        )


def _describe_memory(
    c: TrainConfig, p: OptimConfig, parts: RunParts, split: tuple[int, int]
) -> Iterator[str]:
    """Lines about memory.

    Args:
        c, p: sections of the configuration.
        parts: of the run.
        split: number of ranks, and images in a micro-batch.
    """
    model = parts.model
    if not isinstance(model, TextToImage):
        yield describe_memory(c, p, model, parts.execution, split)
        return
    examples = shapes_and_cond(parts.conditions, parts.dataset)
    checkpointed = parts.execution.checkpointing == "full"
    yield from memory_table(c, p, model, examples, (split[1], checkpointed))


def _reading_rate(dataset: Dataset, microbatch: int, workers: int) -> float:
    """Images a second that one rank's loader gives, the first micro-batch left out."""
    options = dict(seed=0, global_batch_size=microbatch, microbatch_size=microbatch)
    with BatchLoader(dataset, num_workers=workers, **options) as loader:
        next(loader)
        started, images = time.perf_counter(), 0
        while time.perf_counter() - started < _READING_S:
            images += len(next(loader).y)
        return images / (time.perf_counter() - started)
