"""The three layouts of images with captions, as other programs write them."""

import csv
import gzip
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mixflow_fast.data.preparation.captioned_source import BadItems, open_captioned
from mixflow_fast.data.webdataset import WebDataset
from tests.support.image_folders import adm_crop, bad_images, encoded, smooth

# Names whose order is another one with the folders taken apart, by length or by lower case.
NAMES = ("b.jpg", "a/2.png", "a/10.webp", "a.x/1.jpg", "B.JPG", "a-b.jpeg")
ORDER = sorted(NAMES)
CAPTIONS = {
    "b.jpg": ["a red fox"],
    "a/2.png": ["two cats, one asleep", "cats"],
    "a/10.webp": ["ein Bär im Wald", "熊", "🐻"],
    "a.x/1.jpg": ["a fox"],  # that others have, too
    "B.JPG": ['she said "no", twice'],
    "a-b.jpeg": ["line separator\u2028inside"],
}
GOOD = {"good.jpg": encoded(smooth(40, 50, 1), "JPEG"), "good.txt": b"a fox"}
JPEG = GOOD["good.jpg"]
SIZES = {name: (40 + 7 * n, 61 - 3 * n) for n, name in enumerate(NAMES)}


def picture(name: str) -> bytes:
    kind = {".png": "PNG", ".webp": "WEBP"}.get(Path(name).suffix, "JPEG")
    return encoded(smooth(*SIZES[name], seed=NAMES.index(name)), kind)


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def pictures() -> dict[str, bytes]:
    return {name: picture(name) for name in NAMES}


def text_files(root: Path) -> Path:
    texts = {
        f"{os.path.splitext(name)[0]}.txt": "\n".join(lines).encode()
        for name, lines in CAPTIONS.items()
    }
    return write(root, pictures() | texts)


def json_lines(root: Path) -> Path:
    """A text alone as it is, several as a list; other columns are of no matter."""
    rows = [
        {"text": texts if len(texts) > 1 else texts[0], "file_name": name, "score": 0.5}
        for name, texts in CAPTIONS.items()
    ]
    lines = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    return write(root, pictures() | {"metadata.jsonl": lines})


def parquet(root: Path) -> Path:
    write(root, pictures())
    table = pa.table(
        {"file_name": list(CAPTIONS), "text": list(CAPTIONS.values()), "id": list(range(6))}
    )
    pq.write_table(table, root / "metadata.parquet", row_group_size=4)
    return root


