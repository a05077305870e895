"""The rule from image files to RGB: every kind of file by its pixels, or by its refusal."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixflow_fast.data.decoding import decode_rgb

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
COLOURS = np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8)


def pixels(file: Path) -> np.ndarray:
    image = decode_rgb(file)
    assert image.mode == "RGB"
    return np.asarray(image)


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    part = alpha.astype(np.float64)[..., None] / 255
    return colours * part + 255 * (1 - part)


def png16(path: Path, values: np.ndarray, transparent: tuple[int, ...] | None = None) -> Path:
    """A PNG of 16 bits: grey (H, W) or RGB (H, W, 3)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    colour = b"" if transparent is None else struct.pack(f">{len(transparent)}H", *transparent)
    body = chunk(b"IHDR", header) + (chunk(b"tRNS", colour) if colour else b"")
    body += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "jpg", "JPEG"])
@pytest.mark.parametrize("array", [GREY, COLOURS], ids=["grey", "rgb"])
def test_ordinary_files_are_what_pillow_makes_of_them(tmp_path, suffix, array):
    """Parity with ADM, SiT and REPA, which call `convert("RGB")`."""
    file = tmp_path / f"0.{suffix}"
    Image.fromarray(array).save(file)
    np.testing.assert_array_equal(pixels(file), np.asarray(Image.open(file).convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr"])
def test_other_8_bit_modes_are_what_pillow_makes_of_them(tmp_path, mode):
    file = tmp_path / ("0.jpg" if mode in ("CMYK", "YCbCr") else "0.png")
    Image.fromarray(COLOURS).convert(mode).save(file)
    np.testing.assert_array_equal(pixels(file), np.asarray(Image.open(file).convert("RGB")))


def test_16_bits_give_their_high_byte(tmp_path):
    """In grey as in RGB, where Pillow does it; not clipped at 255."""
    values = np.arange(0, 65536, 1024).reshape(8, 8)
    for name, array in (("grey", values), ("rgb", np.stack([values] * 3, -1))):
        found = pixels(png16(tmp_path / f"{name}.png", array))
        np.testing.assert_array_equal(found, np.stack([values >> 8] * 3, -1), name)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "grey.tif")
    np.testing.assert_array_equal(pixels(tmp_path / "grey.tif")[..., 0], values >> 8)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_colours_under_alpha_are_hidden(tmp_path, mode):
    colours = COLOURS if mode == "RGBA" else np.stack([GREY] * 3, -1)
    alpha = np.where(GREY < 20, 0, np.where(GREY < 40, 128, 255)).astype(np.uint8)
    stored = np.dstack([colours if mode == "RGBA" else GREY, alpha])
    Image.fromarray(stored).save(tmp_path / "0.png")
    found = pixels(tmp_path / "0.png")
    np.testing.assert_allclose(found, over_white(colours, alpha), atol=1)
    assert (found[alpha == 0] == 255).all()
    np.testing.assert_array_equal(found[alpha == 255], colours[alpha == 255])
    Image.fromarray(np.dstack([stored[..., :-1], 0 * alpha + 255])).save(tmp_path / "1.png")
    np.testing.assert_array_equal(pixels(tmp_path / "1.png"), colours)


def test_a_transparent_colour_or_palette_entry_is_white(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    colour = Image.new("RGB", (4, 4), (40, 50, 60))
    colour.putpixel((0, 0), (1, 2, 3))
    colour.save(tmp_path / "c.png", transparency=(1, 2, 3))
    for name in ("p", "c"):
        found = pixels(tmp_path / f"{name}.png")
        assert found[0, 0].tolist() == [255, 255, 255] and found[1, 1].tolist() == [40, 50, 60]


def test_a_photo_with_a_preview_beside_it_is_the_photo(tmp_path):
    """Phones write JPEG with a second image (MPO), which is no animation."""
    photo, preview = Image.fromarray(COLOURS), Image.new("RGB", (8, 8), (255, 0, 0))
    photo.save(tmp_path / "0.jpg", "MPO", save_all=True, append_images=[preview])
    with Image.open(tmp_path / "0.jpg") as image:
        assert image.n_frames == 2
    photo.save(tmp_path / "1.jpg")
    np.testing.assert_array_equal(pixels(tmp_path / "0.jpg"), pixels(tmp_path / "1.jpg"))


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(COLOURS[:4]).save(tmp_path / "0.png", exif=exif)
    np.testing.assert_array_equal(pixels(tmp_path / "0.png"), COLOURS[:4])


@pytest.mark.parametrize("suffix", ["png", "webp", "gif", "tif"])
def test_animations_are_refused(tmp_path, suffix):
    frames = [Image.fromarray(COLOURS), Image.fromarray(255 - COLOURS)]
    # By its content, whatever its name says.
    frames[0].save(tmp_path / "0.png", suffix.upper().replace("TIF", "TIFF"), save_all=True,
                   append_images=frames[1:])  # fmt: skip
    with pytest.raises(ValueError, match=r"cannot read the image .*0\.png': it has 2 frames"):
        decode_rgb(tmp_path / "0.png")


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_values_of_unknown_range_are_refused(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "0.tif")
    with pytest.raises(ValueError, match=rf"0\.tif': its mode is {mode} .* store it as 8-bit RGB"):
        decode_rgb(tmp_path / "0.tif")


def test_what_cannot_be_seen_right_is_refused(tmp_path):
    values = np.full((4, 4), 4096)
    for array, colour in ((values, (4096,)), (np.stack([values] * 3, -1), (4096,) * 3)):
        file = png16(tmp_path / "0.png", array, colour)
        with pytest.raises(ValueError, match="16 bits a channel and a transparent colour"):
            decode_rgb(file)
    Image.new("RGB", (404, 4)).save(tmp_path / "line.png")
    with pytest.raises(ValueError, match="404 x 4 pixels, expected sides of at most 100 to 1"):
        decode_rgb(tmp_path / "line.png")
    assert decode_rgb(png16(tmp_path / "one.png", values[:1, :1])).size == (1, 1)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif"])
def test_damaged_files_are_named(tmp_path, suffix):
    file = tmp_path / f"0.{suffix}"
    Image.fromarray(np.tile(COLOURS, (4, 4, 1))).save(file)
    whole = file.read_bytes()
    for content in (b"", whole[:10], whole[: len(whole) // 2], b"\0" * 100, b"<html>not found"):
        file.write_bytes(content)
        reason = r"it is empty \(0 bytes\)" if not content else "."
        with pytest.raises(ValueError, match=rf"cannot read the image .*0\.{suffix}': {reason}"):
            decode_rgb(file)
    with pytest.raises(ValueError, match="cannot read the image .*nowhere.png"):
        decode_rgb(tmp_path / "nowhere.png")
