"""FID's Inception against torch-fidelity's, with random weights of the public file's layout."""

import os
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixflow_fast.evaluation.features.extractor import extract
from mixflow_fast.evaluation.features.inception import Inception, InceptionV3, resize_tf1
from tests.support.golden import load
from tests.support.kernels import relative_rms
from tests.support.torch_fidelity_golden import SIZES, images, random_inception


@cache
def state() -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in InceptionV3().state_dict().items()}
    return random_inception(shapes)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "w.pth"
    torch.save(state(), path)
    return path


@pytest.fixture(scope="module")
def network(weights: Path) -> Inception:
    return Inception(weights, allow_unknown=True)


@pytest.mark.parametrize("size", SIZES)
def test_features_are_torch_fidelity_s(network: Inception, size: int) -> None:
    recorded, _ = load("torch_fidelity")
    with torch.inference_mode():
        found = network(images(size))
    assert relative_rms(found["pool"], recorded[f"pool_{size}"]) < 1e-5
    assert relative_rms(found["logits"], recorded[f"logits_{size}"]) < 1e-5
    maps = recorded[f"spatial_{size}"]
    assert maps.shape == (2, 7, 17, 17)
    # TensorFlow's order: rows, columns, channels.
    flat = torch.stack(
        [maps[:, c, h, w] for h in range(17) for w in range(17) for c in range(7)], 1
    )
    assert found["spatial"].shape == (2, 2023)
    assert relative_rms(found["spatial"], flat) < 1e-5


@pytest.mark.parametrize("size", [(32, 32), (299, 299), (500, 350), (7, 299)])
def test_resize_reads_where_tensorflow_1_reads(size: tuple[int, int]) -> None:
    """The definition, pixel by pixel in float64."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(1, 1, *size, generator=g, dtype=torch.float64) * 255
    found = resize_tf1(x)
    for i, j in ((0, 0), (298, 298), (150, 7), (13, 290)):
        y, z = i * size[0] / 299, j * size[1] / 299
        low = (int(y), int(z))
        high = (min(low[0] + 1, size[0] - 1), min(low[1] + 1, size[1] - 1))
        p, q = y - low[0], z - low[1]
        top = (1 - q) * x[0, 0, low[0], low[1]] + q * x[0, 0, low[0], high[1]]
        bottom = (1 - q) * x[0, 0, high[0], low[1]] + q * x[0, 0, high[0], high[1]]
        assert float(found[0, 0, i, j]) == pytest.approx(float((1 - p) * top + p * bottom))
    # A position is rounded to float32, as TensorFlow's is, and neighbours differ by up to 255.
    assert (resize_tf1(x.float()) - found).abs().max() < 255 * max(size) * 2**-23


def test_an_image_alone_has_the_features_it_has_in_a_batch(network: Inception) -> None:
    """`extract` fills its batch up, here to two."""
    both = images(32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixflow_fast.evaluation.features.extractor.BATCH", 2)
        together = extract([both], network).arrays
        alone = extract([both[1:]], network).arrays
    for name, array in together.items():
        assert relative_rms(torch.from_numpy(array[1]), torch.from_numpy(alone[name][0])) < 1e-6


def test_float64_agrees(weights: Path, network: Inception) -> None:
    double = Inception(weights, dtype=torch.float64, allow_unknown=True)
    assert double.id.dtype == "float64"
    with torch.inference_mode():
        found, plain = double(images(32)[:1]), network(images(32)[:1])
    assert found["pool"].dtype == torch.float64
    assert 0 < relative_rms(plain["pool"], found["pool"]) < 1e-5


def test_refusals(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not there.*weights-inception-2015-12-05"):
        Inception(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="FID's weights have 6726825d.*--allow-unknown-weights"):
        Inception(weights)
    name = "Mixed_6d.branch1x1.conv.weight"
    fewer = {k: v for k, v in state().items() if k != name}
    torch.save(fewer, tmp_path / "fewer.pth")
    with pytest.raises(ValueError, match="another layout.*Mixed_6d.branch1x1.conv.weight"):
        Inception(tmp_path / "fewer.pth", allow_unknown=True)


def test_counters_of_batch_norm_may_be_missing(network: Inception, tmp_path: Path) -> None:
    fewer = {k: v for k, v in state().items() if not k.endswith("num_batches_tracked")}
    assert len(fewer) == 566 - 94
    torch.save(fewer, tmp_path / "fewer.pth")
    other = Inception(tmp_path / "fewer.pth", allow_unknown=True)
    assert torch.equal(other.network.fc.weight, network.network.fc.weight)


@pytest.mark.skipif(
    "MIXFLOW_INCEPTION" not in os.environ, reason="MIXFLOW_INCEPTION=W.pth: no path"
)
def test_the_public_weights_are_known() -> None:
    Inception(Path(os.environ["MIXFLOW_INCEPTION"]))
