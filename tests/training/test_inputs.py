"""What the network trains on, from each kind of batch."""

from __future__ import annotations

import pytest
import torch

from mixflow_fast.data import Batch
from mixflow_fast.data.dataset import split
from mixflow_fast.training.inputs import Inputs

ROW = torch.arange(2)
IMAGES = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 1).view(2, 3, 16, 16)


def test_what_the_data_give_is_taken_as_it_is() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert Inputs()(Batch(x, ROW, ROW)) is x
    moments = split(torch.rand(2, 8, 4, 4), 0.5)
    # Images beside x are the teacher's.
    assert Inputs()(Batch(moments, ROW, ROW, images=IMAGES)) is moments


def test_images_are_scaled_as_official_code_does() -> None:
    x = Inputs()(Batch(None, ROW, ROW, images=IMAGES))
    assert x.dtype == torch.float32 and x.shape == (2, 3, 16, 16)
    exact = IMAGES.double() / 127.5 - 1
    assert (x.double() - exact).abs().max() < 1e-7
    assert x.min() == -1 and x.max() == 1


def test_batches_without_anything_to_train_on() -> None:
    with pytest.raises(ValueError, match="x or images"):
        Inputs()(Batch(None, ROW, ROW))
