"""The folder of a run and its checkpoints: complete or not there, never half written.

    OUT/config.yaml               the resolved configuration
    OUT/metrics.jsonl             one row per log_every steps
    OUT/checkpoints/step_N/       DeepSpeed's sharded state, state.json, weights.pt
    OUT/weights.pt                weights.pt of the newest checkpoint (a hard link where possible)

A checkpoint is written to a name that starts with a dot and renamed when every rank is done; what a
killed run left under such a name is deleted by the next one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import IO, Any

_NAME = re.compile(r"step_(\d+)")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def temporary_name(step: int) -> str:
    """Folder name while the checkpoint is being written."""
    return f".writing_{checkpoint_name(step)}"


def newest_checkpoint(out: Path) -> Path | None:
    """The complete checkpoint with the most steps in a run folder, or None."""
    found = [
        (int(match[1]), path)
        for path in (out / "checkpoints").glob("step_*")
        if (match := _NAME.fullmatch(path.name)) and (path / "state.json").is_file()
    ]
    return max(found)[1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's state.json; ValueError that names it if it cannot be read."""
    try:
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {error}") from None


def clean_unfinished(out: Path) -> None:
    """Delete what killed runs left half written. One rank only, before anything is saved."""
    for path in (out / "checkpoints").glob(".writing_*"):
        shutil.rmtree(path, ignore_errors=True)


def commit(out: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Make a fully written temporary checkpoint the newest one. One rank only, after all wrote.

    Args:
        out: run folder.
        step: optimizer steps done.
        state: goes to state.json.
        keep: newest checkpoints that stay; older ones are deleted.

    Returns:
        the checkpoint's folder.
    """
    folder = out / "checkpoints"
    temporary, final = folder / temporary_name(step), folder / checkpoint_name(step)
    with (temporary / "state.json").open("w") as file:
        json.dump(state, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for file in temporary.rglob("*"):  # DeepSpeed's shards too, before older ones are deleted
        _sync(file)
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    _sync(folder)
    publish(final, out)
    complete = sorted(p for p in folder.glob("step_*") if _NAME.fullmatch(p.name))
    for old in complete[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def lock(out: Path) -> IO[str]:
    """Keep other runs out of the folder for as long as the returned file is open.

    Raises:
        ValueError: another process holds it.
    """
    import fcntl

    file = (out / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ValueError(f"{out} is in use by another run: wait for it or choose another") from None
    return file


def publish(checkpoint: Path, out: Path) -> None:
    """Make OUT/weights.pt that of the checkpoint: a hard link, or a copy where there are none."""
    source, target = checkpoint / "weights.pt", out / "weights.pt"
    if target.exists() and target.samefile(source):
        return
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def weights_file(path: str | os.PathLike[str]) -> Path:
    """The weights file that a user means: a file, a checkpoint folder or a run folder.

    Raises:
        ValueError: nothing there.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "weights.pt").is_file():
            raise ValueError(f"{path} holds no weights.pt: give a run folder or a checkpoint file")
        return path / "weights.pt"
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    return path
