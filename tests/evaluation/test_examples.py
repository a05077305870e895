"""Examples that are read from a dataset."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixflow_fast.data import build_dataset
from mixflow_fast.data.captioned import CaptionedLatents
from mixflow_fast.evaluation.examples import Examples, read_examples
from mixflow_fast.training.inputs import Inputs
from tests.support.caches import latent_values, write_cache


def test_examples_are_spread_over_the_data() -> None:
    pytest.importorskip("sklearn")
    digits = build_dataset("digits")
    found = read_examples(digits, Inputs(), torch.device("cpu"), 50, "digits", batch_size=97)
    # All of a small set; as they are.
    every = torch.arange(len(digits))
    assert torch.equal(found.x, digits.get(every, every, 0).x) and found.description == "digits"
    assert torch.equal(found.y, digits.get(every, every, 0).y)
    photos = build_dataset("photos", size=16)
    some = read_examples(photos, Inputs(), torch.device("cpu"), 100, "photos")
    assert len(some.x) == 20_000 and some.x.shape[1:] == (3, 16, 16)
    # One half of the windows is of each photograph.
    assert some.y.float().mean() == pytest.approx(0.5, abs=1e-3)
    assert some.spread(4).tolist() == [0, 5000, 10_000, 15_000]
    assert found.spread(3 * len(found.x)).unique().numel() == len(found.x)


def test_what_is_refused() -> None:
    for wrong in (torch.zeros(1, 1, 2, 2), torch.zeros(4, 3)):
        with pytest.raises(ValueError, match=r"must be \(N, C, H, W\), N >= 2"):
            Examples(wrong, None)


def test_of_several_shapes_the_most_frequent_is_read(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "c", buckets={"64x64": range(6), "96x48": range(6, 16)})
    data = CaptionedLatents(cache)
    found = read_examples(data, lambda batch: batch.x, torch.device("cpu"), 4, "examples")
    assert found.x.shape == (10, 16, 6, 12)
    # Nothing but the draw of the posterior, of at most 0.2, lies between them.
    for row in range(10):
        mean = 1.5305 * latent_values(6 + row, 0, (16, 6, 12))[:16].float()
        assert (found.x[row] - mean).square().mean().sqrt() < 0.2 * 1.5305
