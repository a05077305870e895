"""What a scan counts, and what it predicts."""

import shutil

import pytest

from mixflow_fast.data.preparation.imagenet import KNOWN_CMYK, KNOWN_PNG
from mixflow_fast.data.preparation.prepare import Settings, prepare
from mixflow_fast.data.preparation.scan import (
    core_count,
    describe_estimates,
    describe_scan,
    estimate,
    free_bytes,
    halvings,
    scan_source,
)
from mixflow_fast.data.preparation.source import list_source
from mixflow_fast.data.set_files import read_manifest
from tests.support.image_folders import bad_images, encoded, smooth, write_folder


@pytest.mark.parametrize(
    ("sides", "size", "count"),
    [((500, 375), 256, 0), ((512, 512), 256, 1), ((511, 900), 256, 0), ((2048, 1024), 256, 2),
     ((1023, 1023), 256, 1), ((4096, 4096), 256, 4), ((20, 20), 256, 0)],
)  # fmt: skip
def test_halvings(sides, size, count):
    assert halvings(*sides, size) == count


def test_a_scan_counts_what_is_there(tmp_path):
    root = write_folder(tmp_path / "images")
    turned = smooth(64, 64, 1)
    exif = turned.getexif()
    exif[0x0112] = 3
    for name, content in (
        ("grey", encoded(turned.convert("L"), "JPEG")),
        ("cmyk", encoded(turned.convert("CMYK"), "JPEG")),
        ("png", encoded(turned, "PNG")),
        ("turned", encoded(turned, "JPEG", exif=exif)),
        ("palette", encoded(turned.quantize(8), "PNG")),
    ):
        (root / f"b/x {name}.JPEG").write_bytes(content)
    source = list_source(root)
    read: list[int] = []
    found = scan_source(source, 32, threads=2, progress=read.append)
    assert found.bytes == sum(p.stat().st_size for p in root.rglob("*.JPEG")) and sum(read) >= 19
    assert found.formats == {"JPEG": 17, "PNG": 2}
    assert found.modes == {"RGB": 16, "L": 1, "CMYK": 1, "P": 1}
    # 40 x 52 and 48 x 48 and 33 x 64 need none; 131 x 150 needs two; the five here one.
    assert found.halvings == {0: 6, 1: 6 + 5, 2: 2} and found.enlarged == 0
    assert found.oddities == {
        "grey": ["b/x grey.JPEG"],
        "CMYK": ["b/x cmyk.JPEG"],
        "PNG by the name of another format": ["b/x palette.JPEG", "b/x png.JPEG"],
        "mode P": ["b/x palette.JPEG"],
        "EXIF orientation, not applied as in ADM": ["b/x turned.JPEG"],
    }
    assert not found.bad
    text = "\n".join(describe_scan(source, found, 32))
    assert "19 in 2 classes (7 to 12 each)" in text
    assert "6 not halved; 11 halved once; 2 halved 2 times; 0 enlarged" in text
    assert "CMYK: 1, such as b/x cmyk.JPEG" in text and "bad       0" in text
    assert scan_source(source, 64).enlarged == 6


def test_damaged_exif_is_counted_and_harms_nobody(tmp_path, recwarn):
    root = write_folder(tmp_path / "images")
    damaged = b"Exif\0\0II*\0\x08\0\0\0\xff\0" + b"\x12\x01" * 8
    (root / "a/x.JPEG").write_bytes(encoded(smooth(64, 64, 1), "JPEG", exif=damaged))
    source = list_source(root)
    found = scan_source(source)
    assert found.exif_warnings == 1 and not found.bad and not found.oddities
    assert "damaged EXIF, which nobody reads: 1" in "\n".join(describe_scan(source, found, None))
    assert prepare(source, tmp_path / "set", Settings(32)).complete
    assert not [w for w in recwarn if "EXIF" in str(w.message)]


def test_bad_files_are_listed_with_reasons(tmp_path):
    root = write_folder(tmp_path / "images")
    for kind, (content, _) in bad_images().items():
        (root / f"a/x {kind}.JPEG").write_bytes(content)
    source = list_source(root)
    found = scan_source(source, 32)
    seen = {bad.file.removeprefix("a/x ").removesuffix(".JPEG"): bad.reason for bad in found.bad}
    assert seen.keys() == bad_images().keys() - {"half", "no end"}  # cut off: no header shows it
    assert all(bad_images()[kind][1] in reason for kind, reason in seen.items())
    lines = describe_scan(source, found, 32)
    assert lines[-7] == "bad       6:" and "x empty.JPEG: it is empty (0 bytes)" in "\n".join(lines)


def test_known_oddities_of_imagenet_are_said_to_be_known(tmp_path):
    from mixflow_fast.data.preparation.imagenet_synsets import SYNSETS

    cmyk = encoded(smooth(40, 40, 1).convert("CMYK"), "JPEG")
    plain = encoded(smooth(40, 40, 1), "JPEG")
    for name in SYNSETS:
        (tmp_path / name).mkdir()
    by_class = {name.partition("_")[0]: name for name in KNOWN_CMYK | KNOWN_PNG}
    for name in SYNSETS:
        file = tmp_path / name / f"{by_class.get(name, f'{name}_1')}.JPEG"
        file.write_bytes(cmyk if file.stem in KNOWN_CMYK else plain)
    source = list_source(tmp_path)
    text = "\n".join(describe_scan(source, scan_source(source), None))
    assert "CMYK: 22 (all known of ImageNet)" in text
    assert "the 1000 synsets of ImageNet-1k; the training set has 1,281,167 images" in text
    shutil.copy(file.parent / file.name, file.parent / "other.JPEG")
    file.with_name("other.JPEG").write_bytes(cmyk)
    source = list_source(tmp_path)
    text = "\n".join(describe_scan(source, scan_source(source), None))
    assert f"CMYK: 23, such as {file.parent.name}/other.JPEG" in text


@pytest.mark.parametrize("image_format", ["webp", "raw", "jpeg"])
def test_the_predicted_size_is_that_of_the_set(tmp_path, image_format):
    source = list_source(write_folder(tmp_path / "images", each=40))
    found = estimate(source, 32, image_format, most=40)
    assert found.images == 40 and found.seconds > 0
    prepare(source, tmp_path / "set", Settings(32, image_format))
    (shard,) = read_manifest(tmp_path / "set", "mixflow-images/1")["shards"]
    assert found.bytes == pytest.approx(shard["bytes"], rel=0.1)


def test_lines_on_sizes_time_and_disk(tmp_path):
    source = list_source(write_folder(tmp_path / "images"))
    lines = describe_estimates(source, 32, 2, tmp_path / "not/there/yet", "webp")
    assert [line.split()[0] for line in lines] == ["webp", "raw", "jpeg", "free"]
    assert lines[0].endswith("with 2 threads, exact (14 images tried) <- chosen")
    assert "not exact" in lines[2] and lines[3].endswith(f"at {tmp_path}")
    assert free_bytes(tmp_path / "x")[0] > 0


def test_cores_are_shared_by_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert core_count() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert core_count() == 4
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "8(x2)")
    assert core_count() == 2
