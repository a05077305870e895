"""Shards as units of work: nothing is made twice, nothing is lost, whatever dies in between."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixflow_fast import folder_lock
from mixflow_fast.data.preparation.shard_work import ShardWork, ranks_of_environment
from mixflow_fast.data.set_files import file_record, read_manifest, verify, write_manifest
from mixflow_fast.files import write_json

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = {"format": "test/1", "size": 256, "names": ("a", "b")}


def make(work: ShardWork, numbers: list[int]) -> None:
    for number in numbers:
        work.temporary(number).write_bytes(bytes([number]) * (100 + number))
        work.finish(number, rows=number + 1, extra={"sum": number})


def complete(work: ShardWork) -> bool:
    def write(records: list[dict[str, object]]) -> None:
        write_manifest(work.out, {"format": "test/1", "shards": records, "files": []})

    return work.complete_with(write)


def tree(root) -> dict[str, bytes]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def test_one_rank_and_three_make_the_same_set(tmp_path):
    with ShardWork(tmp_path / "one", SETTINGS, 7, ".bin") as work:
        assert work.remaining() == list(range(7)) and not complete(work)
        make(work, work.remaining())
        assert work.remaining() == [] and work.unfinished() == 0 and complete(work)
    seen = []
    for rank in (2, 0, 1):
        with ShardWork(tmp_path / "three", SETTINGS, 7, ".bin", rank, 3) as work:
            seen += work.remaining()
            make(work, work.remaining())
            assert complete(work) == (rank == 1)
    assert sorted(seen) == list(range(7))
    one = tree(tmp_path / "one")
    assert one == tree(tmp_path / "three") and "shards/00006.bin" in one
    assert verify(tmp_path / "one") == []
    records = read_manifest(tmp_path / "one", "test/1")["shards"]
    assert [(r["file"], r["rows"], r["bytes"], r["sum"]) for r in records][2] == (
        *("shards/00002.bin", 3),
        *(102, 2),
    )


def test_a_rank_that_starts_late_takes_its_own_part(tmp_path):
    """What is left when it looks is less than what the others saw: their parts must not overlap."""
    first = ShardWork(tmp_path, SETTINGS, 6, ".bin", 0, 2)
    mine = first.remaining()
    make(first, mine[:1])
    with ShardWork(tmp_path, SETTINGS, 6, ".bin", 1, 2) as second:
        assert sorted(mine + second.remaining()) == list(range(6))
    first.close()


def test_what_a_kill_left_is_made_again_and_only_that(tmp_path):
    with ShardWork(tmp_path, SETTINGS, 3, ".bin") as work:
        make(work, [0, 1])
    before = (tmp_path / "shards/00000.bin").stat().st_mtime_ns
    # Killed in shard 2; after the rename of shard 1, before its done file; rank 4 died elsewhere.
    (tmp_path / "shards/.tmp-0-00002.bin").write_bytes(b"half")
    (tmp_path / "shards/.tmp-4-00002.bin").write_bytes(b"half")
    (tmp_path / "done/.tmp-0-00001.json").write_text("{")
    (tmp_path / "done/00001.done.json").unlink()
    with ShardWork(tmp_path, SETTINGS, 3, ".bin") as work:
        assert work.remaining() == [1, 2]
        assert [p.name for p in (tmp_path / "shards").glob(".tmp*")] == [".tmp-4-00002.bin"]
        make(work, [1, 2])
        assert complete(work)
    assert not list(tmp_path.rglob(".tmp*")) and not (tmp_path / ".locks").exists()
    assert (tmp_path / "shards/00000.bin").stat().st_mtime_ns == before
    with ShardWork(tmp_path, SETTINGS, 3, ".bin") as work:
        assert work.complete and work.remaining() == []


@pytest.mark.parametrize("damage", ["truncated", "missing", "done file"])
def test_a_shard_that_does_not_hold_its_record_is_made_again(tmp_path, damage):
    with ShardWork(tmp_path, SETTINGS, 2, ".bin") as work:
        make(work, [0, 1])
        complete(work)
    whole = tree(tmp_path)
    if damage == "truncated":
        (tmp_path / "shards/00001.bin").write_bytes(b"x")
    elif damage == "missing":
        (tmp_path / "shards/00001.bin").unlink()
    else:
        (tmp_path / "done/00001.done.json").write_text("{")
    with ShardWork(tmp_path, SETTINGS, 2, ".bin") as work:
        assert work.redone == [1] == work.remaining() and not work.complete
        assert not (tmp_path / "manifest.json").exists()
        make(work, [1])
        assert complete(work)
    assert tree(tmp_path) == whole


@pytest.mark.parametrize("damage", ["missing", "truncated", "manifest"])
def test_files_beside_the_shards_are_written_again(tmp_path, damage):
    def write(records: list[dict[str, object]]) -> None:
        (tmp_path / "labels").write_bytes(b"0 1")
        files = [file_record(tmp_path, "labels")]
        write_manifest(tmp_path, {"format": "test/1", "shards": records, "files": files})

    with ShardWork(tmp_path, SETTINGS, 2, ".bin") as work:
        make(work, [0, 1])
        assert work.complete_with(write)
    whole = tree(tmp_path)
    if damage == "missing":
        (tmp_path / "labels").unlink()
    elif damage == "truncated":
        (tmp_path / "labels").write_bytes(b"0")
    else:
        (tmp_path / "manifest.json").write_text("{")
    with ShardWork(tmp_path, SETTINGS, 2, ".bin") as work:
        assert not work.complete and work.remaining() == []
        assert work.complete_with(write)
    assert tree(tmp_path) == whole and verify(tmp_path) == []


def test_other_settings_are_refused_by_name(tmp_path):
    with ShardWork(tmp_path, SETTINGS, 2, ".bin") as work:
        make(work, [0])
    for settings, shards, words in (
        ({**SETTINGS, "size": 512}, 2, "size = 256, now it is 512"),
        (SETTINGS, 3, "shards = 2, now it is 3"),
        ({**SETTINGS, "new": 1}, 2, "new = None, now it is 1"),
        ({"format": "test/1", "names": ["a", "b"]}, 2, "size = 256, now it is None"),
    ):
        with pytest.raises(ValueError, match=f"was begun with {words}: go on with what"):
            ShardWork(tmp_path, settings, shards, ".bin")
    ShardWork(tmp_path, {**SETTINGS, "names": ["a", "b"]}, 2, ".bin").close()


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and no set was begun .*thesis.tex"):
        ShardWork(tmp_path, SETTINGS, 2, ".bin")
    with pytest.raises(ValueError, match="is not a folder: choose another --out"):
        ShardWork(tmp_path / "thesis.tex", SETTINGS, 2, ".bin")
    assert os.listdir(tmp_path) == ["thesis.tex"]
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "mine").touch()
    (tmp_path / "thesis.tex").unlink()
    with pytest.raises(ValueError, match="is not empty and no set was begun"):
        ShardWork(tmp_path, SETTINGS, 2, ".bin")


def test_ranks_that_begin_at_the_same_time(tmp_path):
    """The other one has made its folders and not yet said what the set is to be."""
    for name in ("shards", "done", ".locks/1"):
        (tmp_path / name).mkdir(parents=True)
    with ShardWork(tmp_path, SETTINGS, 2, ".bin", 0, 2) as work:
        assert work.remaining() == [0]


def test_shards_that_need_not_stay_may_be_gone_once_the_set_is_whole(tmp_path):
    def begin() -> ShardWork:
        return ShardWork(tmp_path, SETTINGS, 2, ".bin", manifest="set.json", kept=False)

    with begin() as work:
        make(work, [0, 1])
    (tmp_path / "shards/00000.bin").unlink()
    with begin() as work:  # it is not whole yet: damage
        assert work.redone == [0] == work.remaining()
        make(work, [0])
        work.forget(1)
        assert work.remaining() == [1] and work.unfinished() == 1
        make(work, [1])
        assert work.complete_with(lambda records: write_json(tmp_path / "set.json", records))
    for shard in (tmp_path / "shards").iterdir():
        shard.unlink()
    with begin() as work:
        assert work.complete and work.remaining() == [] == work.redone
    assert len(json.loads((tmp_path / "set.json").read_text())) == 2


def test_two_processes_are_not_one_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "WAIT_S", 0.2)
    source = (
        "import sys; from pathlib import Path\n"
        "from mixflow_fast.data.preparation.shard_work import ShardWork\n"
        f"work = ShardWork(Path({str(tmp_path)!r}), {SETTINGS!r}, 2, '.bin')\n"
        "work.temporary(0).write_bytes(b'half')\n"
        "print('holds', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", source],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout.readline() == b"holds\n"
        with (
            pytest.warns(UserWarning, match="is in use"),
            pytest.raises(ValueError, match="is in use by another .* or choose another --out"),
        ):
            ShardWork(tmp_path, SETTINGS, 2, ".bin")
        ShardWork(tmp_path, SETTINGS, 2, ".bin", 1, 2).close()
        assert (tmp_path / "shards/.tmp-0-00000.bin").exists()  # its work is left alone
        other.kill()
    ShardWork(tmp_path, SETTINGS, 2, ".bin").close()
    assert not list(tmp_path.rglob(".tmp*"))


def test_shards_may_be_folders(tmp_path):
    with ShardWork(tmp_path, SETTINGS, 1, "", folder="images") as work:
        assert work.path(0) == tmp_path / "images/00000"
        for name, content in (("b.png", b"bb"), ("a.png", b"a")):
            work.temporary(0).mkdir(exist_ok=True)
            (work.temporary(0) / name).write_bytes(content)
        work.finish(0, 2, {})
        (record,) = work.records()
    done = subprocess.run(
        "sha256sum a.png b.png | sha256sum", cwd=work.path(0), shell=True, capture_output=True
    )
    assert record["bytes"] == 3 and record["sha256"] == done.stdout.decode().split()[0]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    with ShardWork(tmp_path, SETTINGS, 2, ".bin") as work:
        make(work, [0])
        with pytest.raises(FileNotFoundError):
            work.finish(1, 1, {})
    assert json.loads((tmp_path / "work.json").read_text())["shards"] == 2
    with ShardWork(tmp_path, SETTINGS, 2, ".bin") as work:
        assert work.records() is None and work.remaining() == [1] and work.unfinished() == 1


def test_ranks_are_those_of_the_launcher(monkeypatch):
    # A test of training in this process may have left its process group.
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_of_environment() == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "2"), monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert ranks_of_environment() == (2, 4)
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "3")
    assert ranks_of_environment() == (1, 3)
