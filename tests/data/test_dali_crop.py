"""ADM's crop in DALI's operators against Pillow's."""

from __future__ import annotations

import numpy as np
import PIL
import pytest
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from PIL import Image

from mixflow_fast.data.dali_crop import MAX_HALVINGS, adm_crop, crop_plan, halving
from mixflow_fast.data.image_folder import adm_center_crop
from tests.support.encoded_images import encoded, photos


def test_halving_has_pillows_bits_for_every_length() -> None:
    rng = np.random.RandomState(0)
    for source in range(2, 700):
        pixels = rng.randint(0, 256, (4, source)).astype(np.uint8)
        truth = np.asarray(Image.fromarray(pixels).resize((source // 2, 4), Image.Resampling.BOX))
        h, wide = halving(source), pixels.astype(np.int64)
        pairs = np.delete(wide, np.s_[h.cut_start : h.cut_end], axis=1)
        assert pairs.shape[1] == 2 * h.target == 2 * (source // 2)
        out = (pairs[:, 0::2] + pairs[:, 1::2] + 1) // 2
        center = wide[:, h.first : h.first + h.count].sum(1)
        out[:, h.middle] = (2 * center + h.count) // (2 * h.count)
        np.testing.assert_array_equal(out, truth, err_msg=str(source))


def test_the_plan_of_an_image_of_imagenets_usual_size() -> None:
    plan = crop_plan(500, 375, 256)
    assert plan[0] == 0 and not plan[1:-4].any()
    assert plan[-4:].tolist() == [341, 256, 42, 0]


def test_the_plan_rounds_half_to_even() -> None:
    """Python's round, as ADM's code calls it."""
    assert crop_plan(7, 4, 6)[-4:-2].tolist() == [10, 6]  # 10.5
    assert crop_plan(9, 4, 6)[-4:-2].tolist() == [14, 6]  # 13.5


def test_an_image_that_needs_more_halvings_has_no_plan() -> None:
    side = 8 << (MAX_HALVINGS + 1)
    assert crop_plan(side - 1, side, 8)[0] == MAX_HALVINGS
    assert crop_plan(side, side, 8) is None


def test_tall_images_have_no_plan() -> None:
    """Pillow 13 resizes them along the height first, and rounds to bytes elsewhere."""
    assert crop_plan(300, 600, 256) is not None
    assert crop_plan(300, 640, 256) is None
    assert crop_plan(640, 300, 256) is not None
    assert crop_plan(600, 1300, 256) is None
    assert crop_plan(100, 300, 256) is not None  # enlarged
    tall = photos()[2].crop((150, 0, 411, 593))
    once = np.asarray(tall.resize((256, 582), Image.Resampling.BICUBIC))
    width_first = tall.resize((256, 593), Image.Resampling.BICUBIC)
    twice = np.asarray(width_first.resize((256, 582), Image.Resampling.BICUBIC))
    assert np.array_equal(once, twice) == (int(PIL.__version__.split(".")[0]) < 13)


def _windows() -> list[Image.Image]:
    """The photographs, and windows of them with odd and even sides, wide and tall."""
    boxes = [(0, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (3, 5, 2, 9), (120, 0, 101, 37)]
    return [
        photo.crop((left, top, photo.width - right, photo.height - bottom))
        for photo in photos()
        for left, top, right, bottom in boxes
    ]


def _crops(size: int, one_resize: bool = False) -> list[np.ndarray]:
    windows = _windows()

    def source() -> tuple[list[np.ndarray], list[np.ndarray]]:
        files = [np.frombuffer(encoded(w, "PNG", compress_level=0), np.uint8) for w in windows]
        return files, [crop_plan(w.width, w.height, size) for w in windows]

    def in_one(image: DataNode, plan: DataNode) -> DataNode:
        """The same sizes and offsets, as it is usually done: with both axes in one resize."""
        end = 1 + 14 * MAX_HALVINGS
        width, height = (fn.cast(plan[end + k], dtype=types.FLOAT) for k in range(2))
        image = fn.resize(
            image,
            resize_x=width,
            resize_y=height,
            mode="stretch",
            interp_type=types.INTERP_CUBIC,
            antialias=True,
        )
        start = fn.stack(plan[end + 3], plan[end + 2])
        return fn.slice(image, start=start, shape=[size, size], axes=[0, 1])

    @pipeline_def(
        batch_size=len(windows),
        num_threads=1,
        device_id=None,
        exec_dynamic=True,
        enable_conditionals=True,
    )
    def graph() -> DataNode:
        files, plan = fn.external_source(source, num_outputs=2, batch=True)
        image = fn.decoders.image(files, device="cpu", output_type=types.RGB)
        return in_one(image, plan) if one_resize else adm_crop(image, plan, size)

    pipeline = graph()
    pipeline.build()
    (images,) = pipeline.run()
    return [np.array(images.at(row)) for row in range(len(windows))]


def _differences(size: int, one_resize: bool = False) -> tuple[float, int, float]:
    """Mean and largest difference of bytes, and the median PSNR in dB over the images."""
    means, largest, noise = [], 0, []
    for window, ours in zip(_windows(), _crops(size, one_resize), strict=True):
        truth = np.asarray(adm_center_crop(window, size)).astype(np.int64)
        assert ours.shape == truth.shape and ours.dtype == np.uint8
        off = np.abs(truth - ours)
        means.append(off.mean())
        largest = max(largest, int(off.max()))
        noise.append(10 * np.log10(255**2 / max((off**2).mean(), 1e-9)))
    return float(np.mean(means)), largest, float(np.median(noise))


# Upscaled; no halving; one, two, three, four.
@pytest.mark.parametrize("size", [512, 256, 112, 64, 36, 24])
def test_the_crop_is_pillows_but_for_rounding(size: int) -> None:
    mean, largest, psnr = _differences(size)
    assert mean <= 0.05 and largest <= 40 and psnr >= 60, (mean, largest, psnr)
    # Halvings add nothing. What is left are roundings of the bicubic passes, and borders, where
    # Pillow leaves out the weights outside of the image and DALI repeats the last pixel.
    assert largest <= 8, largest


def test_one_resize_is_not_within_these_bounds() -> None:
    mean, _, psnr = _differences(256, one_resize=True)
    assert mean > 0.05 and psnr < 60
    mean, largest, psnr = _differences(64, one_resize=True)
    assert mean > 0.5 and largest > 20 and psnr < 45, (mean, largest, psnr)
