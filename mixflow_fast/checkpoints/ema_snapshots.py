"""Saved power-function EMAs along a run, and the average of any width that is made of them.

    OUT/ema/step_N.safetensors    one EMA for each of optim.ema_sigma_rel, float32, and what is
                                  not trained; the header says steps, widths, model and clock

A snapshot is written before the checkpoint of its step. After an interruption the run writes the
later ones again, to the same bits.

Source: EDM2, arXiv 2312.02696, section 3.2 (post-hoc EMA).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from mixflow_fast.checkpoints import manifest, run_folder
from mixflow_fast.checkpoints.shards import full_states
from mixflow_fast.files import check_writable, existing_folder, replacing
from mixflow_fast.models import save_weights
from mixflow_fast.models.weights.damage import refuse_not_finite
from mixflow_fast.optim.power_ema import (
    posthoc_error,
    posthoc_weights,
    sigma_rel_to_gamma,
)

if TYPE_CHECKING:
    from safetensors import safe_open as SafetensorsFile

_A_RUN = "the folder of a run"
_NAME = re.compile(r"step_(\d+)\.safetensors")


def snapshot_file(run: Path, step: int) -> Path:
    """Where a run keeps the snapshot of a step."""
    return run / "ema" / f"step_{step:08d}.safetensors"


def write_snapshot(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a snapshot, whole or not at all.

    Args:
        path: as `snapshot_file` gives it.
        tensors: "NUMBER/NAME" for each EMA, "frozen/NAME" for what is not trained.
        header: metadata of a weights file and "sigma_rel", the widths as JSON.

    Raises:
        OSError: it could not be written (a full disk).
    """
    from safetensors.torch import save_file

    try:
        with replacing(path) as partial:
            save_file(dict(tensors), str(partial), dict(header))
    except OSError:
        raise
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise OSError(f"{path} could not be written: {error}") from error


@dataclass(frozen=True)
class Snapshot:
    """One file along a run: its place, step, widths, and the metadata of its header."""

    path: Path
    step: int
    sigma_rel: tuple[float, ...]
    metadata: Mapping[str, str]


