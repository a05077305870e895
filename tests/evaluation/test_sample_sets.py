"""Sets of samples: the same bytes from any number of ranks and after any kill, never replaced."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mixflow_fast.evaluation import sample_sets
from mixflow_fast.evaluation.protocol import Protocol
from mixflow_fast.evaluation.sample_sets import Made, SetPlan, read_set, write_set
from tests.support.sample_sets import (
    SHAPE,
    content,
    ended,
    in_child,
    killed_at,
    make,
    pictures,
    plan,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The set that nobody interrupts, of one rank."""
    folder = tmp_path_factory.mktemp("whole") / "a"
    assert write_set(make, plan(), folder, batch_size=3)
    return content(folder)


def test_a_set_is_what_the_maker_makes(tmp_path: Path, whole: dict[str, bytes]) -> None:
    folder = tmp_path / "a"
    begun: list[int] = []
    assert write_set(make, plan(), folder, batch_size=64, begins=begun.append)
    assert begun == [11] and content(folder) == whole  # batches do not cross shards
    names = sorted(whole)
    assert [n for n in names if "done" not in n] == [
        "a.labels.npy",
        "a.npz",
        "a/set.json",
        "a/work.json",
    ]
    expected = pictures(torch.arange(11)).movedim(1, -1).numpy()
    with np.load(tmp_path / "a.npz") as arrays:
        assert list(arrays) == ["arr_0"] and np.array_equal(arrays["arr_0"], expected)
    for path in (folder, tmp_path / "a.npz"):
        found = read_set(path)
        assert np.array_equal(found.pictures, expected) and found.path == tmp_path / "a.npz"
        assert isinstance(found.pictures, np.memmap) and len(found) == 11
        assert found.labels.tolist() == [i % 3 for i in range(11)]
        assert found.protocol == plan().protocol and found.origin == {"weights": "aa"}
        batches = list(found.batches(4))
        assert [len(b) for b in batches] == [4, 4, 3]
        assert torch.equal(torch.cat(batches), pictures(torch.arange(11)))
    record = json.loads((folder / "set.json").read_text())
    assert record["hash"] == plan().protocol.sha256 and record["n"] == 11
    assert [shard["rows"] for shard in record["shards"]] == [4, 4, 3]
    # Once more: nothing is made.
    assert write_set(_never, plan(), folder) and content(folder) == whole


def _never(ids: Tensor) -> Made:
    raise AssertionError(f"made once more: {ids}")


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_makes_the_same_bytes(
    tmp_path: Path, whole: dict[str, bytes], ranks: int
) -> None:
    folder = tmp_path / "a"

    def work(rank: int) -> None:
        write_set(make, plan(), folder, rank=rank, world=ranks, batch_size=3)

    pids = [in_child(lambda rank=rank: work(rank)) for rank in range(ranks)]
    assert [ended(pid) for pid in pids] == [0] * ranks
    assert content(folder) == whole


def test_a_kill_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    """Each state that a kill can leave is met, one after the other, and gone on with."""
    small, met = plan(n=3, shard=2), []
    assert write_set(make, small, tmp_path / "truth" / "a", batch_size=3)
    truth = content(tmp_path / "truth" / "a")
    for moment in range(1, 1000):
        folder = tmp_path / str(moment) / "a"
        folder.parent.mkdir()
        code = killed_at(folder, moment, small)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        met.append(tuple(sorted(content(folder))))
        left = {n: c for n, c in content(folder).items() if n in ("a/set.json", "a.npz")}
        for name, bytes_ in left.items():  # what has its name is whole
            assert bytes_ == truth[name]
        ranks = 1 + moment % 3
        for rank in range(ranks):
            write_set(make, small, folder, rank=rank, world=ranks)
        assert content(folder) == truth, moment
        shutil.rmtree(folder.parent)
    assert len(met) > 25 and len(set(met)) > 10


