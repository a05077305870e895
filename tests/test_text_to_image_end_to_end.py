"""Pictures with captions to an exported model, through the commands and the official pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor

from mixflow_fast.reports.text_previews import read_settings
from mixflow_fast.sampling.text_to_image import noise_of_ids
from tests.support.command_line import run
from tests.support.runs import assert_same_bits
from tests.support.text_to_image import write_pipeline

CAPTIONS = ["a fox", "a red fox\na fox in the snow", "two cups", "a heron", "a fox", "a blue door"]
# Row 0 is the empty prompt; the others in the order of their first appearance.
PROMPTS = ["", "a fox", "a red fox", "a fox in the snow", "two cups", "a heron", "a blue door"]
SIZES = [(64, 64), (80, 72), (96, 64), (64, 64), (100, 60), (70, 70)]
LENGTH = 16
# What makes the recipe small: 20 steps of 4 images, and pictures at both ends.
TINY = [
    *("train.global_batch_size=4", "train.microbatch_size=4", "train.images=80"),
    *("train.save_every=0", "train.log_every=5", "train.device=cpu", "data.workers=0"),
    *("optim.warmup_images=8", "optim.lr=1e-3"),
]
PREVIEWS = [
    *("train.preview_every=20", "train.previews=4", "train.preview_steps=3"),
    "train.preview_cfg=4",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline, six pictures of two shapes with captions, and the cache made of them."""
    root = tmp_path_factory.mktemp("text_to_image")
    write_pipeline(root / "sd35")
    (root / "pictures").mkdir()
    for number, ((width, height), words) in enumerate(zip(SIZES, CAPTIONS, strict=True)):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(root / "pictures" / f"{number}.png")
        (root / "pictures" / f"{number}.txt").write_text(words)
    return root


@pytest.fixture(scope="module")
def cache(root: Path) -> Path:
    from mixflow_fast.cli.main import main

    paths = ["--model", root / "sd35", "--data", root / "pictures", "--out", root / "cache"]
    more = ["--buckets", "64x64,96x64", "--t5-length", LENGTH, "--text-batch", len(PROMPTS)]
    command = ["encode", *paths, *more, "--device", "cpu", "--threads", 1]
    assert main([str(argument) for argument in command]) == 0
    return root / "cache"


def settings(root: Path, out: Path, *more: str) -> list[str]:
    return [
        *(f"model.folder={root / 'sd35'}", f"data.path={root / 'cache'}", f"out={out}"),
        *(*TINY, *more),
    ]


@torch.no_grad()
def prompts_of_the_pipeline(root: Path) -> dict[str, Tensor]:
    """What the official pipeline's encode_prompt makes of all prompts in bf16, in one batch."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(root / "sd35", torch_dtype=torch.bfloat16)
    text, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, max_sequence_length=LENGTH)
    return {"prompt_embeds": text.float(), "pooled_prompt_embeds": pooled.float()}


def latents_of(pipeline: StableDiffusion3Pipeline, cond: dict[str, Tensor]) -> Tensor:
    """What it makes of the previews' prompts and noise."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        **{name: value[1:5] for name, value in cond.items()},
        **{f"negative_{n}": v[:1].expand(4, *v.shape[1:]) for n, v in cond.items()},
        latents=noise_of_ids(0, torch.arange(4), (16, 8, 12)),
        **{"guidance_scale": 4.0, "num_inference_steps": 3, "height": 64, "width": 96},
        output_type="latent",
    ).images


def preview(out: Path, step: int) -> np.ndarray:
    """The four pictures of a preview, with two pixels between them."""
    whole = np.asarray(Image.open(out / "previews" / f"step_{step:08d}.png"))
    assert whole.shape == (2 * 64 + 2, 2 * 96 + 2, 3)
    places = [(row, left) for row in (0, 66) for left in (0, 98)]
    return np.stack([whole[row : row + 64, left : left + 96] for row, left in places])


def loaded(folder: Path) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)


def test_captions_to_an_exported_model(
    root: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe, at toy size and in float32, where previews have the pipeline's bits."""
    more = ["train.precision=fp32", "train.keep_last=1", *PREVIEWS]
    # Stopped half-way, and gone on: the same weights as in one go.
    for out, lengths in ((tmp_path / "run", (40, 80)), (tmp_path / "whole", (80,))):
        for images in lengths:
            given = settings(root, out, *more, f"train.images={images}")
            code, said, err = run("train", "sd35-medium", *given, capsys=capsys)
            assert code == 0, said + err
    out = tmp_path / "run"
    assert_same_bits(out, tmp_path / "whole")

    command = ("export", out, "--to", "diffusers", "--out", tmp_path / "trained", "--dtype", "fp32")
    code, said, err = run(*command, capsys=capsys)
    assert code == 0, err
    cond = prompts_of_the_pipeline(root)
    shown = json.loads((out / "previews" / "settings.json").read_text())
    assert shown["prompts"] == PROMPTS[1:5]
    decoder = read_settings(out / "previews").load_decoder()
    for folder, step in ((root / "sd35", 0), (tmp_path / "trained", 20)):
        pictures = decoder(latents_of(loaded(folder), cond)).movedim(1, -1).numpy()
        assert np.array_equal(preview(out, step), pictures)
    assert not np.array_equal(preview(out, 0), preview(out, 20))
    code, said, _ = run("inspect", tmp_path / "trained", capsys=capsys)
    assert code == 0 and "SD3" in said


# (recipe, ZeRO stage, ranks, precision)
MATRIX = [
    (recipe, stage, ranks, precision)
    for recipe in ("sd35-medium",)
    for stage in (2, 3)
    for ranks in (1, 2)
    for precision in ("bf16", "fp32")
]


@pytest.mark.long
@pytest.mark.parametrize(("recipe", "stage", "ranks", "precision"), MATRIX)
def test_a_stopped_run_goes_on_to_the_bit_and_is_exported(
    recipe: str,
    stage: int,
    ranks: int,
    precision: str,
    root: Path,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """20 steps, buckets on, prompts and encoders dropped: 0 bits differ, and the pipeline loads
    what was trained."""
    more = ["cond.drop_each=[t5:0.2, clip_l:0.2]", f"train.precision={precision}"]
    given = settings(root, tmp_path / "both", *more, f"train.zero_stage={stage}")
    # Two micro-batches on a rank.
    given += [f"train.microbatch_size={2 // ranks}"]
    command = ("verify-resume", recipe, *given, "--steps", 20, "--ranks", ranks)
    code, said, err = run(*command, "--out", tmp_path / "both", capsys=capsys)
    assert code == 0, said + err
    assert "the same bits" in said
    weights = torch.load(tmp_path / "both" / "whole" / "weights.pt", weights_only=True)["ema"]
    out = ("--out", tmp_path / "trained", "--dtype", "fp32")
    code, _, err = run("export", tmp_path / "both/whole", "--to", "diffusers", *out, capsys=capsys)
    assert code == 0, err
    state = loaded(tmp_path / "trained").transformer.state_dict()
    assert {f"transformer.{name}" for name in state} == weights.keys()
    assert all(torch.equal(state[n.removeprefix("transformer.")], t) for n, t in weights.items())
