"""Encoding: the latents are diffusers', and the bytes those of one whole run, whatever happened."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mixflow_fast.data import Latents
from mixflow_fast.data.latents_store import LatentsStore
from mixflow_fast.data.preparation import encode as encode_module
from mixflow_fast.data.preparation.encode import EncodeOptions, encode
from mixflow_fast.data.set_files import verify
from mixflow_fast.kernels.interpolate import Moments
from mixflow_fast.models.autoencoders.sdvae import SDVAE
from tests.support.autoencoder import small_autoencoder, write_autoencoder
from tests.support.prepared import LABELS, PIXELS, SOURCE, write_prepared

CPU = torch.device("cpu")
OPTIONS = EncodeOptions(batch=4, shard_samples=3)
ROOT = Path(__file__).resolve().parents[3]


class Stand:
    """An encoder without weights: sums of pixels, for tests of everything around it."""

    shape, scale, precision = (1, 2, 2), 0.5, "fp32"

    def __call__(self, images):
        blocks = images.float().unflatten(2, (2, 16)).unflatten(4, (2, 16)).mean((1, 3, 5))
        return Moments(blocks[:, None], blocks[:, None] / 255, self.scale)

    def record(self):
        return {"class": "Stand"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("set") / "prepared")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return SDVAE(write_autoencoder(tmp_path_factory.mktemp("vae")), 32)


def run(prepared, out, encoder, rank=0, world=1, **options):
    how = EncodeOptions(**{"batch": 4, "shard_samples": 3, **options})
    return encode(prepared, out, encoder, CPU, how, rank, world, quiet=True)


def files(root):
    """The bytes of all files, but for those about the work itself."""
    found = sorted(p for p in root.rglob("*") if p.is_file() and ".locks" not in p.parts)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in found}


@torch.no_grad()
@pytest.mark.parametrize("mirrors", [1, 2])
def test_rows_are_what_diffusers_gives(prepared, vae, tmp_path, mirrors):
    done = run(prepared, tmp_path / "out", vae, mirrors=mirrors)
    assert (done.samples, done.made, done.unfinished) == (7, 7, 0)
    store = LatentsStore(tmp_path / "out")
    assert store.shape == (7 * mirrors, 8, 16, 16) and verify(tmp_path / "out") == []
    images = PIXELS.permute(0, 3, 1, 2)
    both = torch.stack([images, images.flip(-1)][:mirrors], 1).flatten(0, 1)
    expected = small_autoencoder().encode(both.float() / 127.5 - 1).latent_dist
    stored = store.take(torch.arange(7 * mirrors)).float()
    for ours, theirs in zip(stored.chunk(2, 1), (expected.mean, expected.std), strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 4e-4  # of float16
    assert store.labels.tolist() == LABELS.tolist() and store.source.tolist() == SOURCE.tolist()


def test_the_manifest_says_how_it_was_done(prepared, vae, tmp_path):
    run(prepared, tmp_path / "out", vae)
    info = LatentsStore(tmp_path / "out").info
    assert (info.kind, info.shape, info.dtype, info.mirrors) == (
        "moments",
        (8, 16, 16),
        "float16",
        2,
    )
    assert (info.count, info.num_classes, info.scale, info.size) == (7, 3, 0.18215, 32)
    assert info.encoder == vae.record() and info.input_range == [-1.0, 1.0]
    assert info.precision == {"dtype": "fp32", "tf32": False, "device": "cpu", "batch": 4}
    assert info.preprocessing.startswith("adm-center-crop/pil/") and info.source["skipped"] == 2
    assert len(info.source["manifest"]) == 64 and len(info.classes) == 64
    assert [shard.rows for shard in info.shards] == [6, 6, 2]


def test_it_is_trained_on(prepared, vae, tmp_path):
    run(prepared, tmp_path / "out", vae)
    dataset = Latents(tmp_path / "out")
    assert dataset.shape == (4, 16, 16) and dataset.num_classes == 3 and dataset.flip
    batch = dataset.get(torch.arange(7), torch.arange(7), 0)
    assert batch.x.mean.shape == (7, 4, 16, 16) and batch.x.scale == 0.18215


def test_bytes_do_not_depend_on_ranks_or_batches_that_are_short(prepared, vae, tmp_path):
    run(prepared, tmp_path / "one", vae)
    for rank in (2, 0, 1):
        left = run(prepared, tmp_path / "three", vae, rank, 3).unfinished
        assert left == {2: 2, 0: 1, 1: 0}[rank]
    assert files(tmp_path / "three") == files(tmp_path / "one")
    assert run(prepared, tmp_path / "one", vae).made == 0  # it is complete
    # The last batch of each shard is short; with batches of two samples the rows are the same.
    run(prepared, tmp_path / "more", vae, threads=3)
    assert files(tmp_path / "more") == files(tmp_path / "one")


KILLED = """
import os, signal, sys, time
from pathlib import Path
from tests.data.preparation import test_encode as tests
from mixflow_fast.data import latents_writer
from mixflow_fast.data.preparation import encode, shard_work

