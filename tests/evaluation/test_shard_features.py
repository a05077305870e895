"""Features of shards are those of the whole set."""

from pathlib import Path

import numpy as np
import torch

from mixflow_fast.evaluation.features.extractor import ExtractorId, extract
from mixflow_fast.evaluation.sample_sets import read_set, write_set
from mixflow_fast.evaluation.shard_features import ShardFeatures
from tests.support.sample_sets import make, pictures, plan


class Means:
    """Mean colours, which can be seen; counts its images."""

    id = ExtractorId("means", None, "none")
    outputs = ("colours",)
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"colours": images.float().mean(dim=(2, 3))}


def test_features_of_shards_are_those_of_the_set(tmp_path: Path) -> None:
    """Computed with the shards, and again where one is lacking or is of other pictures."""
    network = Means()
    features = ShardFeatures(tmp_path / "a" / "features", [network], 4)
    assert write_set(make, plan(), tmp_path / "a", on_shard=features.on_shard)
    assert network.calls == 3
    made = read_set(tmp_path / "a")
    (found,) = features.gather(made.pictures, "source")
    assert network.calls == 3
    all_of_them = [pictures(torch.arange(11))]
    expected = extract(all_of_them, network, source="source")
    assert np.array_equal(found.arrays["colours"], expected.arrays["colours"])
    assert found.ids.tolist() == list(range(11)) and found.source == "source"
    assert found.extractor == network.id and found.constant == expected.constant
    (tmp_path / "a" / "features" / "00001" / "means.json").unlink()
    other = np.array(made.pictures)
    other[8] = 77  # of one colour, in the last shard
    calls = network.calls
    (again,) = features.gather(other, "other")
    assert network.calls == calls + 2 and again.constant == (8,)
    assert np.array_equal(again.arrays["colours"][:8], expected.arrays["colours"][:8])
    assert again.arrays["colours"][8].tolist() == [77.0] * 3
    features.delete()
    assert not (tmp_path / "a" / "features").exists()
