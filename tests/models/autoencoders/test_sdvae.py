"""The SD-VAE's encoder against diffusers itself, its sizes, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixflow_fast.models.autoencoders import sdvae
from mixflow_fast.models.autoencoders.sdvae import SDVAE, SDVAEFiles
from mixflow_fast.models.autoencoders.sdvae_files import WEIGHTS
from tests.support.autoencoder import REAL, small_autoencoder, write_autoencoder

diffusers = pytest.importorskip("diffusers")
IMAGES = torch.randint(
    0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_autoencoder(tmp_path_factory.mktemp("vae"))


@torch.no_grad()
def test_moments_are_those_of_diffusers(folder):
    encoder = SDVAE(folder, 16)
    assert encoder.shape == (4, 8, 8) and encoder.scale == 0.18215
    moments = encoder(IMAGES)
    expected = small_autoencoder().encode(IMAGES.float() / 127.5 - 1).latent_dist
    for ours, theirs in ((moments.mean, expected.mean), (moments.std, expected.std)):
        assert ours.dtype == torch.float32 and ours.is_contiguous()
        # Channels last is another order of the sums.
        assert (ours - theirs).norm() / theirs.norm() < 1e-5
    assert moments.scale == 0.18215 and (moments.std > 0).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(IMAGES).mean, moments.mean)


@torch.no_grad()
def test_the_log_variance_is_clamped_and_becomes_a_std(tmp_path):
    model = small_autoencoder()
    model.quant_conv.bias[4:6], model.quant_conv.bias[6:] = -200.0, 200.0
    model.save_pretrained(tmp_path)
    std = SDVAE(tmp_path, 16)(IMAGES).std
    assert torch.allclose(std[:, :2], torch.tensor(-15.0).exp())
    assert torch.allclose(std[:, 2:], torch.tensor(10.0).exp())


def test_rows_do_not_depend_on_what_fills_up_a_batch(folder):
    encoder = SDVAE(folder, 16)
    filled = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    filled[:5] = IMAGES
    other = filled.clone()
    other[5:] = 255
    for first, second in zip(encoder(filled)[:2], encoder(other)[:2], strict=True):
        assert torch.equal(first[:5], second[:5]) and not torch.equal(first[5:], second[5:])


def test_a_mirrored_latent_is_not_the_latent_of_the_mirrored_image(folder):
    encoder = SDVAE(folder, 16)
    mean, mirrored = encoder(IMAGES).mean, encoder(IMAGES.flip(-1)).mean
    assert (mean.flip(-1) - mirrored).norm() / mirrored.norm() > 0.05


@torch.no_grad()
def test_it_is_compiled_as_one_graph(folder, monkeypatch):
    """What torch.compile(fullgraph=True) needs, as on a GPU; a break would be an error here."""
    encoder = SDVAE(folder, 16)
    expected = encoder(IMAGES)
    one = torch.compile(sdvae._mean_and_std, fullgraph=True, dynamic=False, backend="eager")
    monkeypatch.setattr(sdvae, "_mean_and_std", one)
    for ours, theirs in zip(encoder(IMAGES)[:2], expected[:2], strict=True):
        assert torch.equal(ours, theirs)


def test_bf16_is_near(folder):
    exact, rounded = SDVAE(folder, 16)(IMAGES), SDVAE(folder, 16, precision="bf16")(IMAGES)
    assert rounded.mean.dtype == torch.float32
    error = (exact.mean - rounded.mean).norm() / exact.mean.norm()
    assert 1e-4 < error < 5e-2


def test_the_real_configuration(tmp_path):
    """Sizes of sd-vae-ft-ema and -mse, which need no download to be known."""
    with torch.device("meta"):
        model = diffusers.AutoencoderKL(**REAL)
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    assert len(model.state_dict()) == 248
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"} | REAL))
    (tmp_path / WEIGHTS).touch()
    files = SDVAEFiles.read(tmp_path)
    assert files.shape(256) == (4, 32, 32) and files.shape(512) == (4, 64, 64)
    assert files.scale == model.config.scaling_factor == 0.18215
    with pytest.raises(ValueError, match="250 x 250 pixels have no latent .* multiples of 8"):
        files.shape(250)


def test_only_the_encoder_stays_and_is_never_tiled(folder):
    encoder = SDVAE(folder, 16)
    names = [name.partition(".")[0] for name, _ in encoder.model.named_parameters()]
    assert set(names) == {"encoder", "quant_conv"}
    assert not encoder.model.use_tiling and not encoder.model.training
    assert not any(p.requires_grad for p in encoder.model.parameters())
    record = encoder.record()
    assert record["class"] == "AutoencoderKL" and len(record["weights_sha256"]) == 64
    with pytest.raises(ValueError, match=r"images must be uint8 \(B, 3, 16, 16\)"):
        encoder(IMAGES.float())
    with pytest.raises(ValueError, match=r"got torch.uint8 \(5, 3, 8, 8\)"):
        encoder(IMAGES[..., :8, :8])


def test_the_weights_decide_about_the_record(folder, tmp_path):
    other = SDVAE(write_autoencoder(tmp_path, seed=1), 16).record()
    mine = SDVAE(folder, 16).record()
    assert [key for key in mine if mine[key] != other[key]] == ["weights_sha256"]


BROKEN = {
    "missing": (lambda w: w.pop("encoder.conv_in.weight"), "lacks 1 of .* encoder.conv_in.weight"),
    "not finite": (
        lambda w: w["encoder.conv_in.bias"].fill_(float("nan")),
        "encoder.conv_in.bias has 32 values that are not finite",
    ),
    "another shape": (
        lambda w: w.update({"encoder.conv_in.bias": torch.zeros(7)}),
        "cannot load the autoencoder .*encoder.conv_in.bias",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_weights_are_refused(tmp_path, case):
    change, message = BROKEN[case]
    weights = load_file(write_autoencoder(tmp_path) / WEIGHTS)
    change(weights)
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=message) as error:
        SDVAE(tmp_path, 16)
    assert "\n" not in str(error.value)


def test_what_is_no_autoencoder_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"--vae {tmp_path}/none does not exist.*hf download"):
        SDVAE(tmp_path / "none", 16, name="--vae")
    with pytest.raises(ValueError, match="encoder.path .* holds no config.json: .*hf download"):
        SDVAE(tmp_path, 16)
    write_autoencoder(tmp_path / "vae")
    with pytest.raises(ValueError, match=f"give '{tmp_path}/vae'"):
        SDVAE(tmp_path, 16)
    config = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae" / WEIGHTS).rename(tmp_path / "vae/diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no diffusion_pytorch_model.safetensors .*pickle"):
        SDVAE(tmp_path / "vae", 16)
    for change, message in [
        ({"_class_name": "AsymmetricAutoencoderKL"}, "'AsymmetricAutoencoderKL', expected 'Auto"),
        (
            {"latents_mean": [0.1] * 4},
            "has statistics of each channel .* not applied here",
        ),
        ({"scaling_factor": 0}, "config.json' is not read: scale must be a positive"),
    ]:
        (tmp_path / "vae/config.json").write_text(json.dumps(config | change))
        (tmp_path / "vae" / WEIGHTS).touch()
        with pytest.raises(ValueError, match=message):
            SDVAE(tmp_path / "vae", 16)
    (tmp_path / "vae/config.json").write_text("[]")
    with pytest.raises(ValueError, match="must be the config.json of an AutoencoderKL"):
        SDVAE(tmp_path / "vae", 16)
    with pytest.raises(ValueError, match="precision must be one of"):
        SDVAE(tmp_path / "vae", 16, precision="fp16")
