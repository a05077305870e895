"""Latents in every layout: exact values, the posterior, refusals."""

from __future__ import annotations

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch

from mixflow_fast.data import Latents, Photos
from mixflow_fast.data.dataset import joined, without_flips
from mixflow_fast.data.label_dropout import LabelDropout
from mixflow_fast.data.latents_store import LatentsStore, Normalisation
from mixflow_fast.kernels.interpolate import sample_moments
from mixflow_fast.kernels.philox import Stream, normal, uniform
from mixflow_fast.objective import MixFlow
from tests.support.datasets import (
    FEATURES,
    LABELS,
    LATENTS,
    MOMENTS,
    WRITERS,
    content,
    get,
    write_folder,
    write_npy,
    write_npz,
    write_repa,
)
from tests.support.latents import LABELS as STORE_LABELS
from tests.support.latents import ROWS, write_store
from tests.support.latents import SOURCE as STORE_SOURCE
from tests.support.prepared import LABELS as PREPARED_LABELS
from tests.support.prepared import PIXELS, write_prepared
from tests.support.prepared import SOURCE as PREPARED_SOURCE


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_latents_come_back_exactly_in_float32(tmp_path, write, dtype):
    dataset = Latents(write(tmp_path, LATENTS.astype(dtype)), scale=0.5)
    assert (len(dataset), dataset.shape, dataset.num_classes) == (6, (4, 2, 3), 5)
    batch = get(dataset, 5, 0, 3)
    assert batch.x.dtype == torch.float32 and batch.features is None
    expected = LATENTS.astype(dtype).astype(np.float32)[[5, 0, 3]] * np.float32(0.5)
    np.testing.assert_array_equal(batch.x.numpy(), expected)
    assert batch.y.tolist() == [4, 0, 2]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_moments_are_given_out_as_they_are_stored(tmp_path, write, dtype):
    """The posterior is drawn by `MixFlow.prepare`, with the position's noise."""
    stored = MOMENTS.astype(dtype)
    dataset = Latents(write(tmp_path, stored), scale=0.18215, moments=True)
    assert dataset.shape == (2, 2, 3)
    batch = get(dataset, 4, 1, seed=11, first=50)
    mean, std = np.split(stored[[4, 1]], 2, axis=1)
    np.testing.assert_array_equal(batch.x.mean.numpy(), mean)
    np.testing.assert_array_equal(batch.x.std.numpy(), std)
    assert batch.x.scale == 0.18215 and joined(batch.x) is not None  # halves of one buffer
    noise = normal(11, Stream.POSTERIOR, batch.positions, 12).view(2, 2, 2, 3)
    expected = (mean.astype(np.float64) + std * noise.double().numpy()) * 0.18215
    mix = MixFlow(gamma=0, clock="noise_at_1", seed=11)
    x = mix.prepare(
        batch.x, ids=batch.positions, t=torch.zeros(2), slowed_t=torch.zeros(2), dtype=torch.float32
    ).x
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_posterior_samples_have_the_stored_mean_and_std(tmp_path):
    dataset = Latents(write_npz(tmp_path, MOMENTS), moments=True)
    count = 4000
    batch = dataset.get(torch.full((count,), 2), torch.arange(count), 0)
    x = sample_moments(batch.x, 0, batch.positions).double()
    mean, std = (torch.from_numpy(part).double() for part in np.split(MOMENTS[2], 2))
    assert ((x.mean(0) - mean).abs() < 5 * std / count**0.5).all()
    assert ((x.std(0) - std).abs() < 5 * std / (2 * count) ** 0.5).all()


