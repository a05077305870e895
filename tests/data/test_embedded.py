"""The embedded datasets against scikit-learn's own pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixflow_fast.data import Digits, Photos
from tests.support.datasets import every, get, halved_photos, sklearn_datasets


@pytest.mark.parametrize("split", ["train", "heldout", "all"])
def test_photo_windows_are_slices_of_the_halved_photographs(split):
    dataset, truth = Photos(split), halved_photos()
    indices = torch.cat([every(dataset)[:: len(dataset) // 50], torch.tensor([len(dataset) - 1])])
    batch = dataset.get(indices, torch.zeros_like(indices), 0)
    assert batch.x.shape == (len(indices), 3, 16, 16) and batch.x.dtype == torch.float32
    for x, y, photo, row, col in zip(batch.x, batch.y, *dataset.locate(indices), strict=True):
        window = truth[photo, row : row + 16, col : col + 16].transpose(2, 0, 1)
        assert y == photo
        np.testing.assert_allclose(x.double().numpy(), window, rtol=0, atol=1e-6)


def test_photo_splits_share_no_pixel_and_cover_their_bands():
    covered = {}
    for split in ("train", "heldout"):
        dataset = Photos(split)
        places = torch.stack(dataset.locate(every(dataset)), dim=1)
        assert len(places.unique(dim=0)) == len(dataset)  # no window twice
        mask = np.zeros((2, 213, 320), bool)
        for photo, row, col in places.tolist():
            mask[photo, row : row + 16, col : col + 16] = True
        covered[split] = mask
        # A window inside one band starts in the band that it ends in.
        start, end = places[:, 2], places[:, 2] + 15
        assert torch.equal(start // 53, end // 53)
        assert torch.equal(start % 53 >= 33, end % 53 >= 33)
    assert not (covered["train"] & covered["heldout"]).any()
    assert covered["train"].sum() == 2 * 213 * 6 * 33
    assert covered["heldout"].sum() == 2 * 213 * 6 * 20
    assert len(Photos("train")) == 2 * 198 * 6 * 18 and len(Photos("heldout")) == 2 * 198 * 6 * 5
    assert len(Photos("all")) == 2 * 198 * 305


def test_digits_are_the_images_and_the_splits_partition_them():
    raw = sklearn_datasets.load_digits()
    train, heldout, full = (Digits(8, split) for split in ("train", "heldout", "all"))
    assert (len(train), len(heldout), len(full)) == (1438, 359, 1797)
    x = full.get(every(full), every(full), 0)
    np.testing.assert_array_equal(x.x[:, 0].numpy(), raw.images / 8 - 1)
    np.testing.assert_array_equal(x.y.numpy(), raw.target)
    assert float(x.x.min()) == -1 and float(x.x.max()) == 1
    np.testing.assert_array_equal(get(heldout, 0, 1).x[:, 0], raw.images[[4, 9]] / 8 - 1)
    np.testing.assert_array_equal(get(train, 3, 4).x[:, 0], raw.images[[3, 5]] / 8 - 1)
    for size in (16, 32):
        big = get(Digits(size, "all"), 7).x
        block = np.kron(raw.images[7] / 8 - 1, np.ones((size // 8, size // 8)))
        np.testing.assert_array_equal(big[0, 0].numpy(), block)


@pytest.mark.parametrize("bad", [-1, 1797])
def test_indices_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 1797\)"):
        get(Digits(8, "all"), 0, bad)
