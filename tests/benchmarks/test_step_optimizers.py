"""`benchmarks.deepspeed_cost`: both arms train the same network, and the ratio is one of times."""

import json

import pytest
import torch

from benchmarks import deepspeed_cost
from mixflow_fast.config.loading import load_config
from mixflow_fast.distributed import process_group

TINY = ["model.depth=1", "model.hidden_size=32", "model.num_heads=2", "train.global_batch_size=4"]


@pytest.mark.parametrize(("precision", "stage", "limit"), [("fp32", 0, 1e-5), ("bf16", 2, 1e-3)])
def test_both_arms_train_alike(monkeypatch, precision, stage, limit) -> None:
    kept = {}
    weights, engine = deepspeed_cost.Weights, deepspeed_cost.Engine
    monkeypatch.setattr(
        deepspeed_cost, "Weights", lambda net: kept.setdefault("bare", weights(net))
    )
    monkeypatch.setattr(
        deepspeed_cost, "Engine", lambda *a: kept.setdefault("deepspeed", engine(*a))
    )
    overrides = [f"train.precision={precision}", f"train.zero_stage={stage}", "optim.lr=1e-4"]
    config = load_config("photos", [*TINY, *overrides])
    device = process_group.init_process_group("cpu")
    arms = deepspeed_cost.steps(config, device)
    before = [p.detach().clone() for p in kept["bare"].masters]
    for _ in range(4):
        for step in arms.values():
            step()
    theirs = dict(kept["deepspeed"].gathered("model", stepped=True))
    names = [n for n, p in kept["bare"].single.named_parameters() if p.requires_grad]
    moved = sum((a - b).square().sum() for a, b in zip(kept["bare"].masters, before, strict=True))
    apart = sum(
        (theirs[name].view_as(p) - p).square().sum()
        for name, p in zip(names, kept["bare"].masters, strict=True)
    )
    assert moved > 0 and (apart / moved).sqrt() < limit
    kept["deepspeed"].close()


def test_command(capsys) -> None:
    arguments = ["photos", *TINY, "train.zero_stage=1", "--rounds", "2", "--steps", "1"]
    assert deepspeed_cost.main(arguments) == 0
    row, sentence = capsys.readouterr().out.splitlines()[-2:]
    found = json.loads(row)
    assert found["deepspeed_over_bare"] > 0 and found["zero_stage"] == 1 and "bare" not in found
    assert "no speed" in sentence
    with pytest.raises(SystemExit):
        deepspeed_cost.main(["photos", "train.microbatch_size=2"])
    assert "one micro-batch" in capsys.readouterr().err
    assert torch.nn.functional.linear is torch._C._nn.linear