def test_features_travel_with_their_latents(tmp_path):
    path = write_npz(tmp_path, LATENTS, features=FEATURES)
    batch = get(Latents(path), 3, 1)
    assert batch.features.dtype == torch.float32
    np.testing.assert_array_equal(batch.features.numpy(), FEATURES[[3, 1]].astype(np.float32))
    assert get(Latents(path, features=False), 3).features is None
    write_npy(tmp_path, LATENTS)
    assert get(Latents(tmp_path / "set.npy"), 3).features is None
    np.save(tmp_path / "other.npy", FEATURES[::-1])
    batch = get(Latents(tmp_path / "set.npy", features=tmp_path / "other.npy"), 5)
    np.testing.assert_array_equal(batch.features.numpy(), FEATURES[:1].astype(np.float32))
    np.save(tmp_path / "features.npy", FEATURES)
    batch = get(Latents(tmp_path / "set.npy"), 3)
    np.testing.assert_array_equal(batch.features.numpy(), FEATURES[3:4].astype(np.float32))
    np.save(tmp_path / "features.npy", FEATURES[:5])
    with pytest.raises(ValueError, match="features must have one row per latent, 6, got 5"):
        Latents(tmp_path / "set.npy")


def test_npy_is_memory_mapped_and_never_written(tmp_path):
    path = write_npy(tmp_path, LATENTS)
    dataset = Latents(path)
    assert isinstance(dataset._files.x, np.memmap)
    get(dataset, 0).x.fill_(9.0)
    np.testing.assert_array_equal(np.load(path), LATENTS)
    get(Latents(write_npy(tmp_path, MOMENTS), moments=True), 0).x.mean.fill_(9.0)
    np.testing.assert_array_equal(np.load(path), MOMENTS)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("x", "labels", "kwargs", "message"),
    [
        (LATENTS[:, 0], LABELS, {}, r"latents of .* must be \(N, C, H, W\)"),
        (LATENTS.astype(np.float64), LABELS, {}, "must be float16 or float32, got float64"),
        (LATENTS[:, :3], LABELS, {"moments": True}, "even number of channels"),
        (LATENTS, LABELS - 1, {}, "labels must lie in"),
        (LATENTS, LABELS, {"num_classes": 4}, r"labels must lie in \[0, 4\), got 0 to 4"),
        (LATENTS, LABELS.astype(np.float32), {}, "labels must be .* integers"),
        (LATENTS, LABELS, {"scale": 0.0}, "scale must be"),
        (LATENTS, LABELS, {"features": "no/such.npy"}, "such.npy"),
    ],
)
def test_bad_latents_are_refused(tmp_path, write, x, labels, kwargs, message):
    with pytest.raises(ValueError, match=message):
        Latents(write(tmp_path, x, labels), **kwargs)


@pytest.mark.parametrize("write", [write_npz, write_npy, write_folder])
def test_counts_must_agree(tmp_path, write):
    with pytest.raises(ValueError, match="labels must have one entry per latent, 6, got 5"):
        Latents(write(tmp_path, LATENTS, LABELS[:5]))


@pytest.mark.parametrize("write", [write_npz, write_npy, write_folder, write_repa])
def test_pickled_arrays_are_refused(tmp_path, write):
    with pytest.raises(ValueError, match="cannot read the arrays of"):
        Latents(write(tmp_path, LATENTS.astype(object)))


def test_log_variances_and_unlabelled_or_unknown_paths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="log-variance"):
        get(Latents(write_npz(tmp_path, LATENTS), moments=True), *range(6))
    np.savez(tmp_path / "m.npz", moments=MOMENTS, y=LABELS)
    with pytest.raises(ValueError, match="pass moments=True"):
        Latents(tmp_path / "m.npz")
    assert len(Latents(tmp_path / "m.npz", moments=True)) == 6
    np.save(tmp_path / "alone.npy", LATENTS)
    with pytest.raises(ValueError, match="alone_labels.npy or labels.npy"):
        Latents(tmp_path / "alone.npy")
    with pytest.raises(ValueError, match="path .*none.npz does not exist: the last folder of it"):
        Latents(tmp_path / "none.npz")
    (tmp_path / "notes.txt").write_text("no latents")
    with pytest.raises(ValueError, match="path must be a .npz, a .npy or a folder"):
        Latents(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"one of latents.npy, .*, dataset.json, got none"):
        Latents(tmp_path / "empty")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 but no archive")
    with pytest.raises(ValueError, match="cannot read the arrays of .*broken.npz"):
        Latents(tmp_path / "broken.npz")