def comma_separated(root: Path) -> Path:
    """One caption an image: the first."""
    write(root, pictures())
    with (root / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        writer.writerows([name, texts[0]] for name, texts in CAPTIONS.items())
    return root


def tars(root: Path) -> Path:
    """By webdataset's writer, two in a tar; .txt with lines, or .json."""
    webdataset = pytest.importorskip("webdataset")
    root.mkdir(parents=True)
    with webdataset.ShardWriter(str(root / "%03d.tar"), maxcount=2, verbose=0) as sink:
        for number, name in enumerate(ORDER):
            texts = CAPTIONS[name]
            sample = {"__key__": f"{number:06d}", Path(name).suffix[1:]: picture(name)}
            if number % 2:
                sample["json"] = {"text": texts if len(texts) > 1 else texts[0], "caption": "no"}
            else:
                sample["txt"] = "\n".join(texts)
            sink.write(sample)
    return root


@pytest.mark.parametrize("layout", [text_files, json_lines, parquet, comma_separated, tars])
def test_every_layout_gives_what_was_put_in(tmp_path, layout):
    source = open_captioned(layout(tmp_path / "data"))
    assert len(source) == len(NAMES) and source.skipped == () and source.warnings == ()
    names = [source.name(i) for i in range(len(source))]
    if layout is not tars:
        assert names == ORDER
    for i, name in enumerate(ORDER):
        expected = CAPTIONS[name][:1] if layout is comma_separated else CAPTIONS[name]
        assert source.captions(i) == tuple(expected)
        assert source.size(i) == SIZES[name] and source.sizes[i].tolist() == list(SIZES[name])
        assert source.payload(i) == picture(name)
        truth = Image.open(os.path.join(write(tmp_path / "one", {name: picture(name)}), name))
        np.testing.assert_array_equal(np.array(source.image(i)), np.array(truth.convert("RGB")))


def test_names_of_tars(tmp_path):
    """Shards by name; the classes' reader of the same tars agrees on the images."""
    source = open_captioned(tars(tmp_path / "data"))
    assert [source.name(i) for i in (0, 1, 2, 5)] == [
        "000.tar/000000.JPG",
        "000.tar/000001.jpeg",
        "001.tar/000002.jpg",
        "002.tar/000005.jpg",
    ]
    one = open_captioned(tmp_path / "data/001.tar")
    assert len(one) == 2 and one.payload(1) == source.payload(3)
    with pytest.raises(ValueError, match="000000.JPG in .*000.tar has no label"):
        WebDataset(tmp_path / "data", 32)


def test_webdatasets_reader_sees_the_same(tmp_path):
    """webdataset's own grouping of members, in its order."""
    webdataset = pytest.importorskip("webdataset")
    root = tars(tmp_path / "data")
    source = open_captioned(root)
    theirs = list(
        webdataset.WebDataset([str(p) for p in sorted(root.iterdir())], shardshuffle=False)
    )
    assert len(theirs) == len(source)
    for i, sample in enumerate(theirs):
        (image,) = [v for k, v in sample.items() if k in ("jpg", "jpeg", "png", "webp")]
        assert source.payload(i) == image
        if "txt" in sample:
            assert source.captions(i) == tuple(sample["txt"].decode().split("\n"))


def test_an_order_of_the_file_system_does_not_matter(tmp_path, monkeypatch):
    roots = [make(tmp_path / make.__name__) for make in (text_files, json_lines, tars)]
    before = [open_captioned(root) for root in roots]
    scandir, listdir = os.scandir, os.listdir

    class Backwards:
        def __init__(self, folder):
            with scandir(folder) as entries:
                self._entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self._entries)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr("os.scandir", Backwards)
    monkeypatch.setattr("os.listdir", lambda folder: sorted(listdir(folder), reverse=True))
    for root, source in zip(roots, before, strict=True):
        after = open_captioned(root, threads=3)
        assert [after.name(i) for i in range(6)] == [source.name(i) for i in range(6)]
        assert after.digest() == source.digest()


def test_the_digest_is_of_names_captions_and_sizes(tmp_path):
    root = text_files(tmp_path / "data")
    digest = open_captioned(root).digest()
    os.rename(root, tmp_path / "moved")
    root = tmp_path / "moved"
    assert open_captioned(root).digest() == digest
    # The captions of one image as one, and as two.
    (root / "a/2.txt").write_text("two cats, one asleep cats")
    other = open_captioned(root).digest()
    assert other != digest
    (root / "a/2.txt").write_text("two cats, one asleep\r\n\n  cats\t\n")
    assert open_captioned(root).digest() == digest
    (root / "a/2.png").write_bytes(encoded(smooth(50, 50, 1), "PNG"))
    assert open_captioned(root).digest() not in (digest, other)
    (root / "a/2.png").write_bytes(picture("a/2.png"))
    os.rename(root / "a/2.png", root / "a/3.png")
    os.rename(root / "a/2.txt", root / "a/3.txt")
    assert open_captioned(root).digest() != digest


def test_the_order_is_that_of_the_images_names(tmp_path):
    """And not that of the text files, among which a.TXT is the first."""
    files = {name: b"x" for name in ("a.TXT", "a.b.txt", "B.txt")}
    files |= {name: JPEG for name in ("a.jpg", "a.b.jpg", "B.jpg")}
    source = open_captioned(write(tmp_path, files))
    assert [source.name(i) for i in range(3)] == ["B.jpg", "a.b.jpg", "a.jpg"]


def test_byte_order_marks_and_line_ends(tmp_path):
    mark = b"\xef\xbb\xbf"
    files = {"1.jpg": picture("b.jpg"), "1.TXT": mark + b"one\rtwo\r\nthree\n\n \n"}
    source = open_captioned(write(tmp_path / "texts", files))
    assert source.captions(0) == ("one", "two", "three")
    for suffix, table in (
        ("csv", b'file_name,text\r\n1.jpg,"one, with\nan end of line"\r\n'),
        ("jsonl", b'{"file_name": "1.jpg", "text": "one, with\\nan end of line"}\r\n\r\n'),
    ):
        files = {"1.jpg": picture("b.jpg"), f"metadata.{suffix}": mark + table}
        source = open_captioned(write(tmp_path / suffix, files))
        assert source.captions(0) == ("one, with\nan end of line",)


