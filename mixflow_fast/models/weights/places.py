"""Where a user's path leads: to a weights file, or to the weights in a folder of a known kind."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from mixflow_fast.files import check_inside, existing_path
from mixflow_fast.messages import shorten
from mixflow_fast.models.weights.foreign import ZERO_SHARD

_INDEX = ".index.json"
_ADAPTERS = ("adapter_model", "pytorch_lora_weights")
# What folders of Hugging Face's libraries hold, in the order of preference.
_HUB_FILES = tuple(
    f"{stem}.{suffix}"
    for suffix in ("safetensors", "bin")
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model", *_ADAPTERS)
)
_PIPELINE_PARTS = ("transformer", "unet")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.\w+)")
_NO_INDEX = f"download their index (the file whose name ends in {_INDEX}) into the folder, too"
_WEIGHTS = ("*.pt", "*.pth", "*.safetensors", "*.ckpt", "*.bin")


def weights_file(path: str | os.PathLike[str]) -> Path:
    """The weights file that a user means: a file, the index of one in parts, a folder with either.

    Folders are those of runs and checkpoints, of diffusers and of transformers.

    Raises:
        ValueError: nothing there; a folder without weights, with what it is and the next step.
    """
    path = existing_path(path, "checkpoint")
    if path.is_dir():
        return _in_folder(path)
    if (count := _count_parts(path.name)) > 1:
        indexed = any(path.parent.glob(f"*{_INDEX}"))
        step = f"give the folder {path.parent}" if indexed else _NO_INDEX
        raise ValueError(f"{path} is one of {count} parts of the weights: {step}")
    return path


def _count_parts(name: str) -> int:
    """Of how many parts a file is one, by its name."""
    shard = _SHARD.fullmatch(name)
    return 1 if shard is None else int(shard[2])


def parts(path: Path) -> list[Path]:
    """The files that hold the weights: those that an index names, or the file itself.

    Raises:
        ValueError: an index that cannot be read, or parts that are not there.
    """
    if not path.name.endswith(_INDEX):
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        files = [path.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of weights ({error}): download it again") from None
    check_inside(names, path)
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(
            f"{path} names {shorten(absent)}, which {path.parent} does not hold: download the rest"
        )
    return files


def _in_folder(folder: Path) -> Path:
    if (folder / "weights.pt").is_file():
        return folder / "weights.pt"
    if indices := sorted(folder.glob(f"*{_INDEX}")):
        return indices[0]
    for name in _HUB_FILES:
        if (folder / name).is_file():
            return folder / name
    for part in _PIPELINE_PARTS:  # of a diffusers pipeline
        if (folder / part / "config.json").is_file():
            return _in_folder(folder / part)
    raise ValueError(f"{folder} holds no weights.pt: {_next_step(folder)}")


def _next_step(folder: Path) -> str:
    """What a folder without weights is, and what to do."""
    ours = ("state.json", "step_*/state.json", "checkpoints/step_*/state.json")
    if any(any(folder.glob(mark)) for mark in ours):
        run = folder.parent if folder.name == "checkpoints" else folder
        return (
            "its run was stopped before its end, or has train.save_weights=never: mixflow-fast "
            f"consolidate {run} --out FILE.pt makes one"
        )
    if (folder / "metrics.jsonl").is_file():
        return "its run has saved no checkpoint yet: the command that began it goes on"
    if any(folder.glob("*_optim_states.pt")) or any(folder.glob("global_step*")):
        states = next(iter(sorted(folder.rglob("mp_rank_00_model_states.pt"))), None)
        half = f"; its network in the precision of training is in {states}" if states else ""
        return f"it is {ZERO_SHARD}{half}"
    if (folder / ".metadata").is_file():
        return (
            "it is a checkpoint of torch.distributed.checkpoint: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE.pt makes one"
        )
    if (folder / "manifest.json").is_file():
        return f"it is a set of data: mixflow-fast data info {folder} says what is in it"
    # Runs of SiT, REPA and RAE keep theirs in a folder of that name.
    found = [f for p in _WEIGHTS for f in (*folder.glob(p), *folder.glob(f"checkpoints/{p}"))]
    if any(_count_parts(file.name) > 1 for file in found):
        return f"it holds weights in parts: {_NO_INDEX}"
    if found:
        names = sorted(file.relative_to(folder).as_posix() for file in found)
        return f"give one of the files in it: {shorten(names)}"
    return "give a run folder, a checkpoint folder or a weights file"