def test_a_killed_rank_is_made_up_for_by_others(tmp_path: Path, whole: dict[str, bytes]) -> None:
    folder = tmp_path / "a"

    def one() -> None:
        def dying(ids: Tensor) -> Made:
            if 7 in ids:
                os.kill(os.getpid(), signal.SIGKILL)
            return make(ids)

        write_set(dying, plan(), folder, rank=1, world=3, batch_size=3)

    assert ended(in_child(one)) == -signal.SIGKILL
    assert not write_set(make, plan(), folder, rank=0, world=3, batch_size=3)
    with pytest.raises(ValueError, match="no finished set of samples .1 of 3 shards are done; run"):
        read_set(folder)
    seen: list[int] = []

    def watched(ids: Tensor) -> Made:
        seen.extend(ids.tolist())
        return make(ids)

    assert write_set(watched, plan(), folder, batch_size=3) and content(folder) == whole
    assert seen == list(range(4, 11))  # shard 0 was done


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_twenty_kills_at_random_times(tmp_path: Path, ranks: int) -> None:
    large, draw = plan(n=400, shard=20), random.Random(ranks)
    write_set(make, large, tmp_path / "truth" / "a", batch_size=7)
    folder = tmp_path / "killed" / "a"

    def slow(ids: Tensor) -> Made:
        time.sleep(0.002)
        return make(ids)

    def work(rank: int) -> None:
        write_set(slow, large, folder, rank=rank, world=ranks, batch_size=7)

    kills = 0
    while kills < 20:
        pids = [in_child(lambda rank=rank: work(rank)) for rank in range(ranks)]
        time.sleep(draw.uniform(0, 0.06))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        kills += sum(ended(pid) == -signal.SIGKILL for pid in pids) > 0
        if (folder / "set.json").is_file():  # it was quicker: another one
            shutil.rmtree(folder.parent)
    for rank in range(ranks):
        work(rank)
    assert content(folder) == content(tmp_path / "truth" / "a")


def test_another_protocol_or_other_weights_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    for finished in (False, True):
        if finished:
            assert write_set(make, plan(), folder)
        else:
            write_set(make, plan(), folder, rank=0, world=2)
        before = content(folder)
        other = plan(image={"size": 4, "quantisation": "floor"})
        with pytest.raises(ValueError, match="another protocol.*image.quantisation = 'round' aga"):
            write_set(make, other, folder)
        with pytest.raises(ValueError, match="another protocol.*set.n = 11 against 12"):
            write_set(make, plan(n=12), folder)
        weights = SetPlan(protocol=plan().protocol, shape=SHAPE, origin={"weights": "bb"}, shard=4)
        with pytest.raises(ValueError, match="was begun with origin = {'weights': 'aa'}, now"):
            write_set(make, weights, folder)
        assert content(folder) == before
    # Of a finished set that was copied without its work.json, `set.json` says the same.
    (folder / "work.json").unlink()
    with pytest.raises(ValueError, match="another protocol.*image.quantisation = 'round' aga"):
        write_set(make, plan(image={"size": 4, "quantisation": "floor"}), folder)
    with pytest.raises(ValueError, match="was begun with origin = {'weights': 'aa'}, now"):
        write_set(make, weights, folder)
    assert write_set(_never, plan(), folder)