@pytest.mark.parametrize(
    ("files", "problem", "line"),
    [
        ({"1.png": JPEG}, "image without a caption", r"1.png \(no 1.txt beside it\)"),
        ({"s/1.txt": b"x"}, "caption without an image", r"s/1.txt \(no 1.png, .jpg beside it\)"),
        (
            {"1.txt": b"x", "1.gif": b""},
            "caption without an image",
            r"1.txt \(1.gif is of a format that is not read\)",
        ),
        ({"1.png": JPEG, "1.txt": b"\n \r\n"}, "empty caption", "1.txt"),
        ({"1.png": JPEG, "1.txt": b""}, "empty caption", "1.txt"),
        (
            {"1.png": JPEG, "1.txt": "Bär".encode("latin-1")},
            "caption that is not UTF-8",
            r"1.txt \(byte 2 is 0xe4",
        ),
        (
            {"1.png": JPEG, "1.txt": "fox".encode("utf-16")},
            "caption that is not UTF-8",
            r"1.txt \(byte 1 is 0xff",
        ),
        (
            {"1.png": JPEG, "1.jpg": JPEG, "1.txt": b"x"},
            "second image of one name",
            r"1.png \(1.jpg, 1.png, 1.txt: keep one image and one text file\)",
        ),
    ],
)
def test_text_files_that_cannot_be_used(tmp_path, files, problem, line):
    check_one_bad(write(tmp_path, GOOD | files), "good.jpg", problem, line)


def check_one_bad(root, good, problem, line):
    """The one thing that is bad is named, and left out where that is asked for."""
    with pytest.raises(BadItems, match=rf"{problem}: 1\n +{line}") as error:
        open_captioned(root)
    assert len(error.value.bad) == 1 and error.value.bad[0].problem == problem
    assert "1 of 2 entries cannot be used" in str(error.value)
    assert "--on-bad skip" in str(error.value)
    source = open_captioned(root, on_bad="skip")
    assert source.skipped == error.value.bad
    assert [source.name(i) for i in range(len(source))] == [good]
    assert source.captions(0) == ("a fox",) and source.payload(0) == JPEG
    with pytest.raises(BadItems, match="More than --max-bad 0: look at them"):
        open_captioned(root, on_bad="skip", max_bad=0)


@pytest.mark.parametrize("kind", bad_images())
def test_images_that_cannot_be_used(tmp_path, kind):
    content, reason = bad_images()[kind]
    root = write(tmp_path, GOOD | {"bad.png": content, "bad.txt": b"x"})
    if reason == "truncated":  # which no header shows
        source = open_captioned(root)
        with pytest.raises(ValueError, match=f"cannot read the image 'bad.png': .*{reason}"):
            source.image(0)
    else:
        check_one_bad(root, "good.jpg", "image that cannot be used", named(reason))


@pytest.mark.parametrize("kind", ["empty", "noise", "animated"])
def test_images_of_tars_that_cannot_be_used(tmp_path, kind):
    content, reason = bad_images()[kind]
    members = {"good.jpg": JPEG, "good.txt": b"a fox", "bad.png": content, "bad.txt": b"x"}
    pack(tmp_path / "s.tar", members)
    line = "s.tar/" + named(reason)
    check_one_bad(tmp_path, "s.tar/good.jpg", "image that cannot be used", line)


def named(reason: str) -> str:
    return rf"bad.png \(.*{re.escape(reason)}"


def pack(path: Path, members: dict[str, bytes]) -> Path:
    """A tar as the command `tar` makes it of files that are there in this order."""
    files = write(path.parent / f".{path.stem}", members)
    with tarfile.open(path, "w") as archive:
        for name in members:
            archive.add(files / name, name)
    return path


def test_members_that_are_no_neighbours(tmp_path):
    """tar packs a folder in the order of its file system."""
    members = {
        "x/2.txt": b"two",
        "x/1.jpg": picture("b.jpg"),
        "README": b"no sample",
        "y/1.png": picture("a/2.png"),
        "x/2.png": picture("a/2.png"),
        "y/1.json": b'{"text": ["other"]}',
        "x/1.json": b'{"text": "not this one"}',
        "x/1.txt": b"one",
    }
    source = open_captioned(pack(tmp_path / "s.tar", members))
    found = {source.name(i): (source.captions(i), source.payload(i)) for i in range(3)}
    assert list(found) == ["s.tar/x/2.png", "s.tar/x/1.jpg", "s.tar/y/1.png"]
    assert found["s.tar/x/1.jpg"] == (("one",), picture("b.jpg"))
    assert found["s.tar/x/2.png"] == (("two",), picture("a/2.png"))
    assert found["s.tar/y/1.png"] == (("other",), picture("a/2.png"))


