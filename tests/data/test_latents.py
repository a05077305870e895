"""Latents in every layout: exact values, the posterior, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixflow_fast.data import Latents
from mixflow_fast.kernels.philox import Stream, normal
from tests.support.datasets import (
    FEATURES,
    LABELS,
    LATENTS,
    MOMENTS,
    WRITERS,
    get,
    write_folder,
    write_npy,
    write_npz,
    write_repa,
)


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
def test_moments_draw_the_posterior_by_position(tmp_path, write):
    dataset = Latents(write(tmp_path, MOMENTS), scale=0.18215, moments=True)
    assert dataset.shape == (2, 2, 3)
    mean, std = np.split(MOMENTS.astype(np.float64)[[4, 1]], 2, axis=1)
    noise = normal(11, Stream.POSTERIOR, torch.tensor([50, 51]), 12).view(2, 2, 2, 3)
    expected = (mean + std * noise.double().numpy()) * 0.18215
    batch = get(dataset, 4, 1, seed=11, first=50)
    np.testing.assert_allclose(batch.x.numpy(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(get(dataset, 1, seed=11, first=51).x, batch.x[1:])
    assert not torch.equal(get(dataset, 1, seed=11, first=52).x, batch.x[1:])


def test_posterior_samples_have_the_stored_mean_and_std(tmp_path):
    dataset = Latents(write_npz(tmp_path, MOMENTS), moments=True)
    count = 4000
    indices = torch.full((count,), 2)
    x = dataset.get(indices, torch.arange(count), 0).x.double()
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
    assert isinstance(dataset._x, np.memmap)
    get(dataset, 0).x.fill_(9.0)
    np.testing.assert_array_equal(np.load(path), LATENTS)


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
    with pytest.raises(ValueError, match="path must be a .npz, a .npy or a folder"):
        Latents(tmp_path / "none.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 but no archive")
    with pytest.raises(ValueError, match="cannot read the arrays of .*broken.npz"):
        Latents(tmp_path / "broken.npz")
