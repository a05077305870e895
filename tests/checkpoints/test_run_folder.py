"""Checkpoints that survive: damage, what is kept, full disks, signals, kill -9."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from mixflow_fast.checkpoints import manifest
from mixflow_fast.checkpoints.run_folder import (
    RunState,
    choose_checkpoint,
    clean_unfinished,
    newest_checkpoint,
)
from mixflow_fast.checkpoints.writing import commit, temporary_name
from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.distributed import process_group
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.training.trainer import train
from tests.support.launchers import run_ranks
from tests.support.runs import assert_same_bits
from tests.support.train_ranks import TINY

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def host_group() -> HostGroup:
    process_group.init_process_group("cpu")
    return HostGroup()


def state_of(step: int) -> RunState:
    return RunState(metadata={}, step=step, images_seen=8 * step, world_size=1)


def write_checkpoint(out: Path, step: int, keep: int = 2, keep_every: int = 0) -> Path:
    temporary = out / "checkpoints" / temporary_name(step)
    (temporary / "part").mkdir(parents=True)
    for name in ("weights.pt", "rank_0.pt", "part/rank_1.pt"):
        (temporary / name).write_bytes(f"{step} {name}".encode() * 1000)
    return commit(out, state_of(step), keep, keep_every)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_the_manifest_has_every_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    there = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    del there["manifest.json"]
    assert (
        files.keys()
        == there.keys()
        == {"weights.pt", "rank_0.pt", "part/rank_1.pt"} | {"state.json"}
    )
    for name, path in there.items():
        content = path.read_bytes()
        assert files[name] == {"bytes": len(content), "crc32": zlib.crc32(content)}
    assert names(tmp_path) == ["step_00000003"]
    assert (tmp_path / "weights.pt").samefile(folder / "weights.pt")


def truncated(folder: Path) -> None:
    os.truncate(folder / "rank_0.pt", 100)


def missing(folder: Path) -> None:
    (folder / "part" / "rank_1.pt").unlink()


def flipped(folder: Path) -> None:
    content = bytearray((folder / "rank_0.pt").read_bytes())
    content[-1] ^= 1
    (folder / "rank_0.pt").write_bytes(content)


def without_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def cut_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 90)


def other_manifest(folder: Path) -> None:
    """One digit of a checksum: as if the file were the damaged one, but it is the list."""
    text = (folder / "manifest.json").read_text()
    content = json.loads(text)
    content["files"]["rank_0.pt"]["bytes"] += 1
    (folder / "manifest.json").write_text(json.dumps(content))


def not_a_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[1, 2]")


def manifest_of_others(folder: Path) -> None:
    """A whole one, made by somebody: its list names a file outside of the checkpoint."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    (folder.parent.parent / "other").write_bytes(b"x")
    name = "../../other" if folder.name.endswith("2") else str(folder.parent.parent / "other")
    manifest.write(folder, files | {name: manifest.entry(folder / name)})


