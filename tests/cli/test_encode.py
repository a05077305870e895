"""`mixflow-fast encode` as a user meets it; caches against the official pipelines."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mixflow_fast.cli import main
from mixflow_fast.data.buckets import fit_to_bucket, parse_buckets
from mixflow_fast.data.captioned import CaptionedLatents
from mixflow_fast.data.latents_store import LatentsStore
from mixflow_fast.data.preparation import encode_captioned
from mixflow_fast.data.prompts_store import PromptsStore
from mixflow_fast.data.set_files import how_far
from mixflow_fast.models.text_to_image.prompts import layout_for, prompt_encoder
from tests.support.text_to_image import write_pipeline

diffusers = pytest.importorskip("diffusers")
ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("sd3", "flux", "z_image")
TEXTS = ["a fox", "a red fox\nfox in the snow", "a fox", "Ünïcödé 狐", "snow " * 60]
PROMPTS = ["", "a fox", "a red fox", "fox in the snow", "Ünïcödé 狐", ("snow " * 60).strip()]
SIZES = [(64, 64), (96, 64), (64, 64), (70, 60), (80, 48)]
SMALL = ("--size", 64, "--t5-length", 16, "--device", "cpu", "--threads", 2)


def pixels(number: int) -> np.ndarray:
    width, height = SIZES[number]
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels(number)).save(stream, "png")
    return stream.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A pipeline of each family, and five pictures in a folder and in a tar."""
    root = tmp_path_factory.mktemp("files")
    for family in FAMILIES:
        write_pipeline(root / family, family)
    (root / "pictures").mkdir()
    (root / "tars").mkdir()
    with tarfile.open(root / "tars" / "00000.tar", "w") as tar:
        for number, text in enumerate(TEXTS):
            for name, content in (
                (f"{number}.png", picture(number)),
                (f"{number}.txt", text.encode()),
            ):
                (root / "pictures" / name).write_bytes(content)
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return root


def encode(files, out, *more, model="sd3", data="pictures"):
    paths = ["--model", files / model, "--data", files / data, "--out", out]
    return main([str(argument) for argument in ("encode", *paths, *more)])


