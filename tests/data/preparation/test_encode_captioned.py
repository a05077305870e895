"""A cache of captioned images: its content, and the same bytes whatever stopped it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixflow_fast.data.buckets import fit_to_bucket, parse_buckets
from mixflow_fast.data.captioned import CaptionedLatents
from mixflow_fast.data.latents_store import LatentsStore
from mixflow_fast.data.preparation import encode_captioned as module
from mixflow_fast.data.preparation import encode_prompts
from mixflow_fast.data.preparation.captioned_source import BadItems, open_captioned
from mixflow_fast.data.preparation.encode_buckets import Autoencoder
from mixflow_fast.data.preparation.encode_captioned import (
    CaptionedJob,
    CaptionedModel,
    CaptionedOptions,
)
from mixflow_fast.data.prompts_store import PromptsStore
from mixflow_fast.data.set_files import how_far, read_manifest, sha256_of, size_of, verify
from mixflow_fast.kernels.interpolate import Moments

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
BUCKETS = parse_buckets("48x32,32x32")
SIZES = [(96, 64), (64, 64), (50, 50), (70, 45), (64, 64), (33, 40), (80, 64)]
CAPTIONS = ["a fox", "a fox", "a red fox\nfox", "snow", "", "the fox", "a fox\nsnow"]


def pixels(number: int) -> np.ndarray:
    width, height = SIZES[number]
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def write_pictures(root: Path) -> Path:
    """Seven images; captions are lines, number 4 is left out by its sidecar's absence."""
    root.mkdir()
    for number, text in enumerate(CAPTIONS):
        if not text:
            continue
        Image.fromarray(pixels(number)).save(root / f"{number}.png")
        (root / f"{number}.txt").write_text(text)
    return root


@dataclass(frozen=True)
class Part:
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Stage:
    name: str
    parts: tuple[str, ...]


class Texts:
    """Text encoders without weights, which know whether they are loaded."""

    length = 5
    parts = {
        "clip": Part((3, 2), torch.bfloat16),
        "pooled": Part((4,), torch.bfloat16),
        "t5": Part((5, 4), torch.bfloat16),
        "mask": Part((5,), torch.uint8),
    }
    token_parts = {"clip_ids": Part((3,), torch.int32), "t5_ids": Part((5,), torch.int32)}
    stages = (Stage("clip", ("clip", "pooled")), Stage("t5", ("t5", "mask")))

    def __init__(self):
        self.loaded, self.calls = set(), []

    def tokens(self, prompts):
        rows = [[len(p), *p.encode()[:4]] + [0] * (4 - len(p.encode()[:4])) for p in prompts]
        ids = torch.tensor(rows, dtype=torch.int32)
        return {"clip_ids": ids[:, :3], "t5_ids": ids}

    def embed(self, stage, tokens):
        self.loaded.add(stage)
        assert self.loaded == {stage}  # one at a time
        self.calls.append((stage, len(tokens["t5_ids"])))
        ids = tokens["t5_ids"].float()
        if stage == "clip":
            clip = ids[:, :3, None] * torch.tensor([1.0, 0.5])
            return {"clip": clip.bfloat16(), "pooled": ids[:, :4].bfloat16()}
        return {
            "t5": (ids[:, :, None] / 7 * torch.arange(4)).bfloat16(),
            "mask": (ids > 0).to(torch.uint8),
        }

    def release(self, stage):
        self.loaded.discard(stage)


class Pictures:
    """An autoencoder without weights: means of blocks of 16 pixels."""

    scale = 1.5

    def __call__(self, images):
        blocks = images.float().unflatten(2, (-1, 16)).unflatten(4, (-1, 16)).mean((1, 3, 5))
        return Moments(blocks[:, None] - 3, blocks[:, None] / 255, self.scale)


def model(texts=None, load=Pictures):
    record = {"transformer": "t" * 64, "encoders": {"clip": "c"}, "vae": {"class": "Pictures"}}
    autoencoder = Autoencoder(1, 16, 1.5, record["vae"], load)
    return CaptionedModel(texts or Texts(), autoencoder, "SD3Transformer2DModel", 5, record)


