"""What is written about a step whose loss or gradient was not finite: OUT/nonfinite/step_N/.

    report.json    samples with position, index, label, t, m and loss; gradient norms by module;
                   weights that are not finite; for each rank
    rank_R.pt      the same of a rank's whole micro-batch, and its data x1, as tensors

Losses are those that the step itself had. The rest comes from running the step's micro-batch once
more: positions fix its samples, noise and times, and nothing of it was kept. The weights have
changed since, or are not finite any more: the report says which ones it took.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixflow_fast import files
from mixflow_fast.checkpoints import run_folder
from mixflow_fast.config.schema import Config
from mixflow_fast.data import Batch, BatchLoader, Dataset, sample_index
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.messages import error_line
from mixflow_fast.objective.mixflow import MixFlow
from mixflow_fast.training.engine import Engine
from mixflow_fast.training.step_record import BadStep, StepOutput

# Samples that a report names for each rank.
NAMED = 16


def grad_norms(gradients: Mapping[str, Tensor | None]) -> dict[str, float]:
    """Norm of the gradient of each module's own parameters, by the module's name.

    Args:
        gradients: by parameter name; None where there is none.
    """
    squares: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        if gradient is not None:
            module = name.rpartition(".")[0] or name
            square = gradient.detach().float().square().sum()
            squares[module] = squares[module] + square if module in squares else square
    return {module: math.sqrt(float(square)) for module, square in squares.items()}


def damaged_weights(module: nn.Module) -> dict[str, int]:
    """Elements that are not finite, by name; of ZeRO 3's shards, what this rank has."""
    tensors = {n: getattr(p, "ds_tensor", p) for n, p in module.named_parameters()}
    counts = {n: int((~p.detach().isfinite()).sum()) for n, p in tensors.items()}
    return {name: count for name, count in counts.items() if count}


def report(
    bad: BadStep,
    now: int,
    folder: Path | None,
    *,
    config: Config,
    dataset: Dataset,
    mix: MixFlow,
    engine: Engine,
    forward: Callable[[Any, Batch], StepOutput],
    host_group: HostGroup,
    device: torch.device,
    untouched: bool,
) -> str:
    """Find a bad step's samples and write the folder. Every rank must call it.

    Args:
        bad: the step.
        now: the last step made.
        folder: OUT/nonfinite, or None to write nothing.
        config, source, mix, engine, agreement, device: of the run.
        forward: what a training step does with a network and a micro-batch.
        untouched: bad steps changed no weight. Where they did, weights that are not finite are
            replaced by the newest checkpoint's or the first ones: the run must not go on with them.

    Returns:
        what was found, in one to three sentences; the same on all ranks.
    """
    weights = f"of step {now}" if now > bad.step else "of this step"
    damaged = damaged_weights(engine.module)
    if not untouched and any(host_group.all_gather(bool(damaged))):
        weights = _replace_weights(engine, config, host_group) or f"of step {now}, not finite"
    try:
        found, tensors = _examine(bad, config, dataset, mix, engine, forward, host_group, device)
    except Exception as error:  # no memory left, on this rank perhaps: the run's own way goes on
        if config.train.zero_stage == 3:  # whose forward pass the other ranks wait in
            raise
        found, tensors = _recorded(bad, config, host_group), {"loss": bad.each}
        found["error"] = error_line(error, 200)
    found |= {"weights_not_finite": damaged}
    ranks = host_group.all_gather(found)
    path = None
    if folder is not None:
        c = config.train
        content = {
            "step": bad.step,
            "positions": [(bad.step - 1) * c.global_batch_size, bad.step * c.global_batch_size - 1],
            "grad_norm": bad.norm,
            "on_nonfinite": c.on_nonfinite,
            "examined_with": f"weights {weights}",
            "ranks": ranks,
        }
        path = _write(folder, bad.step, content, tensors, host_group)
    return _sentences(bad, ranks, config, path, host_group)


def _replace_weights(engine: Engine, config: Config, host_group: HostGroup) -> str | None:
    """Finite weights for the examination; what they are."""
    with contextlib.suppress(ValueError):  # all are damaged: the error that comes is more important
        newest, _ = run_folder.choose_checkpoint(Path(config.out), host_group)
        if newest is not None and engine.load(newest):
            return f"of the checkpoint {newest.name}"
    if config.train.zero_stage == 3:
        return None
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            parameter.copy_(engine.initial[name])
    return "that this part of the run began with"


