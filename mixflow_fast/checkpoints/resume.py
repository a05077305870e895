"""What a run begins with: a checkpoint that continues under its configuration, or weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixflow_fast.checkpoints import run_folder
from mixflow_fast.checkpoints.shards import read_layout
from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.models import Transformer, load_into, load_weights, read_model_config

# Fields that may change between the parts of one run: they do not touch what is computed (but
# train.images does where the learning rate descends towards it).
FREE = {"out", "train.images", "train.log_every", "train.save_every", "train.keep",
        "optim.snapshot_every", "optim.impl", "train.keep_every", "train.save_weights",
        "train.zero_stage", "train.device",
        "train.on_nonfinite", "train.max_skips", "train.max_rollbacks",
        "train.timeout_minutes", "train.microbatch_size", "data.workers", "objective.impl",
        "model.mode", "model.attention", "model.checkpointing", "train.loggers",
        "train.preview_every", "train.previews", "train.preview_steps", "train.preview_cfg",
        "train.validate_every", "train.validate_examples"}  # fmt: skip


def check_resume(config: Config, newest: Path) -> dict[str, Any]:
    """The checkpoint's state.json, if the run may go on from there.

    Args:
        config: of the part of the run that starts now.
        newest: its newest checkpoint.

    Raises:
        ValueError: another configuration.
    """
    out = Path(config.out)
    old = _flat(load_config(str(out / "config.yaml")).to_dict())
    new = _flat(config.to_dict())
    changed = sorted(k for k in new.keys() | old.keys() if old.get(k) != new.get(k))
    fixed = {"train.images"} if _descends_to_the_end(config) else set()
    changed = [key for key in changed if key not in FREE - fixed]
    if changed:
        listed = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed[:5])
        raise ValueError(
            f"{out} holds a run with another configuration ({listed}): choose another "
            "out=, or give the same settings to resume it"
        )
    return run_folder.read_state(newest)


def resharded_from(config: Config, newest: Path, ranks: int) -> str:
    """How the shards of a checkpoint were cut, in words; "" if just as this run cuts them."""
    layout = read_layout(newest)
    stage = config.train.zero_stage
    if layout.stage == stage and (layout.ranks == ranks or stage == 0):
        return ""
    return f"{layout.ranks} rank{'s' * (layout.ranks > 1)}, ZeRO {layout.stage}"


def start_from(model: Transformer, path: Path) -> None:
    """Start a network (and so its EMA) from the EMA weights of a checkpoint.

    Raises:
        ValueError: they do not fit, or were trained with another clock, head count or depth of
            REPA's encoder, which shapes do not show and which would train without an error.
    """
    load_into(model, load_weights(path, key="ema"))
    recorded, own = read_model_config(path), model.config | {"clock": model.clock}
    for name in ("clock", "num_heads", "encoder_depth"):
        if name in recorded and recorded[name] != own[name]:
            raise ValueError(
                f"train.init={path} was trained with {name}={recorded[name]!r}, this model has "
                f"{own[name]!r}: set model.{name}"
            )


def _descends_to_the_end(config: Config) -> bool:
    return config.optim.schedule != "constant" and not config.optim.decay_images


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