def job(source, out, given=None, on_bad="refuse", **options):
    how = {"buckets": BUCKETS, "text_batch": 2, "batch": 2, "shard_images": 2, "shard_prompts": 3}
    how = CaptionedOptions(**{**how, "on_bad": on_bad, **options})
    found = open_captioned(source, on_bad, how.max_bad)
    return CaptionedJob(found, out, given or model(), CPU, how)


def run(source, out, *arguments, rank=0, world=1, **options):
    return job(source, out, *arguments, **options).run(rank, world, quiet=True)


def files(root):
    """The bytes of all files, but for the locks."""
    found = sorted(p for p in root.rglob("*") if p.is_file() and ".locks" not in p.parts)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in found}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("source") / "pictures")


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "cache"
    assert run(pictures, out).unfinished == 0
    return out


def part(cache, name):
    """All rows of a part."""
    store = PromptsStore(cache / "prompts")
    return store.take(torch.arange(store.info.count))[name]


def test_a_prompt_stands_once_and_the_first_is_empty(whole):
    lines = [json.loads(line) for line in (whole / "prompts/prompts.jsonl").open()]
    assert [line["text"] for line in lines] == ["", "a fox", "a red fox", "fox", "snow", "the fox"]
    assert [line["row"] for line in lines] == list(range(6))
    first, rows = np.load(whole / "items/first.npy"), np.load(whole / "items/prompt.npy")
    said = [
        [lines[row]["text"] for row in rows[a:b]] for a, b in zip(first, first[1:], strict=False)
    ]
    assert said == [text.split("\n") for text in CAPTIONS if text]


def test_parts_are_what_the_encoders_give(whole):
    texts = ["", "a fox", "a red fox", "fox", "snow", "the fox"]
    encoders = Texts()
    for stage in encoders.stages:
        made = encoders.embed(stage.name, encoders.tokens(texts))
        encoders.release(stage.name)
        for name in stage.parts:
            assert torch.equal(part(whole, name), made[name])


def test_latents_of_a_bucket_are_of_its_crops(whole):
    manifest = read_manifest(whole, "mixflow-captioned/1")
    assert [(b["name"], b["count"]) for b in manifest["buckets"]] == [("48x32", 3), ("32x32", 3)]
    numbers = [n for n, text in enumerate(CAPTIONS) if text]
    for bucket, items in zip(BUCKETS, ([0, 3, 5], [1, 2, 4]), strict=True):
        store = LatentsStore(whole / "latents" / bucket.name)
        assert store.source.tolist() == items and store.info.num_classes == 1
        assert store.info.size == (32 if bucket.name == "32x32" else None)
        crops = [fit_to_bucket(pixels(numbers[item]), bucket) for item in items]
        mean, std, _ = Pictures()(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2))
        assert torch.equal(store.take(torch.arange(3)), torch.cat([mean, std], 1).half())


def test_the_shards_hashes_are_those_of_their_folders(whole):
    for note in sorted((whole / "prompts/done").iterdir()):
        record = json.loads(note.read_text())
        folder = whole / "prompts/shards" / note.name.partition(".")[0]
        assert record["sha256"] == sha256_of(folder) and record["bytes"] == size_of(folder)


def test_the_manifest_lists_all_and_each_set_is_whole(whole):
    for root in (whole, whole / "prompts", *(whole / "latents").iterdir()):
        assert verify(root) == []
    record = read_manifest(whole, "mixflow-captioned/1")
    assert (record["items"], record["captions"], record["prompts"]) == (6, 8, 6)
    assert (record["text"], record["length"]) == ("cached", 5)
    assert record["class_name"] == "SD3Transformer2DModel" and record["model"] == model().record