def test_a_part_of_a_folder_of_latents_is_sent_to_the_folder(tmp_path):
    folder = write_repa(tmp_path, LATENTS)
    with pytest.raises(ValueError, match="give the folder that holds it"):
        Latents(folder / "dataset.json")
    with pytest.raises(ValueError, match=f"{str(folder)!r} has a dataset.json.* give that folder"):
        Latents(folder / "00000")


def test_plain_latents_taken_for_moments_are_named_as_such(tmp_path):
    with pytest.raises(ValueError, match=r"log-variance.*plain latents, .*data.moments=false"):
        Latents(write_npz(tmp_path, LATENTS), moments=True).statistics()
    np.savez(tmp_path / "m.npz", moments=MOMENTS, y=LABELS)
    with pytest.raises(ValueError, match=r"data.moments=true"):
        Latents(tmp_path / "m.npz")


@pytest.mark.parametrize("moments", [False, True])
def test_files_that_are_listed_must_be_there(tmp_path, moments):
    """Seen when the data are opened, not after hours of training."""
    write_repa(tmp_path, MOMENTS if moments else LATENTS)
    (tmp_path / "00001/img-00000004.npy").unlink()
    message = r"lists 6 files, of which 1 are not there, such as '00001/img-00000004.npy'"
    with pytest.raises(ValueError, match=message):
        Latents(tmp_path, moments=moments)
    shutil.rmtree(tmp_path / "00000")
    with pytest.raises(ValueError, match="of which 4 are not there"):
        Latents(tmp_path, moments=moments)


def test_a_million_listed_files_cost_one_listing_a_folder(tmp_path, monkeypatch):
    """On a network disk a look at each file takes minutes."""
    write_repa(tmp_path, LATENTS)
    listed, looked_at = [], []
    listdir, stat = os.listdir, os.stat
    monkeypatch.setattr(os, "listdir", lambda path: [listed.append(path), listdir(path)][1])
    monkeypatch.setattr(os, "stat", lambda path, **k: [looked_at.append(path), stat(path, **k)][1])
    Latents(tmp_path)
    assert sorted(listed) == [tmp_path / "00000", tmp_path / "00001"]
    assert sum(".npy" in str(path) and "img-" in str(path) for path in looked_at) <= 1


def test_a_file_that_is_listed_twice_is_refused(tmp_path):
    index = write_repa(tmp_path, LATENTS) / "dataset.json"
    pairs = json.loads(index.read_text())["labels"]
    index.write_text(json.dumps({"labels": [*pairs, [pairs[0][0], 1]]}))
    with pytest.raises(ValueError, match="lists 1 of its 7 files twice"):
        Latents(tmp_path)


@pytest.mark.parametrize("name", ["../other/1.npy", "a/../../other/1.npy", "{}/other/1.npy"])
def test_a_list_names_files_of_its_own_folder(tmp_path, name):
    """The files are there, and a link to them is their user's own choice."""
    name = name.format(tmp_path)
    folder, other = tmp_path / "latents", tmp_path / "other"
    other.mkdir()
    (folder / "a").mkdir(parents=True)
    np.save(other / "1.npy", LATENTS[0])
    (folder / "dataset.json").write_text(json.dumps({"labels": [[name, 0]]}))
    with pytest.raises(ValueError, match=f"dataset.json names {re.escape(repr(name))}, which is"):
        Latents(folder)
    (folder / "link").symlink_to(other)
    (folder / "dataset.json").write_text(json.dumps({"labels": [["link/1.npy", 0]]}))
    assert len(Latents(folder)) == 1


SCALED = np.random.RandomState(0).standard_normal((300, 4, 4, 4)).astype(np.float32) / 0.18215
NUMBERED = np.arange(300) % 7


