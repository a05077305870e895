"""docs/text_to_image.md is true: its blocks are executed, its numbers held."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from mixflow_fast import MixFlow
from mixflow_fast.flow import NOISE_AT_1, resolution_shift
from mixflow_fast.models.text_to_image import SD3Adapter, adapter_for
from mixflow_fast.sampling import sigma_grid
from tests.support.text_to_image import numbers, sd3, sd3_pipeline, text

DOC = (Path(__file__).parents[3] / "docs" / "text_to_image.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^## ([^\n]*)\n(?:(?!^## ).)*?^```python\n(.*?)^```$", DOC, re.M | re.S))


def test_every_block_is_executed() -> None:
    assert list(BLOCKS) == ["A training loop", "Sampling", "Your own class"]
    assert DOC.count("```") == 2 * len(BLOCKS)
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