DAMAGES = [
    (manifest_of_others, "other', which is not below"),
    (truncated, "rank_0.pt has 100 bytes instead of 11000"),
    (missing, "part/rank_1.pt is missing"),
    (flipped, "rank_0.pt has another checksum"),
    (without_manifest, "manifest.json is missing"),
    (cut_manifest, "manifest.json is not valid"),
    (other_manifest, "manifest.json is not valid"),
    (not_a_manifest, "manifest.json is not valid"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, host_group: HostGroup, damage: Callable[[Path], None], reason: str
) -> None:
    older, newer = (write_checkpoint(tmp_path, step) for step in (1, 2))
    assert choose_checkpoint(tmp_path, host_group) == (newer, [])
    damage(newer)
    chosen, lines = choose_checkpoint(tmp_path, host_group)
    assert chosen == older
    assert len(lines) == 1 and str(newer) in lines[0] and reason in lines[0]
    # Without reading the contents, sizes are all that is seen.
    assert newest_checkpoint(tmp_path) == (newer if damage is flipped else older)
    damage(older)
    with pytest.raises(ValueError, match="no checkpoint that can be resumed"):
        choose_checkpoint(tmp_path, host_group)


def test_what_is_kept(tmp_path: Path) -> None:
    for step in range(1, 10):
        write_checkpoint(tmp_path, step, keep=2, keep_every=3)
    kept = [f"step_{step:08d}" for step in (3, 6, 8, 9)]
    assert names(tmp_path) == kept
    truncated(tmp_path / "checkpoints" / kept[3])
    write_checkpoint(tmp_path, 10, keep=2)  # a damaged one is not one of the two
    assert names(tmp_path) == [kept[2], kept[3], "step_00000010"]


def test_what_was_passed_over_neither_counts_nor_hides(
    tmp_path: Path, host_group: HostGroup
) -> None:
    """A run that went back writes older steps than the damaged ones that it passed over."""
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step, keep=2, keep_every=10)
    for step in (20, 30):
        flipped(tmp_path / "checkpoints" / f"step_{step:08d}")
    assert choose_checkpoint(tmp_path, host_group)[0].name == "step_00000010"
    new = write_checkpoint(tmp_path, 15, keep=1)
    assert new.is_dir() and choose_checkpoint(tmp_path, host_group, set_aside=True)[0] == new
    damaged = [f".damaged_step_{step:08d}" for step in (20, 30)]
    assert names(tmp_path) == [*damaged, new.name]
    assert newest_checkpoint(tmp_path) == new


@pytest.mark.parametrize("killed_at", [".writing_", "step_"])
def test_a_kill_between_two_renames(
    tmp_path: Path, host_group: HostGroup, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    """The same step is written again, by a run that resumed from it in another layout."""
    folder, rename = write_checkpoint(tmp_path, 20), os.rename

    def killed(source: Path, target: Path) -> None:
        if Path(source).name.startswith(killed_at):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 20)
    monkeypatch.undo()
    clean_unfinished(tmp_path)
    assert names(tmp_path) == [folder.name]
    assert choose_checkpoint(tmp_path, host_group) == (folder, [])


def test_a_rename_that_fails_leaves_the_one_from_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = write_checkpoint(tmp_path, 20), os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".writing_"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        write_checkpoint(tmp_path, 20)
    assert manifest.damage(folder, checksums=(0, 1)) is None


def test_nothing_is_deleted_before_the_new_one_is_complete(tmp_path: Path) -> None:
    older = write_checkpoint(tmp_path, 1, keep=1)
    temporary = tmp_path / "checkpoints" / temporary_name(2)
    temporary.mkdir()
    listed = {"rank_1.pt": {"bytes": 5, "crc32": 0}}
    with pytest.raises(OSError, match="rank_1.pt is missing as rank 0 sees.*machines share"):
        commit(tmp_path, state_of(2), keep_last=1, entries=listed)
    assert manifest.damage(older, checksums=(0, 1)) is None
    assert not (temporary / "manifest.json").exists()
    (tmp_path / "checkpoints" / ".deleting_step_00000000").mkdir()
    clean_unfinished(tmp_path)
    assert names(tmp_path) == [older.name]


def test_a_damaged_one_is_replaced_by_its_own_step(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    flipped(write_checkpoint(tmp_path, 2))
    folder = write_checkpoint(tmp_path, 2)
    assert manifest.damage(folder, checksums=(0, 1)) is None
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def tiny(out: Path, *overrides: str) -> Config:
    own = ["train.zero_stage=1", "train.images=32", f"out={out}"]
    return load_config("photos", [*TINY, *own, *overrides])


def test_a_run_goes_on_from_the_one_before_the_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny(tmp_path / "whole", "train.keep_last=1"), quiet=True)
    train(tiny(tmp_path / "run", "train.images=24", "train.save_every=1"), quiet=True)
    (shard,) = (tmp_path / "run" / "checkpoints" / "step_00000003").glob("zero_*.pt")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    train(tiny(tmp_path / "run", "train.keep_last=1"))
    said = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(said) == 1 and f"{shard.name} has another checksum" in said[0]
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(("save_every", "keep_every"), [(0, 10), (4, 6)])
def test_a_keep_every_that_no_checkpoint_falls_on_is_refused(
    tmp_path: Path, save_every: int, keep_every: int
) -> None:
    with pytest.raises(ValueError, match="train.keep_every must be a multiple"):
        train(tiny(tmp_path, f"train.save_every={save_every}", f"train.keep_every={keep_every}"))


