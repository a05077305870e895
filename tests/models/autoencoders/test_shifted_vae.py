"""SD3's autoencoder: 16 channels, a shift, no quant convolutions, images that are not square."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mixflow_fast.kernels.interpolate import Moments
from mixflow_fast.models.autoencoders.decoding import load_decoder
from mixflow_fast.models.autoencoders.sdvae import SDVAE, ImageVAE, SDVAEDecoder, SDVAEFiles
from mixflow_fast.models.text_to_image import LatentMap
from tests.support.text_to_image import EIGHT_TIMES, OF_FLUX, VAE, write_pipeline

diffusers = pytest.importorskip("diffusers")
SHIFT, SCALE = 0.0609, 1.5305
# What stabilityai/stable-diffusion-3.5-medium's vae/config.json says of shapes.
REAL = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": SCALE,
    "shift_factor": SHIFT,
}


def network(**config: object) -> torch.nn.Module:
    """diffusers' own class with random weights; NCHW, as its pipelines have it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.AutoencoderKL(**VAE | EIGHT_TIMES | config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(2.0)
    return model.requires_grad_(False)


def pictures(height: int, width: int, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def latents(height: int = 8, width: int = 6) -> Tensor:
    return torch.randn(3, 16, height, width, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae")
    network().save_pretrained(path)
    return path


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (16, 32), (80, 16)])
def test_moments_are_those_of_diffusers_without_the_shift(folder, height, width):
    encoder, images = ImageVAE(folder), pictures(height, width)
    moments = encoder(images)
    posterior = network().encode(images.float() / 127.5 - 1).latent_dist
    assert moments.mean.shape == moments.std.shape == (3, 16, height // 8, width // 8)
    assert moments.scale == encoder.scale == SCALE
    for ours, theirs in ((moments.mean, posterior.mean - SHIFT), (moments.std, posterior.std)):
        assert ours.dtype == torch.float32 and ours.is_contiguous()
        # Channels last is another order of the sums, and nothing else is between them.
        assert relative(ours, theirs) < 1e-5
    assert relative(moments.mean, posterior.mean) > 1e-3


def test_in_diffusers_own_memory_format_the_bits_are_its(folder):
    encoder, images = ImageVAE(folder), pictures(48, 80)
    encoder.model.to(memory_format=torch.contiguous_format)
    x = images.float() / 127.5 - 1
    posterior = network().encode(x).latent_dist
    mean, std = encoder.model.encode(x).latent_dist.mean, encoder.model.encode(x).latent_dist.std
    assert torch.equal(mean, posterior.mean) and torch.equal(std, posterior.std)
    ours = encoder.files.latents.moments(mean, std)
    theirs = LatentMap.of_vae(network().config).moments(posterior.mean, posterior.std)
    assert torch.equal(ours.mean, theirs.mean) and torch.equal(ours.mean, posterior.mean - SHIFT)


def test_a_draw_of_the_moments_is_the_training_scripts_latent(folder):
    """(sample - shift) scale, of diffusers' own sample of its posterior."""
    images = pictures(48, 80)
    posterior = network().encode(images.float() / 127.5 - 1).latent_dist
    sample = posterior.sample(torch.Generator().manual_seed(5))
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(5))
    moments: Moments = ImageVAE(folder)(images)
    drawn = moments.scale * (moments.mean + moments.std * noise)
    assert relative(drawn, (sample - SHIFT) * SCALE) < 1e-5


def test_a_square_one_gives_the_same_moments(folder):
    square, images = SDVAE(folder, 64), pictures(64, 64)
    assert square.shape == (16, 8, 8)
    for ours, theirs in zip(square(images)[:2], ImageVAE(folder)(images)[:2], strict=True):
        assert torch.equal(ours, theirs)
    assert square.record() == ImageVAE(folder).record() == SDVAEFiles.read(folder).record()


def test_decoding_is_the_pipelines(folder):
    decoder = SDVAEDecoder(folder)
    assert (decoder.scale, decoder.shift, decoder.channels, decoder.upsampling) == (
        *(SCALE, SHIFT, 16),
        8,
    )
    z = latents() / SCALE + SHIFT
    theirs = network().decode(z, return_dict=False)[0]
    ours = decoder.decode(latents())
    assert ours.shape == (3, 3, 64, 48) and relative(ours, theirs) < 1e-5
    without = network().decode(latents() / SCALE, return_dict=False)[0]
    assert relative(without, theirs) > 1e-3
    record = decoder.record()
    assert (record["scale"], record["shift"]) == (SCALE, SHIFT)