def test_it_is_read_as_examples(whole):
    data = CaptionedLatents(whole)
    assert data.info.text == "cached" and data.bucket_sizes == [3, 3] and not data.flip
    batch = data.get(torch.arange(3, 6), torch.arange(3), 0)  # the pictures 1, 2 and 5
    assert batch.x.mean.shape == (3, 1, 2, 2) and batch.x.scale == 1.5
    encoders = Texts()
    expected = encoders.embed("t5", encoders.tokens(["a fox", "a red fox", "snow"]))["t5"]
    assert torch.equal(batch.cond["t5"][0], expected[0])
    rows = data.prompt_rows(torch.tensor([4] * 50), torch.arange(50), 0)
    assert set(rows.tolist()) == {2, 3}  # both captions of picture 2


def test_encoders_come_one_after_the_other_with_one_batch_size(pictures, tmp_path):
    texts, loads = Texts(), []

    def load():
        assert not texts.loaded
        loads.append(1)
        return Pictures()

    run(pictures, tmp_path / "out", model(texts, load))
    # 3 + 3 prompts in shards: two batches of two each, filled up.
    assert texts.calls == [("clip", 2)] * 4 + [("t5", 2)] * 4 and loads == [1]
    texts.calls.clear()
    done = run(pictures, tmp_path / "out", model(texts, load))
    assert (done.made, done.unfinished) == (0, 0) and not texts.calls and loads == [1]


def test_token_ids_are_stored_without_an_encoder(pictures, tmp_path):
    texts = Texts()
    run(pictures, tmp_path / "out", model(texts), text="online")
    assert not texts.calls
    ids = part(tmp_path / "out", "t5_ids")
    assert ids.dtype == torch.int32
    prompts = ["", "a fox", "a red fox", "fox", "snow", "the fox"]
    assert torch.equal(ids, texts.tokens(prompts)["t5_ids"])


def test_bytes_do_not_depend_on_ranks(pictures, whole, tmp_path):
    left = [run(pictures, tmp_path / "out", rank=rank, world=3).unfinished for rank in (2, 0, 1)]
    assert left[:2] > [0, 0] and left[2] == 0
    assert files(tmp_path / "out") == files(whole)
    assert not list((tmp_path / "out").rglob(".locks"))


def test_a_rank_that_ends_last_completes_what_others_finished(
    pictures, whole, tmp_path, monkeypatch
):
    """One makes the prompts' last shard, the other the last of the latents, at the same time."""
    out, inner = tmp_path / "out", CaptionedJob._make_latents

    def other_first(self, *arguments):
        monkeypatch.undo()
        assert run(pictures, out, rank=1, world=2).unfinished > 0
        return inner(self, *arguments)

    monkeypatch.setattr(CaptionedJob, "_make_latents", other_first)
    assert run(pictures, out, rank=0, world=2).unfinished == 0
    assert files(out) == files(whole)