prepared, out = map(Path, sys.argv[1:])
def die(*_): os.kill(os.getpid(), signal.SIGKILL)

def in_a_shard():
    write, calls = latents_writer.ShardWriter.write, []
    def patched(self, block):
        calls.append(write(self, block))
        if len(calls) == 3:
            while not (out / "in_a_shard/done/00000.done.json").exists(): time.sleep(0.01)
            die()
    latents_writer.ShardWriter.write = patched

def before_the_rename():
    finish, calls = shard_work.ShardWork.finish, []
    def patched(self, number, rows, extra):
        if number == 1: shard_work.os.replace = die
        finish(self, number, rows, extra)
    shard_work.ShardWork.finish = patched

def before_the_manifest():
    latents_writer.write_manifest = die

for place in (in_a_shard, before_the_rename, before_the_manifest):
    pid = os.fork()
    if not pid:
        place()
        tests.run(prepared, out / place.__name__, tests.Stand())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, place
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(prepared, tmp_path):
    run(prepared, tmp_path / "whole", Stand())
    command = [sys.executable, "-c", KILLED, str(prepared), str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = files(tmp_path / "whole")
    # The second shard was open, was not renamed, all were there.
    kept = {"in_a_shard": 1, "before_the_rename": 1, "before_the_manifest": 3}
    for place, shards in kept.items():
        out = tmp_path / place
        assert not (out / "manifest.json").exists()
        assert len(list((out / "done").glob("*.done.json"))) == shards
        with pytest.raises(ValueError, match=f"not complete: {shards} of 3 shards are done"):
            LatentsStore(out)
        before = {p: p.stat().st_mtime_ns for p in (out / "moments").glob("[0-9]*")}
        # Another number of ranks, and nothing that was done is made again.
        made = [run(prepared, out, Stand(), rank, 2).made for rank in (0, 1)]
        assert sum(made) == [7, 4, 1, 0][shards]
        if place != "before_the_rename":
            assert all(p.stat().st_mtime_ns == time for p, time in before.items())
        assert files(out) == expected


def test_other_settings_are_not_mixed_in(prepared, tmp_path):
    run(prepared, tmp_path / "out", Stand(), 0, 3)
    for options, name in [
        ({"mirrors": 1}, "mirrors = 2, now it is 1"),
        ({"batch": 2}, "precision = .*'batch': 4.* now it is .*'batch': 2"),
        ({"shard_samples": 2}, "shard_samples = 3, now it is 2"),
    ]:
        with pytest.raises(ValueError, match=f"was begun with {name}"):
            run(prepared, tmp_path / "out", Stand(), **options)

    class Other(Stand):
        def record(self):
            return {"class": "Other"}

    with pytest.raises(ValueError, match="was begun with encoder = .*Stand.* now .*Other"):
        run(prepared, tmp_path / "out", Other())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "latent of .*{name}.* has values that are not finite"),
        (1e5, r"latent of .*{name}.* has a value of 1e\+05, which float16 cannot hold"),
    ],
)
@pytest.mark.parametrize("mirror", [0, 1])
def test_a_bad_latent_stops_with_the_name_of_its_image(prepared, tmp_path, value, message, mirror):
    bad = PIXELS[5].permute(2, 0, 1)
    bad = bad.flip(-1) if mirror else bad

    class Bad(Stand):
        def __call__(self, images):
            moments = super().__call__(images)
            moments.mean[(images == bad).flatten(1).all(1)] = value
            return moments

    with pytest.raises(ValueError, match=message.format(name=f"0*{SOURCE[5]}")) as error:
        run(prepared, tmp_path / "out", Bad())
    assert ("mirrored" in str(error.value)) == bool(mirror)
    assert [p.name for p in (tmp_path / "out/moments").iterdir()] == ["00000.npy"]
    assert run(prepared, tmp_path / "out", Stand()).made == 4  # the first shard is kept


