"""A digest tells weights apart, and not the files that they lie in."""

import torch
from torch import nn

from mixflow_fast.models.weights.digest import weights_sha256


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_values_names_and_types_decide() -> None:
    mine = weights_sha256(network())
    assert len(mine) == 64 and mine == weights_sha256(network())
    other = network()
    with torch.no_grad():
        other[0].bias[1] += 1e-6
    named = nn.ModuleDict({"a": network()[0], "b": network()[1]})
    found = [mine, weights_sha256(network(1)), weights_sha256(other), weights_sha256(named)]
    found += [weights_sha256(network().bfloat16()), weights_sha256(network().double())]
    assert len(set(found)) == len(found)
    loaded = network(1)
    loaded.load_state_dict(network().state_dict())
    assert weights_sha256(loaded) == mine