CHOOSING = """
import sys
from pathlib import Path
from mixflow_fast.checkpoints.run_folder import choose_checkpoint
from mixflow_fast.distributed import process_group
from mixflow_fast.distributed.host_group import HostGroup

process_group.init_process_group("cpu")
host_group = HostGroup()
chosen, lines = choose_checkpoint(Path(sys.argv[1]), host_group)
print(chosen.name, *lines)
try:
    with host_group.raise_together():
        if host_group.rank == 1:
            raise OSError("rank 1 alone")
except OSError as error:
    print(error)
process_group.leave()
"""


def test_ranks_share_the_reading_and_take_the_same(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    newer = write_checkpoint(tmp_path, 2)
    listed = sorted(json.loads((newer / "manifest.json").read_text())["files"])
    assert listed.index("rank_0.pt") % 2 == 1  # only rank 1 of 2 reads it
    flipped(newer)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    common = ENVIRONMENT | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHOOSING, str(tmp_path)],
            env=common | {"RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert said[0] == said[1]
    assert said[0].startswith("step_00000001") and "rank_0.pt has another checksum" in said[0]
    assert said[0].endswith("rank 1 alone\n")


STOPPING = """
import hashlib
from mixflow_fast.distributed.stop_signal import StopSignal

stop = StopSignal(1)
with stop.installed():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # no bytecode of the main thread runs
"""


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [(signal.SIGINT, signal.SIGINT, 130), (signal.SIGUSR1, signal.SIGTERM, 143)],
)
def test_a_second_signal_ends_the_process_at_once(first: int, second: int, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPING],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(first)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(second)
    assert process.wait(timeout=10) == code
    assert process.stderr is not None and "without saving" in process.stderr.readline()
    process.stdout.close()
    process.stderr.close()


@pytest.mark.parametrize("engine", ["deepspeed", pytest.param("ddp", marks=pytest.mark.long)])
def test_three_kills_lose_nothing(engine: str) -> None:
    """`make test-kill` does fifty, on two ranks too."""
    options = ["--kills", "3", "--steps", "24", "--one-rank", "--engine", engine]
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.kill_harness", *options],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "3 kills" in result.stdout and "no example lost or twice" in result.stdout


LONG = pytest.mark.long
SEPARATE = """
import sys, warnings
from pathlib import Path
from mixflow_fast.checkpoints import run_folder
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.distributed.process_group import init_process_group, rank

warnings.simplefilter("ignore")
init_process_group("cpu", timeout_s=20)
run_folder.SHARED_S = 1.0
folder = run_folder.RunFolder(Path(sys.argv[1 + rank()]), HostGroup())
try:
    folder.hold()
    folder.make("a: 1", None)
    print("made")
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "there", [(0,), *(pytest.param(t, marks=LONG) for t in [(), (1,), (0, 1)])]
)
def test_a_folder_that_is_not_the_same_for_all_ranks(tmp_path: Path, there: tuple) -> None:
    """Whichever of them has a run already: no rank waits for another, or trains."""
    outs = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for number in there:
        (outs[number] / "checkpoints").mkdir(parents=True)
    both = list(map(str, outs))
    for code, text in run_ranks([[SEPARATE, *both]] * 2):
        assert code == 0 and "out= must be one folder that all ranks see: rank 1 does not" in text
        assert f"find at {outs[1]} on " in text


def test_one_folder_by_two_paths(tmp_path: Path) -> None:
    """As with other mounts on other machines."""
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    found = run_ranks([[SEPARATE, str(tmp_path / "a" / "run"), str(tmp_path / "link" / "run")]] * 2)
    assert found == [(0, "made\n"), (0, "made\n")]
