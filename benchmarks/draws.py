"""What the kernels draw, and that their bits depend on nothing but the inputs.

Philox integers against the PyTorch twin, normals against float64 Box-Muller, the noise of the loss
against that of the interpolation, two runs, a sample alone and in a batch, unwritten output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.numerics import FLOORS, Finding
from benchmarks.verify import relative_rms
from mixflow_fast import MixFlow
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.philox import Stream, philox_words
from mixflow_fast.kernels.runtime import jit, tl, triton

SEED = 0x9E3779B97F4A7C15
# Positions on both sides of 2^32, and the largest.
POSITIONS = (0, 1, 12_345, (1 << 32) - 1, 1 << 32, (1 << 62) + 5, (1 << 63) - 1)


@jit
def _words_kernel(
    seed_ptr, positions_ptr, out_ptr, blocks, STREAM: tl.constexpr, BLOCK: tl.constexpr
):
    sample = tl.program_id(0)
    block = tl.arange(0, BLOCK)
    w0, w1, w2, w3 = philox_words(tl.load(seed_ptr), STREAM, tl.load(positions_ptr + sample), block)
    out = out_ptr + (sample * blocks + block) * 4
    inside = block < blocks
    tl.store(out, w0.to(tl.int32, bitcast=True), mask=inside)
    tl.store(out + 1, w1.to(tl.int32, bitcast=True), mask=inside)
    tl.store(out + 2, w2.to(tl.int32, bitcast=True), mask=inside)
    tl.store(out + 3, w3.to(tl.int32, bitcast=True), mask=inside)


def _kernel_words(stream: Stream, positions: Tensor, numel: int) -> Tensor:
    """`philox.random_words` by the device function; numel a multiple of 4."""
    seed = philox.seed_tensor(SEED, positions.device)
    out = torch.zeros(len(positions), numel, dtype=torch.int32, device=positions.device)
    block = triton.next_power_of_2(numel // 4)
    _words_kernel[(len(positions),)](
        seed, positions, out, numel // 4, STREAM=int(stream), BLOCK=block
    )
    return out.to(torch.int64) & 0xFFFFFFFF


def _differs(check: str, tensor: str, dtype: str, a: Tensor, b: Tensor) -> Finding:
    """A yes-or-no finding: whether two tensors have the same bits (NaN equals no bits)."""
    same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return Finding(check, tensor, dtype, 0.0 if same else 1.0, 0.0)


def integers(device: torch.device, impl: str) -> Iterator[Finding]:
    """The device function's words, all 32 bits, against the PyTorch twin."""
    positions = torch.tensor(POSITIONS, device=device)
    for stream in (Stream.NOISE, Stream.TIME):
        words = philox.random_words(SEED, stream, positions, 48)
        ours = words if impl == "reference" else _kernel_words(stream, positions, 48)
        yield _differs("philox words", f"stream {stream.name}", "int32", ours, words)


def _normal_truth(positions: Tensor, numel: int) -> Tensor:
    """Box-Muller in float64 from the integers and the float32 uniforms (docs of `philox`)."""
    words = philox.random_words(SEED, Stream.NOISE, positions, numel).view(-1, 2)
    a = (words[:, 0].to(torch.float32) * 2.0**-32 + 2.0**-33).double()
    b = ((words[:, 1] >> 9).double() + 0.5) * 2.0**-23
    radius, angle = torch.sqrt(-2 * torch.log(a)), 2 * math.pi * b
    pair = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pair.view(len(positions), numel)


