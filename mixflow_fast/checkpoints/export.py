"""Write a checkpoint in a form that others read: official samplers, safetensors, diffusers.

    official    .pt      {"ema", "args", "steps"} in float32: what SiT's, REPA's and RAE's samplers
                         load; or, `bare`, the state dict alone
    ema         .safetensors   the state dict, with how the network is built in the header
    diffusers   folder   `DiTTransformer2DModel` and mixflow.json, for SiT and REPA's SiT

Nothing is written unless the weights fit their network and are finite, and then whole or not at
all.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mixflow_fast import __version__
from mixflow_fast.checkpoints.inspect import model_name
from mixflow_fast.checkpoints.run_folder import weights_file
from mixflow_fast.files import replacing
from mixflow_fast.messages import shorten
from mixflow_fast.models.transformer import Transformer
from mixflow_fast.models.weights import diffusers_dit
from mixflow_fast.models.weights.files import (
    is_finite,
    portable,
    read_content,
    read_metadata,
    state_of,
    write_pt,
    write_safetensors,
)
from mixflow_fast.models.weights.loading import (
    compare,
    load_into,
    official_settings,
    on_meta,
    recorded_config,
)
from mixflow_fast.models.weights.naming import (
    infer_kwargs,
    kind_of,
    with_sigma_head,
    with_velocity_head,
)

FORMATS = {"official": ".pt", "ema": ".safetensors", "diffusers": ""}
HEADS = ("velocity", "sigma", "as-is")
_RECORD = "mixflow.json"
_OWN_NAMES = ("source_args", "kwargs", "format", "steps")
# Relative RMS difference to the diffusers class in float32, usually below 1e-6; without the change
# of the time's basis 5e-4 and more on random weights.
_TOLERANCE, _TOLERANCE_WITH_DRIFT = 1e-4, 2e-3


@dataclass(kw_only=True)
class Exported:
    """What was written: the file or folder, its size, tensors, the network, remarks."""

    path: Path
    size_bytes: int
    tensors: int
    model: str
    clock: str
    notes: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class _Source:
    """Weights to export and everything that is known of their network."""

    state: dict[str, Tensor]
    model: Transformer  # on the meta device
    class_name: str
    prediction: str
    steps: int
    file: str
    weights: str
    recorded_args: dict[str, Any]
    notes: list[str]


def export(
    checkpoint: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    *,
    weights: str = "ema",
    head: str | None = None,
    bare: bool = False,
    clock: str | None = None,
    num_heads: int | tuple[int, int] | None = None,
    force: bool = False,
) -> Exported:
    """Write a checkpoint's weights in another form.

    Args:
        checkpoint: a run folder, or any file that `load_weights` reads.
        to: "official", "ema" or "diffusers".
        out: what to write: a .pt, a .safetensors, a folder.
        weights: "ema" or "model".
        head: of a SiT: "velocity" drops the sigma rows of the head, as the official sample scripts
            demand; "sigma" has them (zeros if there are none), as the official training code
            demands; "as-is". None: "as-is" for "ema", else "velocity".
        bare: "official" without the dict around the state dict.
        clock: "data_at_1" or "noise_at_1", where the file does not say it and its class is wrong.
        num_heads: where the file does not say it and the shapes cannot tell.
        force: replace what is at `out`.

    Raises:
        ValueError: a wrong option, something in the way at `out`, weights that cannot be read, do
            not fit their network or are not finite, or a network that the form cannot hold.
        ImportError: diffusers is not installed.
        OSError: it could not be written; then nothing is left at `out` that was not there.
    """
    out = Path(out)
    _check_options(to, out, weights, head, bare)
    file = weights_file(checkpoint)
    _check_free(file, out, to, force)
    source = _read(file, weights, clock, num_heads)
    _set_head(source, head or ("as-is" if to == "ema" else "velocity"), head is not None)
    _check_fit(source)
    count = {"official": _official, "ema": _ema, "diffusers": _diffusers}[to](source, out, bare)
    files = [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else [out]
    return Exported(
        path=out,
        size_bytes=sum(path.stat().st_size for path in files),
        tensors=count,
        model=model_name(source.class_name, source.model.config),
        clock=source.model.clock,
        notes=source.notes,
    )


def _check_options(to: str, out: Path, weights: str, head: str | None, bare: bool) -> None:
    for name, value, choices in (("to", to, FORMATS), ("weights", weights, ("ema", "model"))):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if head is not None and head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
    if bare and to != "official":
        raise ValueError(f"bare is a form of --to official, got --to {to}")
    suffix = FORMATS[to]
    if suffix and out.suffix != suffix:
        raise ValueError(f"out must end in {suffix} for --to {to}, got {out}")
    if not suffix and out.suffix in (".pt", ".safetensors"):
        raise ValueError(f"out must be a folder for --to {to}, got {out}")


def _check_free(file: Path, out: Path, to: str, force: bool) -> None:
    if not out.exists():
        return
    if out.samefile(file):
        raise ValueError(f"{out} is the checkpoint that is exported: choose another --out")
    if to == "diffusers":
        if not out.is_dir():
            raise ValueError(f"{out} is a file, --to diffusers writes a folder: choose another")
        if any(out.iterdir()) and not (out / _RECORD).is_file():
            raise ValueError(f"{out} is a folder with other things in it: choose another --out")
    elif out.is_dir():
        raise ValueError(f"{out} is a folder, --to {to} writes a file: choose another --out")
    if not force:
        raise ValueError(f"{out} exists: choose another --out, or replace it with --force")


def _read(
    file: Path, weights: str, clock: str | None, num_heads: int | tuple[int, int] | None
) -> _Source:
    content, metadata = read_content(file), read_metadata(file)
    said = official_settings(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = portable(state_of(content, weights, file), str(file))
        class_name, kwargs = None, {}
        args = metadata or content.get("args")
        args = args if isinstance(args, Mapping) else {}
        if recorded := recorded_config(args, file):
            class_name = "DiTDH" if "s_embedder.proj.weight" in state else "SiT"
            kwargs = {name: value for name, value in recorded.items() if name != "prediction"}
        else:
            depth = said.get("encoder_depth") if kind_of(state) == "REPA SiT" else None
            class_name, kwargs = infer_kwargs(state, num_heads, depth)
    kwargs |= {} if clock is None else {"clock": clock}
    counts = [content.get(name) for name in ("steps", "train_steps", "step")]
    steps = next((n for n in (*counts, metadata.get("steps")) if str(n).isdigit()), 0)
    return _Source(
        state=state,
        model=on_meta(class_name, kwargs),
        class_name=class_name,
        prediction=recorded.get("prediction") or said.get("prediction", "velocity"),
        steps=int(steps),
        file=str(file),
        weights=weights,
        recorded_args={n: v for n, v in args.items() if isinstance(v, str | int | float | bool)},
        notes=[str(warning.message) for warning in caught],
    )


def _set_head(source: _Source, head: str, asked: bool) -> None:
    if head == "as-is":
        return
    kwargs = source.model.config
    if source.class_name != "SiT" or kwargs["z_dims"] is not None:
        if asked and head == "sigma":
            raise ValueError(
                f"head sigma is for SiT; {model_name(source.class_name, kwargs)} has no sigma "
                "channels: leave --head out"
            )
        return
    change = with_sigma_head if head == "sigma" else with_velocity_head
    source.state = change(source.state)
    if kwargs["learn_sigma"] != (head == "sigma"):
        did = "zero sigma rows added to" if head == "sigma" else "unused sigma rows dropped from"
        source.notes.append(f"{did} the head (--head {head})")
    source.model = on_meta("SiT", kwargs | {"learn_sigma": head == "sigma"})


def _check_fit(source: _Source) -> None:
    missing, unexpected, shapes = compare(source.state, source.model.state_dict())
    wrong = [f"{n} {h} instead of {w}" for n, (h, w) in shapes.items()]
    parts = (("missing", missing), ("unexpected", unexpected), ("mis-shaped", wrong))
    if any(names for _, names in parts):
        listing = "; ".join(
            f"{len(names)} {what}: {shorten(names)}" for what, names in parts if names
        )
        name = model_name(source.class_name, source.model.config)
        raise ValueError(f"{source.file} does not fit {name}: {listing}: see mixflow-fast inspect")
    bad = [name for name, tensor in source.state.items() if not is_finite(tensor)]
    if bad:
        raise ValueError(f"{source.file} holds values that are not finite in {shorten(bad)}")


def _metadata(source: _Source) -> dict[str, str]:
    """How the network is built and where it is from, as strings."""
    config = source.model.config
    return {
        "name": model_name(source.class_name, config),
        "class": source.class_name,
        "clock": source.model.clock,
        "prediction": source.prediction,
        "source": Path(source.file).name,
        "weights": source.weights,
        "written_by": f"mixflow-fast {__version__}",
    }


def _official(source: _Source, out: Path, bare: bool) -> int:
    if source.weights != "ema" and not bare:
        source.notes.append("the online weights stand under 'ema', where official samplers look")
    if source.prediction != "velocity":
        source.notes.append(f"the network predicts {source.prediction}: tell the sampler so")
    if bare:
        implied = on_meta(source.class_name, source.model.config | {"clock": None}).clock
        if implied != source.model.clock:
            source.notes.append(f"a bare file does not say its clock, {source.model.clock}")
        write_pt(out, source.state)
        return len(source.state)
    args = _metadata(source) | {"model": json.dumps(source.model.config)}
    rest = {n: v for n, v in source.recorded_args.items() if n not in (*args, *_OWN_NAMES)}
    if rest:
        args["source_args"] = json.dumps(rest)
    write_pt(out, {"ema": source.state, "args": args, "steps": source.steps})
    return len(source.state)


def _ema(source: _Source, out: Path, _bare: bool) -> int:
    metadata = _metadata(source) | {
        "format": "pt",
        "model": _metadata(source)["name"],
        "kwargs": json.dumps(source.model.config),
        "steps": str(source.steps),
    }
    write_safetensors(out, source.state, metadata)
    return len(source.state)


def _diffusers(source: _Source, out: Path, _bare: bool) -> int:
    if source.class_name != "SiT":
        raise ValueError(
            f"diffusers has no class for {model_name(source.class_name, source.model.config)}: "
            "export --to official or --to ema"
        )
    kwargs = source.model.config
    if kwargs["z_dims"] is not None:
        source.notes.append("REPA's projectors, used in training only, are left out")
    drift = diffusers_dit.position_drift(source.state)
    theirs = diffusers_dit.build_diffusers(source.state, kwargs)
    count = len(theirs.state_dict())
    record = _metadata(source) | {
        "steps": source.steps,
        "kwargs": kwargs,
        "timestep": "t in [0, 1], unscaled, in the clock above; the sample is dx/dt by that t"
        if source.prediction == "velocity"
        else "t in [0, 1], unscaled, in the clock above",
    }
    with replacing(out) as partial:
        theirs.save_pretrained(partial)
        del theirs  # of an XL, 3 GB
        (partial / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
        ours = on_meta("SiT", kwargs)
        load_into(ours, source.state)
        read_back = diffusers_dit.diffusers_class().from_pretrained(
            partial, low_cpu_mem_usage=False
        )
        read_back.eval()
        error = diffusers_dit.largest_difference(ours.eval(), read_back)
        if not error <= (_TOLERANCE_WITH_DRIFT if drift else _TOLERANCE):
            raise ValueError(
                f"the diffusers model differs from this one by {error:.2g} (relative RMS) on "
                "random inputs; nothing was written: please report it with the versions of torch "
                "and diffusers"
            )
    source.notes.append(
        f"read back with diffusers: relative difference {error:.1e} on random inputs"
    )
    if drift:
        source.notes.append(f"diffusers computes pos_embed itself, up to {drift:.1e} away")
    return count
