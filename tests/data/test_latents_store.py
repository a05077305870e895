"""Sets of latents: what other readers see, every layout of shards, and what is refused."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mixflow_fast.data.latents_store import LatentsInfo, LatentsStore
from mixflow_fast.data.latents_writer import (
    ShardWriter,
    finish_store,
    to_float16,
)
from mixflow_fast.data.npy_files import padded_header
from mixflow_fast.data.set_files import file_record, read_manifest, write_manifest
from mixflow_fast.data.summary import digest_of
from tests.support.latents import INFO, LABELS, ROWS, SOURCE, write_store

PICKED = torch.tensor([9, 0, 5, 3, 3, 8])


def change(root, **values):
    """Another manifest, as its own program would write it; a value None takes the entry away."""
    record = read_manifest(root, "mixflow-latents/1") | values
    del record["checksum"]
    write_manifest(root, {key: value for key, value in record.items() if value is not None})


def test_rows_come_back_by_sample_and_mirror(tmp_path):
    store = LatentsStore(write_store(tmp_path))
    assert store.shape == (10, 4, 3, 2) and store.dtype == torch.float16
    assert store.labels.tolist() == LABELS.tolist() and store.source.tolist() == SOURCE.tolist()
    store.willneed(PICKED)
    out = torch.full((6, 4, 3, 2), float("nan"), dtype=torch.float16)
    store.fill(out, PICKED)
    assert torch.equal(out, ROWS[PICKED].half()) and torch.equal(store.take(PICKED), out)
    out.fill_(0)  # the caller's memory, never the file
    assert torch.equal(store.take(PICKED), ROWS[PICKED].half())
    assert store.take(PICKED[:0]).shape == (0, 4, 3, 2)


def test_any_reader_of_npy_reads_the_shards(tmp_path):
    write_store(tmp_path)
    files = sorted((tmp_path / "moments").iterdir())
    assert [file.name for file in files] == ["00000.npy", "00001.npy", "00002.npy"]
    arrays = [np.load(file, mmap_mode="r") for file in files]
    assert [array.offset for array in arrays] == [4096] * 3
    np.testing.assert_array_equal(np.concatenate(arrays), ROWS.half().numpy())
    assert np.load(tmp_path / "labels.npy").dtype == np.int32
    assert np.load(tmp_path / "source.npy").dtype == np.int64


def test_statistics_are_those_of_all_rows(tmp_path):
    info = LatentsInfo.read(write_store(tmp_path))
    stored = ROWS.half().double()
    mean, std = stored.mean((0, 2, 3)), stored.std((0, 2, 3), correction=0)
    np.testing.assert_allclose(info.statistics["mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(info.statistics["std"], std, rtol=1e-10)


def test_float16_keeps_what_it_can_hold_and_names_the_rest():
    rows = torch.randn(5, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    rows[:, 4:] = rows[:, 4:].abs() * torch.tensor([1e-7, 1e-4, 1, 100, 6e4])[:, None, None, None]
    rows = rows.clamp(max=65504)
    stored = to_float16(rows, "moments", str)
    error = (stored.float() - rows).norm() / rows.norm()
    assert stored.dtype == torch.float16 and error < 3e-4 and (stored[:, 4:] >= 0).all()
    for value, message in [
        (float("nan"), "latent of image 2 has values that are not finite"),
        (float("inf"), "not finite"),
        (7e4, "latent of image 2 has a value of 7e\\+04, which float16 cannot hold"),
    ]:
        bad = rows.clone()
        bad[2, 1, 3, 0] = value
        with pytest.raises(ValueError, match=message):
            to_float16(bad, "moments", "image {}".format)
    bad = rows.clone()
    bad[3, 6, 0, 0] = -0.5
    with pytest.raises(ValueError, match="latent of image 3 has a negative std.*logvar"):
        to_float16(bad, "moments", "image {}".format)
    assert to_float16(bad, "sample", str)[3, 6, 0, 0] == -0.5


def in_place(root, records, **info):
    """A set whose rows lie in files of another program."""
    values = {"shape": (4, 3, 2), "dtype": "float32", "count": 5, "mirrors": 2, **info}
    plain = LatentsInfo(kind="sample", num_classes=3, **values)
    finish_store(root, plain, records, LABELS, SOURCE)
    return LatentsStore(root)


def test_tensors_of_safetensors_are_read_where_they_lie(tmp_path):
    """LightningDiT's files: a tensor for each mirror, beside others."""
    records = []
    for number, samples in enumerate((range(0, 3), range(3, 5))):
        name = f"latents_rank00_shard{number:03d}.safetensors"
        plain = torch.stack([ROWS[2 * i] for i in samples])
        flipped = torch.stack([ROWS[2 * i + 1] for i in samples])
        tensors = {"latents": plain, "labels": torch.arange(len(samples)), "latents_flip": flipped}
        save_file(tensors, tmp_path / name)
        content = (tmp_path / name).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        first = [8 + length + header[k]["data_offsets"][0] for k in ("latents", "latents_flip")]
        rows = 2 * len(samples)
        records.append({**file_record(tmp_path, name), "rows": rows, "offsets": first})
    store = in_place(tmp_path, records)
    assert store.dtype == torch.float32 and torch.equal(store.take(PICKED), ROWS[PICKED])
    store.willneed(PICKED)