KILLED = """
import os, signal, sys
from pathlib import Path
from mixflow_fast.data import latents_writer
from mixflow_fast.data.preparation import encode_captioned, encode_prompts, encode_buckets
from mixflow_fast.data.preparation import shard_work
from tests.data.preparation import test_encode_captioned as tests

pictures, out = map(Path, sys.argv[1:])
def die(*_): os.kill(os.getpid(), signal.SIGKILL)

def at_call(owner, name, number):
    inner, calls = getattr(owner, name), []
    def patched(*arguments, **named):
        calls.append(1)
        if len(calls) == number: die()
        return inner(*arguments, **named)
    setattr(owner, name, patched)

PLACES = {
    "in_the_first_encoder": lambda: at_call(encode_prompts._UnitWriter, "write", 3),
    "in_the_second_encoder": lambda: at_call(encode_prompts._UnitWriter, "write", 7),
    "before_the_prompts_manifest": lambda: at_call(encode_captioned, "write_texts", 1),
    "in_the_latents": lambda: at_call(latents_writer.ShardWriter, "write", 2),
    "in_the_second_bucket": lambda: at_call(latents_writer.ShardWriter, "write", 4),
    "between_rename_and_note": lambda: at_call(shard_work, "_write_json", 9),
    "before_a_bucket's_manifest": lambda: at_call(encode_buckets, "finish_store", 1),
    "before_the_manifest": lambda: at_call(encode_captioned, "write_manifest", 2),
}
for name, prepare in PLACES.items():
    pid = os.fork()
    if not pid:
        prepare()
        tests.run(pictures, out / name)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, name
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(pictures, whole, tmp_path):
    command = [sys.executable, "-c", KILLED, str(pictures), str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected, far = files(whole), {}
    for out in sorted(tmp_path.iterdir()):
        assert not (out / "manifest.json").exists()
        far[out.name] = how_far(out)[0]
        with pytest.raises(ValueError, match=f"not complete: {far[out.name]} of 8 shards are done"):
            read_manifest(out, "mixflow-captioned/1")
        # Another number of ranks, and nothing that was done is made again.
        made = [run(pictures, out, rank=rank, world=2).made for rank in (0, 1)]
        assert sum(made) == 8 - far[out.name]
        assert files(out) == expected, out.name
    assert len(far) == 8 and far["before_the_manifest"] == 8
    assert far["in_the_first_encoder"] < far["in_the_second_encoder"] < 4
    assert far["before_the_prompts_manifest"] == 4 <= far["in_the_latents"] < 6
    assert far["in_the_second_bucket"] in (5, 6)


def test_what_is_lost_is_made_again(pictures, whole, tmp_path):
    out = tmp_path / "out"
    run(pictures, out)
    (out / "prompts/shards/00002/t5.npy").unlink()
    (out / "latents/48x32/moments/00001.npy").write_bytes(b"")
    (out / "items/first.npy").unlink()
    assert run(pictures, out).made == 2
    assert files(out) == files(whole)


def test_other_settings_are_refused_by_name(pictures, tmp_path):
    out = tmp_path / "out"
    run(pictures, out, rank=0, world=3)
    for options, name in [
        ({"mirrors": 2}, r"mirrors = 1, now it is 2 \(--mirrors\)"),
        ({"text": "online"}, r"text = 'cached', now it is 'online' \(--text\)"),
        ({"text_dtype": "fp32"}, r"text_dtype = 'bf16', now it is 'fp32' \(--dtype\)"),
        ({"text_batch": 1}, r"text_batch = 2, now it is 1 \(--text-batch\)"),
        ({"batch": 4}, r"image_batch = .* \(--batch\)"),
        ({"shard_prompts": 2}, r"shard_prompts = 3, now it is 2 \(--shard-prompts\)"),
        ({"buckets": parse_buckets("32x32")}, r"buckets = \[.*\], now it is .* \(--buckets"),
    ]:
        with pytest.raises(ValueError, match=f"was begun with {name}"):
            run(pictures, out, **options)
    other = model()
    longer = CaptionedModel(other.text, other.autoencoder, other.class_name, 7, other.record)
    with pytest.raises(ValueError, match=r"text_length = 5, now it is 7 \(--t5-length\)"):
        run(pictures, out, longer)
    more = write_pictures(tmp_path / "more")
    (more / "0.txt").write_text("another")
    with pytest.raises(ValueError, match=r"was begun with data = .* \(--data\)"):
        run(more, out)


@pytest.mark.parametrize("lost", ["2", "all of a bucket"])
def test_images_that_cannot_be_decoded(pictures, tmp_path, lost):
    """Their headers are whole, so that only the decoder sees it."""
    source = write_pictures(tmp_path / "pictures")
    names = ["2.png"] if lost == "2" else ["0.png", "3.png", "6.png"]
    for name in names:
        whole_file = (source / name).read_bytes()
        (source / name).write_bytes(whole_file[: len(whole_file) // 2])
    out = tmp_path / "out"
    with pytest.raises(BadItems, match=f"(?s){names[0]}.*") as error:
        run(source, out)
    assert "--on-bad skip" in str(error.value) and len(error.value.bad) == len(names)
    assert not (out / "manifest.json").exists()
    assert (out / "prompts/manifest.json").exists()  # all others are made
    with pytest.raises(ValueError, match="More than --max-bad 0"):
        run(source, out, on_bad="skip", max_bad=0)
    done = run(source, out, on_bad="skip")
    assert (done.skipped, done.unfinished) == (len(names), 0)
    manifest = read_manifest(out, "mixflow-captioned/1")
    if lost == "2":
        # Every item keeps its number and its captions.
        store = LatentsStore(out / "latents/32x32")
        assert store.source.tolist() == [1, 4] and manifest["items"] == 6
        assert verify(out / "latents/32x32") == []
    else:
        assert [b["name"] for b in manifest["buckets"]] == ["32x32"]
    assert run(source, out, on_bad="skip").made == 0
    for name in names:  # good files by now
        (source / name).write_bytes((pictures / name).read_bytes())
    assert run(source, out).made == 0  # it is complete
    (out / "latents" / BUCKETS[lost == "2"].name / "manifest.json").unlink(missing_ok=True)
    (out / "manifest.json").unlink()
    assert run(source, out).made > 0
    run(source, tmp_path / "again")
    assert files(out) == files(tmp_path / "again")


def test_nothing_is_left(tmp_path):
    source = write_pictures(tmp_path / "pictures")
    for path in source.glob("*.png"):
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="no image of .* can be used: nothing is left to train"):
        run(source, tmp_path / "out", on_bad="skip")


def test_a_text_that_is_not_finite_is_named(pictures, tmp_path):
    class Bad(Texts):
        def embed(self, stage, tokens):
            parts = super().embed(stage, tokens)
            if stage == "t5":
                parts["t5"][tokens["t5_ids"][:, 0] == len("snow")] = float("nan")
            return parts

    with pytest.raises(
        ValueError, match="t5 makes values that are not finite of the prompt 'snow'"
    ):
        run(pictures, tmp_path / "out", model(Bad()))
    assert run(pictures, tmp_path / "out").made > 0


def test_sizes_are_said_and_are_what_is_written(pictures, whole, tmp_path):
    work = job(pictures, tmp_path / "out")
    written = sum(p.stat().st_size - 4096 for p in whole.rglob("*.npy") if p.name[0] != "l")
    arrays = [p for p in whole.rglob("*.npy") if "shards" in p.parts or "moments" in p.parts]
    assert work.total_bytes() == sum(p.stat().st_size - 4096 for p in arrays) and written
    lines = "\n".join(work.describe())
    assert "6 images with 8 captions: 6 prompts" in lines
    assert "latents 48x32" in lines and "text t5" in lines and "5 x 4 bf16" in lines
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_seen_before_and_survived(pictures, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda path: (100, path))
    with pytest.raises(ValueError, match="needs .* more, .* has 100 bytes free: make room"):
        run(pictures, tmp_path / "out")
    assert "100 bytes at" in (said := "\n".join(job(pictures, tmp_path / "out").describe()))
    assert "TOO LITTLE" in said and not (tmp_path / "out").exists()
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(encode_prompts._UnitWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        run(pictures, tmp_path / "out")
    assert not list((tmp_path / "out/prompts/shards").iterdir())
    monkeypatch.undo()
    run(pictures, tmp_path / "out")
    assert files(tmp_path / "out") == files(whole)


def test_mirrors_are_rows_of_their_own(pictures, whole, tmp_path):
    run(pictures, tmp_path / "out", mirrors=2)
    both, one = (LatentsStore(r / "latents/48x32") for r in (tmp_path / "out", whole))
    rows = both.take(torch.arange(6)).unflatten(0, (3, 2))
    assert torch.equal(rows[:, 0], one.take(torch.arange(3)))
    assert torch.equal(rows[:, 1], rows[:, 0].flip(-1))  # of this encoder, which is symmetric


def test_a_signal_ends_it_between_two_batches(pictures, whole, tmp_path, monkeypatch):
    inner, calls = Texts.embed, []

    def embed(self, stage, tokens):
        calls.append(stage)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return inner(self, stage, tokens)

    monkeypatch.setattr(Texts, "embed", embed)
    with pytest.raises(KeyboardInterrupt):
        run(pictures, tmp_path / "out")
    monkeypatch.undo()
    assert how_far(tmp_path / "out")[0] in (1, 2)
    assert not list(tmp_path.rglob(".tmp-*"))
    run(pictures, tmp_path / "out")
    assert files(tmp_path / "out") == files(whole)
