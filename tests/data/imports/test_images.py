"""Sets of images made of other programs' files, compared with the pixels that were put in."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mixflow_fast.data.imports.images import is_packed, list_packed
from mixflow_fast.data.preparation.imagenet_synsets import SYNSETS
from mixflow_fast.data.preparation.prepare import Settings, prepare
from mixflow_fast.data.preparation.source import read_crop
from mixflow_fast.data.prepared_images import PreparedImages

GENERATOR = np.random.default_rng(0)
SIZE = 32


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def pictures(count: int) -> np.ndarray:
    return GENERATOR.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def metadata(names: list[str]) -> dict[str, str]:
    """As Hugging Face datasets write it."""
    feature = {"names": names, "_type": "ClassLabel"}
    return {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}


def write_table(
    path: Path, contents: list[bytes | None], labels: list[int], names: list[str] | None
) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": content, "path": f"{n}.png"} for n, content in enumerate(contents)]
    schema = pa.schema([("image", image), ("label", pa.int64())])
    table = pa.table({"image": pa.array(rows, image), "label": labels}, schema)
    if names is not None:
        table = table.replace_schema_metadata(metadata(names))
    pq.write_table(table, path, row_group_size=2)


def test_tables(tmp_path: Path) -> None:
    """Two files of several groups of rows; the images are crops, which stay as they are."""
    pixels = pictures(7)
    contents, labels = [png(image) for image in pixels], [2, 0, 1, 1, 2, 0, 0]
    (tmp_path / "hub").mkdir()
    # Written in the other order: the names decide.
    write_table(tmp_path / "hub" / "train-00001.parquet", contents[4:], labels[4:], ["a", "b", "c"])
    write_table(tmp_path / "hub" / "train-00000.parquet", contents[:4], labels[:4], ["a", "b", "c"])
    source = list_packed(tmp_path / "hub")
    assert source.classes == ("a", "b", "c") and source.scheme == "folder"
    assert source.files[4] == "train-00001.parquet[0]"
    assert prepare(source, tmp_path / "set", Settings(SIZE, shard_rows=3), threads=2).complete
    images = PreparedImages(tmp_path / "set", flip=False)
    assert len(images) == 7 and images.num_classes == 3
    for number in range(7):
        decoded = np.asarray(Image.open(io.BytesIO(images.payload(number))))
        assert (decoded == pixels[number]).all()
    assert [int(images.labels(np.array([n]))) for n in range(7)] == labels


def test_parts_of_a_data_set_do_not_become_one(tmp_path: Path) -> None:
    """The hub's folder of ImageNet holds train-*, validation-* and test-*."""
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        write_table(tmp_path / f"{name}.parquet", [png(pictures(1)[0])], [0], ["a"])
    with pytest.raises(ValueError, match="the parts train, validation .* into a folder of their"):
        list_packed(tmp_path)
    (tmp_path / "train").mkdir()
    for file in tmp_path.glob("train-*"):
        (tmp_path / "train" / file.name).symlink_to(file)
    assert len(list_packed(tmp_path / "train")) == 2


def test_class_names_of_tables(tmp_path: Path) -> None:
    contents = [png(image) for image in pictures(2)]
    file = tmp_path / "train.parquet"
    write_table(file, contents, [0, 1], None)
    with pytest.raises(ValueError, match="--trust-labels"):
        list_packed(file)
    assert list_packed(file, trust_labels=True).classes == ("0", "1")
    write_table(file, contents, [0, 1], ["cat", "dog"])
    with pytest.raises(ValueError, match="not ImageNet's 1000.*begin with 'cat'"):
        list_packed(file, "imagenet")
    # As in `imagenet-1k`: words in the order of the synsets.
    words = ["tench, Tinca tinca", *map(str, range(998)), "toilet tissue, toilet paper"]
    write_table(file, contents, [0, 1], words)
    source = list_packed(file, "imagenet")
    assert source.classes == tuple(SYNSETS) and source.scheme == "imagenet"
    write_table(file, contents, [0, -1], ["cat", "dog"])
    with pytest.raises(ValueError, match="split without labels"):
        list_packed(file)


def test_foreign_tables(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"picture": [b""], "label": [0]}), file)
    with pytest.raises(ValueError, match="columns image .* and label"):
        list_packed(file)
    file.write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(ValueError, match="cannot read"):
        list_packed(file)
    write_table(file, [None, png(pictures(1)[0])], [0, 0], ["a"])
    with pytest.raises(ValueError, match="bytes are not in the table"):
        list_packed(file).read(0)
    (tmp_path / "partial-train").mkdir()
    write_table(tmp_path / "partial-train" / "0000.parquet", [png(pictures(1)[0])], [0], ["a"])
    assert "cuts off at 5 GB" in list_packed(tmp_path / "partial-train").warnings[0]


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_prepared_images_of_repa(tmp_path: Path, zipped: bool) -> None:
    pixels, labels = pictures(5), [0, 2, 1, 1, 0]
    names = [f"00000/img{n:08d}.png" for n in range(5)]
    index = json.dumps({"labels": [list(p) for p in zip(names, labels, strict=True)][::-1]})
    path = tmp_path / ("images.zip" if zipped else "images")
    if zipped:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for n in (3, 1, 0, 4, 2):
                archive.writestr(names[n], png(pixels[n]))
            archive.writestr("dataset.json", index)
    else:
        (path / "00000").mkdir(parents=True)
        for name, image in zip(names, pixels, strict=True):
            (path / name).write_bytes(png(image))
        (path / "dataset.json").write_text(index)
    assert is_packed(path)
    source = list_packed(path)
    assert source.files == names and source.labels.tolist() == labels
    for number in range(5):
        assert (read_crop(source.read(number), SIZE) == pixels[number]).all()
        assert source.look(number)[0] == len(png(pixels[number]))


def test_holes_in_the_numbers_are_refused(tmp_path: Path) -> None:
    """Latents are paired by number, which a set counts without holes."""
    (tmp_path / "00000").mkdir()
    rows = []
    for number in (0, 2):
        name = f"00000/img{number:08d}.png"
        (tmp_path / name).write_bytes(png(pictures(1)[0]))
        rows.append([name, 0])
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": rows}))
    with pytest.raises(ValueError, match="number 1 is missing"):
        list_packed(tmp_path)
