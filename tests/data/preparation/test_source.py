"""The list of a source, and crops that are ADM's bit for bit, whatever the file is."""

import math
import os

import numpy as np
import pytest
from PIL import Image

from mixflow_fast.data.image_folder import adm_center_crop
from mixflow_fast.data.preparation.scan import scan_source
from mixflow_fast.data.preparation.source import list_source, read_crop, read_header
from tests.support.image_folders import adm_crop, bad_images, encoded, smooth, write_folder


@pytest.mark.parametrize(
    ("width", "height"),
    [
        *((500, 375), (375, 500), (333, 500)),  # no halving at 256
        *((40, 33), (255, 257)),  # enlarged
        *((512, 700), (513, 512), (1023, 777)),  # one halving, even and odd
        *((1024, 1100), (1027, 2047)),  # two, of which the second sees an odd side
        (2051, 2300),  # three
        *((256, 256), (384, 257), (2 * 256 + 1, 3 * 256 + 1)),
    ],
)
def test_the_crop_is_adms(width, height):
    picture = smooth(width, height, width + height)
    np.testing.assert_array_equal(np.asarray(adm_center_crop(picture, 256)), adm_crop(picture, 256))


@pytest.mark.parametrize(("width", "rounded"), [(50, 62), (54, 68), (58, 72)])
def test_a_half_is_rounded_to_even(width, rounded):
    """62.5, 67.5 and 72.5: rounding half up would cut out other pixels."""
    picture = smooth(width, 40, 3)
    assert round(width * 50 / 40) == rounded
    np.testing.assert_array_equal(np.asarray(adm_center_crop(picture, 50)), adm_crop(picture, 50))
    wider = np.asarray(picture.resize((math.floor(width * 50 / 40 + 0.5), 50), Image.BICUBIC))
    left = (wider.shape[1] - 50) // 2
    differs = not np.array_equal(wider[:, left : left + 50], adm_crop(picture, 50))
    assert differs == (rounded != math.floor(width * 50 / 40 + 0.5))


@pytest.mark.parametrize(
    "kind", ["grey", "cmyk", "palette", "rgba", "turned", "profile", "png as jpeg", "progressive"]
)
def test_every_kind_of_file_is_what_adm_reads(tmp_path, kind):
    """`convert("RGB")` and the crop; EXIF's orientation is not applied."""
    picture = smooth(90, 75, 5)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = {
        "grey": lambda: encoded(picture.convert("L"), "JPEG"),
        "cmyk": lambda: encoded(picture.convert("CMYK"), "JPEG"),
        "palette": lambda: encoded(picture.quantize(17), "PNG"),
        "rgba": lambda: encoded(picture.convert("RGBA"), "PNG"),
        "turned": lambda: encoded(picture, "JPEG", exif=exif),
        "profile": lambda: encoded(picture, "PNG", icc_profile=b"no profile at all"),
        "png as jpeg": lambda: encoded(picture, "PNG"),
        "progressive": lambda: encoded(picture, "JPEG", progressive=True),
    }[kind]()
    file = tmp_path / "n01440764_1.JPEG"
    file.write_bytes(content)
    found = read_crop(content, 32)
    np.testing.assert_array_equal(found, adm_crop(Image.open(file).convert("RGB"), 32))
    header = read_header(file)
    assert (header.width, header.height) == (90, 75)
    assert header.orientation == (6 if kind == "turned" else 1)
    assert header.mode == {"grey": "L", "cmyk": "CMYK", "palette": "P", "rgba": "RGBA"}.get(
        kind, "RGB"
    )
    assert header.format == ("PNG" if b"PNG" in content[:8] else "JPEG")


@pytest.mark.parametrize("kind", bad_images())
def test_images_that_cannot_be_used_say_why(tmp_path, kind):
    content, reason = bad_images()[kind]
    file = tmp_path / "image.JPEG"
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_crop(content, 32)
    assert reason in str(error.value) and str(tmp_path) not in str(error.value)
    if reason != "truncated":  # which no header shows
        with pytest.raises(ValueError) as error:
            read_header(file)
        assert reason in str(error.value)


def test_a_file_that_cannot_be_opened_is_no_bad_image(tmp_path):
    """A network disk that does not answer must not leave images out of a set."""
    source = list_source(write_folder(tmp_path / "images"))
    (source.root / source.files[3]).unlink()
    with pytest.raises(FileNotFoundError):
        source.read(3)
    with pytest.raises(FileNotFoundError):
        scan_source(source)


def test_the_list_is_sorted_by_class_and_name(tmp_path):
    root = write_folder(tmp_path / "images", ("b", "a", "C"), each=3)
    os.rename(root / "a/001.JPEG", root / "a/Z.jpg")
    source = list_source(root)
    assert source.classes == ("C", "a", "b") and source.scheme == "folder"
    assert source.files[:4] == ["C/000.JPEG", "C/001.JPEG", "C/002.JPEG", "a/000.JPEG"]
    assert source.files[4:6] == ["a/002.JPEG", "a/Z.jpg"]
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and len(source) == 9
    digest = source.digest()
    os.rename(root, tmp_path / "moved")
    assert list_source(tmp_path / "moved").digest() == digest
    os.rename(tmp_path / "moved/b/002.JPEG", tmp_path / "moved/b/003.JPEG")
    assert list_source(tmp_path / "moved").digest() != digest


def test_a_path_that_is_no_source_is_named(tmp_path):
    with pytest.raises(ValueError, match="folder .*nowhere does not exist"):
        list_source(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be a folder of class folders"):
        list_source(tmp_path / "file")
    with pytest.raises(ValueError, match="no class folder"):
        list_source(tmp_path)
