"""Write a checkpoint in a form that others read: official samplers, safetensors, diffusers.

    official    .pt      {"ema", "args", "steps"} in float32: what SiT's, REPA's and RAE's samplers
                         load; or, `bare`, the state dict alone
    ema         .safetensors   the state dict, with how the network is built in the header
    diffusers   folder   `DiTTransformer2DModel` and mixflow.json, for SiT and REPA's SiT; of a
                         text-to-image run the source's pipeline (see `export_text_to_image`)
    lora        .safetensors   the adapters of a text-to-image run (see `export_lora`)

Nothing is written unless the weights fit their network and are finite, and then whole or not at
all.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from mixflow_fast import __version__
from mixflow_fast.checkpoints.export_lora import write_lora
from mixflow_fast.checkpoints.export_text_to_image import (
    Dtype,
    TextToImageWeights,
    text_to_image_weights,
)
from mixflow_fast.files import check_writable, replacing
from mixflow_fast.messages import shorten
from mixflow_fast.models.network import Network
from mixflow_fast.models.registry import describe_model
from mixflow_fast.models.sit import SiT
from mixflow_fast.models.weights import diffusers_dit
from mixflow_fast.models.weights.files import (
    WeightsFile,
    portable,
    write_pt,
    write_safetensors,
)
from mixflow_fast.models.weights.loading import compare, load_into, network_spec, on_meta
from mixflow_fast.models.weights.metadata import Scalar
from mixflow_fast.models.weights.naming import ClassName, with_sigma_head, with_velocity_head
from mixflow_fast.models.weights.places import parts, weights_file
from mixflow_fast.models.weights.source_record import SETTINGS
from mixflow_fast.models.weights.sources import check_source, record_of, source_state

Format = Literal["official", "ema", "diffusers", "lora"]
Head = Literal["velocity", "sigma", "as-is"]
Which = Literal["ema", "model"]
FORMATS: dict[Format, str] = {
    "official": ".pt",
    "ema": ".safetensors",
    "diffusers": "",
    "lora": ".safetensors",
}
HEADS: tuple[Head, ...] = get_args(Head)
_OWN_NAMES = ("source_args", "kwargs", "format", "steps")
# Relative RMS difference to the diffusers class in float32, usually below 1e-6; without the change
# of the time's basis 5e-4 and more on random weights.
_TOLERANCE, _TOLERANCE_WITH_DRIFT = 1e-4, 2e-3


@dataclass(kw_only=True)
class Exported:
    """What was written.

    Attributes:
        path, size_bytes, tensors: the file or folder.
        model, clock: the network in words, and its clock.
        notes: what a user should know of the conversion.
    """

    path: Path
    size_bytes: int
    tensors: int
    model: str
    clock: str
    notes: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class _Weights:
    """Weights to export and everything that is known of their network.

    Attributes:
        model: the network on the meta device.
        which: the state dict that was read from `file`.
        recorded_args: settings in the file that are passed on.
        source: weights of the mixed source beside the network; empty without one.
    """

    state: dict[str, Tensor]
    model: Network
    class_name: ClassName
    prediction: str
    steps: int
    file: Path
    which: Which
    recorded_args: dict[str, Scalar]
    notes: list[str]
    source: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return describe_model(self.class_name, self.model.config)


def export(
    checkpoint: str | os.PathLike[str],
    to: Format,
    out: str | os.PathLike[str],
    *,
    weights: Which = "ema",
    head: Head | None = None,
    bare: bool = False,
    clock: str | None = None,
    num_heads: int | tuple[int, int] | None = None,
    force: bool = False,
    model: str | os.PathLike[str] | None = None,
    dtype: Dtype | None = None,
    link: bool = False,
) -> Exported:
    """Write a checkpoint's weights in another form.

    Args:
        checkpoint: a run folder, or any file that `load_weights` reads.
        to: "official", "ema", "diffusers" or "lora".
        out: what to write: a .pt, a .safetensors, a folder.
        weights: "ema" or "model".
        head: of a SiT: "velocity" drops the sigma rows of the head, as the official sample scripts
            demand; "sigma" has them (zeros if there are none), as the official training code
            demands; "as-is". None: "as-is" for "ema", else "velocity".
        bare: "official" without the dict around the state dict.
        clock: "data_at_1" or "noise_at_1", where the file does not say it and its class is wrong.
        num_heads: where the file does not say it and the shapes cannot tell.
        force: replace what is at `out`.
        model: of a text-to-image run the folder that it was trained from, where that is not the
            one that it records.
        dtype: of the transformer of a text-to-image run; None: that of the folder's weights.
        link: of a text-to-image run, symbolic links to the folder's other parts, not copies.

    Raises:
        ValueError: a wrong option, something in the way at `out`, weights that cannot be read, do
            not fit their network or are not finite, or a network that the form cannot hold.
        ImportError: diffusers is not installed.
        OSError: it could not be written; then nothing is left at `out` that was not there.
    """
    out = Path(out)
    _check_options(to, out, weights, head, bare)
    path = weights_file(checkpoint)
    _check_free(parts(path), out, to, force)
    file, notes = _open(path)
    if (found := text_to_image_weights(file, weights)) is not None:
        _check_text_to_image(to, found.name, head, bare, clock, num_heads)
        return _export_text_to_image(found, to, out, model, dtype, link, notes)
    if to == "lora":
        raise ValueError(
            f"lora is the form of adapters of a text-to-image run (lora.rank), and {path} holds "
            "none: export --to ema or --to official"
        )
    for given, name in ((model, "model"), (dtype, "dtype"), (link or None, "link")):
        if given is not None:
            raise ValueError(
                f"--{name} is for text-to-image networks, and {path} is none: leave it out"
            )
    loaded = _read(file, weights, clock, num_heads, notes)
    _set_head(loaded, head or ("as-is" if to == "ema" else "velocity"), head is not None)
    _check_fit(loaded)
    if loaded.source and (to != "official" or bare):
        loaded.notes.append(
            "the file has a mixed source, which this form cannot hold: it is left out, and samples "
            "begin at N(0, I)"
        )
    if to == "official":
        count = _write_official(loaded, out, bare)
    elif to == "ema":
        count = _write_ema(loaded, out)
    else:
        count = _write_diffusers(loaded, out)
    files = [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else [out]
    return Exported(
        path=out,
        size_bytes=sum(path.stat().st_size for path in files),
        tensors=count,
        model=loaded.name,
        clock=loaded.model.clock,
        notes=loaded.notes,
    )


def _check_options(to: Format, out: Path, weights: Which, head: Head | None, bare: bool) -> None:
    for name, value, choices in (("to", to, FORMATS), ("weights", weights, get_args(Which))):
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


def _check_free(files: list[Path], out: Path, to: Format, force: bool) -> None:
    # Not even with --force: the export would destroy what it reads.
    if out.exists() and any(out.samefile(file) for file in files):
        raise ValueError(f"{out} is the checkpoint that is exported: choose another --out")
    if to != "diffusers":
        check_writable(out, force)
        return
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file, --to diffusers writes a folder: choose another")
    # A record of ours marks an earlier export; any other folder may be somebody's work.
    if any(out.iterdir()) and not (out / diffusers_dit.RECORD).is_file():
        raise ValueError(f"{out} is a folder with other things in it: choose another --out")
    if not force:
        raise ValueError(f"{out} exists: choose another --out, or replace it with --force")


def _open(path: Path) -> tuple[WeightsFile, list[str]]:
    """The file, and what was said of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file = WeightsFile.open(path)
    return file, [str(warning.message) for warning in caught]


