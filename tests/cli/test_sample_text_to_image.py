"""`mixflow-fast sample --prompts`: the official pipeline's pictures, files and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, ZImagePipeline
from PIL import Image

from mixflow_fast.cli.sample_text_to_image import GRIDS, parse_size, read_prompts
from mixflow_fast.distributed import process_group
from mixflow_fast.models import save_weights
from mixflow_fast.models.text_to_image.flux import pack
from mixflow_fast.models.weights.metadata import Metadata
from mixflow_fast.sampling.grids import SigmaGrid
from mixflow_fast.sampling.text_to_image import noise_of_ids
from tests.support.command_line import run
from tests.support.text_to_image import write_pipeline

PROMPTS = ("a fox in the snow", "two cups")
OPTIONS = ("--steps", 3, "--size", "64x48", "--t5-length", 16, "--seed", 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model") / "tiny-sd35")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def official(folder: Path, prompts: tuple[str, ...], scale: float) -> list[np.ndarray]:
    """What the pipeline itself makes of the same noise; its text encoders in bf16, as ours are."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        getattr(pipeline, name).to(torch.bfloat16)
    told = pipeline.encode_prompt(
        list(prompts), None, None, negative_prompt="", max_sequence_length=16
    )
    names = ("prompt_embeds", "negative_prompt_embeds")
    names += ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    images = pipeline(
        **{name: value.float() for name, value in zip(names, told, strict=True)},
        latents=noise_of_ids(5, torch.arange(len(prompts)), (16, 6, 8)),
        num_inference_steps=3,
        guidance_scale=scale,
        height=48,
        width=64,
    ).images
    return [np.asarray(image).astype(int) for image in images]