def test_images_that_are_not_exact_need_a_word(tmp_path):
    prepared = write_prepared(tmp_path / "set", "jpeg")
    with pytest.raises(ValueError, match="JPEG and not exact, .*or give --allow-lossy"):
        run(prepared, tmp_path / "out", Stand())
    assert not (tmp_path / "out").exists()
    run(prepared, tmp_path / "out", Stand(), allow_lossy=True)
    assert LatentsStore(tmp_path / "out").info.source["exact"] is False


def test_a_full_disk_is_seen_before_and_survived_when_it_fills_up(prepared, tmp_path, monkeypatch):
    usage = encode_module.shutil.disk_usage
    monkeypatch.setattr(
        encode_module.shutil, "disk_usage", lambda path: usage(path)._replace(free=100)
    )
    with pytest.raises(ValueError, match="needs 224 bytes more, its disk has 100 bytes free"):
        run(prepared, tmp_path / "out", Stand())
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(encode_module.ShardWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        run(prepared, tmp_path / "out", Stand())
    assert list((tmp_path / "out/moments").iterdir()) == []
    monkeypatch.undo()
    run(prepared, tmp_path / "out", Stand())
    run(prepared, tmp_path / "whole", Stand())
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_batch_holds_whole_samples(prepared, tmp_path):
    with pytest.raises(ValueError, match="batch must be a multiple of the 2 mirrors, got 3"):
        run(prepared, tmp_path / "out", Stand(), batch=3)
    seen = []

    class Counting(Stand):
        def __call__(self, images):
            seen.append(len(images))
            return super().__call__(images)

    run(prepared, tmp_path / "fixed", Counting(), batch=4)
    assert seen == [4] * 5  # 3 + 3 + 1 samples in shards: two samples a batch, filled up
    seen.clear()
    run(prepared, tmp_path / "default", Counting(), batch=None, mirrors=1, shard_samples=100)
    assert seen == [64]
    record = json.loads((tmp_path / "default/manifest.json").read_text())
    assert record["precision"]["batch"] == 64 and record["mirrors"] == 1


def test_images_are_decoded_ahead_but_not_all_of_them():
    import threading
    from concurrent.futures import ThreadPoolExecutor

    begun = threading.Semaphore(0)
    made = []

    def make(task):
        made.append(task)
        begun.release()
        return task * task

    with ThreadPoolExecutor(2) as pool:
        found = encode_module.ahead(pool, make, range(20), 3)
        assert next(found) == (0, 0)
        assert all(begun.acquire(timeout=10) for _ in range(4)) and len(made) == 4
        assert list(found) == [(n, n * n) for n in range(1, 20)]


def test_threads_do_not_change_what_torch_does(prepared, tmp_path):
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    seen = []

    class Looking(Stand):
        def __call__(self, images):
            cudnn = torch.backends.cudnn
            seen.append((cudnn.deterministic, cudnn.benchmark))
            return super().__call__(images)

    run(prepared, tmp_path / "out", Looking())
    assert set(seen) == {(True, False)}
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == before
    assert np.load(tmp_path / "out/labels.npy").tolist() == LABELS.tolist()