def _read(
    file: WeightsFile,
    which: Which,
    clock: str | None,
    num_heads: int | tuple[int, int] | None,
    notes: list[str],
) -> _Weights:
    path = file.path
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = file.state(which)
        spec = network_spec(file, state, num_heads)
        file.check_values(which, state)
        state = portable(state, str(path))
        record, source = record_of(file), source_state(file, which)
        if record is not None:
            check_source(file, source, record)
    return _Weights(
        state=state,
        model=spec.on_meta(clock),
        class_name=spec.class_name,
        prediction=spec.prediction,
        steps=file.steps or 0,
        file=path,
        which=which,
        recorded_args={
            name: value
            for name, value in file.args.items()
            if isinstance(value, str | int | float | bool)
        },
        notes=[*notes, *(str(warning.message) for warning in caught)],
        source={} if record is None else portable(source, str(path)),
    )


def _check_text_to_image(
    to: Format,
    name: str,
    head: Head | None,
    bare: bool,
    clock: str | None,
    num_heads: int | tuple[int, int] | None,
) -> None:
    if to == "official":
        raise ValueError(
            f"official is the form of samplers for SiT, REPA and RAE, and {name} is a "
            "text-to-image network: export --to diffusers, which its pipeline and interfaces such "
            "as ComfyUI read"
        )
    for given, option in ((head, "head"), (bare or None, "bare"), (num_heads, "num-heads")):
        if given is not None:
            raise ValueError(f"--{option} has no meaning for {name}: leave it out")
    if clock == "data_at_1":
        raise ValueError(f"{name} has the clock noise_at_1: leave --clock out")


