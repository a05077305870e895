"""Features of a stream of images: batches, ids, files and refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mixflow_fast.evaluation.features.extractor import (
    ExtractorId,
    Features,
    PixelFeatures,
    exact_float32,
    extract,
    kept_or_extracted,
    sha256_of,
)
from mixflow_fast.evaluation.frechet import pooled_pixels


class Mean:
    """Mean colours, and the sizes of the batches that came."""

    id = ExtractorId("mean", None, "none")
    outputs = ("rgb", "bad")
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        self.sizes.append(len(images))
        rgb = images.double().mean(dim=(2, 3))
        return {"rgb": rgb, "bad": torch.where(rgb == 7, torch.nan, rgb)}


def some(count: int, side: int = 4) -> Tensor:
    g = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, side, side), generator=g, dtype=torch.uint8)


def test_the_network_sees_full_batches_whatever_came() -> None:
    images, network = some(150), Mean()
    found = extract(images.split([1, 70, 79]), network)
    assert network.sizes == [64, 64, 64] and len(found) == 150
    whole = images.double().mean(dim=(2, 3)).float()
    assert np.array_equal(found.arrays["rgb"], whole.numpy())
    assert np.array_equal(found.ids, np.arange(150))


def test_sizes_may_differ_from_batch_to_batch() -> None:
    found = extract([some(3), some(2, 6), some(5)], Mean())
    expected = torch.cat([x.double().mean(dim=(2, 3)) for x in (some(3), some(2, 6), some(5))])
    assert np.array_equal(found.arrays["rgb"], expected.float().numpy())


def test_files(tmp_path: Path) -> None:
    images = some(5)
    images[3] = 9
    found = extract([images], Mean(), np.array([4, 2, 8, 6, 0]))
    assert found.constant == (6,)
    found.save(tmp_path)
    again = Features.load(tmp_path, "mean")
    assert again.extractor == found.extractor and again.constant == (6,)
    assert np.array_equal(again.ids, found.ids)
    assert all(np.array_equal(again.arrays[n], found.arrays[n]) for n in found.arrays)
    np.save(tmp_path / "mean.rgb.npy", found.arrays["rgb"][:4])
    with pytest.raises(ValueError, match="do not have one length"):
        Features.load(tmp_path, "mean")
    with pytest.raises(ValueError, match=r"cannot read the features .*other.json"):
        Features.load(tmp_path, "other")


def test_a_kill_while_features_are_written_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays of one set under the header of another would be taken for the other's."""
    extract([some(5)], Mean(), source="a").save(tmp_path)
    other = extract([some(5, 6)], Mean(), source="b")
    plain, written = np.save, []

    def save(file: object, array: np.ndarray) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(array)
        plain(file, array)

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(KeyboardInterrupt):
        other.save(tmp_path)
    monkeypatch.setattr(np, "save", plain)
    again = kept_or_extracted(tmp_path, Mean(), lambda: [some(5)], "a")
    assert np.array_equal(again.arrays["rgb"], extract([some(5)], Mean()).arrays["rgb"])


def test_refusals() -> None:
    seven = some(3)
    seven[1] = 7
    cases = [
        ([], None, "at least one"),
        ([some(2).float()], None, "uint8"),
        ([some(2)[:, :1]], None, r"\(B, 3, H, W\)"),
        ([some(3)], np.array([1, 1, 2]), "2 different"),
        ([some(3)], np.array([1, 2]), "3 different"),
        ([seven], np.array([5, 11, 3]), "not finite for 1 of 3 images, the first with id 11"),
    ]
    for images, ids, message in cases:
        with pytest.raises(ValueError, match=message):
            extract(images, Mean(), ids)


def test_pixels_are_those_of_the_demo() -> None:
    images = some(4, 16)
    found = extract([images], PixelFeatures("pooled_pixels"))
    expected = pooled_pixels(images.float() / 127.5 - 1)
    np.testing.assert_allclose(found.arrays["features"], expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="pooled_pixels, random_conv"):
        PixelFeatures("vgg")


def test_tf32_is_off_within_and_as_it_was_after() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    try:
        matmul.allow_tf32 = True
        with exact_float32():
            assert not (matmul.allow_tf32 or cudnn.allow_tf32 or cudnn.benchmark)
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180's
    assert sha256_of(tmp_path / "x") == expected
