"""Training on one CPU thread: random numbers, the objective, and a step against SiT's.

    python -m benchmarks.cpu_training [--rounds 30]

The providers of a cell take turns in every round. Times are processor time of this process, in
which other work of the machine shows least; ratios are paired by round, above 1 where ours is
faster. One JSON object a provider:

    normals     (64, 4, 32, 32) standard normals: torch.randn, ours, and the plain lines of ours
    objective   prepare, loss and backward pass of (64, 4, 32, 32) data: `benchmarks.plain`, ours
    step        the training step of the official SiT code (its formulas, AdamW, EMA in a loop over
                the parameters, the loss read every step) and ours: `MixFlow` and `AdamWEMA`, each
                on its own copy of one network. No DeepSpeed, data or logging in either.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.rows import paired_ratio
from mixflow_fast import MixFlow
from mixflow_fast.cli.errors import quiet_without_reader
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.models import SiT
from mixflow_fast.optim.adamw_ema import AdamWEMA

SHAPE = (64, 4, 32, 32)
LR, DECAY = 1e-4, 0.9999
Call = Callable[[], object]


@dataclass(frozen=True)
class Workload:
    """A network and a batch of the cell "step"."""

    name: str
    batch: int
    options: Mapping[str, int | bool]


WORKLOADS = (
    Workload(
        "SiT depth 4, width 96, patch 4, 3x16x16 (recipe photos), B=64",
        64,
        dict(
            input_size=16, in_channels=3, patch_size=4, hidden_size=96, depth=4, num_heads=4,
            num_classes=2, learn_sigma=False,
        ),
    ),
    Workload(
        "SiT-S/8, 4x32x32, B=16",
        16,
        dict(
            input_size=32, in_channels=4, patch_size=8, hidden_size=384, depth=12, num_heads=6,
            num_classes=1000, learn_sigma=True,
        ),
    ),
)  # fmt: skip


class OfficialStep:
    """A step of SiT's train.py and transport: linear path, velocity, uniform times.

    Formulas: arXiv 2401.08740, section 2. x_t = t x1 + (1 - t) x0, u = x1 - x0.
    """

    def __init__(self, net: SiT, x1: Tensor, y: Tensor) -> None:
        self._net, self._x1, self._y = net, x1, y
        self._ema = {name: p.detach().clone() for name, p in net.named_parameters()}
        self._optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0)
        self._running_loss = 0.0

    def __call__(self) -> None:
        x1 = self._x1
        x0, t = torch.randn_like(x1), torch.rand(len(x1))
        times = t.view(-1, 1, 1, 1)
        x_t, target = times * x1 + (1 - times) * x0, x1 - x0
        error = self._net(x_t, t, self._y) - target
        loss = (error**2).mean(dim=(1, 2, 3)).mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        with torch.no_grad():
            for name, p in self._net.named_parameters():
                self._ema[name].mul_(DECAY).add_(p.data, alpha=1 - DECAY)
        self._running_loss += loss.item()


class OurStep:
    """The same network with slowed interpolation and the fused optimizer."""

    def __init__(self, net: SiT, x1: Tensor, y: Tensor) -> None:
        self._net, self._x1, self._y = net, x1, y
        self._mix = MixFlow(gamma=plain.GAMMA, clock=net.clock)
        params = [p for p in net.parameters() if p.requires_grad]
        self._optimizer = AdamWEMA(params, lr=LR, weight_decay=0.0, ema_decay=DECAY)
        self._ids = torch.arange(len(x1))

    def __call__(self) -> None:
        self._ids = self._ids + len(self._ids)
        it = self._mix.prepare(self._x1, ids=self._ids)
        loss = self._mix.loss(self._net(it.x, it.t, self._y), it)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()


def steps(workload: Workload) -> dict[str, Call]:
    torch.manual_seed(0)
    net = SiT(**workload.options)
    x1 = torch.randn(workload.batch, net.in_channels, net.input_size, net.input_size)
    y = torch.arange(workload.batch) % net.num_classes
    return {
        "official SiT": OfficialStep(net.train(), x1, y),
        "mixflow_fast": OurStep(copy.deepcopy(net).train(), x1, y),
    }


def objectives() -> dict[str, Call]:
    x1, ids = torch.randn(SHAPE), torch.arange(SHAPE[0])
    pred = torch.randn(SHAPE).requires_grad_()
    mix = MixFlow(gamma=plain.GAMMA, clock="data_at_1")

    def plain_lines() -> None:
        pred.grad = None
        _, _, _, x0 = plain.prepare(x1, plain.GAMMA)
        plain.velocity_loss(pred, x1, x0).backward()

    def ours() -> None:
        pred.grad = None
        mix.loss(pred, mix.prepare(x1, ids=ids)).backward()

    return {"plain lines": plain_lines, "mixflow_fast": ours}


def normals() -> dict[str, Call]:
    ids, numel = torch.arange(SHAPE[0]), torch.Size(SHAPE[1:]).numel()
    return {
        "torch.randn": lambda: torch.randn(SHAPE),
        "plain lines of ours": lambda: philox.normal_reference(0, Stream.NOISE, ids, numel),
        "mixflow_fast": lambda: philox.normal(0, Stream.NOISE, ids, numel),
    }


def processor_ms(call: Call, calls: int) -> float:
    """Processor time of a call, the mean of several."""
    began = time.process_time()
    for _ in range(calls):
        call()
    return 1e3 * (time.process_time() - began) / calls


def measure(providers: Mapping[str, Call], rounds: int, calls: int) -> dict[str, list[float]]:
    """Milliseconds by provider and round; they take turns, and each is first in its turn."""
    for call in providers.values():
        processor_ms(call, 3)
    names, times = list(providers), {name: [] for name in providers}
    for number in range(rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            times[name].append(processor_ms(providers[name], calls))
    return times


def report(cell: str, times: Mapping[str, Sequence[float]]) -> None:
    """One row for each provider."""
    for name, found in times.items():
        row = {"cell": cell, "provider": name, "ms": round(statistics.median(found), 3)}
        if name != "mixflow_fast":
            ratio = paired_ratio(found, times["mixflow_fast"])
            row |= {"over_ours": round(ratio.p50, 3)}
            row |= {"low95": round(ratio.low95, 3), "high95": round(ratio.high95, 3)}
        print(json.dumps(row | {"rounds": len(found), "torch": torch.__version__}), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=30, help="turns of each provider in a cell")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    report(f"normals {SHAPE}", measure(normals(), options.rounds, 10))
    report(f"objective {SHAPE}", measure(objectives(), options.rounds, 10))
    for workload in WORKLOADS:
        report(f"step {workload.name}", measure(steps(workload), options.rounds, 1))
    return 0


if __name__ == "__main__":
    sys.exit(quiet_without_reader(main))
