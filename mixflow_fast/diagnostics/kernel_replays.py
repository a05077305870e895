"""The operators in a CUDA graph and under torch.compile, against the same calls eagerly.

Two functions stand for all of them: a training step with the objective, and a chain that has every
operator of a transformer block once. Beside them the optimizer's step in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mixflow_fast import extension
from mixflow_fast.diagnostics.kernel_cases import SEED, Tensors
from mixflow_fast.diagnostics.kernel_checks import FLOORS, Finding, differing, relative_rms
from mixflow_fast.kernels.activations.gelu import gelu
from mixflow_fast.kernels.activations.swiglu import swiglu
from mixflow_fast.kernels.attention.op import attention
from mixflow_fast.kernels.residual_norm.op import modulated_norm, residual_norm
from mixflow_fast.objective.mixflow import MixFlow
from mixflow_fast.optim.adamw_ema import OptimizerImpl
from mixflow_fast.optim.skip_nonfinite import SkippingAdamWEMA
from mixflow_fast.training.capture import CapturedStep, CudaRecorder, Work

SHAPE = (4, 4, 8, 8)
CPU_SAMPLES = 2  # one program each, slow in the interpreter
# Sums in another order than eager's, of numbers that cancel; products may take another algorithm.
CHAIN_LIMIT = 1e-5
Step = Callable[[], Tensors]


def capture(step: Step, device: torch.device) -> tuple[Tensors, Callable[[], None]]:
    """Static outputs, and a call that fills them anew; on the CPU it just runs the step."""
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


def _objective(impl: str) -> MixFlow:
    return MixFlow(gamma=0.8, clock="data_at_1", seed=SEED, impl=impl)


def _step(objective: MixFlow, x1: Tensor, ids: Tensor | None, pred: Tensor) -> Tensors:
    it = objective.prepare(x1, ids=ids)
    loss = objective.loss(pred, it)
    (gradient,) = torch.autograd.grad(loss, pred)
    return {"x": it.x, "t": it.t, "loss": loss.detach(), "dpred": gradient}


def objective_replays(device: torch.device, impl: str) -> Iterator[Finding]:
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
        check = f"graph replay, ids from {first}"
        yield from differing("objective", check, "float32", outputs, expected)

    counting = _objective(impl)
    outputs, replay = capture(lambda: _step(counting, x1, None, pred), device)
    replay()
    before = outputs["t"].clone()
    replay()
    repeated = float((outputs["t"] == before).any())
    yield Finding("objective", "graph replay without ids", "draws anew", "float32", repeated, 0.0)


def _chain(impl: str) -> Callable[..., Tensor]:
    """Every operator once, as a block uses them; qk_norm_rope as a part of attention."""

    def chain(x: Tensor, h: Tensor, modulation: Tensor, vector: Tensor, wide: Tensor) -> Tensor:
        shift, scale, gate = modulation.chunk(3, dim=-1)
        x, y = residual_norm(x, h, gate, shift, scale, h_bias=vector, impl=impl)
        qkv = gelu(y.repeat(1, 1, 3), wide, impl=impl).unflatten(-1, (3, 2, -1))
        K, N = qkv.shape[-1], qkv.shape[1]
        angle = torch.linspace(0, 1, N * K, device=x.device).view(N, K)
        weights = {"q_weight": vector[:K], "k_weight": vector[-K:]}
        h = attention(qkv, cos=angle.cos(), sin=angle.sin(), norm="rms", **weights, impl=impl)
        h = swiglu(torch.cat([h, y], dim=-1), wide[: 2 * vector.shape[0]], impl=impl)
        return modulated_norm(x + h, shift, scale, weight=vector, norm="rms", impl=impl)

    return chain


def _chain_inputs(device: torch.device) -> Tensors:
    B, N, D = (4, 2, 16) if device.type == "cpu" else (4, 16, 64)
    generator = torch.Generator(device).manual_seed(4)
    shapes = dict(x=(B, N, D), h=(B, N, D), modulation=(B, 3 * D), vector=(D,), wide=(3 * D,))
    return {
        name: torch.randn(shape, generator=generator, device=device).requires_grad_()
        for name, shape in shapes.items()
    }


def _chain_results(call: Callable[..., Tensor], inputs: Tensors) -> Tensors:
    y = call(**inputs)
    gradients = torch.autograd.grad(y.square().sum(), list(inputs.values()))
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(inputs, gradients, strict=True)}


def block_replays(device: torch.device, impl: str) -> Iterator[Finding]:
    """A captured chain of the operators, replayed with other numbers, against a new run."""
    inputs, chain = _chain_inputs(device), _chain(impl)
    outputs, replay = capture(lambda: _chain_results(chain, inputs), device)
    with torch.no_grad():
        for tensor in inputs.values():
            tensor.copy_(tensor.flip(-1) * 1.5)
    replay()
    for tensor, value in _chain_results(chain, inputs).items():
        error = relative_rms(outputs[tensor], value)
        yield Finding("block", "graph replay", tensor, "float32", error, CHAIN_LIMIT)


class _Rerun:
    """In the place of CUDA graphs on a CPU: what is recorded runs again."""

    def rehearse(self, work: Work) -> None:
        work()

    def record(self, work: Work) -> tuple[list[Tensor], Callable[[], None]]:
        def replay() -> None:
            work()

        return [], replay


def optimizer_replays(device: torch.device, impl: OptimizerImpl = "auto") -> Iterator[Finding]:
    """Steps of `AdamWEMA` in a CUDA graph against `step`: a warm-up, and one step passed over."""
    results = []
    for captured in (False, True):
        generator = torch.Generator().manual_seed(8)
        p = torch.randn(1027, generator=generator).to(device).requires_grad_()
        p.grad = torch.zeros_like(p)
        optimizer = SkippingAdamWEMA(
            [p], weight_decay=0.1, ema_decay=0.9, ema_sigma_rel=(0.1,), grad_clip=20.0, impl=impl
        )
        recorder = CudaRecorder(device) if device.type == "cuda" else _Rerun()
        step = CapturedStep(optimizer, recorder) if captured else optimizer.step
        for number in range(1, 21):
            optimizer.param_groups[0]["lr"] = 1e-2 * min(number / 8, 1.0)
            gradient = torch.randn(1027, generator=generator)
            gradient[3] = torch.nan if number == 9 else gradient[3]
            p.grad.copy_(gradient)
            step()
        state = optimizer.state[p]
        names = ("exp_avg", "exp_avg_sq", "ema", "ema_power_0")
        results.append({"weights": p.detach()} | {name: state[name] for name in names})
    # The same arithmetic, or on a GPU other foreach calls for the numbers that change.
    one_pass = impl != "foreach" and extension.load().serves(device.type)
    limit = 0.0 if one_pass or device.type == "cpu" else 1e-6
    plain, ours = results
    for name, x in ours.items():
        error = relative_rms(x, plain[name])
        yield Finding("AdamWEMA", "graph replays", name, "float32", error, limit)


def objective_compiled(
    device: torch.device, impl: str, backend: str = "inductor"
) -> Iterator[Finding]:
    """A training step in one graph: value and gradient of a weight."""
    generator = torch.Generator(device).manual_seed(6)
    x1 = torch.randn(SHAPE, generator=generator, device=device)
    weight = torch.randn(SHAPE[1:], generator=generator, device=device).requires_grad_()
    ids = torch.arange(len(x1), device=device) + 9
    objective = _objective(impl)

    def step(x1: Tensor, ids: Tensor) -> Tensor:
        it = objective.prepare(x1, ids=ids)
        return objective.loss(torch.tanh(it.x) * weight + it.t.view(-1, 1, 1, 1), it)

    def results(call: Callable[..., Tensor], rows: int) -> Tensors:
        loss = call(x1[:rows], ids[:rows])
        return {"loss": loss.detach(), "dweight": torch.autograd.grad(2 * loss, weight)[0]}

    yield from _compiled("objective", step, results, FLOORS[torch.float32], backend)


def block_compiled(device: torch.device, impl: str, backend: str = "inductor") -> Iterator[Finding]:
    """The chain of the operators in one graph."""
    inputs = _chain_inputs(device)

    def results(call: Callable[..., Tensor], rows: int) -> Tensors:
        some = {name: v[:rows] if v.dim() > 1 else v for name, v in inputs.items()}
        return _chain_results(call, {n: v.detach().requires_grad_() for n, v in some.items()})

    yield from _compiled("block", _chain(impl), results, CHAIN_LIMIT, backend)


def _compiled(
    op: str,
    function: Callable[..., Tensor],
    results: Callable[[Callable[..., Tensor], int], Tensors],
    limit: float,
    backend: str,
) -> Iterator[Finding]:
    """Results of a batch with the compiled function, static and dynamic, against the function's."""
    for dynamic, sizes in ((False, (4,)), (True, (4, 3))):
        torch._dynamo.reset()
        call = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
        for rows in sizes:
            ours, eager = results(call, rows), results(function, rows)
            check = f"compiled, {'dynamic' if dynamic else 'static'} batch of {rows}"
            for tensor, value in eager.items():
                error = relative_rms(ours[tensor], value)
                yield Finding(op, check, tensor, "float32", error, limit)
