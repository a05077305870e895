"""docs/text_to_image.md is true: its blocks are executed, its numbers held."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image

from mixflow_fast import MixFlow
from mixflow_fast.cli.main import main
from mixflow_fast.config.schema import OptimConfig, TrainConfig
from mixflow_fast.flow import NOISE_AT_1, resolution_shift
from mixflow_fast.models.text_to_image import SD3Adapter, adapter_for
from mixflow_fast.sampling import sigma_grid
from mixflow_fast.training.memory import state_bytes
from tests.support.released_sd3 import LARGE, MEDIUM, on_meta
from tests.support.text_to_image import numbers, sd3, sd3_pipeline, text, write_pipeline

DOC = (Path(__file__).parents[3] / "docs" / "text_to_image.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^## ([^\n]*)\n(?:(?!^## ).)*?^```python\n(.*?)^```$", DOC, re.M | re.S))


def test_every_block_is_executed() -> None:
    assert list(BLOCKS) == ["A training loop", "Sampling", "Your own class"]
    assert DOC.count("```") == 2 * len(BLOCKS) + 2  # and the commands
    assert len(BLOCKS["A training loop"].strip().splitlines()) <= 30


def test_training_loop(tmp_path: Path) -> None:
    """Its losses are those of the plain formulas, and what it writes is what it trained."""
    network = sd3()
    network.save_pretrained(tmp_path / "folder")
    batches = [
        (numbers(2, 16, 8, 8, seed=s), numbers(2, 16, 8, 8, seed=s + 1).exp(), *text(2, s).values())
        for s in (10, 20)
    ]
    names = {"folder": tmp_path / "folder", "trained": tmp_path / "trained", "loader": batches}
    exec(BLOCKS["A training loop"], names)
    assert names["first"] == 4 and names["loss"].isfinite()
    written = SD3Transformer2DModel.from_pretrained(tmp_path / "trained").state_dict()
    before, after = network.state_dict(), names["adapter"].network.state_dict()
    assert all(torch.equal(written[key], value) for key, value in after.items())
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) > 100

    # The first batch again, in plain lines: (mean + std n - shift) scale, and the squared error.
    mix, latents = MixFlow(gamma=0.8, clock=NOISE_AT_1, shift=3.0, seed=1), SD3Adapter.LATENTS
    mean, std, prompt, pooled = batches[0]
    it = mix.prepare(latents.moments(mean, std), ids=torch.arange(2))
    x1, m = it.x1, it.slowed_t.view(-1, 1, 1, 1)
    torch.testing.assert_close(it.x, (1 - m) * x1 + m * it.x0())
    cond = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        pred = adapter_for(network).velocity(it.x, it.t, cond)
    plain = ((pred.float() - (it.x0() - x1)) ** 2).mean()
    torch.testing.assert_close(mix.loss(pred, it), plain, rtol=1e-6, atol=0)


def test_sampling_block() -> None:
    network, cond, negative = sd3(), text(2), text(2, seed=30)
    names = {"adapter": adapter_for(network), "noise": numbers(2, 16, 8, 6, seed=3)}
    names |= {"cond": cond, "negative": negative}
    exec(BLOCKS["Sampling"], names)
    assert names["z"].shape == (2, 16, 8, 6) and names["z"].isfinite().all()
    levels = "1, .900, .751, .503, .0089, 0", "1, .923, .818, .667, .429, 0"
    for grid, text_ in zip(("diffusers", "linear"), levels, strict=True):
        assert text_ in DOC
        said = torch.tensor([float(number) for number in text_.split(",")])
        torch.testing.assert_close(sigma_grid(5, 3.0, grid), said, atol=5e-4, rtol=0)


def test_own_class_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, printed = sd3(), []
    network.save_pretrained(tmp_path / "folder")
    (tmp_path / "my_file.py").write_text(
        "from mixflow_fast.models.text_to_image import SD3Adapter\n\n\n"
        "class MyAdapter(SD3Adapter):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    names = {"folder": tmp_path / "folder", "pipeline": sd3_pipeline(network), "cond": text(2)}
    names |= {"noise": numbers(2, 16, 8, 6), "height": 16, "width": 12, "print": printed.append}
    exec(BLOCKS["Your own class"], names)
    assert printed == [0.0]
    wrong = names["mine"]
    wrong.velocity = lambda x, t, cond: -SD3Adapter.velocity(wrong, x, t, cond)
    with pytest.raises(ValueError, match="with the other sign it does fit"):
        names["check_against_pipeline"](wrong, names["steps"], names["cond"])


def test_numbers_of_the_text() -> None:
    assert "1.65 at\n256 tokens and 3.16 at 4096" in DOC
    assert resolution_shift(256) == pytest.approx(math.exp(0.5)) == pytest.approx(1.65, abs=5e-3)
    assert resolution_shift(4096) == pytest.approx(3.16, abs=5e-3)


# What makes the commands small; the rest is as the page says.
TOY = [
    *("train.images=4", "train.global_batch_size=2", "train.microbatch_size=2", "train.device=cpu"),
    "optim.warmup_images=2",
]
SMALLER = {"512": "64", "154": "16", "train.preview_every=500": "train.preview_every=1"}


def test_commands_can_be_pasted_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pipeline(tmp_path / "stable-diffusion-3.5-medium")
    (tmp_path / "pictures").mkdir()
    for number, caption in enumerate(["a fox", "a heron", "two cups"]):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 72, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text(caption)
    (block,) = re.findall(r"^```sh\n(.*?)^```", DOC, re.M | re.S)
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    ran = []
    for program, *arguments in filter(None, lines):
        assert program == "mixflow-fast"
        arguments = [SMALLER.get(argument, argument) for argument in arguments]
        code = main(arguments + TOY * (arguments[0] == "train"))
        assert code == 0, (arguments, capsys.readouterr())
        ran.append(arguments[0])
    assert ran == ["encode", *["train"] * 5, "sample", "export", "export", "inspect"]
    said = capsys.readouterr()
    assert "activations: " in said.out + said.err
    made = ("stable-diffusion-3.5-medium-mixflow/model_index.json", "mixflow.safetensors")
    made += ("runs/t2i/previews/step_00000002.png", "pictures_of_t2i/00000.png")
    assert all((tmp_path / name).is_file() for name in made)


def test_sizes_of_a_cache() -> None:
    """What the released encoders and the autoencoder give, in bf16 and float16."""
    t5 = [4096 * length * 2 for length in (77, 154, 256)]
    clips, pooled = 77 * (768 + 1280) * 2, (768 + 1280) * 2
    pictures = [2 * 16 * (side // 8) ** 2 * 2 for side in (512, 1024)]
    for sizes in (t5, [clips], [pooled], pictures):
        assert f"| {', '.join(f'{size:,}' for size in sizes)} |" in DOC
    assert f"| {', '.join(f'{size / 1e6:.2f}' for size in t5)} TB |" in DOC


def test_the_table_of_memory() -> None:
    """States by the formula of --dry-run; the activations are those of its tests."""
    optim, found = OptimConfig(ema_decays=(0.999,)), []
    for config in (MEDIUM, LARGE):
        net = on_meta(config)
        ways = ((1, 2), (2, 2), (4, 2), (8, 2), (8, 3))
        sizes = [state_bytes(net, TrainConfig(precision="bf16"), optim, *way) / 1e9 for way in ways]
        found.append(" | ".join(f"{s:.0f}" if s >= 9.9 else f"{s:.1f}" for s in sizes))
    assert f"| 3.5 medium | {found[0]} |" in DOC and f"| 3.5 large | {found[1]} |" in DOC
    assert "3.0 at 512 pixels and 10.8 at 1024" in DOC and "0.10, 0.33, 0.23 and 0.80" in DOC
