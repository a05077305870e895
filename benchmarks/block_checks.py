"""Correctness of the transformer-block ops on the device: errors, bits, graphs, torch.compile.

    err(ours, float64) <= 2 err(reference in the same dtype, float64) + floor       (relative RMS)

for every output and the gradient of every input, with any upstream gradient. The reference computes
in float32 and rounds once, so it is more exact than plain lines in 16 bits. Floors are those of
`benchmarks.numerics`; of attention those of its backends' own test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import replay
from benchmarks.block_ops import BLOCK_OPS, TIMED_BACKENDS, BlockCase
from benchmarks.block_providers import (
    BlockInputs,
    as_double,
    make_inputs,
    mixflow_call,
    reference_call,
    verdict,
)
from benchmarks.draws import nan_filled_buffers
from benchmarks.numerics import FLOORS, Finding
from benchmarks.verify import relative_rms
from mixflow_fast.kernels.activations.gelu import gelu
from mixflow_fast.kernels.activations.swiglu import swiglu
from mixflow_fast.kernels.attention import choice
from mixflow_fast.kernels.attention.op import attention
from mixflow_fast.kernels.residual_norm.op import modulated_norm, residual_norm

Task = tuple[str, Callable[[], Iterable[Finding]]]
HALVES = (torch.bfloat16, torch.float16)


def _cases(
    *cells: tuple[str, str, tuple[int, ...]], recompute: tuple[int, ...] = ()
) -> list[BlockCase]:
    """`recompute`: of these cells the mode "recompute", too."""
    modes = [("full", cell) for cell in cells] + [
        ("recompute", cells[number]) for number in recompute
    ]
    return [BlockCase(op=op, mode=mode, variant=v, shape=s) for mode, (op, v, s) in modes]


# What is timed, at the timed widths, so that the very kernels are checked; then the rest.
GPU_TIMED = _cases(
    ("residual_norm", "layer per sample", (4, 256, 1152)),
    ("residual_norm", "rms per token", (2, 256, 2048)),
    ("gelu", "bias", (4, 256, 4608)),
    ("swiglu", "bias", (4, 256, 2 * 5504)),
    ("qk_norm_rope", "rope", (4, 256, 16, 72)),
    ("attention", "plain", (4, 256, 16, 72)),
    ("modulated_norm", "rms per sample", (4, 256, 1152)),
    recompute=(2, 3),
)
GPU_MORE = _cases(
    ("residual_norm", "rms per sample", (4, 256, 1152)),
    ("attention", "rms, rope", (2, 256, 16, 128)),
    ("qk_norm_rope", "layer", (4, 256, 16, 72)),
    ("residual_norm", "layer per sample", (3, 7, 1023)),
    ("swiglu", "bias", (3, 7, 2 * 5461)),
    ("gelu", "bias", (3, 7, 1023)),
    ("qk_norm_rope", "rms, rope", (3, 7, 5, 10)),
    ("modulated_norm", "layer per sample", (4, 256, 1152)),
    ("attention", "plain", (2, 1024, 16, 64)),
)
CPU_TIMED = _cases(
    ("residual_norm", "layer per sample", (2, 3, 33)),
    ("residual_norm", "rms per token", (2, 3, 32)),
    ("gelu", "bias", (2, 3, 33)),
    ("swiglu", "bias", (2, 3, 2 * 17)),
    ("qk_norm_rope", "rope", (2, 3, 2, 8)),
    ("attention", "plain", (2, 3, 2, 8)),
    ("modulated_norm", "rms per sample", (2, 3, 32)),
    recompute=(2, 3),
)
CPU_MORE = _cases(
    ("residual_norm", "rms per sample", (2, 5, 64)),
    ("qk_norm_rope", "layer", (2, 3, 2, 10)),
    ("attention", "rms, rope", (2, 5, 2, 8)),
)
# Gradients that add up over the batch: a sample alone has others.
SUMS = {"dh_bias", "dweight", "dbias", "dq_weight", "dk_weight", "dq_bias", "dk_bias"}


def tasks(device: torch.device, impl: str, level: str, ops: Iterable[str]) -> Iterator[Task]:
    """The checks of a level (as `numerics.plan`) for some of `BLOCK_OPS`, most telling first."""
    chosen = [op for op in BLOCK_OPS if op in ops]
    if not chosen:
        return
    on_gpu = device.type == "cuda"
    timed, more = (GPU_TIMED, GPU_MORE) if on_gpu else (CPU_TIMED, CPU_MORE)
    timed, more = ([case for case in cases if case.op in chosen] for cases in (timed, more))

    def checked(case: BlockCase, dtype: torch.dtype) -> Task:
        case = replace(case, dtype=dtype)
        return f"{case.label}", lambda: errors(case, device, impl)

    for case in timed:
        yield checked(case, torch.bfloat16)
    if level == "timed":
        return
    for case in timed:
        if case.op != "attention":
            yield f"same bits, {case.label}", lambda case=case: same_bits(case, device, impl)
    if set(chosen) == set(BLOCK_OPS):
        yield "graph replays of a block", lambda: graph_replays(device, impl)
    for dtype in (torch.float32, torch.float16):
        for case in timed:
            yield checked(case, dtype)
    if level == "smoke":
        return
    for number, case in enumerate(more):
        yield checked(case, HALVES[number % 2])
        yield checked(case, torch.float32)
    if on_gpu and set(chosen) == set(BLOCK_OPS):
        yield "torch.compile of a block", lambda: compiled(device, impl)


def errors(case: BlockCase, device: torch.device, impl: str) -> Iterator[Finding]:
    """Each output and gradient of our op; of attention with every backend that serves it."""
    inputs = make_inputs(case, device)
    eager = reference_call(case, inputs)()
    truth = reference_call(case, as_double(inputs))()
    backends = ("auto",)
    if case.op == "attention":
        # One that its own test refuses cannot be called, and is named by the kernel suite.
        found = {name: verdict(name, case, inputs) for name in (*TIMED_BACKENDS, "math")}
        backends = ("auto", *(name for name, text in found.items() if text.startswith("ok")))
    for backend in backends:
        ours = mixflow_call(case, inputs, impl, backend)()
        op = f"{case.op} again" if case.mode == "recompute" else case.op
        where = f"{op} {case.variant} {'x'.join(map(str, case.shape))}"
        where += f" {backend}" if case.op == "attention" else ""
        for tensor, exact in truth.items():
            yield _finding(case, where, tensor, ours[tensor], eager[tensor], exact)


def _finding(
    case: BlockCase, where: str, tensor: str, ours: Tensor, eager: Tensor, truth: Tensor
) -> Finding:
    floors = choice.FLOORS if case.op == "attention" else FLOORS
    eager_error = relative_rms(eager, truth)
    wrong_form = ours.shape != truth.shape or ours.dtype != case.dtype
    error = float("inf") if wrong_form else relative_rms(ours, truth)
    limit = 2 * eager_error + floors[case.dtype]
    return Finding(where, tensor, case.dtype_name, error, limit, eager_error)


def same_bits(case: BlockCase, device: torch.device, impl: str) -> Iterator[Finding]:
    """Two runs, fresh memory full of NaN, and the second sample alone: the same bits."""
    inputs = make_inputs(case, device)
    call = mixflow_call(case, inputs, impl)
    first = call()
    with nan_filled_buffers(device):
        poisoned = call()
    one = replace(case, shape=(1, *case.shape[1:]))
    alone = mixflow_call(one, _second_sample(inputs), impl)()
    of_first = {name: value[1:2] for name, value in first.items() if name not in SUMS}
    for check, expected, others in (
        ("two runs", first, call()),
        ("buffers full of NaN", first, poisoned),
        ("a sample alone and in a batch", of_first, alone),
    ):
        for name, value in expected.items():
            other = others[name]
            same = other.dtype == value.dtype and torch.equal(other, value)
            op = f"{case.op} {case.mode}"
            yield Finding(f"{op}, {check}", name, case.dtype_name, 1.0 - same, 0.0)


def _second_sample(inputs: BlockInputs) -> BlockInputs:
    """The same op's inputs with the second sample as the whole batch."""

    def pick(name: str, tensor: Tensor) -> Tensor:
        shared = name in ("cos", "sin", "bias", "weight") or name.endswith(("_bias", "_weight"))
        picked = tensor if shared else tensor[1:2]
        return picked.detach().requires_grad_(tensor.requires_grad)

    tensors = {name: pick(name, tensor) for name, tensor in inputs.tensors.items()}
    upstream = tuple(gradient[1:2] for gradient in inputs.upstream)
    return replace(inputs, tensors=tensors, upstream=upstream, biased=None)