def test_pictures_are_the_pipelines(tmp_path):
    """What `StableDiffusion3Pipeline` saves of the latents that it gives."""
    folder = write_pipeline(tmp_path / "model")
    network().save_pretrained(folder / "vae")
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 48, "num_inference_steps": 2, "guidance_scale": 1.0}
    call |= {"prompt": ["a red fox", "snow"], "max_sequence_length": 16}
    x1 = pipeline(**call, output_type="latent", generator=torch.Generator().manual_seed(1)).images
    saved = pipeline(**call, output_type="pil", generator=torch.Generator().manual_seed(1)).images
    assert isinstance(saved[0], Image.Image) and saved[0].size == (48, 64)
    ours = load_decoder(folder / "vae", quantisation="round_even")(x1)
    theirs = np.stack([np.asarray(image) for image in saved]).astype(int)
    difference = ours.movedim(1, -1).int().numpy() - theirs
    # Sums in another order fall on the other side of a half now and then.
    assert abs(difference).max() <= 1 and (difference != 0).mean() < 1e-3
    assert theirs.std() > 5


def test_encoding_and_decoding_meet(folder):
    """What one takes off the other puts on again: the posterior's mean is decoded as diffusers."""
    images = pictures(48, 80)
    moments = ImageVAE(folder)(images)
    ours = SDVAEDecoder(folder).decode(moments.scale * moments.mean)
    model = network()
    theirs = model.decode(model.encode(images.float() / 127.5 - 1).latent_dist.mean).sample
    assert relative(ours, theirs) < 1e-5


def test_flux_has_its_own_shift(tmp_path):
    network(**OF_FLUX).save_pretrained(tmp_path)
    files = SDVAEFiles.read(tmp_path)
    assert (files.shift, files.scale) == (0.1159, 0.3611)
    images = pictures(16, 32)
    posterior = network().encode(images.float() / 127.5 - 1).latent_dist
    assert relative(ImageVAE(tmp_path)(images).mean, posterior.mean - 0.1159) < 1e-5


def test_the_real_configuration(tmp_path):
    with torch.device("meta"):
        model = diffusers.AutoencoderKL(**REAL)
    assert sum(p.numel() for p in model.parameters()) == 83_819_683
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"} | REAL))
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    files = SDVAEFiles.read(tmp_path)
    assert files.shape(1024) == (16, 128, 128) and files.shape(896, 1152) == (16, 112, 144)
    assert files.latents == LatentMap.of_vae(model.config) == LatentMap(SHIFT, SCALE)
    with pytest.raises(ValueError, match="90 x 64 pixels have no latent .* multiples of 8"):
        files.shape(64, 90)


def test_only_the_encoder_stays_and_other_images_are_refused(folder):
    encoder = ImageVAE(folder)
    names = {name.partition(".")[0] for name, _ in encoder.model.named_parameters()}
    assert names == {"encoder"} and not encoder.model.use_tiling and not encoder.model.training
    assert {n.partition(".")[0] for n, _ in SDVAEDecoder(folder).model.named_parameters()} == {
        "decoder"
    }
    for images in (pictures(16, 16).float(), pictures(16, 16)[0], pictures(16, 16)[:, :2]):
        with pytest.raises(ValueError, match=r"images must be uint8 \(B, 3, H, W\)"):
            encoder(images)
    with pytest.raises(ValueError, match=r"12 x 16 pixels have no latent.*multiples of 8"):
        encoder(pictures(16, 12))


def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(folder):
    encoder, images = ImageVAE(folder), pictures(48, 80, batch=4)
    other = images.clone()
    other[2:] = 255
    with torch.autocast("cpu", torch.bfloat16):
        first = encoder(images)
    for a, b in zip(first[:2], encoder(other)[:2], strict=True):
        assert torch.equal(a[:2], b[:2]) and not torch.equal(a[2:], b[2:])