@pytest.mark.parametrize(
    ("stored", "scale", "cause"),
    [
        (SCALED, 0.18215, ""),
        (SCALED * 0.18215, 1.0, ""),
        (
            SCALED * 0.18215,
            0.18215,
            r"std of 0.18\d*, expected about 1 .* twice: set data.scale=1$",
        ),
        (SCALED, 1.0, r"std of 5.\d*, .* Stable Diffusion's .* set data.scale=0.18215$"),
        (SCALED * 0.18215**2, 0.18215, r"stored ones have 0.18\d*: check how they were made"),
        (SCALED * 0, 1.0, "stored ones have 0: check"),
        (SCALED * np.nan, 1.0, "NaN or infinite"),
    ],
)
def test_a_wrong_scale_is_seen_before_the_first_step(tmp_path, stored, scale, cause):
    statistics = Latents(write_npz(tmp_path, stored, NUMBERED), scale=scale).statistics()
    assert statistics.examples == 256
    assert re.search(cause, statistics.warning()) if cause else not statistics.warning()
    if not cause:
        assert abs(statistics.mean) < 0.05 and abs(statistics.std - 1) < 0.05
        assert re.fullmatch(r"mean \S+, std \S+ after scale \S+ \(256 examples\)",
                            statistics.describe())  # fmt: skip


@pytest.mark.parametrize("write", WRITERS)
def test_the_digest_is_of_the_data_not_of_where_they_are(tmp_path, write, monkeypatch):
    def summary(x, labels=LABELS, folder="set", **kwargs):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
        (tmp_path / folder).mkdir()
        return Latents(write(tmp_path / folder, x, labels), **kwargs).summary()

    first = summary(LATENTS)
    assert first.describe() == "6 latents, 5 classes, 4 x 2 x 3"
    assert summary(LATENTS, folder="elsewhere") == first
    if write in (write_folder, write_repa):
        monkeypatch.chdir(tmp_path / "set")
        assert Latents(".").summary() == first
    np.save(tmp_path / "features.npy", FEATURES)
    others = [
        summary(LATENTS[:5], LABELS[:5]),
        summary(LATENTS, LABELS[::-1].copy()),
        summary(LATENTS[::-1]),
        summary(LATENTS.astype(np.float16)),
        summary(LATENTS, features=tmp_path / "features.npy"),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 6


def test_a_set_says_itself_what_it_holds(tmp_path):
    dataset = Latents(write_store(tmp_path / "set"))
    assert (dataset.moments, dataset.scale, dataset.mirrors, dataset.flip) == (True, 0.5, 2, True)
    assert dataset.shape == (2, 3, 2) and len(dataset) == 5 and dataset.num_classes == 3
    assert Latents(tmp_path / "set", scale=0.5, moments=True, mirrors=2).scale == 0.5
    summary = dataset.summary()
    assert summary.describe() == "5 latents, 3 classes, 2 x 3 x 2"
    assert summary.notes == (
        "moments of AutoencoderKL (weights 555555555555) in fp32, stored as float16, with their "
        "mirror images",
    )
    unmirrored = Latents(tmp_path / "set", mirrors=1)
    assert not unmirrored.flip and unmirrored.summary().digest != summary.digest
    (tmp_path / "set").rename(tmp_path / "elsewhere")
    assert Latents(tmp_path / "elsewhere").summary() == summary


def test_a_position_picks_the_image_or_its_mirror(tmp_path):
    dataset = Latents(write_store(tmp_path / "set"))
    indices, positions = torch.arange(40) % 5, torch.arange(100, 140)
    flipped = uniform(7, Stream.FLIP, positions)[:, 0] < 0.5
    assert 10 < flipped.sum() < 30
    dataset.willneed(indices, positions, 7)
    batch = dataset.get(indices, positions, 7)
    assert torch.equal(content(batch), ROWS.half()[2 * indices + flipped])
    assert batch.x.mean.dtype == torch.float16 and joined(batch.x) is not None
    assert batch.y.tolist() == STORE_LABELS[indices].tolist()
    for plain in (Latents(tmp_path / "set", mirrors=1), without_flips(dataset)):
        batch = plain.get(indices, positions, 7)
        assert torch.equal(content(batch), ROWS.half()[2 * indices])


@pytest.mark.parametrize(
    ("info", "given", "message"),
    [
        ({}, {"scale": 0.18215}, "data.scale=0.18215, but the manifest of .*set' says 0.5: leave"),
        ({}, {"moments": False}, r"data.moments=false, but .* holds moments \(mean \| std\)"),
        ({"kind": "sample"}, {"moments": True}, "data.moments=true, but .* latents, one sample"),
        ({"mirrors": 1}, {"mirrors": 2}, "data.mirrors=2, but .* says 1: .*encode --mirrors 2"),
        ({}, {"num_classes": 2}, r"labels must lie in \[0, 2\), got 0 to 2"),
        (
            {},
            {"features": "features.npy"},
            "features are of the images as .*data.mirrors=1",
        ),
        (
            {"kind": "sample", "normalisation": Normalisation((0.0,) * 4, (1.0,) * 4)},
            {"scale": 0.5},
            "data.scale=0.5, but .* says 1: leave",
        ),
    ],
)
def test_what_contradicts_a_set_is_refused_with_both_values(tmp_path, info, given, message):
    mirrors = info.get("mirrors", 2)
    write_store(tmp_path / "set", ROWS[:: 3 - mirrors], **info)
    np.save(tmp_path / "features.npy", FEATURES[:5])
    if "features" in given:
        given = {"features": tmp_path / given["features"]}
    with pytest.raises(ValueError, match=message):
        Latents(tmp_path / "set", **given)


def test_samples_are_normalised_by_channel_where_the_set_says_so(tmp_path):
    mean, std = (0.5, -1.0, 2.0, 3.0), (2.0, 0.5, 1.5, 4.0)
    write_store(tmp_path / "set", kind="sample", normalisation=Normalisation(mean, std, 0.7))
    dataset = Latents(tmp_path / "set", mirrors=1)
    assert dataset.shape == (4, 3, 2) and not dataset.moments
    x = get(dataset, 3, 1).x
    plain = ROWS[[6, 2]].double()
    expected = (plain - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None] * 0.7
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), expected, rtol=1e-6, atol=1e-6)
    write_store(tmp_path / "plain", kind="sample")
    assert torch.equal(get(Latents(tmp_path / "plain", mirrors=1), 3, 1).x, ROWS[[6, 2]] * 0.5)