def _chain(impl: str) -> Callable[..., Tensor]:
    """Every op once, as a block uses them; qk_norm_rope as a part of attention."""

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


def _chain_inputs(device: torch.device) -> list[Tensor]:
    B, N, D = (4, 2, 16) if device.type == "cpu" else (4, 16, 64)
    generator = torch.Generator(device).manual_seed(4)
    shapes = (B, N, D), (B, N, D), (B, 3 * D), (D,), (3 * D,)
    return [
        torch.randn(shape, generator=generator, device=device).requires_grad_() for shape in shapes
    ]


def _results(call: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, Tensor]:
    y = call(*inputs)
    names = ("dx", "dh", "dmodulation", "dvector", "dwide")
    gradients = torch.autograd.grad(y.square().sum(), inputs)
    return {"y": y.detach()} | dict(zip(names, gradients, strict=True))


def graph_replays(device: torch.device, impl: str) -> Iterator[Finding]:
    """A captured chain of the ops, replayed with other numbers in memory, against a new run."""
    inputs, chain = _chain_inputs(device), _chain(impl)
    outputs, recompute = replay.capture(lambda: _results(chain, inputs), device)
    with torch.no_grad():
        for tensor in inputs:
            tensor.copy_(tensor.flip(-1) * 1.5)
    recompute()
    for tensor, value in _results(chain, inputs).items():
        # Products may take another algorithm in a graph.
        error = relative_rms(outputs[tensor], value.double())
        yield Finding("graph replay of a block", tensor, "float32", error, 1e-5)


def compiled(device: torch.device, impl: str, backend: str = "inductor") -> Iterator[Finding]:
    """The chain in one graph, static and dynamic, against the same chain eagerly."""
    inputs, chain = _chain_inputs(device), _chain(impl)
    for dynamic, sizes in ((False, (4,)), (True, (4, 3))):
        torch._dynamo.reset()
        call = torch.compile(chain, fullgraph=True, dynamic=dynamic, backend=backend)
        for rows in sizes:
            some = [v[:rows] if v.dim() > 1 else v for v in inputs]
            some = [v.detach().requires_grad_() for v in some]
            ours, eager = _results(call, some), _results(chain, some)
            for tensor, value in eager.items():
                error = relative_rms(ours[tensor], value.double())
                name = f"compiled block, {'dynamic' if dynamic else 'static'} batch of {rows}"
                # Sums in another order than eager's, of numbers that cancel.
                yield Finding(name, tensor, "float32", error, 1e-5)