def test_members_of_a_stored_zip_are_read_where_they_lie(tmp_path):
    """Their bytes begin anywhere, at odd addresses too."""
    offsets = np.zeros(10, np.int64)
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_STORED) as archive:
        for row in (7, 0, 3, 1, 2, 9, 8, 4, 5, 6):
            with archive.open(f"{'x' * row}{row}.bin", "w") as member:
                member.write(ROWS[row].numpy().tobytes())
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        for info in archive.infolist():
            offsets[int(info.filename[-5])] = info.header_offset + 30 + len(info.filename)
    assert (offsets % 4 > 0).any()
    (tmp_path / "offsets").mkdir()
    np.save(tmp_path / "offsets/00000.npy", offsets)
    record = {**file_record(tmp_path, "set.zip"), "rows": 10, "offsets": "offsets/00000.npy"}
    store = in_place(tmp_path, [record])
    assert torch.equal(store.take(PICKED), ROWS[PICKED])
    files = [entry["file"] for entry in read_manifest(tmp_path, "mixflow-latents/1")["files"]]
    assert files == ["labels.npy", "source.npy", "offsets/00000.npy"]
    change(tmp_path, shards=[record | {"offsets": "../elsewhere.npy"}])
    with pytest.raises(ValueError, match="names '../elsewhere.npy', which is not below"):
        LatentsStore(tmp_path)
    change(tmp_path, shards=[record])
    np.save(tmp_path / "offsets/00000.npy", offsets + 4000)
    with pytest.raises(ValueError, match="set.zip' must have at least .* bytes for its 10 rows"):
        in_place(tmp_path, [record])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "mixflow-latents/2"}, "mixflow-latents/2.*expected 'mixflow-latents/1'"),
        ({"kind": "moment"}, "does not describe a set of latents .*kind 'moment'"),
        ({"shape": [3, 3, 2]}, "does not describe .*shape \\(3, 3, 2\\)"),
        ({"shape": [8, 3, 2]}, r"00000.npy' must be \(4, 8, 3, 2\) float16.*got \(4, 4, 3, 2\)"),
        ({"dtype": "float32"}, r"must be \(4, 4, 3, 2\) float32, .*got \(4, 4, 3, 2\) float16"),
        ({"count": 6}, "6 samples of 2 rows, 10 rows"),
        ({"mirrors": 1}, "5 samples of 1 rows, 10 rows"),
        ({"num_classes": 2}, r"labels of .* must lie in \[0, 2\), as its manifest says, got 0 to"),
        ({"shape": None}, "does not describe .*'shape'"),
    ],
)
def test_a_manifest_must_fit_the_files(tmp_path, values, message):
    write_store(tmp_path)
    change(tmp_path, **values)
    with pytest.raises(ValueError, match=message):
        LatentsStore(tmp_path)


def test_files_that_are_cut_off_or_gone_are_named(tmp_path):
    file = write_store(tmp_path) / "moments/00001.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"00001.npy has 4,287 bytes, expected 4,288"):
        LatentsStore(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="00001.npy cannot be read"):
        LatentsStore(tmp_path)
    # Sizes that agree with a manifest that is wrong: reading on would kill the process.
    file.write_bytes(padded_header((4, 4, 3, 2), "float16") + content[4096:-100])
    shards = read_manifest(tmp_path, "mixflow-latents/1")["shards"]
    shards[1]["bytes"] = file.stat().st_size
    change(tmp_path, shards=shards)
    with pytest.raises(ValueError, match="00001.npy"):
        LatentsStore(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "sample 3 of .* not finite"), (-1.0, "std channels of sample 3 of .*logvar")],
)
def test_bad_rows_are_seen_when_a_set_is_opened(tmp_path, value, message):
    shard = np.load(write_store(tmp_path) / "moments/00001.npy", mmap_mode="r+")
    shard[3, 2, 1, 1] = value  # its second sample's mirror
    shard.flush()
    with pytest.raises(ValueError, match=message):
        LatentsStore(tmp_path)


def test_wrong_calls_are_refused(tmp_path):
    store = LatentsStore(write_store(tmp_path))
    for rows in (torch.tensor([10]), torch.tensor([-1])):
        with pytest.raises(ValueError, match=r"rows must lie in \[0, 10\)"):
            store.take(rows)
    with pytest.raises(ValueError, match=r"rows must be \(B,\) int64"):
        store.take(torch.tensor([1], dtype=torch.int32))
    with pytest.raises(ValueError, match="out must be contiguous"):
        store.fill(torch.empty(1, 4, 3, 2), torch.tensor([1]))
    with ShardWriter(tmp_path / "x.npy", 1, (4, 3, 2)) as shard:
        with pytest.raises(ValueError, match=r"rows must be \(n, \*\(4, 3, 2\)\) float16"):
            shard.write(ROWS[:1])
        with pytest.raises(ValueError, match="not finite"):
            shard.write(torch.full((1, 4, 3, 2), float("inf"), dtype=torch.float16))
        shard.write(ROWS[:1].half())
    with pytest.raises(ValueError, match="needs 2 rows, got 1"):
        with ShardWriter(tmp_path / "y.npy", 2, (4, 3, 2)) as shard:
            shard.write(ROWS[:1].half())
    assert not (tmp_path / "y.npy").exists()


def test_the_identity_is_of_the_content(tmp_path):
    def digest(name, *args, **kwargs):
        return digest_of(LatentsStore(write_store(tmp_path / name, *args, **kwargs)).identity())

    first = digest("a")
    assert digest("b") == first
    others = [
        digest("c", ROWS.flip(0)),
        digest("d", labels=LABELS[::-1].copy()),
        digest("e", scale=0.25),
    ]
    assert len({first, *others}) == 4
    assert INFO.scale == 0.5
