"""The folder of a run and its checkpoints: complete or not there, never half written.

    OUT/config.yaml               the resolved configuration
    OUT/metrics.jsonl             one row per log_every steps
    OUT/checkpoints/step_N/       DeepSpeed's sharded state, state.json, weights.pt, manifest.json
    OUT/weights.pt                weights.pt of the newest checkpoint (a hard link where possible)

A checkpoint is written to a name that starts with a dot, flushed to the disk, and renamed when
every rank is done; what a killed run left under such a name is deleted by the next one. Its last
file is `manifest.json` with size and checksum of all others; a folder without one is never loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from mixflow_fast.checkpoints import manifest
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.files import sync, write_text

_NAME = re.compile(r"step_(\d+)")


class SaveError(OSError):
    """A checkpoint could not be written; raised on every rank with the same text."""


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def temporary_name(step: int) -> str:
    """Folder name while the checkpoint is being written."""
    return f".writing_{checkpoint_name(step)}"


def newest_checkpoint(out: Path) -> Path | None:
    """The checkpoint with the most steps whose files are there in full size, or None.

    Reads no contents: `choose_checkpoint` does, for a run that goes on.
    """
    return next((c for c in reversed(_folders(out)) if manifest.damage(c) is None), None)


def choose_checkpoint(
    out: Path, host_group: HostGroup, set_aside: bool = False
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in which every byte is what was written: the same one on all ranks.

    The ranks share the reading. Every rank must call it.

    Args:
        out: run folder.
        agreement: of the ranks.
        set_aside: damaged ones get names that nothing takes for a checkpoint. The run's lock must
            be held.

    Returns:
        it, or None where there are no checkpoints; a line on each newer one that is damaged.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    passed_over: list[str] = []
    damaged: list[Path] = []
    names = host_group.all_gather([path.name for path in reversed(_folders(out))])[0]
    for name in names:
        path = out / "checkpoints" / name
        found = host_group.all_gather(
            manifest.damage(path, checksums=(host_group.rank, host_group.ranks))
        )
        reason = next((reason for reason in found if reason is not None), None)
        if reason is None:
            if set_aside and host_group.rank == 0:
                for bad in damaged:
                    with contextlib.suppress(OSError):
                        aside = bad.with_name(f".damaged_{bad.name}")
                        shutil.rmtree(aside, ignore_errors=True)
                        os.rename(bad, aside)
            return path, passed_over
        damaged.append(path)
        passed_over.append(f"{path} is damaged ({reason}): passed over")
    if passed_over:
        raise ValueError(
            f"{out} holds no checkpoint that can be resumed: {'; '.join(passed_over)}. Choose "
            f"another out= (train.init={out / 'weights.pt'} starts from the weights, if they are "
            "whole), or delete the folder"
        )
    return None, []


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's state.json; ValueError that names it if it cannot be read."""
    try:
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {error}") from None


def clean_unfinished(out: Path) -> None:
    """Delete what killed runs left half written or half deleted. One rank only, before any save.

    What is whole under such a name, and has no other, was between two renames: it gets its own.
    """
    for path in _folders(out, ".writing_") + _folders(out, ".deleting_"):
        final = path.with_name(path.name.partition("_")[2])
        if not final.exists() and manifest.damage(path, checksums=(0, 1)) is None:
            os.rename(path, final)
            sync(path.parent)
    for pattern in (".writing_*", ".deleting_*"):
        for path in (out / "checkpoints").glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


class Writing:
    """One checkpoint while the ranks write it: every rank makes one and calls `commit`.

    A rank's error is kept until `commit`, where all hear of it: raised at once it would leave the
    other ranks waiting in DeepSpeed's barriers.

    Args:
        out: run folder.
        step: optimizer steps done.
        agreement: of the ranks.

    Attributes:
        folder: temporary folder in which the files go.
    """

    def __init__(self, out: Path, step: int, host_group: HostGroup) -> None:
        self._out, self._step, self._host_group = out, step, host_group
        self._error: str | None = None
        self._files: dict[str, dict[str, int]] = {}
        self.folder = out / "checkpoints" / temporary_name(step)
        with self.attempt():
            self.folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Errors of writing inside are kept for `commit`."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            if self._error is None:
                free = ""
                with contextlib.suppress(OSError):
                    free = f" ({shutil.disk_usage(self._out).free / 2**20:.0f} MiB free)"
                self._error = f"{_root(error)}{free}"

    def write(self, state_dict: Any, path: str | os.PathLike[str]) -> None:
        """`torch.save` of this rank's own file, flushed to the disk; nothing after an error.

        The arguments have the names by which DeepSpeed gives them.
        """
        if self._error is not None:
            return
        with self.attempt():
            with open(path, "wb") as file:
                torch.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())
            self._files[Path(path).relative_to(self.folder).as_posix()] = manifest.entry(Path(path))

    def commit(self, state: dict[str, Any], keep: int, keep_every: int = 0) -> Path:
        """Make it the newest checkpoint if every rank wrote its part; arguments as `commit`.

        Raises:
            SaveError: a rank could not; nothing of it stays, and older checkpoints are whole.
        """
        said = self._host_group.all_gather((self._error, self._files))
        files = {name: entry for _, own in said for name, entry in own.items()}
        errors = [error for error, _ in said]
        if not any(errors):
            if self._host_group.rank == 0:
                with self.attempt():
                    commit(self._out, self._step, state, keep, keep_every, files)
            errors = self._host_group.all_gather(self._error)
        failed = {rank: error for rank, error in enumerate(errors) if error is not None}
        if failed:
            if self._host_group.rank == 0:
                shutil.rmtree(self.folder, ignore_errors=True)
            self._host_group.all_gather(
                None
            )  # a launcher ends all ranks when the first one has ended
            who = f"rank {min(failed)}: " if self._host_group.ranks > 1 else ""
            raise SaveError(
                f"checkpoint of step {self._step} could not be written to {self._out}: "
                f"{who}{failed[min(failed)]}; the checkpoints from before stay. With that put "
                "right, the same command resumes"
            )
        return self._out / "checkpoints" / checkpoint_name(self._step)


