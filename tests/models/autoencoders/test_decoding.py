"""Decoders against diffusers and RAE's official code, and the rules that round to 8 bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mixflow_fast.models.autoencoders.decoding import Decoder, load_decoder, quantise
from mixflow_fast.models.autoencoders.sdvae import SDVAEDecoder
from tests.support.autoencoder import small_autoencoder, write_autoencoder
from tests.support.golden import load
from tests.support.rae import save_decoder, save_statistics

diffusers = pytest.importorskip("diffusers")
LATENTS = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_autoencoder(tmp_path_factory.mktemp("vae"))


def rae_folder(folder: Path, golden: str = "rae_stage1_4x4") -> Path:
    save_decoder(folder, golden)
    save_statistics(folder, golden)
    (folder / "decoder.json").rename(folder / "config.json")
    return folder


@torch.no_grad()
def diffusers_images() -> Tensor:
    return small_autoencoder().decode(LATENTS / 0.18215).sample


def test_an_sdvae_decodes_as_diffusers(folder: Path) -> None:
    state = torch.random.get_rng_state()
    decoder = SDVAEDecoder(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    ours, theirs = decoder.decode(LATENTS), diffusers_images()
    assert ours.shape == (5, 3, 16, 16) and ours.dtype == torch.float32 and ours.is_contiguous()
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
    names = {name.partition(".")[0] for name, _ in decoder.model.named_parameters()}
    assert names == {"decoder", "post_quant_conv"} and not decoder.model.use_tiling
    twice = SDVAEDecoder(folder, scale=2 * 0.18215).decode(2 * LATENTS)
    assert (twice - ours).abs().max() < 1e-6
    near = SDVAEDecoder(folder, precision="bf16").decode(LATENTS)
    assert near.dtype == torch.float32 and 1e-4 < (near - ours).norm() / ours.norm() < 5e-2
    record = decoder.record()
    assert (record["kind"], record["scale"], len(str(record["sha256"]))) == ("sdvae", 0.18215, 64)


def test_pictures_are_those_that_diffusers_saves(folder: Path) -> None:
    """Its own processor of images rounds as `round_even` does."""
    processor = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=2)
    theirs = processor.postprocess(diffusers_images(), output_type="pil")
    ours = load_decoder(folder, quantisation="round_even")(LATENTS)
    assert ours.dtype == torch.uint8
    difference = ours.movedim(1, -1).int().numpy() - np.stack(theirs).astype(int)
    # Sums in another order fall on the other side of a half now and then.
    assert abs(difference).max() <= 1 and (difference != 0).mean() < 1e-3


def test_a_picture_does_not_depend_on_how_many_there_are(folder: Path) -> None:
    network = SDVAEDecoder(folder)
    for chunk in (1, 2, 4):
        decoder = Decoder(network, chunk=chunk)
        whole = decoder(LATENTS)
        assert torch.equal(whole[:3], decoder(LATENTS[:3]))
        assert torch.equal(whole[4:], decoder(LATENTS[4:]))
    assert decoder(LATENTS[:0]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("golden", ["rae_stage1_4x4", "rae_stage1_8x8"])
def test_rae_decodes_to_the_official_pixels(tmp_path: Path, golden: str) -> None:
    tensors, _ = load(golden)
    folder = rae_folder(tmp_path, golden)
    decoder = load_decoder(folder, stats=folder / "stat.pt", quantisation="floor")
    decoder.check(tuple(tensors["latent"].shape[1:]))
    ours = decoder(tensors["latent"]).int()
    theirs = (tensors["decoded"].double().clamp(0, 1) * 255).floor().int()
    assert (ours - theirs).abs().max() <= 1 and (ours != theirs).double().mean() < 1e-3
    record = decoder.record()
    assert record["kind"] == "rae" and len(str(record["stats"])) == 64
    assert load_decoder(folder).record() == record | {"stats": "none"}
    with pytest.raises(ValueError, match=r"takes latents of \(32, ., .\), the network makes"):
        decoder.check((4, 8, 8))


def test_the_rules_part_where_they_should() -> None:
    x = torch.tensor([-2.0, -1.0, -1 + 1.6 / 127.5, -1 + 0.8 / 127.5, 0.0, 0.999, 1.0, 3.0])
    rules = {rule: quantise(x, rule).tolist() for rule in ("round", "floor", "round_even")}
    assert rules["round"] == [0, 0, 2, 1, 128, 255, 255, 255]
    assert rules["floor"] == [0, 0, 1, 0, 127, 254, 255, 255]
    assert rules["round_even"] == [0, 0, 2, 1, 128, 255, 255, 255]
    # 0.3 is 76.5 grey levels, an exact half also in float32: up, down, and to the even number.
    y = torch.tensor([0.3])
    assert [quantise(y, rule, low=0.0).item() for rule in rules] == [77, 76, 76]


@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_the_rules_are_their_formulas_in_float64(low: float) -> None:
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    exact = x.double() if low == 0.0 else (x.double() + 1) / 2
    truth = {
        "round": (255 * exact + 0.5).clamp(0, 255).floor(),
        "floor": (255 * exact.clamp(0, 1)).floor(),
        "round_even": (255 * exact.clamp(0, 1)).round(),
    }
    means = {}
    for rule, expected in truth.items():
        ours = quantise(x, rule, low)
        assert ours.dtype == torch.uint8
        wrong = (ours.double() - expected).abs()
        assert wrong.max() <= 1 and (wrong > 0).double().mean() < 1e-4, rule  # float32's own digits
        inside = (exact > 0) & (exact < 1)
        means[rule] = (ours.double() - 255 * exact)[inside].mean()
    assert abs(means["round"]) < 0.02 and abs(means["floor"] + 0.5) < 0.02


def test_what_cannot_be_decoded_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of round, floor, round_even, got 'nearest'"):
        quantise(LATENTS, "nearest")
    with pytest.raises(ValueError, match="must be finite, got NaN"):
        quantise(torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="x must be floating"):
        quantise(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"latents must be \(B, 4, h, w\).*got \(4, 3, 8, 8\)"):
        load_decoder(folder)(LATENTS[:, :3])
    with pytest.raises(ValueError, match="no decoder of RAE .*: leave them out"):
        load_decoder(folder, stats=folder / "stat.pt")
    with pytest.raises(ValueError, match="--decoder .* holds no config.json"):
        load_decoder(tmp_path)
    with pytest.raises(ValueError, match="a number > 0, got 0"):
        load_decoder(folder, scale=0.0)
    rae = rae_folder(tmp_path)
    with pytest.raises(ValueError, match="a decoder of RAE, for which there is no scale"):
        load_decoder(rae, scale=0.5)
    with pytest.raises(ValueError, match="there is no bf16"):
        load_decoder(rae, precision="bf16")
    shutil.move(rae / "config.json", rae / "x")
    with pytest.raises(ValueError, match="decoder's config"):
        load_decoder(rae)
