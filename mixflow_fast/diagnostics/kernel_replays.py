"""The objective in a CUDA graph and under torch.compile, against the same calls eagerly."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.draws import SEED
from benchmarks.numerics import FLOORS, Finding
from benchmarks.verify import relative_rms
from mixflow_fast import MixFlow

SHAPE = (4, 4, 8, 8)
CPU_SAMPLES = 2  # one program each, slow in the interpreter
Step = Callable[[], dict[str, Tensor]]


def _objective(impl: str) -> MixFlow:
    return MixFlow(gamma=0.8, clock="data_at_1", seed=SEED, impl=impl)


def _step(objective: MixFlow, x1: Tensor, ids: Tensor | None, pred: Tensor) -> dict[str, Tensor]:
    it = objective.prepare(x1, ids=ids)
    loss = objective.loss(pred, it)
    (gradient,) = torch.autograd.grad(loss, pred)
    return {"x": it.x, "t": it.t, "loss": loss.detach(), "gradient": gradient}


def capture(step: Step, device: torch.device) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Static outputs, and a call that fills them again; on the CPU it just runs the step."""
    if device.type == "cpu":
        outputs = {name: value.clone() for name, value in step().items()}

        def replay() -> None:
            for name, value in step().items():
                outputs[name].copy_(value)

        return outputs, replay
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return outputs, graph.replay


def graph_replays(device: torch.device, impl: str) -> Iterator[Finding]:
    """Replays draw for the ids that are in memory then, or go on counting without ids."""
    generator = torch.Generator(device).manual_seed(5)
    shape = (CPU_SAMPLES, *SHAPE[1:]) if device.type == "cpu" else SHAPE
    x1, pred = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    pred.requires_grad_()
    ids = torch.arange(len(x1), device=device)
    objective = _objective(impl)
    outputs, replay = capture(lambda: _step(objective, x1, ids, pred), device)
    for first in (1000, 1 << 40):
        ids.copy_(torch.arange(len(x1), device=device) + first)
        replay()
        expected = _step(_objective(impl), x1, ids, pred)
        for tensor, value in expected.items():
            same = torch.equal(outputs[tensor], value)
            yield Finding(f"graph replay, ids from {first}", tensor, "float32", 1.0 - same, 0.0)

    counting = _objective(impl)
    outputs, replay = capture(lambda: _step(counting, x1, None, pred), device)
    replay()
    before = outputs["t"].clone()
    replay()
    repeated = float((outputs["t"] == before).any())
    yield Finding("graph replay without ids", "draws anew", "float32", repeated, 0.0)


def compiled(device: torch.device, impl: str, backend: str = "inductor") -> Iterator[Finding]:
    """A training step in one graph, static and dynamic: value and gradient of a weight."""
    generator = torch.Generator(device).manual_seed(6)
    x1 = torch.randn(SHAPE, generator=generator, device=device)
    weight = torch.randn(SHAPE[1:], generator=generator, device=device).requires_grad_()
    ids = torch.arange(len(x1), device=device) + 9
    objective = _objective(impl)

    def step(x1: Tensor, ids: Tensor) -> Tensor:
        it = objective.prepare(x1, ids=ids)
        return objective.loss(torch.tanh(it.x) * weight + it.t.view(-1, 1, 1, 1), it)

    def results(call: Callable[..., Tensor], rows: int) -> dict[str, Tensor]:
        loss = call(x1[:rows], ids[:rows])
        return {"loss": loss.detach(), "gradient": torch.autograd.grad(2 * loss, weight)[0]}

    for dynamic, sizes in ((False, (4,)), (True, (4, 3))):
        torch._dynamo.reset()
        call = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
        for rows in sizes:
            ours, eager = results(call, rows), results(step, rows)
            for tensor, value in eager.items():
                error = relative_rms(ours[tensor], value.double())
                name = f"compiled, {'dynamic' if dynamic else 'static'} batch of {rows}"
                yield Finding(name, tensor, "float32", error, FLOORS[torch.float32])
