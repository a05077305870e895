"""Bytes of a mixed source's training step beside the network: `python -m benchmarks.source_bytes`.

From what the predictor returns (float32 mean | log-variance) to x_m, x0 and KL and back, and the
loss with the gradients of the prediction and of x0: bytes an element of bf16 data that eager
PyTorch, torch.compile at its best and our operators move, counted without a GPU.

Eager is every operator of the plain lines on meta tensors (`benchmarks/census.py`). For a compiler
the lines are partitioned into a forward and a backward graph as torch.compile partitions them
(min-cut, noise is kept and not drawn again), and each graph reads its inputs and writes its outputs
once: what it reaches if it fuses all of a graph, sums included, into one kernel. Ours is what
the kernels are given (`tests/benchmarks/test_source_bytes.py` holds it to their launches).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from functorch.compile import aot_function, default_decompositions, make_boxed_func
from functorch.compile import min_cut_rematerialization_partition as min_cut
from torch import Tensor, fx

from benchmarks import plain
from benchmarks.census import Census
from benchmarks.ops import REGISTRY, Cell
from mixflow_fast.cli.errors import quiet_without_reader

SHAPE = (4, 64, 16, 16)
PARTS = ("source", "loss")


@dataclass(frozen=True)
class Moved:
    """Bytes an element of the data; launches only where they are known."""

    forward: float
    backward: float
    launches: int | None = None

    @property
    def total(self) -> float:
        return self.forward + self.backward


def _lines(part: str, device: str) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The plain lines of a part, and their arguments."""
    B, C, H, W = SHAPE
    x1 = torch.randn(SHAPE, dtype=torch.bfloat16, device=device)
    if part == "source":
        predicted = torch.randn(B, 2 * C, H, W, device=device, requires_grad=True)
        times = torch.rand(2, B, device=device)
        return lambda *given: plain.mixed_source(*given)[:3], [x1, predicted, times[0], times[1]]
    pred = torch.randn_like(x1).requires_grad_()
    x0 = torch.randn(SHAPE, device=device, requires_grad=True)
    return lambda *given: (plain.velocity_loss(*given),), [pred, x1, x0]


def eager(part: str) -> Moved:
    """Operator by operator."""
    function, given = _lines(part, "meta")
    trained = [x for x in given if x.requires_grad]
    with Census() as mode:
        made = function(*given)
        upstream = [torch.empty_like(x) for x in made]
        mode.phase = "backward"
        torch.autograd.grad(made, trained, upstream)
    costs = {phase: 0 for phase in ("forward", "backward")}
    for (phase, _), cost in mode.table.items():
        costs[phase] += cost.bytes
    numel = given[0].numel()
    launches = sum(cost.launches for cost in mode.table.values())
    return Moved(costs["forward"] / numel, costs["backward"] / numel, launches)


def compiled(part: str) -> Moved:
    """Both graphs, each as one kernel."""
    function, given = _lines(part, "cpu")
    moved = []

    def count(graph: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        nodes = {node for node in graph.graph.nodes if node.op == "placeholder"}
        nodes |= {node for node in output.args[0] if isinstance(node, fx.Node)}
        values = [node.meta["val"] for node in nodes]
        moved.append(sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor)))
        return make_boxed_func(graph)

    decompositions = default_decompositions
    traced = aot_function(
        function, count, count, partition_fn=min_cut, decompositions=decompositions
    )
    made = traced(*given)
    torch.autograd.backward(made, [torch.ones_like(x) for x in made])
    forward, backward = (total / given[0].numel() for total in moved)
    return Moved(forward, backward)


def ours(part: str) -> Moved:
    """The operators mix_and_interpolate and velocity_loss, for an upstream gradient of 1."""
    if part == "source":
        cells = [Cell(op="mixed_source", mode=mode, shape=SHAPE) for mode in ("forward", "full")]
        forward, full = (REGISTRY["mixed_source"].bytes(cell) / cell.elements for cell in cells)
        return Moved(forward, full - forward, 3)
    # pred, x1, x0 and pred's gradient; then that is read, and x0's is written from it.
    return Moved(2 + 2 + 4 + 2, 2 + 4, 4)


def main() -> int:
    """Print the table."""
    print(f"{'':10}{'':10}{'forward':>9}{'backward':>10}{'both':>8}{'launches':>10}")
    for part in PARTS:
        for provider in (eager, compiled, ours):
            moved = provider(part)
            launches = "-" if moved.launches is None else moved.launches
            numbers = f"{moved.forward:9.1f}{moved.backward:10.1f}{moved.total:8.1f}{launches:>10}"
            print(f"{part:10}{provider.__name__:10}{numbers}")
    return 0


if __name__ == "__main__":
    sys.exit(quiet_without_reader(main))