@pytest.mark.parametrize(
    ("members", "problem", "line"),
    [
        ({"1.jpg": JPEG}, "image without a caption", r"s.tar/1.jpg \(neither 1.txt nor 1.json"),
        ({"1.jpg": JPEG, "1.cls": b"3"}, "image without a caption", r"s.tar/1.jpg \(neither"),
        ({"1.txt": b"x"}, "caption without an image", r"s.tar/1 \(expected one of .jpg"),
        ({"1.gif": b"x", "1.txt": b"x"}, "caption without an image", r"s.tar/1 \(expected"),
        ({"1.jpg": JPEG, "1.txt": b" "}, "empty caption", "s.tar/1.jpg"),
        ({"1.jpg": JPEG, "1.txt": b"\xe4"}, "caption that is not UTF-8", r"s.tar/1.jpg \(byte 1"),
        ({"1.jpg": JPEG, "1.json": b'{"caption": "x"}'}, "image without a caption", r"s.tar/1.jpg"
         r' \(1.json has no "text"'),
        ({"1.jpg": JPEG, "1.json": b"{"}, "row that cannot be read", r"s.tar/1.jpg \(1.json: "),
        ({"1.jpg": JPEG, "1.json": b'{"text": 3}'}, "caption that is no text", r"s.tar/1.jpg \(got"
         " 3"),
        ({"good.png": JPEG}, "second image of one name", r"s.tar/good.png \(good.jpg comes before"),
    ],
)  # fmt: skip
def test_tars_that_cannot_be_used(tmp_path, members, problem, line):
    between = {"z.cls": b"1"}  # else the two images would be neighbours
    pack(tmp_path / "s.tar", GOOD | between | members)
    check_one_bad(tmp_path, "s.tar/good.jpg", problem, line)


def test_tars_that_are_damaged(tmp_path):
    pack(tmp_path / "s/1.tar", GOOD | {"good.png": JPEG})
    with pytest.raises(ValueError, match="1.tar: it has two images for one sample"):
        open_captioned(tmp_path / "s")
    packed = gzip.compress((tmp_path / "s/1.tar").read_bytes())
    with pytest.raises(ValueError, match=r"compressed archives \(1.tar.gz\).*unpack"):
        open_captioned(write(tmp_path / "z", {"1.tar.gz": packed}))
    os.truncate(tmp_path / "s/1.tar", 700)
    with pytest.raises(ValueError, match="cannot read the shard .*1.tar"):
        open_captioned(tmp_path / "s")


ROW = b'{"file_name": "good.jpg", "text": "a fox"}\n'


