"""Training in bf16 against training in float32, on embedded images; and that a batch is learnt.

Measured on a CPU, SiT of depth 1 and width 32, batch 8, AdamW at 1e-3, EMA of 0.98, the same
examples, noise and times. Loss: of 10-step windows; EMA: distance between the two runs' EMA
weights over the distance that float32's moved.

    steps    loss, largest window    loss, mean    EMA
      100                  1.8e-4       -1.3e-5   0.013
    1,000                  5.3e-4       -3.5e-5   0.118
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.data import build_dataset
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.models import load_weights
from mixflow_fast.training.build import build_model
from mixflow_fast.training.trainer import train
from tests.support.train_ranks import TINY


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on several, and much slower where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def configured(out: Path, precision: str, steps: int, *more: str) -> Config:
    own = [f"out={out}", f"train.precision={precision}", f"train.images={8 * steps}"]
    own += ["train.zero_stage=2", "optim.lr=1e-3", "optim.ema_decays=[0.98]", "train.log_every=10"]
    return load_config("photos", [*TINY, *own, *more])


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl")]


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((a[name] - b[name]).square().sum()) for name in b))


def drift(folder: Path, steps: int) -> tuple[list[float], float]:
    """(relative differences of the windows' losses, EMA's distance over its way)."""
    found = []
    for precision in ("fp32", "bf16"):
        config = configured(folder / precision, precision, steps)
        train(config, quiet=True)
        ema = load_weights(folder / precision / "weights.pt", "ema")
        found.append((losses(folder / precision), ema))
    (exact, ema), (rounded, other) = found
    assert exact[-1] < 0.8 * exact[0]  # it is training that is compared
    moved = distance(ema, build_model(config.model).state_dict())
    return [b / a - 1 for a, b in zip(exact, rounded, strict=True)], distance(ema, other) / moved


def test_a_hundred_steps_of_bf16_follow_float32(tmp_path: Path) -> None:
    differences, ema = drift(tmp_path, 100)
    assert max(map(abs, differences)) < 1e-3
    assert ema < 0.03


@pytest.mark.long
def test_a_thousand_steps_of_bf16_follow_float32(tmp_path: Path) -> None:
    differences, ema = drift(tmp_path, 1000)
    print(f"loss {max(map(abs, differences)):.2g}, mean {np.mean(differences):.2g}, EMA {ema:.3f}")
    assert max(map(abs, differences)) < 3e-3
    assert abs(float(np.mean(differences))) < 5e-4
    assert ema < 0.25


def test_one_small_batch_is_learnt(tmp_path: Path) -> None:
    """Four images, new noise and times at every step: the loss falls below a third."""
    dataset = build_dataset("photos", size=16)
    batch = dataset.get(torch.arange(4) * (len(dataset) // 4), torch.arange(4), 0)
    np.savez(tmp_path / "set.npz", latents=batch.x.numpy(), labels=batch.y.numpy())
    more = [f"data={{kind: latents, path: {tmp_path / 'set.npz'}}}", "train.label_dropout=0"]
    more += ["model.hidden_size=64", "optim.lr=3e-3", "train.log_every=20"]
    train(configured(tmp_path / "run", "bf16", 120, *more), quiet=True)
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] / 3, found