def snapshots(run: Path) -> list[Snapshot]:
    """A run's snapshots in the order of their steps.

    Raises:
        ValueError: no such folder, or a file that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    existing_folder(run, _A_RUN)
    found = []
    for path in (run / "ema").glob("step_*.safetensors"):
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
            widths = tuple(json.loads(header["sigma_rel"]))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}): move it away") from None
        found.append(Snapshot(path, int(match[1]), widths, header))
    return sorted(found, key=lambda snapshot: snapshot.step)


@dataclass(frozen=True)
class Reconstruction:
    """An average that `reconstruct` made.

    Attributes:
        step: at which it ends.
        sigma_rel: its relative width.
        error: how far its profile is from the wanted one, relative, as a root mean square.
    """

    step: int
    sigma_rel: float
    error: float


def reconstruct(
    run: Path, sigma_rel: float, out: Path, step: int | None = None, force: bool = False
) -> Reconstruction:
    """Write a weights file whose "model" and "ema" are both an average made afterwards.

    Args:
        run: folder of a run with optim.ema_sigma_rel.
        sigma_rel: relative width of the average.
        out: the .pt to write.
        step: optimizer step at which the average ends; None = the last snapshot's.
        force: replace what is at `out`.

    Raises:
        ValueError: no snapshots, none that late, one that is not finite, a width outside its range,
            or `out` exists.
    """
    existing_folder(run, _A_RUN)
    check_writable(out, force)
    gamma = sigma_rel_to_gamma(sigma_rel)
    every = snapshots(run)
    if not every:
        raise ValueError(
            f"{run} holds no snapshots (ema/step_*.safetensors): a run writes them with "
            "optim.ema_sigma_rel=[0.05,0.1]; from a run without them no other width can be made"
        )
    step = every[-1].step if step is None else step
    # Later ones say nothing about weights up to this step that those before and at it do not.
    used = [snapshot for snapshot in every if snapshot.step <= step]
    if not used or used[-1].step != step:
        steps = ", ".join(str(snapshot.step) for snapshot in every)
        raise ValueError(f"step must be one of the snapshots' ({steps}), got {step}")
    columns = [(s, number) for s in used for number in range(len(s.sigma_rel))]
    steps = [float(s.step) for s, _ in columns]
    gammas = [sigma_rel_to_gamma(s.sigma_rel[number]) for s, number in columns]
    weights = posthoc_weights(steps, gammas, float(step), gamma)
    state = _sum(columns, weights)
    metadata = _typed(used[-1].metadata) | {"ema_sigma_rel": sigma_rel}
    save_weights(out, state, state, metadata)
    return Reconstruction(step, sigma_rel, posthoc_error(weights, steps, gammas, step, gamma))


def _sum(columns: Sequence[tuple[Snapshot, int]], weights: np.ndarray) -> dict[str, Tensor]:
    """Sum of the columns, in float64: coefficients of either sign cancel."""
    from safetensors import safe_open

    total: dict[str, Tensor] = {}
    for (snapshot, number), weight in zip(columns, weights.tolist(), strict=True):
        with safe_open(snapshot.path, "pt") as file:
            for name, tensor in _of(file, f"{number}/"):
                refuse_not_finite({name: tensor}, snapshot.path, "move this snapshot away")
                if name in total:
                    total[name].add_(tensor, alpha=weight)
                else:
                    total[name] = tensor.double().mul_(weight)
    state = {name: tensor.float() for name, tensor in total.items()}
    with safe_open(columns[-1][0].path, "pt") as file:
        return state | dict(_of(file, "frozen/"))


def _of(file: SafetensorsFile, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for key in file.keys():
        if key.startswith(prefix):
            yield key.removeprefix(prefix), file.get_tensor(key)


def extract(run: Path, decay: float, out: Path, force: bool = False) -> int:
    """Write a weights file with the EMA of one of the run's fixed decays; its newest checkpoint's.

    Args:
        run: folder of a run.
        decay: one of optim.ema_decays.
        out: the .pt to write; "model" has the live weights.
        force: replace what is at `out`.

    Returns:
        the checkpoint's step.

    Raises:
        ValueError: no checkpoint, a decay that the run did not track, or `out` exists.
    """
    existing_folder(run, _A_RUN)
    check_writable(out, force)
    newest = run_folder.newest_checkpoint(run)
    if newest is None:
        raise ValueError(f"{run} holds no checkpoint: give {_A_RUN}")
    if reason := manifest.damage(newest, checksums=(0, 1)):
        raise ValueError(f"{newest} is damaged ({reason}): take a copy of the run from before")
    metadata = run_folder.read_state(newest).metadata
    options = json.loads(metadata["config"])["optim"]
    # Checkpoints from before optim.ema_decays hold the same numbers under two names.
    former = [options.get("ema_decay"), *options.get("ema_more_decays", ())]
    decays = options.get("ema_decays", former)
    if decay not in decays:
        raise ValueError(f"decay must be one of the run's ({decays}), got {decay}")
    number = decays.index(decay)
    name = f"ema_{number}" if number else "ema"
    found = full_states(newest)
    model = {key: values["weight"] for key, values in found.items()}
    ema = {key: values.get(name, values["weight"]) for key, values in found.items()}
    for state in (model, ema):
        refuse_not_finite(state, newest, "take a copy of the run from before")
    save_weights(out, model, ema, metadata)
    return metadata["steps"]


def _typed(header: Mapping[str, str]) -> dict[str, str | int]:
    numbers = ("steps", "images_seen")
    kept: dict[str, str | int] = {n: v for n, v in header.items() if n != "sigma_rel"}
    return kept | {name: int(kept[name]) for name in numbers if name in kept}


def table(found: Sequence[Snapshot]) -> str:
    """The snapshots, a line each."""
    lines = ["step          sigma_rel"]
    lines += [f"{s.step:<13,} {', '.join(f'{w:g}' for w in s.sigma_rel)}" for s in found]
    return "\n".join(lines)