def normals(device: torch.device, impl: str) -> Iterator[Finding]:
    """Normals against float64, and the same ones in x_m, in the loss and on demand."""
    positions = torch.tensor(POSITIONS, device=device)
    numel = 64 if device.type == "cpu" else 4096
    truth = _normal_truth(positions, numel)
    ours = philox.normal(SEED, Stream.NOISE, positions, numel, impl)
    twin = philox.normal_reference(SEED, Stream.NOISE, positions, numel)
    floor = FLOORS[torch.float32]
    eager = relative_rms(twin, truth)
    error = relative_rms(ours, truth)
    yield Finding("philox normals", "RMS error", "float32", error, 2 * eager + floor, eager)
    worst, eager = (float((v.double() - truth).abs().max()) for v in (ours, twin))
    yield Finding("philox normals", "largest error", "float32", worst, 2 * eager + floor, eager)

    # At the noise end x_m is x0; with data and prediction 0 the noise loss's gradient is -2 x0 / E,
    # exact where E is a power of two.
    objective = MixFlow(clock="data_at_1", prediction="noise", seed=SEED, impl=impl)
    x1 = torch.zeros(len(positions), numel, device=device)
    end = torch.zeros(len(positions), device=device)
    it = objective.prepare(x1, ids=positions, t=end, slowed_t=end)
    pred = torch.zeros_like(x1, requires_grad=True)
    (gradient,) = torch.autograd.grad(objective.loss(pred, it, reduction="sum"), pred)
    yield _differs("one noise", "x at the noise end", "float32", it.x, ours)
    yield _differs("one noise", "x0()", "float32", it.x0(), ours)
    yield _differs("one noise", "gradient of the loss", "float32", gradient * (-numel / 2), ours)


def times(device: torch.device, impl: str) -> Iterator[Finding]:
    """t and m against the reference's draws, which are exact for the uniform distribution."""
    count = 6 if device.type == "cpu" else 4096  # one program each, slow in the interpreter
    ids = torch.arange(count, device=device) + (1 << 32) - count // 2
    x1 = torch.zeros(count, 4, device=device)
    cases = {
        "uniform": dict(timesteps="uniform", gamma=0.0, clock="data_at_1"),
        "beta21, slowed": dict(gamma=0.8, clock="data_at_1"),
        "logit-normal, shift 6.93, slowed": dict(
            gamma=0.4, clock="noise_at_1", timesteps="logit-normal", shift=6.93
        ),
    }
    for name, options in cases.items():
        ours = MixFlow(**options, seed=SEED, impl=impl).prepare(x1, ids=ids)
        twin = MixFlow(**options, seed=SEED, impl="reference").prepare(x1, ids=ids)
        for tensor in ("t", "slowed_t"):
            a, b = getattr(ours, tensor), getattr(twin, tensor)
            if name == "uniform":
                yield _differs(f"times {name}", tensor, "float32", a, b)
            else:
                # Logarithms and sigmoids differ in their last bits between libraries.
                error = relative_rms(a, b.double())
                yield Finding(f"times {name}", tensor, "float32", error, 2e-6)


def _everything(objective: MixFlow, x1: Tensor, pred: Tensor, ids: Tensor) -> dict[str, Tensor]:
    it = objective.prepare(x1, ids=ids)
    pred = pred.detach().requires_grad_()
    losses = objective.loss(pred, it, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), pred)
    return {
        "x": it.x,
        "t": it.t,
        "slowed_t": it.slowed_t,
        "losses": losses.detach(),
        "gradient": gradient,
    }


def same_bits(
    device: torch.device, impl: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Iterator[Finding]:
    """Two runs, samples alone and in the batch, and buffers that held NaN before."""
    name = str(dtype).removeprefix("torch.")
    generator = torch.Generator(device).manual_seed(3)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    x1, pred = normal(), normal()
    ids = torch.arange(shape[0], device=device) + 77
    objective = MixFlow(gamma=0.8, clock="data_at_1", seed=SEED, impl=impl)
    first = _everything(objective, x1, pred, ids)
    where = "x".join(map(str, shape))

    def compare(check: str, other: dict[str, Tensor], rows: slice) -> Iterator[Finding]:
        for tensor, value in first.items():
            yield _differs(f"{check} {where}", tensor, name, other[tensor], value[rows])

    yield from compare("two runs", _everything(objective, x1, pred, ids), slice(None))
    for sample in (0, shape[0] - 1):
        rows = slice(sample, sample + 1)
        alone = _everything(objective, x1[rows], pred[rows], ids[rows])
        yield from compare(f"sample {sample} alone and in", alone, rows)
    with nan_filled_buffers(device):
        filled = _everything(objective, x1, pred, ids)
    yield from compare("buffers full of NaN before", filled, slice(None))


@contextmanager
def nan_filled_buffers(device: torch.device) -> Iterator[None]:
    """Every new float buffer of torch is full of NaN, so that an element nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        if not torch.empty(8, device=device).isnan().all():
            raise RuntimeError("this torch does not fill new buffers: the check cannot fail")
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled
