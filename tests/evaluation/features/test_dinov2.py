"""FD-DINOv2's features against transformers' model, called by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mixflow_fast.evaluation.features.dinov2 import DinoV2Features, preprocess
from mixflow_fast.evaluation.features.extractor import extract, sha256_of
from mixflow_fast.models.dinov2 import resample_positions
from tests.support.kernels import relative_rms
from tests.support.teacher import WIDTH, images, save_teacher

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("dinov2"))


def test_class_token_is_transformers(folder: Path, tmp_path: Path) -> None:
    """Of a model whose table has 16 x 16 places already, so that nothing is resampled by it."""
    found = extract([images(2, 48)], DinoV2Features(folder, allow_unknown=True))
    assert found.arrays["cls"].shape == (2, WIDTH)
    assert found.extractor.sha256 == sha256_of(folder / "model.safetensors")

    weights = load_file(folder / "model.safetensors")
    name = "embeddings.position_embeddings"
    weights[name] = resample_positions(weights[name], 16, "hub").contiguous()
    config = transformers.Dinov2Config.from_pretrained(folder)
    config.image_size = 224
    config.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = transformers.Dinov2Model.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        tokens = model(pixel_values=preprocess(images(2, 48))).last_hidden_state
    assert relative_rms(torch.from_numpy(found.arrays["cls"]), tokens[:, 0]) < 1e-5


def test_resize_is_pillow_s_without_its_rounding() -> None:
    """EDM2's words: the filter of Pillow's uint8 resize, which rounds after each axis."""
    from PIL import Image

    x = images(1, 300)
    pixels = np.asarray(x[0].permute(1, 2, 0).contiguous())
    pillow = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    ours = (preprocess(x)[0] * std + mean) * 255
    gap = (ours.clamp(0, 255) - torch.from_numpy(pillow.copy()).permute(2, 0, 1)).abs()
    # Pillow rounds to bytes after each of the two axes.
    assert float(gap.mean()) < 0.5
    assert ours.min() < 0 and ours.max() > 255


def test_another_network_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"dinov2 of {WIDTH} channels .*dinov2-large"):
        DinoV2Features(folder)
    with pytest.raises(ValueError, match="DINOv2.path.*does not exist.*dinov2-large"):
        DinoV2Features(folder / "none")