@pytest.mark.parametrize(
    ("row", "problem", "line"),
    [
        (b'{"file_name": "no.jpg", "text": "x"}', "caption without an image", "there is no no.jpg"),
        (b'{"file_name": "x.gif", "text": "x"}', "caption without an image", "x.gif is of a "),
        (b'{"file_name": "x.txt", "text": "x"}', "caption without an image", "x.txt is none of "),
        (b'{"file_name": "./good.jpg", "text": "x"}', "second image of one name",
         "good.jpg has a row before this one"),
        (b'{"file_name": "s/../../a.jpg", "text": "x"}', "name outside the folder",
         r".*names 's/../../a.jpg', which is not below"),
        (b'{"file_name": "/etc/a.jpg", "text": "x"}', "name outside the folder", r".*not below"),
        (b'{"file_name": "1.png"}', "image without a caption", "the row of 1.png has no text"),
        (b'{"file_name": "1.png", "text": ["x", " "]}', "empty caption", "of 1.png"),
        (b'{"file_name": "1.png", "text": null}', "empty caption", "of 1.png: null"),
        (b'{"file_name": "1.png", "text": []}', "empty caption", "of 1.png"),
        (b'{"file_name": "1.png", "text": 7}', "caption that is no text", "of 1.png: got 7"),
        (b'{"file_name": "1.png", "text": {"en": "x"}}', "caption that is no text", "of 1.png"),
        (b'{"file_name": "1.png", "text": "\\ud800"}', "caption that is not UTF-8", "of 1.png"),
        (b'{"file_name": "no.png", "text": "\xe4"}', "caption that is not UTF-8", "byte 34 is"),
        (b'{"file_name": "no.png" "text": "x"}', "row that cannot be read", "Expecting ',' delim"),
        (b'["no.png", "x"]', "row that cannot be read", "it is no JSON object"),
        (b'{"file_name": null, "text": "x"}', "row that cannot be read", "its file_name is None"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(tmp_path, row, problem, line):
    files = {"good.jpg": JPEG, "metadata.jsonl": ROW + row, "x.gif": b"", "x.txt": b"x"}
    if b"1.png" in row:
        files["1.png"] = JPEG
    check_one_bad(write(tmp_path, files), "good.jpg", problem, rf"metadata.jsonl line 2 \({line}")


def test_images_that_no_row_names(tmp_path):
    files = {"good.jpg": JPEG, "metadata.jsonl": ROW, "s/1.png": JPEG, "LICENSE": b""}
    line = r"s/1.png \(no row of metadata.jsonl names it\)"
    check_one_bad(write(tmp_path, files), "good.jpg", "image without a caption", line)
    (tmp_path / "s/1.png").unlink()
    source = open_captioned(tmp_path)
    assert source.notes == ("files passed over: 1 (without a suffix 1)",)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.jsonl", b'{"file_name": "1.jpg", "captions": ["x"]}',
         "must have the columns file_name and text, got file_name, captions; did you mean 'text'. "
         "Rename 'captions'"),
        ("metadata.jsonl", b'{"filename": "1.jpg", "text": "x"}',
         "got filename, text; did you mean 'file_name'. Rename 'filename'"),
        ("metadata.csv", b"a;b\n1;2\n", "got a;b$"),
        ("metadata.csv", b"", "got none$"),
        ("metadata.csv", b"file_name,text\n", "has no row"),
        ("metadata.csv", b"file_name,text\n1.jpg,\xe4\n", "its text is not UTF-8: .*byte 22 is"),
        ("metadata.csv", b'file_name,text\n1.jpg,"x\n', "metadata.csv' at line 2: unexpected end"),
        ("metadata.parquet", b"no table", "cannot read '.*metadata.parquet'"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_read(tmp_path, name, content, words):
    with pytest.raises(ValueError, match=words):
        open_captioned(write(tmp_path, {"1.jpg": JPEG, name: content}))


def test_rows_of_csv_with_a_comma_too_many(tmp_path):
    table = b"file_name,text\ngood.jpg,a fox\n1.png,a fox, red\n"
    root = write(tmp_path, {"good.jpg": JPEG, "metadata.csv": table})
    line = r"metadata.csv line 3 \(expected 2 cells; put texts into quotes\)"
    check_one_bad(root, "good.jpg", "row that cannot be read", line)


def test_a_table_of_another_name_is_given_itself(tmp_path):
    root = write(tmp_path, {"good.jpg": JPEG, "train.jsonl": ROW})
    assert open_captioned(root / "train.jsonl").captions(0) == ("a fox",)
    os.rename(root / "train.jsonl", root / "old_metadata.jsonl")
    with pytest.raises(ValueError, match="holds no images with captions: its files are 2"):
        open_captioned(root)
    os.rename(root / "old_metadata.jsonl", root / "Metadata.jsonl")
    assert open_captioned(root).layout == "metadata"


def test_images_inside_of_a_table_are_refused(tmp_path):
    image = pa.array([{"bytes": JPEG, "path": "1.jpg"}])
    pq.write_table(pa.table({"image": image, "text": ["x"]}), tmp_path / "metadata.parquet")
    with pytest.raises(ValueError, match="got image, text; images inside of tables are not read"):
        open_captioned(tmp_path)
    os.rename(tmp_path / "metadata.parquet", tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="Images inside of tables are not read"):
        open_captioned(tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "holds no images with captions: it is empty; known are .1. a folder of images with"),
        ({"1.jpg": JPEG}, r"no images with captions: its files are 1 \(.jpg 1\); known are"),
        ({"1.txt": b"x"}, r"no images with captions: its files are 1 \(.txt 1\); known are"),
        ({"train/metadata.csv": b"x", "train/1.jpg": JPEG},
         "train/metadata.csv is one level too low: give the folder '.*train'"),
        ({"a/1.tar": b""}, "a/1.tar is one level too low: give the folder '.*a'"),
        ({"metadata.csv": b"", "metadata.jsonl": b""}, "can be read in several ways, it holds "
         "metadata.csv, metadata.jsonl: give the table or the .tar"),
        ({"1.tar": b"", "metadata.jsonl": b""}, "several ways"),
        ({"1.tar": b"", "1.jpg": JPEG, "1.txt": b"x"}, "several ways, it holds 1.tar, 1.jpg"),
    ],
)  # fmt: skip
def test_other_layouts(tmp_path, files, words):
    with pytest.raises(ValueError, match=words):
        open_captioned(write(tmp_path / "data", {".hidden": b""} | files))


def test_paths_that_are_no_folder(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist: the last folder"):
        open_captioned(tmp_path / "nowhere")
    write(tmp_path, GOOD)
    for name in ("good.jpg", "good.txt"):
        with pytest.raises(ValueError, match=rf"{name} holds no images with captions.*known are"):
            open_captioned(tmp_path / name)


def test_many_bad_ones_are_counted_and_the_first_named(tmp_path):
    files = {f"{n:03d}.txt": b"x" for n in range(120)} | {f"e{n}.jpg": JPEG for n in range(3)}
    root = write(tmp_path, GOOD | files)
    with pytest.raises(BadItems) as error:
        open_captioned(root)
    text = str(error.value)
    assert text.startswith("123 of 124 entries cannot be used")
    assert "caption without an image: 120\n" in text and "image without a caption: 3\n" in text
    assert "004.txt" in text and "005.txt" not in text and "... and 115 more" in text
    assert "e2.jpg" in text and len(error.value.bad) == 123
    with pytest.raises(BadItems, match="More than --max-bad 100"):
        open_captioned(root, on_bad="skip")
    source = open_captioned(root, on_bad="skip", max_bad=123)
    assert len(source) == 1 and len(source.skipped) == 123


def test_nothing_is_left(tmp_path):
    root = write(tmp_path, {"1.jpg": b"", "1.txt": b"x"})
    with pytest.raises(ValueError, match="no image with a caption is left in"):
        open_captioned(root, on_bad="skip")


def test_exifs_orientation_is_said_and_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(smooth(60, 40, 2), "PNG", exif=exif)
    source = open_captioned(write(tmp_path, GOOD | {"t.png": turned, "t.txt": b"x"}))
    assert source.size(1) == (60, 40) and source.image(1).size == (60, 40)
    np.testing.assert_array_equal(adm_crop(source.image(1), 40), adm_crop(smooth(60, 40, 2), 40))
    assert len(source.warnings) == 1
    assert "EXIF's orientation, which is not applied as in ADM: 1;" in source.warnings[0]


def test_images_that_are_not_read_are_warned_of(tmp_path):
    root = write(tmp_path, GOOD | {"x.gif": b"", "notes.md": b""})
    (warning,) = open_captioned(root).warnings
    assert warning == "files passed over: 2 (.md 1, .gif 1)"


def test_a_file_that_cannot_be_opened_is_no_bad_image(tmp_path, monkeypatch):
    """A network disk that does not answer must not leave images out."""
    root = write(tmp_path, GOOD)
    path_open = Path.open

    def fail(self, *args, **options):
        if self.name == "good.jpg":
            raise OSError(5, "Input/output error", str(self))
        return path_open(self, *args, **options)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match="Input/output error"):
        open_captioned(root, on_bad="skip")


def test_headers_of_tars_are_read_without_the_images(tmp_path, monkeypatch):
    """Of a large image only what its header needs."""
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), "PNG")
    pack(tmp_path / "s.tar", {"1.png": content, "1.txt": b"x"})
    counts = []
    pread = os.pread

    def counted(descriptor, count, offset):
        counts.append(count)
        return pread(descriptor, count, offset)

    monkeypatch.setattr("os.pread", counted)
    source = open_captioned(tmp_path)
    assert source.size(0) == (400, 400) and sum(counts) < 100_000 < len(content)
    assert source.payload(0) == content


def test_progress_counts_all(tmp_path):
    seen = []
    files = {f"{n:03d}.jpg": JPEG for n in range(70)} | {f"{n:03d}.txt": b"x" for n in range(70)}
    open_captioned(write(tmp_path, files), progress=seen.append)
    assert sum(seen) == 70 and len(seen) > 1
