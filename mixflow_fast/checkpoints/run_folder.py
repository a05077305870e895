"""The folder of a run and its checkpoints: complete or not there, never half written.

    OUT/config.yaml               the resolved configuration
    OUT/metrics.jsonl             one row per log_every steps
    OUT/checkpoints/step_N/       DeepSpeed's sharded state, state.json, manifest.json; weights.pt
                                  as train.save_weights says
    OUT/weights.pt                that of the newest checkpoint with one, as a hard link if possible

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
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from mixflow_fast.checkpoints import manifest
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.files import check_folder_writable, remove_partial, sync, write_text
from mixflow_fast.folder_lock import FolderLock, shows_token

_NAME = re.compile(r"step_(\d+)")
# How long a rank may not see what rank 0 wrote: clients of network file systems keep what they
# know of a folder for a while.
SHARED_S = 30.0


@dataclass(frozen=True)
class RunState:
    """What state.json says of a run at a checkpoint, beside the engine's state.

    Attributes:
        metadata: of weights files at this step: steps, images_seen, clock, model, config.
        step: optimizer steps done.
        images_seen: training images so far, over all ranks.
        world_size: processes that wrote the checkpoint.
        attention: backends that the run chose, so that it goes on with the same bits; None where
            it chose none.
        safety: what `NonFiniteGuard` counts. (The name is that of the file format.)
        data: fingerprint of the examples (`DataSummary.to_record`); None in checkpoints of before
            it was recorded.
        bits: what the last bits of a deterministic run depend on besides its configuration, by
            name; None for other runs.
    """

    metadata: Mapping[str, str | int]
    step: int
    images_seen: int
    world_size: int
    attention: list[str] | None = None
    safety: Mapping[str, object] = field(default_factory=dict)
    data: Mapping[str, object] | None = None
    bits: Mapping[str, str] | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> RunState:
        """The content of a state.json; what a later release added to it is passed over."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in record.items() if name in known})

    def to_json(self) -> str:
        """The text of state.json."""
        return json.dumps(asdict(self), indent=1)


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def newest_checkpoint(out: Path) -> Path | None:
    """The checkpoint with the most steps whose files are there in full size, or None.

    Reads no contents: `choose_checkpoint` does, for a run that goes on.
    """
    return next((c for c in reversed(checkpoint_folders(out)) if manifest.damage(c) is None), None)


def choose_checkpoint(
    out: Path, host_group: HostGroup, set_aside: bool = False
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in which every byte is what was written: the same one on all ranks.

    The ranks share the reading. Every rank must call it.

    Args:
        out: run folder.
        host_group: exchange between the ranks.
        set_aside: damaged ones get names that nothing takes for a checkpoint. The run's lock must
            be held.

    Returns:
        the checkpoint, or None without any; a line on each newer one that is damaged.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    passed_over: list[str] = []
    damaged: list[Path] = []
    names = host_group.all_gather([path.name for path in reversed(checkpoint_folders(out))])[0]
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


def read_state(checkpoint: Path) -> RunState:
    """The checkpoint's state.json; ValueError that names it if it cannot be read."""
    try:
        return RunState.from_record(json.loads((checkpoint / "state.json").read_text()))
    except (OSError, json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {error}") from None


def clean_unfinished(out: Path) -> None:
    """Delete what killed runs left half written or half deleted. One rank only, before any save.

    What is whole under such a name, and has no other, was between two renames: it gets its own.
    """
    for path in checkpoint_folders(out, ".writing_") + checkpoint_folders(out, ".deleting_"):
        final = path.with_name(path.name.partition("_")[2])
        if not final.exists() and manifest.damage(path, checksums=(0, 1)) is None:
            os.rename(path, final)
            sync(path.parent)
    for pattern in (".writing_*", ".deleting_*"):
        for path in (out / "checkpoints").glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


class RunFolder:
    """A run's folder while the run holds it: one run at a time, what killed ones left put in order.

    Args:
        out: the folder; nothing is made before `make`.
        host_group: exchange between the ranks. Every rank must call every method.
        rehearsal: nothing is put in order: the folder is only looked at.
    """

    def __init__(self, out: Path, host_group: HostGroup, rehearsal: bool = False) -> None:
        self.out, self.host_group, self.rehearsal = out, host_group, rehearsal
        self._lock: FolderLock | None = None
        self._writes = host_group.rank == 0

    def hold(self) -> None:
        """Keep other runs out, where there is a run: one may be writing its last checkpoint.

        Raises:
            ValueError: another run holds it, it cannot be written, or it is not one folder for all
                ranks.
        """
        with self.host_group.raise_together():
            if self._writes:
                check_folder_writable(self.out)
            if self._writes and self._lock is None and (self.out / "checkpoints").is_dir():
                self._lock = FolderLock(self.out, 0.0 if self.rehearsal else None)
                if self.rehearsal:
                    return
                clean_unfinished(self.out)
                for folder in (self.out, self.out / "ema", self.out / "previews"):
                    remove_partial(folder)
        self._check_shared()

    def _check_shared(self) -> None:
        """Refuse a folder that is another one on another rank, which would save half a checkpoint.

        Only rank 0 looks what is there: what others see may be older, by a file system's caches.
        """
        token, host = self.host_group.all_gather(
            (self._lock and self._lock.token, socket.gethostname())
        )[0]
        if token is None:
            return
        with self.host_group.raise_together():
            deadline = time.monotonic() + SHARED_S
            while not self._writes and not shows_token(self.out, token):
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"out= must be one folder that all ranks see: rank {self.host_group.rank} "
                        f"does not find at {self.out.absolute()} on {socket.gethostname()} what "
                        f"rank 0 wrote on {host}. Choose a path on a file system that all machines "
                        "share"
                    )
                time.sleep(min(0.2, SHARED_S / 10))

    def make(self, config_yaml: str, newest: Path | None, finished: bool = False) -> None:
        """Make the folder and hold it; write its config.yaml.

        Args:
            config_yaml: the resolved configuration.
            newest: the checkpoint that the run goes on from; its weights.pt is put back in place.
            finished: nothing is left to train, so config.yaml keeps what was trained.
        """
        if newest is None:
            with self.host_group.raise_together():
                if self._writes:
                    (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.hold()
        with self.host_group.raise_together():
            if self._writes:
                if newest is not None:
                    publish(newest, self.out)
                if not finished:
                    write_text(self.out / "config.yaml", config_yaml)

    @contextlib.contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Let other runs in where something inside fails."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other runs in."""
        if self._lock is not None:
            self._lock.close()


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


def checkpoint_folders(out: Path, prefix: str = "") -> list[Path]:
    """Everything named like a checkpoint, by steps; `prefix` stands before such a name."""
    found = (out / "checkpoints").glob(f"{prefix}step_*")
    named = (p for p in found if _NAME.fullmatch(p.name.removeprefix(prefix)) and p.is_dir())
    return sorted(named, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps, by the name of a checkpoint's folder."""
    return int(checkpoint.name.rpartition("_")[2])
