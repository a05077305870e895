"""Parts of prompts against the official pipelines' `encode_prompt`, at every length and dtype."""

from __future__ import annotations

import contextlib
import json
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3ForCausalLM

from mixflow_fast.models.text_to_image import adapter_for, check_against_pipeline, record_steps
from mixflow_fast.models.text_to_image.flux import unpack
from mixflow_fast.models.text_to_image.prompts import (
    Part,
    PromptEncoder,
    layout_for,
    prompt_encoder,
    text_encoders,
)
from tests.support import tiny_text
from tests.support.text_to_image import FLUX, SD3, write_pipeline

FAMILIES = ("sd3", "flux", "z_image")
LONG = "snow on the fox and " * 60
PROMPTS = ("a red fox in the snow", "", "Ünïcödé 狐 🦊\n\tÅ", LONG, "a red fox in the snow")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole pipeline of each family, and SD3 without its T5."""
    root = tmp_path_factory.mktemp("pipelines")
    written = {family: write_pipeline(root / family, family) for family in FAMILIES}
    return written | {"sd3 without t5": write_pipeline(root / "no_t5", t5=False)}


def official(folder: Path, dtype: torch.dtype, **more: object) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **more)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def encode_prompt(pipeline: DiffusionPipeline, prompts: list[str], length: int) -> dict:
    """What the pipeline makes of prompts, by the names of a condition; lists for Z-Image."""
    name = type(pipeline).__name__
    prompts = list(prompts)  # Z-Image's pipeline writes into it
    if name == "StableDiffusion3Pipeline":
        text, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, max_sequence_length=length)
        return {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
    out = pipeline.encode_prompt(prompts, max_sequence_length=length)
    if name == "ZImagePipeline":
        return {"prompt_embeds": out[0]}
    return {"prompt_embeds": out[0], "pooled_prompt_embeds": out[1]}


def assert_same(cond: Mapping[str, Tensor], truth: Mapping[str, Tensor | list[Tensor]]) -> None:
    if "prompt_mask" in cond:
        assert cond["prompt_mask"].dtype == torch.bool
        pairs = zip(cond["prompt_embeds"], cond["prompt_mask"], strict=True)
        for (embeds, mask), caption in zip(pairs, truth["prompt_embeds"], strict=True):
            assert torch.equal(embeds[mask], caption)
            assert not embeds[~mask].any()
        return
    assert set(cond) == set(truth)
    for name, value in truth.items():
        assert cond[name].dtype == value.dtype and torch.equal(cond[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_condition_is_the_pipelines_to_the_bit(folders, family, dtype):
    pipeline = official(folders[family], dtype)
    for length in (77, 154, 256):
        encoder = prompt_encoder(folders[family], length, dtype)
        parts = encoder.encode(PROMPTS)
        assert {name: Part(tuple(p.shape[1:]), p.dtype) for name, p in parts.items()} == (
            encoder.parts
        )
        assert_same(encoder.layout.assemble(parts), encode_prompt(pipeline, PROMPTS, length))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_folder_without_t5_has_its_zeros(folders, dtype):
    folder = folders["sd3 without t5"]
    pipeline = official(folder, dtype, text_encoder_3=None, tokenizer_3=None)
    encoder = prompt_encoder(folder, 154, dtype)
    parts = encoder.encode(PROMPTS)
    assert parts["t5"].shape == (len(PROMPTS), 154, 1)
    truth = encode_prompt(pipeline, PROMPTS, 154)
    assert truth["prompt_embeds"].shape == (len(PROMPTS), 77 + 154, 32)
    assert_same(encoder.layout.assemble(parts), truth)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_length_is_the_pipelines(folders, family):
    encoder = prompt_encoder(folders[family], dtype=torch.float32)
    pipeline = official(folders[family], torch.float32)
    default = {"sd3": 256, "flux": 512, "z_image": 512}[family]
    assert encoder.length == default
    cond = encoder.layout.assemble(encoder.encode(PROMPTS[:2]))
    assert_same(cond, encode_prompt(pipeline, PROMPTS[:2], default))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_given_the_parts_does_what_its_pipeline_does_with_the_prompt(folders, family):
    pipeline = official(folders[family], torch.float32)
    encoder = prompt_encoder(folders[family], 32, torch.float32)
    back = (lambda tokens: unpack(tokens, 8, 6)) if family == "flux" else None
    steps = record_steps(
        pipeline,
        back,
        prompt="a red fox",
        height=64,
        width=48,
        max_sequence_length=32,
        num_inference_steps=2,
        guidance_scale=0.0 if family == "z_image" else 1.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    # Both released FLUX.1 are distilled.
    warns = pytest.warns(UserWarning, match="distilled")
    with warns if family == "flux" else contextlib.nullcontext():
        adapter = adapter_for(pipeline.transformer)
    cond = encoder.layout.assemble(encoder.encode(["a red fox"]))
    assert check_against_pipeline(adapter, steps, cond, tolerance=0.0) == 0.0
    # And it is the prompt that makes it so.
    other = encoder.layout.assemble(encoder.encode(["snow"]))
    with pytest.raises(ValueError, match="is not the pipeline's"):
        check_against_pipeline(adapter, steps, other)


@pytest.mark.parametrize("family", [*FAMILIES, "sd3 without t5"])
def test_embedding_stored_ids_is_encoding(folders, family, tmp_path):
    """Stage by stage, from int32 on the disk, as text=online has them."""
    encoder = prompt_encoder(folders[family], 77)
    parts = encoder.encode(PROMPTS)
    tokens = encoder.tokens(PROMPTS)
    assert {n: Part(tuple(t.shape[1:]), t.dtype) for n, t in tokens.items()} == encoder.token_parts
    stored = {}
    for name, ids in tokens.items():
        assert ids.dtype == torch.int32
        np.save(tmp_path / f"{name}.npy", ids.numpy())
        stored[name] = torch.from_numpy(np.load(tmp_path / f"{name}.npy"))
    seen = {}
    for stage in encoder.stages:
        made = encoder.embed(stage.name, {name: stored[name] for name in stage.tokens})
        assert tuple(made) == stage.parts
        seen |= made
        encoder.release(stage.name)
    assert set(seen) == set(parts) == set(encoder.parts)
    for name, part in parts.items():
        assert torch.equal(seen[name], part), name


@pytest.mark.parametrize("family", FAMILIES)
def test_other_prompts_in_the_batch_change_rounding_at_most(folders, family):
    encoder = prompt_encoder(folders[family], 77, torch.float32)
    together = encoder.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt])
        for name, part in alone.items():
            difference = (part[0].double() - together[name][row].double()).norm()
            assert difference <= 2e-6 * part[0].double().norm().clamp_min(1e-9), (name, prompt)
    for name, part in together.items():
        # Two rows of one batch with the same prompt; and another one is another.
        torch.testing.assert_close(part[0], part[4], rtol=2e-6, atol=2e-6, msg=name)
    assert (together[encoder.stages[0].parts[0]][0] - together[encoder.stages[0].parts[0]][1]).any()


def test_t5_sees_its_padding_and_clip_and_qwen_do_not(folders):
    """So that a cache belongs to a length, and cutting it is not encoding at the shorter one."""
    prompt = ["a red fox"]
    short = prompt_encoder(folders["sd3"], 77, torch.float32).encode(prompt)
    long = prompt_encoder(folders["sd3"], 256, torch.float32).encode(prompt)
    for name in ("clip_l", "pooled_l", "clip_g", "pooled_g"):
        assert torch.equal(short[name], long[name])
    moved = (short["t5"] - long["t5"][:, :77]).norm() / short["t5"].norm()
    assert moved > 0.01
    short = prompt_encoder(folders["z_image"], 77, torch.float32).encode(prompt)
    long = prompt_encoder(folders["z_image"], 256, torch.float32).encode(prompt)
    torch.testing.assert_close(
        short["prompt_embeds"], long["prompt_embeds"][:, :77], rtol=1e-5, atol=1e-5
    )
    assert torch.equal(short["prompt_mask"], long["prompt_mask"][:, :77])


def test_prompts_that_are_cut_are_counted(folders):
    prompts = ["a fox", LONG, "fox " * 75, "fox " * 76, "a " * 153, "a " * 154]
    # CLIP has 75 tokens between its two marks; T5 153 before its one, each "a" or "fox" a token.
    assert prompt_encoder(folders["sd3"], 154).cut(prompts) == {
        "clip_l": 4,
        "clip_g": 4,
        "t5": 2,
    }
    assert prompt_encoder(folders["flux"], 512).cut(prompts) == {"clip": 4, "t5": 0}
    assert prompt_encoder(folders["sd3 without t5"], 154).cut([LONG])["t5"] == 0
    # The words of a conversation around a prompt are tokens too.
    tokens = int(prompt_encoder(folders["z_image"]).tokens(["a fox"])["qwen_mask"].sum())
    assert prompt_encoder(folders["z_image"], tokens).cut(["a fox"]) == {"qwen": 0}
    assert prompt_encoder(folders["z_image"], tokens - 1).cut(["a fox"]) == {"qwen": 1}


def test_one_encoder_is_in_memory_at_a_time(folders, monkeypatch):
    loaded, at_load = [], []
    load = text_encoders._load

    def alive() -> int:
        return sum(model() is not None for model in loaded)

    def watched(class_name, folder, dtype):
        at_load.append(alive())
        model = load(class_name, folder, dtype)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(text_encoders, "_load", watched)
    encoder = prompt_encoder(folders["sd3"], 32)
    tokens = encoder.tokens(PROMPTS)
    assert not loaded
    encoder.encode(PROMPTS)
    assert at_load == [0, 0, 0] and alive() == 0
    # What a caller has loaded stays, through encode too, until it is released.
    encoder.embed("t5", tokens)
    encoder.embed("t5", tokens)
    encoder.encode(PROMPTS)
    assert at_load == [0, 0, 0, 0, 1, 1] and alive() == 1
    encoder.release("t5")
    encoder.release("t5")
    assert alive() == 0


def test_tokens_need_no_weights(folders, tmp_path):
    folder = tmp_path / "light"
    shutil.copytree(
        folders["sd3"], folder, ignore=shutil.ignore_patterns("*.safetensors", "vae", "scheduler")
    )
    encoder = prompt_encoder(folder, 77)
    tokens = encoder.tokens(PROMPTS)
    whole = prompt_encoder(folders["sd3"], 77).tokens(PROMPTS)
    assert all(torch.equal(tokens[name], whole[name]) for name in whole)
    with pytest.raises(ValueError, match=r"cannot read .*text_encoder_3"):
        encoder.embed("t5", tokens)


def test_encoding_leaves_the_callers_random_numbers_and_ignores_its_autocast(folders):
    encoder = prompt_encoder(folders["sd3"], 77, torch.float32)
    plain = encoder.encode(PROMPTS)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        inside = encoder.encode(PROMPTS)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(inside[name], part) for name, part in plain.items())
    assert not any(part.requires_grad for part in inside.values())


@pytest.mark.parametrize(
    ("family", "dropped"), [("sd3", "clip_l"), ("sd3", "clip_g"), ("sd3", "t5"), ("flux", "t5")]
)
def test_without_an_encoder_its_part_of_the_condition_is_zero(folders, family, dropped):
    """As sd-scripts: hidden states and pooled row of a dropped encoder are zeros."""
    encoder = prompt_encoder(folders[family], 77, torch.float32)
    layout, parts = encoder.layout, encoder.encode(PROMPTS[:3])
    full = layout.assemble(parts)
    mask = torch.tensor([True, False, True])
    before = {name: part.clone() for name, part in parts.items()}
    cond = layout.assemble(layout.without(parts, dropped, mask))
    assert all(torch.equal(parts[name], part) for name, part in before.items())
    expected = {name: value.clone() for name, value in full.items()}
    text, pooled = expected["prompt_embeds"], expected["pooled_prompt_embeds"]
    for row in (0, 2):
        if family == "flux":
            text[row] = 0
        elif dropped == "t5":
            text[row, 77:] = 0
        else:
            channels, pool = (
                (slice(0, 8), slice(0, 24))
                if dropped == "clip_l"
                else (slice(8, 24), slice(24, 64))
            )
            text[row, :77, channels] = 0
            pooled[row, pool] = 0
    assert all(torch.equal(cond[name], value) for name, value in expected.items())
    assert not torch.equal(cond["prompt_embeds"], full["prompt_embeds"])


def test_flux_without_its_clip_has_no_pooled_row(folders):
    encoder = prompt_encoder(folders["flux"], 20, torch.float32)
    parts = encoder.encode(PROMPTS[:2])
    cond = encoder.layout.assemble(
        encoder.layout.without(parts, "clip", torch.tensor([False, True]))
    )
    assert torch.equal(cond["pooled_prompt_embeds"][0], parts["pooled"][0])
    assert not cond["pooled_prompt_embeds"][1].any()
    assert torch.equal(cond["prompt_embeds"], parts["t5"])


def test_a_guided_flux_gets_the_pipelines_guidance(folders):
    parts = prompt_encoder(folders["flux"], 20).encode(PROMPTS[:2])
    cond = layout_for("FluxTransformer2DModel", FLUX | {"guidance_embeds": True}).assemble(parts)
    assert torch.equal(cond["guidance"], torch.full((2,), 3.5))


def test_the_record_names_what_encoders_and_tokenizers_are(folders, tmp_path):
    record = prompt_encoder(folders["sd3"], 77).record()
    assert "text_encoder_3/config.json" in record and "tokenizer_2/tokenizer.json" in record
    copy = tmp_path / "copy"
    shutil.copytree(folders["sd3"], copy)
    assert prompt_encoder(copy, 154).record() == record
    file = copy / "tokenizer_3" / "tokenizer_config.json"
    file.write_text(file.read_text() + "\n")
    changed = prompt_encoder(copy, 77).record()
    assert {name for name in record if record[name] != changed[name]} == {
        "tokenizer_3/tokenizer_config.json"
    }


def _edit_json(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def _same(parts: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return set(parts) == set(others) and all(torch.equal(parts[n], others[n]) for n in parts)


def test_folders_as_they_are_published_give_the_same(folders, tmp_path):
    """T5 in shards, tokenizers in the older files and under the older names."""
    folder = tmp_path / "published"
    shutil.copytree(folders["sd3"], folder)
    (folder / "text_encoder_3" / "model.safetensors").unlink()
    tiny_text.t5(4).save_pretrained(folder / "text_encoder_3", max_shard_size="20KB")
    assert len(list((folder / "text_encoder_3").glob("model-*.safetensors"))) > 1
    for name in ("tokenizer", "tokenizer_2"):
        file = folder / name / "tokenizer.json"
        model = json.loads(file.read_text())["model"]
        file.unlink()
        (folder / name / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = "\n".join(" ".join(pair) for pair in model["merges"])
        (folder / name / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    _edit_json(folder / "model_index.json", tokenizer_3=["transformers", "T5TokenizerFast"])
    encoder = prompt_encoder(folder, 77, torch.float32)
    parts = encoder.encode(PROMPTS)
    assert _same(parts, prompt_encoder(folders["sd3"], 77, torch.float32).encode(PROMPTS))
    truth = encode_prompt(official(folder, torch.float32), PROMPTS, 77)
    assert_same(encoder.layout.assemble(parts), truth)


def test_a_qwen_with_its_head_gives_the_same(folders, tmp_path):
    """As Z-Image is published: the file is of the causal model, the class is the one below it."""
    parts = prompt_encoder(folders["z_image"], 77).encode(PROMPTS)
    folder = tmp_path / "published"
    shutil.copytree(folders["z_image"], folder)
    body = tiny_text.qwen(2)
    whole = Qwen3ForCausalLM(body.config)
    whole.model.load_state_dict(body.state_dict())
    whole.save_pretrained(folder / "text_encoder")
    assert "lm_head.weight" in load_file(folder / "text_encoder" / "model.safetensors")
    assert _same(prompt_encoder(folder, 77).encode(PROMPTS), parts)
    _edit_json(folder / "model_index.json", text_encoder=["transformers", "Qwen3ForCausalLM"])
    assert _same(prompt_encoder(folder, 77).encode(PROMPTS), parts)


def test_weights_that_are_lacking_are_not_made_up(folders, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(folders["sd3"], folder)
    file = folder / "text_encoder_2" / "model.safetensors"
    weights = load_file(file)
    gone = weights.pop("text_projection.weight")
    save_file(weights, file, {"format": "pt"})
    encoder = prompt_encoder(folder, 77)
    with pytest.raises(ValueError, match=r"lacks 1 of .*text_projection\.weight"):
        encoder.encode(PROMPTS)
    save_file(weights | {"text_projection.weight": gone / 0}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"text_projection\.weight"):
        encoder.encode(PROMPTS)


def _edited(folder: Path, source: Path, file: str, **fields: object) -> Path:
    shutil.copytree(source, folder)
    _edit_json(folder / file, **fields)
    return folder


def test_folders_that_do_not_serve_are_refused_by_name(folders, tmp_path):
    sd3 = folders["sd3"]
    with pytest.raises(ValueError, match=r"holds no model_index\.json: give the folder of a whole"):
        prompt_encoder(sd3 / "transformer")
    gone = tmp_path / "gone"
    shutil.copytree(sd3, gone)
    shutil.rmtree(gone / "text_encoder_3")
    with pytest.raises(ValueError, match="has no folder text_encoder_3.*and T5 is zeros"):
        prompt_encoder(gone)
    shutil.rmtree(gone / "tokenizer_2")
    with pytest.raises(ValueError, match=r"has no folder tokenizer_2.*of the pipeline$"):
        prompt_encoder(gone)
    other = _edited(
        tmp_path / "other", sd3, "model_index.json", text_encoder=["transformers", "BertModel"]
    )
    with pytest.raises(ValueError, match="'BertModel' for clip_l, expected CLIPTextModelWithProj"):
        prompt_encoder(other)
    own = _edited(
        tmp_path / "aura", sd3, "transformer/config.json", _class_name="AuraFlowTransformer2DModel"
    )
    with pytest.raises(ValueError, match=r"prompts for SD3Transformer2DModel.*got 'AuraFlow"):
        prompt_encoder(own)
    for field, value in (("joint_attention_dim", 40), ("pooled_projection_dim", 63)):
        mixed = _edited(tmp_path / field, sd3, "transformer/config.json", **{field: value})
        with pytest.raises(ValueError, match=f"transformer takes {value}: the folder is mixed"):
            prompt_encoder(mixed)


@pytest.mark.parametrize("length", [0, 513, True, 77.0])
def test_a_length_that_the_pipelines_refuse_is_refused(folders, length):
    with pytest.raises(ValueError, match="from 1 to 512 tokens"):
        prompt_encoder(folders["sd3"], length)


@pytest.mark.parametrize(
    ("prompts", "error"),
    [("a fox", "sequence of at least one"), ([], "at least one"), (["a", None], "got None")],
)
def test_what_is_no_list_of_prompts_is_refused(folders, prompts, error):
    encoder = prompt_encoder(folders["sd3"])
    for call in (encoder.tokens, encoder.encode, encoder.cut):
        with pytest.raises(ValueError, match=error):
            call(prompts)


def test_what_no_stage_or_layout_has_is_refused(folders):
    encoder: PromptEncoder = prompt_encoder(folders["sd3"], 77)
    tokens = encoder.tokens(["a"])
    with pytest.raises(ValueError, match=r"clip_l, clip_g, t5, got 'clip_1'; did you mean"):
        encoder.embed("clip_1", tokens)
    with pytest.raises(ValueError, match=r"t5_ids of \(B, 77\), got \(1, 20\)"):
        encoder.embed("t5", prompt_encoder(folders["sd3"], 20).tokens(["a"]))
    with pytest.raises(ValueError, match=r"clip_l_ids of \(B, 77\), got only t5_ids"):
        encoder.embed("clip_l", {"t5_ids": tokens["t5_ids"]})
    with pytest.raises(ValueError, match="must hold clip_l, pooled_l, clip_g, pooled_g, t5"):
        encoder.layout.assemble({"t5": torch.zeros(1, 77, 32)})
    parts = {name: torch.zeros(2, *part.shape) for name, part in encoder.parts.items()}
    with pytest.raises(ValueError, match="one of clip_l, clip_g, t5 for SD3Layout, got 'qwen'"):
        encoder.layout.without(parts, "qwen", torch.tensor([True, False]))
    with pytest.raises(ValueError, match=r"\(B,\) = \(2,\) bool, got \(3,\)"):
        encoder.layout.without(parts, "t5", torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be nothing for ZImageLayout"):
        layout_for("ZImageTransformer2DModel", {}).without({}, "qwen", torch.tensor([True]))


@pytest.mark.parametrize(("name", "width"), [("t5", 40), ("t5", 16), ("clip_g", 30)])
def test_padding_hides_no_other_encoder(name, width):
    layout = layout_for("SD3Transformer2DModel", SD3)
    widths = {"clip_l": 8, "clip_g": 12, "t5": 32}
    parts = {part: torch.zeros(1, 5, size) for part, size in widths.items()}
    parts |= {"pooled_l": torch.zeros(1, 24), "pooled_g": torch.zeros(1, 40)}
    assert layout.assemble(parts)["prompt_embeds"].shape == (1, 10, 32)
    with pytest.raises(ValueError, match=f"{name} of the prompts has a width of"):
        layout.assemble(parts | {name: torch.zeros(1, 5, width)})
