"""A cache for another model is refused before anything is trained on it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mixflow_fast.cli import main
from mixflow_fast.data.captioned import CaptionedLatents
from mixflow_fast.data.prompts_store import PartInfo
from mixflow_fast.models.text_to_image.network import TextToImage
from mixflow_fast.models.text_to_image.prompts import layout_for, prompt_encoder
from mixflow_fast.models.text_to_image.spec import TransformerSpec
from mixflow_fast.training.cache_fit import check_cache, check_encoders
from tests.support.caches import SD3_PARTS, write_cache
from tests.support.captioned import model_folder
from tests.support.text_to_image import write_pipeline

pytest.importorskip("diffusers")
FAMILIES = ("sd3", "flux", "z_image")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> TextToImage:
    return TransformerSpec.read(model_folder(tmp_path_factory.mktemp("model"))).on_meta()


def check(cache: Path, network: TextToImage, encoder: object = None) -> None:
    layout = layout_for(network.config["class"], network.config["transformer"])
    check_cache(CaptionedLatents(cache), network, layout, encoder)


def part(name: str, *shape: int) -> dict[str, PartInfo]:
    return {"parts": SD3_PARTS | {name: PartInfo(shape, "bfloat16")}}


def test_caches_of_the_model_pass(tmp_path: Path, network: TextToImage) -> None:
    check(write_cache(tmp_path / "a"), network)
    # A folder without T5, and one with another length of it.
    check(write_cache(tmp_path / "b", **part("t5", 7, 1)), network)
    check(write_cache(tmp_path / "c", length=20, **part("t5", 20, 32)), network)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ({"class_name": "FluxTransformer2DModel"}, "for a FluxTransformer2DModel, the network in"),
        ({"channels": 8}, "latents of 8 channels, the network in model.folder takes 16"),
        ({"scale": 0.18215}, r"scale 0\.18215, the autoencoder in model.folder says 1\.5305"),
        (part("t5", 7, 16), "t5 of the prompts has a width of 16, .* joint_attention_dim is 32"),
        (part("t5", 7, 64), "t5 of the prompts has a width of 64, .* joint_attention_dim is 32"),
        (part("clip_l", 5, 40), "clip_l and clip_g of the prompts has a width of 52, .* is 32"),
        (part("pooled_l", 25), "pooled_prompt_embeds .* width of 65, .* pooled_projection_dim is"),
        (
            {"parts": {k: v for k, v in SD3_PARTS.items() if k != "t5"}},
            "the parts of a prompt must hold clip_l, pooled_l, clip_g, pooled_g, t5 for SD3Layout",
        ),
    ],
)
def test_caches_of_other_models_are_refused(
    tmp_path: Path, network: TextToImage, cache: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(write_cache(tmp_path / "c", **cache), network)


def test_tokens_of_other_encoders_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = write_pipeline(tmp_path / "pipeline", "sd3")
    network, encoder = TransformerSpec.read(folder).on_meta(), prompt_encoder(folder, 9)
    parts = {name: PartInfo(p.shape, "int32") for name, p in encoder.token_parts.items()}

    def written(name: str, parts: Mapping[str, PartInfo]) -> Path:
        return write_cache(tmp_path / name, parts=parts, text="online", length=9)

    check(written("a", parts), network, encoder)
    other = parts | {"t5_ids": replace(parts["t5_ids"], shape=(8,))}
    with pytest.raises(ValueError, match=r"t5_ids \(8,\), the encoders .* t5_ids \(9,\): give a"):
        check(written("b", other), network, encoder)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of pipelines and what `mixflow-fast encode` makes with them of two pictures."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("encoded")
    (root / "pictures").mkdir()
    for number, width in enumerate((64, 96)):
        Image.new("RGB", (width, 64), (number, 99, 0)).save(root / f"pictures/{number}.png")
        (root / f"pictures/{number}.txt").write_text("a fox")
    for family in FAMILIES:
        write_pipeline(root / family, family)
        for text in ("cached", "online"):
            options = ["--buckets", "64x64,96x64", "--t5-length", "16", "--device", "cpu"]
            paths = ["--model", root / family, "--data", root / "pictures"]
            out = ["--out", root / f"{family}-{text}", "--text", text]
            assert main(list(map(str, ["encode", *paths, *out, *options]))) == 0
    return root


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["cached", "online"])
def test_an_encoded_cache_fits_its_model_and_no_other(
    encoded: Path, family: str, text: str
) -> None:
    cache = encoded / f"{family}-{text}"
    network = TransformerSpec.read(encoded / family).on_meta()
    encoder = prompt_encoder(encoded / family, 16) if text == "online" else None
    check(cache, network, encoder)
    for other in set(FAMILIES) - {family}:
        with pytest.raises(ValueError, match="data were encoded for a"):
            check(encoded / f"{other}-{text}", network, encoder)


ENCODER_FILES = {
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "weights of T5": "text_encoder_3/model.safetensors",
}


@pytest.mark.parametrize("text", ["cached", "online"])
@pytest.mark.parametrize("changed", ENCODER_FILES)
def test_other_encoders_of_the_same_shapes_are_refused(
    encoded: Path, tmp_path: Path, changed: str, text: str
) -> None:
    """One bit of one file; training runs text encoders itself where the text is online."""
    info = CaptionedLatents(encoded / f"sd3-{text}").info
    folder = tmp_path / "model"
    shutil.copytree(encoded / "sd3", folder)
    check_encoders(info, folder)
    file = folder / ENCODER_FILES[changed]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    if changed == "weights of T5" and text == "online":
        check_encoders(info, folder)
        return
    with pytest.raises(ValueError, match=f"another {ENCODER_FILES[changed]} than that in"):
        check_encoders(info, folder)
    check_encoders(info, folder / "transformer")


def test_a_damaged_cache_is_mended_as_verify_says(
    encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(encoded / "sd3-cached", cache)
    assert main(["data", "verify", str(cache)]) == 0
    lost = cache / "latents/96x64/moments/00000.npy"
    prompts = sorted((cache / "prompts/shards").rglob("t5.npy"))[0]
    for file in (lost, prompts):
        content = bytearray(file.read_bytes())
        content[-1] ^= 4
        file.write_bytes(content)
    assert main(["data", "verify", str(cache)]) == 1
    said = capsys.readouterr().out
    assert "2 of" in said and "each manifest.json in the folders that they are in, up to" in said
    for file in (lost, prompts):
        file.unlink()
    for folder in ("", "latents/96x64", "prompts"):
        (cache / folder / "manifest.json").unlink()
    options = ["--buckets", "64x64,96x64", "--t5-length", "16", "--device", "cpu"]
    paths = ["--model", encoded / "sd3", "--data", encoded / "pictures", "--out", cache]
    assert main(list(map(str, ["encode", *paths, *options]))) == 0
    assert main(["data", "verify", str(cache)]) == 0
    for file in (lost, prompts):
        there = encoded / "sd3-cached" / file.relative_to(cache)
        assert file.read_bytes() == there.read_bytes()