def test_pictures_are_the_pipeline_s(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "foxes"
    command = ("sample", folder, "--out", out, "--prompts", *PROMPTS, *OPTIONS)
    code, said, err = run(*command, capsys=capsys)
    assert code == 0 and not err
    assert "3 Euler steps on the diffusers grid of shift 3, guidance 4.5, text of 16" in said
    theirs = official(folder, PROMPTS, 4.5)
    for i, expected in enumerate(theirs):
        # Of a batch of other rows the sums have another order: a grey level at most.
        assert np.abs(pixels(out / f"{i:05d}.png") - expected).max() <= 1
    assert np.abs(theirs[0] - theirs[1]).max() > 10
    settings = json.loads((out / "settings.json").read_text())
    assert settings["prompts"] == list(PROMPTS) and settings["grid"] == "diffusers"
    assert (settings["size"], settings["cfg_scale"], settings["weights"]) == (
        *("64x48", 4.5, "pipeline"),
    )
    # The same command goes on after a stop, and makes the same picture.
    before = (out / "00001.png").read_bytes()
    (out / "00001.png").unlink()
    code, said, _ = run(*command, capsys=capsys)
    assert code == 0 and "pictures 2, made now 1" in said
    assert np.abs(pixels(out / "00001.png") - theirs[1]).max() <= 1
    assert len(before) > 100
    code, _, err = run(*command[:-1], 6, capsys=capsys)
    assert code == 2 and "pictures of another seed (5)" in err


def test_flux_as_its_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without guidance, on linspace(1, 1/N, N) with the shift of the size, all by default."""
    folder, out = write_pipeline(tmp_path / "flux", "flux"), tmp_path / "out"
    command = ("sample", folder, "--out", out, "--prompts", PROMPTS[0], *OPTIONS)
    code, said, err = run(*command, capsys=capsys)
    assert code == 0, err
    assert "on the linear grid of shift 1.582, guidance 1, text of 16 tokens" in said
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.text_encoder.to(torch.bfloat16), pipeline.text_encoder_2.to(torch.bfloat16)
    text, pooled, _ = pipeline.encode_prompt(PROMPTS[0], None, max_sequence_length=16)
    image = pipeline(
        prompt_embeds=text.float(),
        pooled_prompt_embeds=pooled.float(),
        latents=pack(noise_of_ids(5, torch.arange(1), (16, 6, 8))),
        **{"num_inference_steps": 3, "height": 48, "width": 64},
    ).images[0]
    assert np.abs(pixels(out / "00000.png") - np.asarray(image).astype(int)).max() <= 1


def test_z_image_as_its_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = write_pipeline(tmp_path / "z", "z_image"), tmp_path / "out"
    command = ("sample", folder, "--out", out, "--prompts", PROMPTS[0], *OPTIONS)
    code, said, err = run(*command, "--cfg-scale", 1, capsys=capsys)
    assert code == 0, err
    assert "on the linear grid of shift 3, guidance 1, text of 16 tokens" in said
    pipeline = ZImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.text_encoder.to(torch.bfloat16)
    told, _ = pipeline.encode_prompt(
        PROMPTS[0], do_classifier_free_guidance=False, max_sequence_length=16
    )
    image = pipeline(
        prompt_embeds=[value.float() for value in told],
        latents=noise_of_ids(5, torch.arange(1), (16, 6, 8)),
        **{"num_inference_steps": 3, "guidance_scale": 0.0, "height": 48, "width": 64},
    ).images[0]
    assert np.abs(pixels(out / "00000.png") - np.asarray(image).astype(int)).max() <= 1


def test_without_guidance_and_on_the_other_grid(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("sample", folder, "--prompts", PROMPTS[0], *OPTIONS)
    assert run(*base, "--cfg-scale", 1, "--out", tmp_path / "a", capsys=capsys)[0] == 0
    (expected,) = official(folder, PROMPTS[:1], 1.0)
    assert np.abs(pixels(tmp_path / "a" / "00000.png") - expected).max() <= 1
    assert run(*base, "--grid", "linear", "--out", tmp_path / "b", capsys=capsys)[0] == 0
    assert run(*base, "--negative", "blurred", "--out", tmp_path / "c", capsys=capsys)[0] == 0
    shown = [pixels(tmp_path / name / "00000.png") for name in "abc"]
    assert all((a != b).any() for a, b in ((shown[0], shown[1]), (shown[1], shown[2])))


def test_a_run_and_geneval_s_layout(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's EMA with the text encoders of the folder that it names; a folder for each prompt."""
    network = StableDiffusion3Pipeline.from_pretrained(folder).transformer
    state = {f"transformer.{name}": t for name, t in network.state_dict().items()}
    online = {name: torch.zeros_like(t) for name, t in state.items()}
    config = {name: v for name, v in network.config.items() if not name.startswith("_")}
    metadata = Metadata(
        kwargs={
            **{"class": "SD3Transformer2DModel", "transformer": config},
            **{"adapter": None, "latents": {"shift": 0.0609, "scale": 1.5305}},
        },
        clock="noise_at_1",
        steps=7,
        config=json.dumps({"model": {"folder": str(folder)}, "objective": {"shift": 3.0}}),
    )
    save_weights(tmp_path / "run" / "weights.pt", online, state, metadata.to_record())
    code, _, err = run("curvature", tmp_path / "run", capsys=capsys)
    assert code == 2 and "text-to-image network, which curvature does not measure" in err
    pages = ("--out", tmp_path / "page.html")
    for command in (
        ("slowflow", tmp_path / "run"),
        ("compare", tmp_path / "run", tmp_path / "run"),
    ):
        code, _, err = run(*command, *pages, capsys=capsys)
        assert code == 2 and f"which {command[0]} does not measure" in err, err
    records = [{"prompt": text, "tag": "single_object"} for text in PROMPTS]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    out = tmp_path / "geneval"
    command = ("sample", tmp_path / "run", "--out", out, "--prompts", file, *OPTIONS)
    code, said, err = run(
        *command, "--layout", "geneval", "--per-prompt", 2, "--batch-size", 3, capsys=capsys
    )
    assert code == 0, err
    assert "2 prompts, 2 pictures of each, 64x48" in said and "note:" not in said
    assert "pictures 4, made now 4" in said
    short = ("--prompts", "a fox", "--steps", 1, "--size", "32x32", "--out", tmp_path / "short")
    code, said, _ = run("sample", tmp_path / "run", *short, capsys=capsys)
    assert code == 0 and "give --t5-length if it was not 256" in said
    for i, record in enumerate(records):
        assert json.loads((out / f"{i:05d}" / "metadata.jsonl").read_text()) == record
        own = [pixels(out / f"{i:05d}" / "samples" / f"{k:05d}.png") for k in range(2)]
        assert (own[0] != own[1]).any()
    code, _, err = run("sample", tmp_path / "run", "--out", tmp_path / "x.npz", capsys=capsys)
    assert code == 2 and "give --prompts" in err
    settings = json.loads((out / "settings.json").read_text())
    assert settings["step"] == 7 and settings["weights"] == "ema"
    # Picture 0 has the noise of the id 0, as without several of each.
    (expected,) = official(folder, PROMPTS[:1], 4.5)
    first = pixels(out / "00000" / "samples" / "00000.png")
    assert np.abs(first - expected).max() <= 1


def test_prompts_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    (tmp_path / "b.jsonl").write_text('{"text": "three", "id": 1}\n')
    given = ["zero", str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    found = read_prompts(given)
    assert [prompt.text for prompt in found] == ["zero", "one", "two", "three"]
    assert found[3].record == {"text": "three", "id": 1}
    with pytest.raises(ValueError, match="there is no such file"):
        read_prompts([str(tmp_path / "c.txt")])
    (tmp_path / "b.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match="line 1 must be a JSON object with one of prompt, text"):
        read_prompts(given)
    assert parse_size("1152x896") == (1152, 896)
    for wrong in ("512", "512x", "500x512", "0x16"):
        with pytest.raises(ValueError, match="multiples of 16"):
            parse_size(wrong)
    assert get_args(SigmaGrid) == GRIDS


def test_refusals(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ("sample", folder, "--prompts", "a fox", "--out", tmp_path / "x")
    for options, words in (
        (("--label", 1), "--label has no meaning with --prompts"),
        (("--evaluate",), "--evaluate belongs to sets of pictures by class"),
        (("-n", 4), "--num has no meaning with --prompts: --per-prompt N makes"),
        (("--size", "208x64"), "has positions for at most 192 pixels a side"),
        (("--steps", 0), "--steps must be >= 1"),
        (("--size", "100x100"), "multiples of 16"),
        (("--out", tmp_path / "x.png"), "must be a folder with --prompts"),
        (("--force",), "never replaced"),
        (("--t5-length", 9999), "from 1 to 512 tokens"),
    ):
        code, _, err = run(*base, *options, capsys=capsys)
        assert code == 2 and words in err, (options, err)
    code, _, err = run("sample", folder, "--grid", "linear", "--out", "x.png", capsys=capsys)
    assert code == 2 and "--grid belongs to --prompts" in err
    assert not (tmp_path / "x").exists()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("")
    code, _, err = run(*base, capsys=capsys)
    assert code == 2 and "holds other things" in err


def test_ranks_share_the_prompts(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each makes its own, in any order; the pictures are those of one process."""
    base = ("sample", folder, "--prompts", *PROMPTS, "a bear", *OPTIONS, "--batch-size", 1)
    assert run(*base, "--out", tmp_path / "one", capsys=capsys)[0] == 0
    # Not by the launcher's variables: an earlier test may have made a group of one.
    monkeypatch.setattr(process_group, "world_size", lambda: 2)
    for rank, made in ((1, ["00001.png"]), (0, ["00000.png", "00001.png", "00002.png"])):
        monkeypatch.setattr(process_group, "rank", lambda rank=rank: rank)
        code, _, err = run(*base, "--out", tmp_path / "two", capsys=capsys)
        assert code == 0, err
        assert sorted(path.name for path in (tmp_path / "two").glob("*.png")) == made
    for name in ("00000.png", "00001.png", "00002.png"):
        assert np.abs(pixels(tmp_path / "one" / name) - pixels(tmp_path / "two" / name)).max() <= 1