def commit(
    out: Path,
    step: int,
    state: dict[str, Any],
    keep: int,
    keep_every: int = 0,
    files: dict[str, dict[str, int]] | None = None,
) -> Path:
    """Make a fully written temporary checkpoint the newest one. One rank only, after all wrote.

    Args:
        out: run folder.
        step: optimizer steps done.
        state: goes to state.json.
        keep: newest checkpoints that stay; older ones are deleted.
        keep_every: checkpoints whose step is a multiple stay for good; 0 = none.
        files: manifest entries of files that their ranks flushed; the others are made here.

    Returns:
        the checkpoint's folder.

    Raises:
        OSError: it could not be written.
    """
    folder = out / "checkpoints"
    temporary, final = folder / temporary_name(step), folder / checkpoint_name(step)
    write_text(temporary / "state.json", json.dumps(state, indent=1))
    files = dict(files or {})
    if reason := manifest.other_size(temporary, files):
        raise OSError(
            f"{reason} as rank 0 sees {temporary}: out= must be on a file system that all machines "
            "share"
        )
    for path in sorted(temporary.rglob("*")):
        name = path.relative_to(temporary).as_posix()
        if path.is_dir():
            sync(path)
        elif name not in files:
            sync(path)
            files[name] = manifest.entry(path)
    manifest.write(temporary, files)
    aside = final.with_name(f".deleting_{final.name}")
    if final.exists():  # written again, by a run that resumed from it in another layout
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except OSError:
        if aside.exists():
            os.rename(aside, final)
        raise
    sync(folder)
    shutil.rmtree(aside, ignore_errors=True)
    _prune(out, step, keep, keep_every)
    try:
        publish(final, out)
    except OSError as error:
        warnings.warn(
            f"{final} is complete, but {out / 'weights.pt'} is still an older one: {error}",
            stacklevel=2,
        )
    return final


def _prune(out: Path, step: int, keep: int, keep_every: int) -> None:
    """Delete older checkpoints than the `keep` newest whole ones up to `step`, which was just
    written; not multiples of keep_every. Later ones are damaged: the run did not begin with them.
    """
    up_to = [path for path in _folders(out) if _step(path) <= step]
    whole = [path for path in up_to if manifest.damage(path) is None]
    oldest = _step(whole[-keep:][0])
    for path in _folders(out):
        if _step(path) < oldest and not (keep_every and _step(path) % keep_every == 0):
            with contextlib.suppress(OSError):
                _delete(path)


def _delete(checkpoint: Path) -> None:
    """Under another name first, so that a kill leaves no half of it under its own."""
    aside = checkpoint.with_name(f".deleting_{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(checkpoint, aside)
    shutil.rmtree(aside, ignore_errors=True)


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
    """Make OUT/weights.pt that of the checkpoint: a hard link, or a copy where there are none.

    Nothing is done where the checkpoint has none (`train.save_weights`).
    """
    source, target = checkpoint / "weights.pt", out / "weights.pt"
    if not source.exists() or (target.exists() and target.samefile(source)):
        return
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)
            sync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    sync(out)


def weights_file(path: str | os.PathLike[str]) -> Path:
    """The weights file that a user means: a file, a checkpoint folder or a run folder.

    Raises:
        ValueError: nothing there.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "weights.pt").is_file():
            raise ValueError(
                f"{path} holds no weights.pt: give a run folder or a checkpoint file (a run with "
                f"train.save_weights=never or end: mixflow-fast consolidate {path} --out FILE)"
            )
        return path / "weights.pt"
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    return path


def _folders(out: Path, prefix: str = "") -> list[Path]:
    """Everything named like a checkpoint, by steps; `prefix` stands before such a name."""
    found = (out / "checkpoints").glob(f"{prefix}step_*")
    named = (p for p in found if _NAME.fullmatch(p.name.removeprefix(prefix)) and p.is_dir())
    return sorted(named, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("_")[2])


def _root(error: BaseException) -> BaseException:
    """The system's error behind torch's own ("unexpected pos 832 vs 790" is a full disk)."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, OSError):
        inner = inner.__cause__ or inner.__context__
    return inner or error