def _export_text_to_image(
    found: TextToImageWeights,
    to: Format,
    out: Path,
    model: str | os.PathLike[str] | None,
    dtype: Dtype | None,
    link: bool,
    notes: list[str],
) -> Exported:
    if to in ("ema", "lora"):
        if link or model is not None:
            raise ValueError(
                "--model and --link belong to --to diffusers, which writes the whole folder"
            )
        written = write_lora(found, out, dtype) if to == "lora" else found.write_file(out, dtype)
    else:
        written = found.write_folder(out, model, dtype, link)
    files = [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else [out]
    return Exported(
        path=out,
        size_bytes=sum(path.stat().st_size for path in files),
        tensors=written.tensors,
        model=found.name,
        clock="noise_at_1",
        notes=[*notes, *written.notes],
    )


def _set_head(loaded: _Weights, head: Head, asked: bool) -> None:
    if head == "as-is":
        return
    kwargs = loaded.model.config
    if not isinstance(loaded.model, SiT) or loaded.model.config["z_dims"] is not None:
        if asked and head == "sigma":
            raise ValueError(
                f"head sigma is for SiT; {loaded.name} has no sigma channels: leave --head out"
            )
        return
    change = with_sigma_head if head == "sigma" else with_velocity_head
    loaded.state = change(loaded.state)
    if kwargs["learn_sigma"] != (head == "sigma"):
        did = "zero sigma rows added to" if head == "sigma" else "unused sigma rows dropped from"
        loaded.notes.append(f"{did} the head (--head {head})")
    loaded.model = on_meta("SiT", {**kwargs, "learn_sigma": head == "sigma"})


def _check_fit(loaded: _Weights) -> None:
    missing, unexpected, shapes = compare(loaded.state, loaded.model.state_dict())
    wrong = [f"{n} {h} instead of {w}" for n, (h, w) in shapes.items()]
    parts = (("missing", missing), ("unexpected", unexpected), ("mis-shaped", wrong))
    if any(names for _, names in parts):
        listing = "; ".join(
            f"{len(names)} {what}: {shorten(names)}" for what, names in parts if names
        )
        raise ValueError(
            f"{loaded.file} does not fit {loaded.name}: {listing}: see mixflow-fast inspect"
        )


def _metadata(loaded: _Weights) -> dict[str, str]:
    """Network and origin of the weights, as strings."""
    return {
        "name": loaded.name,
        "class": loaded.class_name,
        "clock": loaded.model.clock,
        "prediction": loaded.prediction,
        "source": loaded.file.name,
        "weights": loaded.which,
        "written_by": f"mixflow-fast {__version__}",
    }


def _write_official(loaded: _Weights, out: Path, bare: bool) -> int:
    if loaded.which != "ema" and not bare:
        loaded.notes.append("the online weights stand under 'ema', where official samplers look")
    if loaded.prediction != "velocity":
        loaded.notes.append(f"the network predicts {loaded.prediction}: tell the sampler so")
    if bare:
        implied = on_meta(loaded.class_name, {**loaded.model.config, "clock": None}).clock
        if implied != loaded.model.clock:
            loaded.notes.append(f"a bare file does not say its clock, {loaded.model.clock}")
        write_pt(out, loaded.state)
        return len(loaded.state)
    args = _metadata(loaded) | {"model": json.dumps(loaded.model.config)}
    if loaded.source:
        args[SETTINGS] = loaded.recorded_args[SETTINGS]
    rest = {n: v for n, v in loaded.recorded_args.items() if n not in args and n not in _OWN_NAMES}
    if rest:
        args["source_args"] = json.dumps(rest)
    beside = {"source_ema": loaded.source} if loaded.source else {}
    write_pt(out, {"ema": loaded.state, **beside, "args": args, "steps": loaded.steps})
    return len(loaded.state)


def _write_ema(loaded: _Weights, out: Path) -> int:
    metadata = _metadata(loaded) | {
        "format": "pt",
        "model": loaded.name,
        "kwargs": json.dumps(loaded.model.config),
        "steps": str(loaded.steps),
    }
    write_safetensors(out, loaded.state, metadata)
    return len(loaded.state)


def _write_diffusers(loaded: _Weights, out: Path) -> int:
    if not isinstance(loaded.model, SiT):
        raise ValueError(
            f"diffusers has no class for {loaded.name}: export --to official or --to ema"
        )
    kwargs = loaded.model.config
    if kwargs["z_dims"] is not None:
        loaded.notes.append("REPA's projectors, used in training only, are left out")
    drift = diffusers_dit.position_drift(loaded.state)
    theirs = diffusers_dit.build_diffusers(loaded.state, kwargs)
    count = len(theirs.state_dict())
    record = _metadata(loaded) | {
        "steps": loaded.steps,
        "kwargs": kwargs,
        "timestep": "t in [0, 1], unscaled, in the clock above; the sample is dx/dt by that t"
        if loaded.prediction == "velocity"
        else "t in [0, 1], unscaled, in the clock above",
    }
    with replacing(out) as partial:
        theirs.save_pretrained(partial)
        del theirs  # of an XL, 3 GB
        (partial / diffusers_dit.RECORD).write_text(json.dumps(record, indent=1) + "\n")
        error = _read_back_error(loaded, partial)
        if not error <= (_TOLERANCE_WITH_DRIFT if drift else _TOLERANCE):
            raise ValueError(
                f"the diffusers model differs from this one by {error:.2g} (relative RMS) on "
                "random inputs; nothing was written: please report it with the versions of torch "
                "and diffusers"
            )
    loaded.notes.append(
        f"read back with diffusers: relative difference {error:.1e} on random inputs"
    )
    if drift:
        loaded.notes.append(f"diffusers computes pos_embed itself, up to {drift:.1e} away")
    return count


def _read_back_error(loaded: _Weights, folder: Path) -> float:
    """Relative RMS difference of what diffusers reads from the folder to the network here."""
    ours = on_meta("SiT", loaded.model.config)
    load_into(ours, loaded.state)
    read_back = diffusers_dit.diffusers_class().from_pretrained(folder, low_cpu_mem_usage=False)
    return diffusers_dit.largest_difference(ours.eval(), read_back.eval())