@torch.no_grad()
def pipelines(folder: Path, family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the official pipeline's encode_prompt makes of the prompts, in one batch."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    if family == "sd3":
        text, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, max_sequence_length=16)
        return {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
    out = pipeline.encode_prompt(list(PROMPTS), max_sequence_length=16)
    if family == "z_image":
        return {"prompt_embeds": out[0]}
    return {"prompt_embeds": out[0], "pooled_prompt_embeds": out[1]}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_and_online_conditions_are_the_pipelines(files, tmp_path, family, dtype):
    given = (*SMALL, "--text-batch", len(PROMPTS), "--dtype", dtype)
    assert encode(files, tmp_path / "cached", *given, model=family) == 0
    assert encode(files, tmp_path / "online", *given, "--text", "online", model=family) == 0
    cached, online = (PromptsStore(tmp_path / n / "prompts") for n in ("cached", "online"))
    rows = torch.arange(cached.info.count)
    config = json.loads((files / family / "transformer/config.json").read_text())
    layout = layout_for(config["_class_name"], config)
    parts = cached.take(rows)
    cond = layout.assemble(parts)
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    truth = pipelines(files / family, family, torch_dtype)
    if family == "z_image":
        for embeds, mask, row in zip(
            cond["prompt_embeds"], cond["prompt_mask"], truth["prompt_embeds"], strict=True
        ):
            assert torch.equal(embeds[mask], row.bfloat16())
    else:
        assert set(cond) == set(truth)
        for name, value in truth.items():
            assert torch.equal(cond[name], value.bfloat16()), name
    # Token ids become the same in training.
    encoder = prompt_encoder(files / family, 16, torch_dtype)
    tokens, made = online.take(rows), {}
    for stage in encoder.stages:
        made |= encoder.embed(stage.name, tokens)
    assert set(made) == set(parts)
    for name, value in made.items():
        assert torch.equal(value.to(parts[name].dtype), parts[name]), name


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_latents_are_the_pipelines_posterior(files, tmp_path, family):
    out, buckets = tmp_path / "out", parse_buckets("64x64,96x64")
    given = ("--buckets", "64x64,96x64", *SMALL[2:], "--text", "online")
    assert encode(files, out, *given, model=family) == 0
    vae = diffusers.AutoencoderKL.from_pretrained(files / family / "vae")
    for bucket, items in zip(buckets, ([0, 2, 3], [1, 4]), strict=True):
        store = LatentsStore(out / "latents" / bucket.name)
        assert store.source.tolist() == items and store.info.scale == vae.config.scaling_factor
        crops = np.stack([fit_to_bucket(pixels(item), bucket) for item in items])
        x = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        mean, std = store.take(torch.arange(len(items))).float().chunk(2, 1)
        for ours, theirs in (
            (mean, posterior.mean - vae.config.shift_factor),
            (std, posterior.std),
        ):
            assert (ours - theirs).norm() / theirs.norm() < 4e-4  # of float16
        batch = CaptionedLatents(out, [bucket.name]).get(torch.tensor([0]), torch.tensor([0]), 0)
        assert torch.equal(batch.x.mean, store.take(torch.tensor([0]))[:, :16])


def test_tars_and_a_folder_of_the_same_pictures_give_the_same(files, tmp_path):
    for data in ("pictures", "tars"):
        assert encode(files, tmp_path / data, *SMALL, data=data) == 0
    for pattern in ("moments/*.npy", "shards/*/*.npy", "prompts.jsonl", "items/*.npy"):
        ours, theirs = (
            {
                p.relative_to(tmp_path / data): p.read_bytes()
                for p in (tmp_path / data).rglob(pattern)
            }
            for data in ("pictures", "tars")
        )
        assert ours == theirs and ours
    lines = [json.loads(line) for line in (tmp_path / "tars/prompts/prompts.jsonl").open()]
    assert [line["text"] for line in lines] == PROMPTS  # "a fox" of two pictures once


def test_sizes_are_said_before_the_work(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert encode(files, out, *SMALL, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "5 images with 6 captions: 6 prompts" in printed and "free" in printed
    assert "16 x 32 bf16" in printed and "32 x 8 x 8 fp16" in printed
    assert "cut       prompts, which are too long: 1 by clip_l, 1 by clip_g, 1 by t5" in printed
    assert not out.exists()
    assert encode(files, out, *SMALL, "--shard-prompts", 4) == 0
    printed = capsys.readouterr()
    assert printed.out.index("total") < printed.out.index(f"{out}: complete in ")
    assert f"data.kind=captioned data.path={out} model.folder={files / 'sd3'}" in printed.out
    assert "t5: shard 2 of 2" in printed.err
    assert encode(files, out, *SMALL, "--shard-prompts", 4) == 0
    assert f"{out}: complete already, 5 images and 6 prompts" in capsys.readouterr().out
    assert main(["data", "verify", str(out)]) == 0 and main(["data", "info", str(out)]) == 0


def test_ranks_of_a_launcher_share_the_work(files, tmp_path, capsys, monkeypatch):
    # A run in the same process, of another test, leaves its process group.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    small = (*SMALL, "--shard-prompts", 2, "--shard-images", 2)
    for rank, words in ((0, "are left to the others"), (1, "complete in")):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert encode(files, tmp_path / "out", *small) == 0
        assert words in capsys.readouterr().out
    assert len(CaptionedLatents(tmp_path / "out")) == 5


def without(files, tmp_path, name):
    """The pipeline without a file or a folder."""
    copy = tmp_path / f"without-{name.replace('/', '-')}"
    shutil.copytree(files / "sd3", copy)
    path = copy / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return copy


def test_refusals_are_one_line(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert encode(files, out, *SMALL) == 0
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    no_captions = shutil.copytree(files / "pictures", tmp_path / "no captions")
    (no_captions / "3.txt").unlink()
    new = tmp_path / "new"
    for arguments, message in (
        (("--t5-length", 20), "text_length = 16, now it is 20 (--t5-length)"),
        (("--size", 80), "now it is ['80x80'] (--buckets or --size)"),
        (("--text", "online"), "was begun with text = 'cached', now it is 'online' (--text)"),
        (("--model", files / "flux"), "was begun with class_name = "),
        (("--data", files / "tars"), "was begun with data = "),
        (("--out", new, "--size", 72), "multiples of 16 pixels, got 72: 64, 80 would do"),
        (("--out", new, "--t5-length", 1000), "must be from 1 to 512 tokens, got 1000"),
        (("--out", new, "--size", 208), "has positions for at most 192 pixels"),
        (("--out", new, "--batch", 0), "--batch must be >= 1, got 0"),
        (("--out", files / "pictures/cache"), "is inside of --data"),
        (("--out", new, "--model", tmp_path / "no"), "no does not exist"),
        (("--out", new, "--model", files / "sd3/vae"), "holds no model_index.json"),
        (("--out", new, "--model", without(files, tmp_path, "text_encoder_3")), "text_encoder_3"),
        (("--out", new, "--model", without(files, tmp_path, "vae")), "has no folder vae"),
        (("--out", new, "--data", tmp_path / "nothing"), "--data"),
        (("--out", new, "--data", tmp_path / "empty"), "holds no images with captions"),
        (("--out", new, "--adapter", "a.py"), "--adapter must be 'file.py:Class'"),
    ):
        assert encode(files, out, *SMALL, *arguments) == 2, message
        error = capsys.readouterr().err.splitlines()
        assert message in error[-1] and error[-1].startswith("mixflow-fast: error: "), error
        assert not new.exists()
    assert encode(files, new, *SMALL, "--data", no_captions) == 2
    error = capsys.readouterr().err
    assert "3.png (no 3.txt beside it)" in error and "--on-bad skip" in error and not new.exists()
    model = without(files, tmp_path, "text_encoder_2/model.safetensors")
    assert encode(files, new, *SMALL, "--model", model) == 2
    assert "text_encoder_2" in capsys.readouterr().err and not new.exists()


def test_a_disk_that_is_too_small(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(encode_captioned, "free_bytes", lambda path: (1000, path))
    assert encode(files, tmp_path / "out", *SMALL) == 2
    error = capsys.readouterr().err
    assert "has 1.00 kB free: make room, choose another --out, or give --text online" in error


def test_a_class_of_the_users_own_gives_the_encoders(files, tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text(
        "from mixflow_fast.models.text_to_image.prompts import prompt_encoder as ours\n"
        "class Own:\n"
        "    @staticmethod\n"
        "    def prompt_encoder(folder, length, dtype, device):\n"
        "        return ours(folder, 7, dtype, device)\n"
        "class Without: pass\n"
    )
    assert encode(files, tmp_path / "out", *SMALL, "--adapter", f"{own}:Own") == 0
    assert CaptionedLatents(tmp_path / "out").info.length == 7
    assert encode(files, tmp_path / "no", *SMALL, "--adapter", f"{own}:Without") == 2
    assert "has no prompt_encoder(folder, length, dtype, device)" in capsys.readouterr().err


SLOW = """
import sys, time
from mixflow_fast.cli import main
from mixflow_fast.data.preparation import encode_prompts
inner = encode_prompts.PromptsPlan.made
def made(self, stage, tokens):
    print("at", stage.name, file=sys.stderr, flush=True)
    time.sleep(0.0 if stage.name == "clip_l" else 60.0)
    return inner(self, stage, tokens)
encode_prompts.PromptsPlan.made = made
sys.exit(main())
"""


def test_a_stop_says_how_it_goes_on(files, tmp_path, capsys):
    out = tmp_path / "out"
    paths = ["--model", files / "sd3", "--data", files / "pictures", "--out", out]
    arguments = [str(a) for a in ("encode", *paths, *SMALL, "--text-batch", 6)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("at clip_g"):
            break
    while not (out / "prompts/done/00000.done.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, "".join(lines) + error
    assert "interrupted; the same command goes on from here, 1 of 4 shards are done" in error
    assert encode(files, out, *SMALL, "--text-batch", 6) == 0
    assert "done      1 of 4 shards" in capsys.readouterr().out


KILLED = """
import os, signal, sys
from mixflow_fast.cli import main
from mixflow_fast.data.preparation import encode_buckets, encode_captioned, encode_prompts

import diffusers, transformers  # once for all that are killed

*arguments, out = sys.argv[1:]
def die_at(owner, name, when):
    inner, calls = getattr(owner, name), []
    def patched(*given, **named):
        calls.append(given)
        if when(calls): os.kill(os.getpid(), signal.SIGKILL)
        return inner(*given, **named)
    setattr(owner, name, patched)

def second_of(stage):
    def when(calls):
        return sum(given[1].name == stage for given in calls) == 2
    return lambda: die_at(encode_prompts.PromptsPlan, "made", when)

PHASES = {stage: second_of(stage) for stage in ("clip_l", "clip_g", "t5")}
PHASES["autoencoder"] = lambda: die_at(encode_buckets, "start_encoding", lambda c: len(c) == 2)
PHASES["lists"] = lambda: die_at(encode_captioned, "write_manifest", lambda c: len(c) == 2)
for name, prepare in PHASES.items():
    pid = os.fork()
    if not pid:
        prepare()
        os._exit(main([*arguments, "--out", f"{out}/{name}"]))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, name
"""


def test_killed_in_each_phase_it_ends_with_the_same_bytes(files, tmp_path, capsys):
    small = [*SMALL, "--text-batch", 2, "--batch", 2, "--shard-prompts", 4, "--shard-images", 3]
    small = list(map(str, small))
    assert encode(files, tmp_path / "whole", *small) == 0
    paths = ["--model", str(files / "sd3"), "--data", str(files / "pictures")]
    (tmp_path / "killed").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "encode", *paths, *small, str(tmp_path / "killed")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for out in sorted((tmp_path / "killed").iterdir()):
        assert not (out / "manifest.json").exists()
        found[out.name] = how_far(out)[0]
        assert encode(files, out, *small) == 0
        assert contents(out) == contents(tmp_path / "whole"), out.name
    assert set(found) == {"clip_l", "clip_g", "t5", "autoencoder", "lists"}
    # Two shards of each encoder, and two of the latents.
    assert found["clip_l"] == 0 and found["clip_g"] in (1, 2) and found["t5"] in (3, 4)
    assert found["autoencoder"] == 6 and found["lists"] == 8


def contents(root: Path) -> dict[str, bytes]:
    """The bytes of all files."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