def test_images_of_a_set_are_paired_by_number_and_mirrored_along(tmp_path):
    pixels = np.random.RandomState(5).randint(0, 256, (21, 3, 8, 8), np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    dataset = Latents(write_store(tmp_path / "set", size=8), images=tmp_path / "images.npy")
    with pytest.raises(ValueError, match="are of images of 24 pixels, those of .* have 8: give"):
        Latents(write_store(tmp_path / "larger"), images=tmp_path / "images.npy")
    indices, positions = torch.arange(20) % 5, torch.arange(20)
    batch = dataset.get(indices, positions, 3)
    flipped = (uniform(3, Stream.FLIP, positions)[:, 0] < 0.5).numpy()
    assert 0 < flipped.sum() < 20
    for image, index, flip in zip(batch.images.numpy(), indices.tolist(), flipped, strict=True):
        expected = pixels[STORE_SOURCE[index]]
        np.testing.assert_array_equal(image, expected[..., ::-1] if flip else expected)


def test_images_may_be_the_prepared_set(tmp_path):
    write_prepared(tmp_path / "images")
    rows = ROWS[:1].repeat(14, 1, 1, 1)
    store = {"labels": PREPARED_LABELS, "source": PREPARED_SOURCE, "size": None}
    dataset = Latents(write_store(tmp_path / "set", rows, **store), images=tmp_path / "images")
    indices, positions = torch.arange(21) % 7, torch.arange(21)
    flipped = uniform(0, Stream.FLIP, positions)[:, 0] < 0.5
    pixels = PIXELS.permute(0, 3, 1, 2)
    expected = torch.stack([pixels, pixels.flip(-1)])[flipped.long(), indices]
    assert torch.equal(dataset.get(indices, positions, 0).images, expected)


def test_a_loader_writes_rows_straight_into_its_memory(tmp_path, monkeypatch):
    dataset = Latents(write_store(tmp_path / "set"))
    indices, positions = torch.arange(20) % 5, torch.arange(20)
    batch, told = dataset.get(indices, positions, 3), []
    out = batch.map(lambda value: torch.full_like(value, 77))
    monkeypatch.setattr(type(dataset), "get", None)  # not by way of a batch of its own
    monkeypatch.setattr(LatentsStore, "willneed", lambda store, rows: told.append(rows))
    dropout = LabelDropout(dataset, 0.0, None)
    dropout.willneed(indices, positions, 3)
    dropout.fill(out, indices, positions, 3)
    for ours, theirs in zip(out.buffers(), batch.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(told[0], dataset.rows_of(indices, positions, 3))
    LabelDropout(Photos(), 0.0, None).willneed(indices, positions, 3)  # has nothing to be told


def test_features_of_a_set_are_paired_by_number_and_mirror(tmp_path):
    rows = torch.arange(2 * 6 * 4 * 3).view(12, 4, 3) / 8
    numbers = np.array([20, 8, 3, 7, 4, 5])
    features = {"kind": "features", "labels": np.zeros(6, int), "source": numbers}
    write_store(tmp_path / "features", rows, **features)
    dataset = Latents(write_store(tmp_path / "set"), features=tmp_path / "features")
    indices, positions = torch.arange(20) % 5, torch.arange(20)
    flipped = uniform(0, Stream.FLIP, positions)[:, 0] < 0.5
    place = torch.tensor([numbers.tolist().index(STORE_SOURCE[i]) for i in indices.tolist()])
    batch = dataset.get(indices, positions, 0)
    assert batch.features.dtype == torch.float32
    assert torch.equal(batch.features, rows[2 * place + flipped])
    write_store(tmp_path / "one", rows[::2], **features | {"mirrors": 1})
    with pytest.raises(ValueError, match="latents have 2 mirrors, the features .* 1: .*mirrors=1"):
        Latents(tmp_path / "set", features=tmp_path / "one")
    assert Latents(tmp_path / "set", features=tmp_path / "one", mirrors=1).mirrors == 1
    lacking = {**features, "labels": np.zeros(5, int), "source": numbers[1:]}
    write_store(tmp_path / "few", rows[2:], **lacking)
    with pytest.raises(ValueError, match="1 of 5 latents have no features in .* number 20"):
        Latents(tmp_path / "set", features=tmp_path / "few")
    with pytest.raises(ValueError, match="holds features: give it as data.features"):
        Latents(tmp_path / "features")
    with pytest.raises(ValueError, match="must be a set of features"):
        Latents(tmp_path / "set", features=tmp_path / "set")


def test_rows_of_unknown_images_are_paired_with_nothing(tmp_path):
    """LightningDiT's shards do not name their images: -1, which is no place in an array."""
    unknown = write_store(tmp_path / "set", source=np.full(5, -1))
    np.save(tmp_path / "images.npy", np.zeros((5, 3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="do not say which image a row is of"):
        Latents(unknown, images=tmp_path / "images.npy")
    rows = torch.ones(10, 4, 3)
    write_store(tmp_path / "features", rows, kind="features", source=np.full(5, -1))
    for latents in (unknown, write_store(tmp_path / "known")):
        with pytest.raises(ValueError, match="do not say which image a row is of"):
            Latents(latents, features=tmp_path / "features")
    assert len(Latents(unknown)) == 5


def test_plain_files_hold_no_mirrors(tmp_path):
    with pytest.raises(ValueError, match="mirrors=2 needs latents of the mirrored images"):
        Latents(write_npz(tmp_path, MOMENTS), moments=True, mirrors=2)
    assert not Latents(tmp_path / "set.npz", moments=True, mirrors=1).flip


def test_a_set_that_is_not_whole_says_how_it_is_finished(tmp_path):
    write_store(tmp_path / "set")
    (tmp_path / "set/manifest.json").unlink()
    with pytest.raises(ValueError, match="3 of 3 shards are done; run the command"):
        Latents(tmp_path / "set")