def _examine(
    bad: BadStep,
    config: Config,
    dataset: Dataset,
    mix: MixFlow,
    engine: Engine,
    forward: Callable[[Any, Batch], StepOutput],
    host_group: HostGroup,
    device: torch.device,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """This rank's worst micro-batch of the step, recomputed."""
    wrong = ~bad.each.isfinite()
    order = wrong.sum(1) + (~bad.losses.isfinite()).int()
    # Where every loss is finite, the largest: its gradient may not have been.
    part = int(order.argmax()) if order.any() else int(bad.losses.argmax())
    c = config.train
    loader = BatchLoader(
        dataset,
        seed=c.seed,
        global_batch_size=c.global_batch_size,
        microbatch_size=bad.each.shape[1],
        rank=host_group.rank,
        world_size=host_group.ranks,
        start_position=(bad.step - 1) * c.global_batch_size,
    )
    with loader:
        batch = [next(loader) for _ in range(part + 1)][-1]
    indices = sample_index(batch.positions, len(dataset), c.seed)
    # ZeRO 3 gathers weights for its own backward pass only.
    with_gradients = c.zero_stage < 3
    with torch.enable_grad() if with_gradients else torch.no_grad():
        made = forward(engine.module, batch.to(device))
    norms = {}
    if with_gradients:
        trained = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(made.loss, list(trained.values()), allow_unused=True)
        norms = grad_norms(dict(zip(trained, gradients, strict=True)))
    with torch.no_grad():
        again = mix.loss(made.pred.detach(), made.it, reduction="none").cpu()
    each, x1 = bad.each[part], batch.x
    data_wrong = (~x1.isfinite()).flatten(1).sum(1)
    tensors = {
        "positions": batch.positions,
        "indices": indices,
        "y": made.y.cpu(),
        "t": made.it.t.cpu(),
        "slowed_t": made.it.slowed_t.cpu(),
        "loss": each,
        "loss_recomputed": again,
        "x1": x1,
    }
    suspects = wrong[part].nonzero()[:, 0].tolist()
    suspects = suspects or each.argsort(descending=True).tolist()
    files = getattr(dataset, "files", ())
    files = files if len(files) == len(dataset) else ()
    samples = [
        {
            "position": int(batch.positions[i]),
            "index": int(indices[i]),
            **({"file": str(files[int(indices[i])])} if files else {}),
            "label": int(tensors["y"][i]),
            "t": float(tensors["t"][i]),
            "m": float(tensors["slowed_t"][i]),
            "loss": float(each[i]),
            "loss_recomputed": float(again[i]),
            "data_not_finite": int(data_wrong[i]),
        }
        for i in suspects[:NAMED]
    ]
    found = {
        "rank": host_group.rank,
        "loss_of_micro_batches": bad.losses.tolist(),
        "micro_batch": part,
        "samples_not_finite": int(wrong.sum()),
        "samples": samples,
        "grad_norm_by_module": norms,
    }
    return found, tensors


def _recorded(bad: BadStep, config: Config, host_group: HostGroup) -> dict[str, Any]:
    """What `_examine` finds, of what was noted during the step alone."""
    size, start = bad.each.shape[1], (bad.step - 1) * config.train.global_batch_size
    wrong = (~bad.each.isfinite()).nonzero().tolist()
    places = [start + (part * host_group.ranks + host_group.rank) * size + i for part, i in wrong]
    return {
        "rank": host_group.rank,
        "loss_of_micro_batches": bad.losses.tolist(),
        "samples_not_finite": len(wrong),
        "samples": [{"position": place} for place in places[:NAMED]],
    }


def _write(
    folder: Path, step: int, content: dict, tensors: dict[str, Tensor], host_group: HostGroup
) -> Path | None:
    """The folder of one step, complete or not there; None where it could not be written."""
    final = folder / run_folder.checkpoint_name(step)
    temporary = folder / run_folder.temporary_name(step)
    failed = False
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        file = temporary / f"rank_{host_group.rank}.pt"
        torch.save(tensors, file)
        files.sync(file)
        if host_group.rank == 0:
            text = json.dumps(_plain(content), indent=1, allow_nan=False)
            files.write_text(temporary / "report.json", text)
    except (OSError, RuntimeError):  # a full disk must not hide what happened
        failed = True
    failed = any(host_group.all_gather(failed))
    if host_group.rank == 0:
        with contextlib.suppress(OSError):
            if not failed:
                shutil.rmtree(final, ignore_errors=True)
                os.rename(temporary, final)
                files.sync(folder)
        shutil.rmtree(temporary, ignore_errors=True)
    return None if failed else final


def _sentences(
    bad: BadStep, ranks: list[dict], config: Config, path: Path | None, host_group: HostGroup
) -> str:
    c = config.train
    first = (bad.step - 1) * c.global_batch_size
    losses = [loss for rank in ranks for loss in rank["loss_of_micro_batches"]]
    text = (
        f"loss {sum(losses) / len(losses):g}, gradient norm {bad.norm:g} at step {bad.step} "
        f"(samples at positions {first} to {first + c.global_batch_size - 1})."
    )
    count = sum(rank["samples_not_finite"] for rank in ranks)
    if count:
        named = [s for rank in ranks for s in rank["samples"] if rank["samples_not_finite"]]
        listed = "; ".join(_sample(sample) for sample in named[:4])
        text += f" Not finite: {listed}{f' and {count - 4} more' if count > 4 else ''}."
    else:
        text += " Every sample's loss was finite: the gradient alone was not."
    text += "".join(
        f" Rank {rank['rank']} could not make it again ({rank['error']})."
        for rank in ranks
        if "error" in rank
    )
    return text + (f" See {path}." if path is not None else "")


def _sample(sample: dict[str, Any]) -> str:
    if "index" not in sample:
        return f"the sample at position {sample['position']}"
    what = f"sample {sample['index']} of the data"
    what += f" ({sample['file']})" if "file" in sample else ""
    bad = sample["data_not_finite"]
    data = f", {bad} of its numbers are not finite" if bad else ""
    return (
        f"{what} at position {sample['position']}, label {sample['label']}, t {sample['t']:.4g}, "
        f"m {sample['m']:.4g}{data}"
    )


def _plain(value: Any) -> Any:
    """As JSON has it, which knows no NaN: they become text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
