"""What the network is told: labels as they are; prompts, some encoders of them left out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mixflow_fast.data import Batch
from mixflow_fast.kernels.philox import Stream, uniform
from mixflow_fast.models.text_to_image.prompts import layout_for, prompt_encoder
from mixflow_fast.training.conditions import Conditions, Prompts
from tests.support.text_to_image import SD3, numbers, write_pipeline

LAYOUT = layout_for("SD3Transformer2DModel", SD3)
SHAPES = {"clip_l": (5, 8), "clip_g": (5, 12), "t5": (7, 32), "pooled_l": (24,), "pooled_g": (40,)}


def batch(size: int, first: int = 0) -> Batch:
    """The examples at positions first .. first + size - 1."""
    positions = torch.arange(first, first + size)
    cond = {
        name: torch.stack([numbers(*shape, seed=int(p)) for p in positions])
        for name, shape in SHAPES.items()
    }
    return Batch(None, torch.zeros(size, dtype=torch.int64), positions, cond=cond)


def test_labels_are_told_as_they_are() -> None:
    made = dataclasses.replace(batch(3), y=torch.tensor([4, 1, 9]), cond=None)
    conditions = Conditions()
    assert conditions(made) is made.y and conditions.undropped() is conditions


def test_prompts_become_what_the_pipeline_gives() -> None:
    made = batch(2)
    cond = Prompts(LAYOUT, {}, seed=0)(made)
    parts = made.cond
    assert cond.keys() == {"prompt_embeds", "pooled_prompt_embeds"}
    assert cond["prompt_embeds"].shape == (2, 12, 32)
    assert torch.equal(cond["prompt_embeds"][:, :5, 8:20], parts["clip_g"])
    assert not cond["prompt_embeds"][:, :5, 20:].any()
    assert torch.equal(cond["prompt_embeds"][:, 5:], parts["t5"])
    assert torch.equal(cond["pooled_prompt_embeds"][:, 24:], parts["pooled_g"])


def test_encoders_are_dropped_by_seed_and_position() -> None:
    """The same ones in whatever micro-batch an example comes, each with its own probability."""
    size, drops = 256, {"clip_l": 0.1, "t5": 0.4}
    prompts, whole = Prompts(LAYOUT, drops, seed=3), batch(size, first=1000)
    told = prompts(whole)
    parts = [prompts(batch(64, first=1000 + start)) for start in range(0, size, 64)]
    for key, value in told.items():
        assert torch.equal(value, torch.cat([part[key] for part in parts]))
    clip_l = told["prompt_embeds"][:, :5, :8].flatten(1).any(1)
    pooled_l = told["pooled_prompt_embeds"][:, :24].any(1)
    clip_g = told["prompt_embeds"][:, :5, 8:20].flatten(1).any(1)
    t5 = told["prompt_embeds"][:, 5:].flatten(1).any(1)
    assert torch.equal(clip_l, pooled_l) and clip_g.all()
    draws = uniform(3, Stream.ENCODER_DROP, whole.positions, 3)
    assert torch.equal(~clip_l, draws[:, 0] < 0.1) and torch.equal(~t5, draws[:, 2] < 0.4)
    # Three standard deviations of a count of 256.
    assert abs((~clip_l).sum().item() - 25.6) < 15 and abs((~t5).sum().item() - 102.4) < 24
    # Independent of each other: both at 0.04.
    assert abs((~clip_l & ~t5).sum().item() - 10.2) < 10
    other = Prompts(LAYOUT, drops, seed=4)(whole)
    assert not torch.equal(other["prompt_embeds"], told["prompt_embeds"])
    # The batch itself is left alone, and validation drops nothing.
    assert whole.cond["t5"].flatten(1).any(1).all()
    assert prompts.undropped()(whole)["prompt_embeds"][:, 5:].flatten(1).any(1).all()


def test_token_ids_are_embedded_as_a_cache_holds_them(tmp_path) -> None:
    """encode.text=online: the same condition as of embeddings made before, in the same batch."""
    folder = write_pipeline(tmp_path / "model")
    encoder = prompt_encoder(folder, 8)
    texts = ["a fox", "two foxes and a hare", ""]
    made = batch(3)
    online = dataclasses.replace(made, cond=encoder.tokens(texts))
    cached = dataclasses.replace(made, cond=encoder.encode(texts))
    layout = encoder.layout
    told = Prompts(layout, {"t5": 0.5}, 0, encoder)(online)
    expected = Prompts(layout, {"t5": 0.5}, 0)(cached)
    assert told.keys() == expected.keys()
    assert all(torch.equal(told[key], expected[key]) for key in told)
    assert not any(value.requires_grad for value in told.values())


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(ValueError, match="names the text encoder 't6', this network has clip_l, "):
        Prompts(LAYOUT, {"t6": 0.1}, seed=0)
    with pytest.raises(ValueError, match="needs prompts, which these data do not give"):
        Prompts(LAYOUT, {}, seed=0)(dataclasses.replace(batch(1), cond=None))