def test_the_step_of_the_weights_is_noted_and_not_compared(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    assert write_set(make, replace(plan(), step=7), folder)
    assert read_set(folder).origin == {"weights": "aa", "step": 7}
    # The same weights in a file that does not say their step.
    assert write_set(_never, plan(), folder)
    assert read_set(folder).origin["step"] == 7


def test_nothing_is_ever_replaced(tmp_path: Path, whole: dict[str, bytes]) -> None:
    folder = tmp_path / "a"
    for name in ("a.npz", "a.labels.npy"):
        (tmp_path / name).write_bytes(b"mine")
        with pytest.raises(ValueError, match=f"{name} exists and does not belong .* never replac"):
            write_set(_never, plan(), folder)
        assert (tmp_path / name).read_bytes() == b"mine" and not folder.exists()
        (tmp_path / name).unlink()
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not empty and no set was begun there"):
        write_set(_never, plan(), folder)
    (folder / "thesis.tex").unlink()
    assert write_set(make, plan(), folder, batch_size=3) and content(folder) == whole
    # The file of a finished set was lost, or another lies in its place.
    (tmp_path / "a.npz").write_bytes(b"other")
    with pytest.raises(ValueError, match="a.npz has another size than .*: put it back, or delete"):
        write_set(_never, plan(), folder)
    (tmp_path / "a.npz").unlink()
    for use in (lambda: write_set(_never, plan(), folder), lambda: read_set(folder)):
        with pytest.raises(ValueError, match="a.npz is gone, which .*: put it back, or delete"):
            use()


def test_another_start_with_more_or_fewer_ranks_may_be_quicker(tmp_path: Path) -> None:
    """It finishes the set, and deletes the shards, while this process still makes some."""
    folder, large, made = tmp_path / "a", plan(n=24), []

    def slow(ids: Tensor) -> Made:
        if not made:
            assert write_set(make, large, folder)
        made.append(ids)
        return make(ids)

    assert write_set(slow, large, folder, rank=1, world=2)
    assert len(made) == 1
    assert write_set(make, large, tmp_path / "truth" / "a")
    assert content(folder)["a.npz"] == content(tmp_path / "truth" / "a")["a.npz"]


def test_shards_stay_where_they_are_wanted(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    assert write_set(make, plan(), folder, keep_shards=True)
    before = content(folder)
    assert "a/shards/00002.npy" in before
    assert np.array_equal(np.load(folder / "shards/00002.npy")[2, :, :, 0], pictures(
        torch.tensor([10]))[0, 0].numpy())  # fmt: skip
    assert write_set(_never, plan(), folder, keep_shards=True) and content(folder) == before
    assert write_set(_never, plan(), folder) and not (folder / "shards").exists()


@pytest.mark.parametrize("damage", ["a bit", "too long", "too short", "gone"])
def test_a_damaged_shard_is_made_again(
    tmp_path: Path, whole: dict[str, bytes], damage: str
) -> None:
    folder = tmp_path / "a"
    write_set(make, plan(), folder, rank=1, world=3, batch_size=3)
    shard = folder / "shards" / "00001.npy"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    changed = {"a bit": data, "too long": data + b"x", "too short": data[:-3], "gone": None}
    shard.unlink()
    if changed[damage] is not None:
        shard.write_bytes(changed[damage])
    assert write_set(make, plan(), folder, batch_size=3) and content(folder) == whole


def test_a_disk_that_is_or_becomes_full(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(sample_sets.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
        with pytest.raises(OSError, match="needs .* GB more .* are free: free some, or") as error:
            write_set(_never, plan(), folder)
        assert error.value.errno == errno.ENOSPC
        # With 64 KB for the set itself there is no room for what is written beside it.
        free = (1 << 20) + (1 << 16)
        m.setattr(sample_sets.shutil, "disk_usage", lambda path: usage._replace(free=free))
        for wanted, beside in ((plan(), 10_000), (replace(plan(), latents=(4, 64, 64)), 0)):
            with pytest.raises(OSError, match="GB more .* are free"):
                write_set(_never, wanted, tmp_path / "b", on_shard_bytes=beside)
            shutil.rmtree(tmp_path / "b")
        assert write_set(make, plan(), tmp_path / "b" / "c")
        shutil.rmtree(tmp_path / "b")
    # A limit of the system on the size of a file, as a disk that is full: a shard fits (368
    # bytes), the file of all does not.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit, name in ((300, "00000.npy"), (900, "a.npz")):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(OSError, match=name) as error:
                write_set(make, plan(), folder, batch_size=3)
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert error.value.errno == errno.EFBIG
            left = [n for n in content(folder) if "tmp" in n or "partial" in n or ".npz" in n]
            assert left == [] and not (folder / "set.json").exists()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert write_set(make, plan(), folder, batch_size=3) and content(folder) == whole


def test_what_is_no_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_set(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no finished set of samples .no set.json"):
        read_set(tmp_path / "empty")
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 3, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"cannot read arr_0 of .*x.npz"):
        read_set(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", np.zeros((2, 4, 4, 3), np.float32))
    with pytest.raises(ValueError, match=r"must hold pictures, .* got float32 \(2, 4, 4, 3\)"):
        read_set(tmp_path / "y.npz")
    np.savez(tmp_path / "theirs.npz", np.ones((2, 4, 4, 3), np.uint8), np.zeros(2))
    found = read_set(tmp_path / "theirs.npz")
    assert len(found) == 2 and found.protocol is None and found.labels is None
    with pytest.raises(ValueError, match=r"pictures must be uint8 \(4, \*\(3, 4, 5\)\), got"):
        write_set(lambda ids: Made(pictures(ids).float(), None), plan(), tmp_path / "a")
    assert write_set(lambda ids: Made(pictures(ids), None), plan(), tmp_path / "a")
    assert read_set(tmp_path / "a").labels is None
    with pytest.raises(ValueError, match="must say how many, set.n, got None"):
        SetPlan(protocol=Protocol({}), shape=SHAPE, origin={})
    with pytest.raises(ValueError, match=r"shape \(1 or 3, H, W\)"):
        SetPlan(protocol=plan().protocol, shape=(4, 4, 4), origin={})


def _with_latents(ids: Tensor) -> Made:
    x = ids.view(-1, 1, 1, 1) + torch.arange(16).view(1, 4, 2, 2) / 16
    return Made(pictures(ids), None, x.float())


def test_latents_are_kept_with_each_shard(tmp_path: Path) -> None:
    """Those of a shard that is done and has lost them are made again, with the same bytes."""
    folder, wanted = tmp_path / "a", replace(plan(), latents=(4, 2, 2))
    assert not write_set(_with_latents, wanted, folder, rank=0, world=2)
    first = (folder / "latents" / "00000.npy").read_bytes()
    (folder / "latents" / "00000.npy").write_bytes(first[:-1])
    assert write_set(_with_latents, wanted, folder)
    files = sorted(path.name for path in (folder / "latents").iterdir())
    assert files == ["00000.npy", "00001.npy", "00002.npy"]
    assert (folder / "latents" / "00000.npy").read_bytes() == first
    found = np.concatenate([np.load(folder / "latents" / name) for name in files])
    assert found.dtype == np.float16 and found.shape == (11, 4, 2, 2)
    assert np.array_equal(found, _with_latents(torch.arange(11)).latents.half().numpy())
    with np.load(tmp_path / "a.npz") as arrays:
        assert list(arrays) == ["arr_0"]
    noted = json.loads((folder / "set.json").read_text())["shards"][1]["latents"]
    assert noted["file"] == "latents/00001.npy"
    # A set without them is another: they cannot be made without sampling again.
    assert write_set(make, plan(), tmp_path / "b")
    with pytest.raises(ValueError, match=r"begun with latents = None, now it is \[4, 2, 2\]"):
        write_set(_with_latents, wanted, tmp_path / "b")
    with pytest.raises(ValueError, match=r"latents to be kept must be \(3, 4, 2, 2\), got None"):
        write_set(make, wanted, tmp_path / "c", batch_size=3)

    def huge(ids: torch.Tensor) -> Made:
        return Made(pictures(ids), None, torch.full((len(ids), 4, 2, 2), 1e6))

    with pytest.raises(ValueError, match="which float16 cannot hold"):
        write_set(huge, wanted, tmp_path / "d")


def test_shards_are_shown_before_they_are_done(tmp_path: Path) -> None:
    seen: list[tuple[int, np.ndarray]] = []

    def on_shard(number: int, rows: np.ndarray) -> None:
        assert not (tmp_path / "a" / "done" / f"{number:05d}.done.json").exists()
        seen.append((number, np.array(rows)))

    assert write_set(make, plan(), tmp_path / "a", on_shard=on_shard)
    assert [number for number, _ in seen] == [0, 1, 2]
    expected = pictures(torch.arange(11)).movedim(1, -1).numpy()
    assert np.array_equal(np.concatenate([rows for _, rows in seen]), expected)
