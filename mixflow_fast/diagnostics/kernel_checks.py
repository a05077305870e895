"""Whether the kernels are right on a device: for `doctor`, the benchmarks and the tests.

    err(ours, float64) <= 2 err(reference in the same dtype, float64) + floor     (relative RMS)

for every output and the gradient of every input, under an upstream gradient that is not 1. float64
truth is the operator's own reference on the same numbers, which the tests hold to tensors of the
official implementations. Besides: bits that depend on the inputs alone, and what is drawn.
`kernels/attention/choice.py` has an error of its own, as it cannot import from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mixflow_fast.diagnostics.block_cases import BlockCase, backend_verdict
from mixflow_fast.diagnostics.kernel_cases import (
    SEED,
    Call,
    Case,
    Inputs,
    ObjectiveCase,
    Setting,
    Tensors,
    dtype_name,
)
from mixflow_fast.diagnostics.source_cases import SourceCase
from mixflow_fast.kernels import philox, runtime
from mixflow_fast.kernels.attention.backends import BACKENDS
from mixflow_fast.kernels.attention.choice import FLOORS as ROUNDING
from mixflow_fast.kernels.dropout import dropout, layer_keys
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.messages import error_line
from mixflow_fast.objective.mixflow import MixFlow
from mixflow_fast.optim.adamw_ema import AdamWEMA

FLOORS = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}
# Logarithms, sigmoids and cosines differ in their last bits between libraries; a device's own for
# normals are right to about 1e-6.
DRAWN_FLOOR = 2e-6
# Positions on both sides of 2^32, and the largest.
POSITIONS = (0, 1, 12_345, (1 << 32) - 1, 1 << 32, (1 << 62) + 5, (1 << 63) - 1)


@dataclass(frozen=True)
class Finding:
    """One checked number.

    Attributes:
        op: the operator whose result it is.
        check: what was looked at, with its settings.
        tensor: "x", "loss", "dpred", ...
        dtype: of the data, a torch name.
        error, limit: passed when error <= limit; for yes-or-no checks 0 or 1 and 0.
        eager_error: of the reference in the same dtype, where there is one.
    """

    op: str
    check: str
    tensor: str
    dtype: str
    error: float
    limit: float
    eager_error: float | None = None

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # NaN is not

    @property
    def severity(self) -> float:
        """Error in units of what is allowed; infinite where it did not pass."""
        if not self.passed:
            return math.inf
        return self.error / self.limit if self.limit else 0.0


def relative_rms(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth||, in float64; inf for another shape or what is not finite."""
    if value.shape != truth.shape:
        return math.inf
    exact = truth.detach().to(value.device, torch.float64)
    difference = (value.detach().double() - exact).square().mean().sqrt()
    error = (difference / exact.square().mean().sqrt().clamp_min(1e-300)).item()
    return error if math.isfinite(error) else math.inf


def against_eager(
    ours: Tensor, eager: Tensor, truth: Tensor, floor: float | None = None
) -> tuple[float, float, float]:
    """(error, limit, error of eager); the error of another shape or dtype than eager's is inf."""
    eager_error = relative_rms(eager, truth)
    wrong_form = ours.shape != eager.shape or ours.dtype != eager.dtype
    error = math.inf if wrong_form else relative_rms(ours, truth)
    floor = FLOORS[eager.dtype] if floor is None else floor
    # What eager itself cannot compute allows nothing.
    return error, (2 * eager_error if math.isfinite(eager_error) else 0.0) + floor, eager_error


def guarded(
    ops: Iterable[str], check: str, dtype: str, run: Callable[[], Iterable[Finding]]
) -> Iterator[Finding]:
    """The findings of `run`; an exception in it is a failure of all `ops`."""
    try:
        yield from run()
    # A kernel that does not compile or launch is a finding, not the end of the others' checks.
    except Exception as error:
        for op in ops:
            yield Finding(op, check, f"raised {error_line(error)}", dtype, math.inf, 0.0)


def errors(
    case: Case, device: torch.device, impl: str, every_backend: bool = False
) -> Iterator[Finding]:
    """Each output and gradient; `every_backend`: of attention with every one that serves it."""
    inputs = case.inputs(device)
    eager = case.parts(inputs, case.reference(inputs)())
    truth = case.parts(inputs, case.reference(inputs.double())())
    for name, call in _calls(case, inputs, device, impl, every_backend).items():
        ours = case.parts(inputs, call())
        for tensor, exact in truth.items():
            floor = _floor(case, eager[tensor].dtype)
            found = against_eager(ours[tensor], eager[tensor], exact, floor)
            op, dtype = case.op_of(tensor), dtype_name(case.dtype)
            yield Finding(op, name, tensor, dtype, *found)


def _calls(
    case: Case, inputs: Inputs, device: torch.device, impl: str, every_backend: bool
) -> dict[str, Call]:
    calls = {case.name: case.call(inputs, impl)}
    if isinstance(case, BlockCase) and case.op == "attention" and every_backend:
        for backend in BACKENDS:
            # One that its own test refuses cannot be called, and is named by the kernel suite.
            if backend_verdict(backend, case, device).startswith("ok"):
                calls[f"{case.name} {backend}"] = case.call(inputs, impl, backend)
    return calls


def _floor(case: Case, dtype: torch.dtype) -> float:
    if case.ops == ("attention",):
        return ROUNDING[dtype]
    drawn = isinstance(case, ObjectiveCase | SourceCase) and case.drawn
    return max(DRAWN_FLOOR, FLOORS[dtype]) if drawn else FLOORS[dtype]


def differing(
    op: str | Callable[[str], str], check: str, dtype: str, ours: Tensors, expected: Tensors
) -> Iterator[Finding]:
    """Yes-or-no findings: whether tensors have the same bits (NaN equals no bits).

    `op` is the operator that made them, or says which it was by the name of the tensor.
    """
    for tensor, value in expected.items():
        other = ours[tensor]
        same = other.shape == value.shape and other.dtype == value.dtype
        same = same and torch.equal(other, value)
        made_by = op if isinstance(op, str) else op(tensor)
        yield Finding(made_by, check, tensor, dtype, 0.0 if same else 1.0, 0.0)


def same_bits(case: Case, device: torch.device, impl: str) -> Iterator[Finding]:
    """Two runs, buffers that held NaN before, and samples alone: the same bits."""
    inputs = case.inputs(device)
    call = case.call(inputs, impl)
    first = call()

    def compare(check: str, found: Tensors, expected: Tensors) -> Iterator[Finding]:
        where = f"{check}, {case.name}"
        yield from differing(case.op_of, where, dtype_name(case.dtype), found, expected)

    yield from compare("two runs", call(), first)
    with nan_filled_buffers(device):
        filled = call()
    yield from compare("buffers full of NaN before", filled, first)
    of_samples = {
        name: value
        for name, value in first.items()
        if value.dim() and name.removeprefix("d") not in inputs.shared
    }
    batch = len(next(iter(inputs.tensors.values())))
    for sample in (0, batch - 1):
        rows = slice(sample, sample + 1)
        alone = case.call(inputs.rows(rows), impl)()
        expected = {name: value[rows] for name, value in of_samples.items()}
        yield from compare(f"sample {sample} alone and in a batch", alone, expected)


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


def words(device: torch.device, impl: str) -> Iterator[Finding]:
    """The words of the implementation, all 32 bits, against the PyTorch twin."""
    positions = torch.tensor(POSITIONS, device=device)
    expected, ours = {}, {}
    for stream in (Stream.NOISE, Stream.TIME, Stream.SOURCE_NOISE):
        name = f"stream {stream.name}"
        expected[name] = philox.words_reference(SEED, stream, positions, 48)
        ours[name] = philox.random_words(SEED, stream, positions, 48, impl)
    yield from differing("normal", "philox words", "int32", ours, expected)


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
    found = against_eager(ours, twin, truth, DRAWN_FLOOR)
    yield Finding("normal", "philox normals", "RMS error", "float32", *found)
    worst, eager = (float((v.double() - truth).abs().max()) for v in (ours, twin))
    # Where a radius is next to nothing, one pair in a million, the device's logarithm is coarse.
    hardware = device.type == "cuda" and impl != "reference"
    limit = 1e-3 if hardware else 2 * eager + FLOORS[torch.float32]
    yield Finding("normal", "philox normals", "largest error", "float32", worst, limit, eager)

    # At the noise end x_m is x0; with data and prediction 0 the noise loss's gradient is -2 x0 / E,
    # exact where E is a power of two.
    objective = MixFlow(clock="data_at_1", prediction="noise", seed=SEED, impl=impl)
    x1 = torch.zeros(len(positions), numel, device=device)
    end = torch.zeros(len(positions), device=device)
    it = objective.prepare(x1, ids=positions, t=end, slowed_t=end)
    pred = torch.zeros_like(x1, requires_grad=True)
    (gradient,) = torch.autograd.grad(objective.loss(pred, it, reduction="sum"), pred)
    made_by = {
        "x at the noise end": ("interpolate", it.x),
        "x0()": ("normal", it.x0()),
        "gradient of the loss": ("velocity_loss", gradient * (-numel / 2)),
    }
    for tensor, (op, value) in made_by.items():
        yield from differing(op, "one noise", "float32", {tensor: value}, {tensor: ours})


def times(device: torch.device, impl: str) -> Iterator[Finding]:
    """t and m against the reference's draws, which are exact for the uniform distribution."""
    count = 6 if device.type == "cpu" else 4096  # one program each, slow in the interpreter
    ids = torch.arange(count, device=device) + (1 << 32) - count // 2
    x1 = torch.zeros(count, 4, device=device)
    kinds = {
        "uniform": dict(timesteps="uniform", gamma=0.0, clock="data_at_1"),
        "beta21, slowed": dict(gamma=0.8, clock="data_at_1"),
        "logit-normal, shift 6.93, slowed": dict(
            gamma=0.4, clock="noise_at_1", timesteps="logit-normal", shift=6.93
        ),
    }
    for kind, options in kinds.items():
        ours, twin = (
            MixFlow(**options, seed=SEED, impl=of).prepare(x1, ids=ids)
            for of in (impl, "reference")
        )
        a, b = ({"t": it.t, "slowed_t": it.slowed_t} for it in (ours, twin))
        if kind == "uniform":
            yield from differing("interpolate", f"times {kind}", "float32", a, b)
            continue
        for tensor, value in a.items():
            error = relative_rms(value, b[tensor])
            yield Finding("interpolate", f"times {kind}", tensor, "float32", error, DRAWN_FLOOR)


def masks(device: torch.device, impl: str) -> Iterator[Finding]:
    """Dropout and its gradient against the reference, whose bits they have."""
    positions = torch.tensor(POSITIONS, device=device)
    key = layer_keys(SEED, 2).to(device)[1]
    numel = 33 if device.type == "cpu" else 5000
    x = torch.linspace(-1, 1, len(positions) * numel, device=device).view(-1, numel)
    found: dict[str, dict[str, Tensor]] = {}
    for of in (impl, "reference"):
        given = x.clone().requires_grad_()
        out = dropout(given, 0.13, key, positions, of)
        (gradient,) = torch.autograd.grad(out, given, x)
        found[of] = {"out": out.detach(), "dx": gradient}
    yield from differing("dropout", "masks", "float32", found[impl], found["reference"])


def check_kernels(device: torch.device) -> list[Finding]:
    """Every operator at a small shape, in bfloat16 and float32: what `doctor` runs.

    Where the kernels cannot run, the operators' own path on that device is held to the same.
    """
    impl = "triton" if runtime.can_launch(device) else "auto"
    found = list(guarded(("normal",), "words", "int32", lambda: words(device, impl)))
    found += guarded(("normal",), "normals", "float32", lambda: normals(device, impl))
    found += guarded(("dropout",), "masks", "float32", lambda: masks(device, impl))
    for case in small_cases(device):
        for dtype in (torch.bfloat16, torch.float32):
            one = replace(case, dtype=dtype)
            run = partial(errors, one, device, impl)
            found += guarded(one.ops, one.name, dtype_name(dtype), run)
    return found


def small_cases(device: torch.device) -> list[ObjectiveCase | SourceCase | BlockCase]:
    """Every kernel at least once."""
    on_gpu = device.type == "cuda"
    data = (4, 4, 32, 32) if on_gpu else (4, 4, 4, 4)
    stream = (2, 64, 1152) if on_gpu else (2, 3, 32)
    heads = (2, 64, 16, 72) if on_gpu else (2, 3, 2, 8)
    weighted = partial(Setting, weight="sample")
    settings = weighted(), weighted("gvp", "noise", "noise_at_1")
    blocks = (
        ("residual_norm", "layer per sample", stream, "full"),
        ("residual_norm", "rms per token", stream, "full"),
        ("modulated_norm", "layer per sample", stream, "full"),
        ("gelu", "bias", stream, "full"),
        ("gelu", "bias", stream, "recompute"),
        ("swiglu", "bias", stream, "full"),
        ("swiglu", "bias", stream, "recompute"),
        ("qk_norm_rope", "rms, rope", heads, "full"),
        ("qk_norm_rope", "rope", heads, "full"),
        ("attention", "rms", heads, "full"),
    )
    return [
        *(ObjectiveCase(shape=data, setting=setting, drawn=True) for setting in settings),
        SourceCase(shape=data, drawn=True),
        SourceCase(shape=data, mixes="samples", path="gvp", clock="noise_at_1", drawn=True),
        *(BlockCase(op=o, variant=v, shape=s, mode=m) for o, v, s, m in blocks),
    ]


def worst(findings: Iterable[Finding]) -> Finding:
    return max(findings, key=lambda finding: finding.severity)


def check_draws() -> Finding:
    """Random numbers on the CPU, by the library of `csrc/` where it was built, against the lines
    that define them, bit for bit.
    """
    positions, numel = torch.tensor(POSITIONS), 1027
    ours, twin = {}, {}
    for name, draw, reference in (
        ("uniform", philox.uniform, philox.uniform_reference),
        ("normal", philox.normal, philox.normal_reference),
    ):
        ours[name] = draw(SEED, Stream.NOISE, positions, numel)
        twin[name] = reference(SEED, Stream.NOISE, positions, numel)
    return worst(differing("philox", "numbers on the CPU", "float32", ours, twin))


def check_optimizer(device: torch.device) -> Finding:
    """Three steps of `AdamWEMA` in csrc against the same in foreach calls, weights and EMA."""
    results: list[Mapping[str, Tensor]] = []
    for impl in ("csrc", "foreach"):
        generator = torch.Generator().manual_seed(7)
        p = torch.randn(1027, generator=generator).to(device).requires_grad_()
        optimizer = AdamWEMA(
            [p], lr=1e-2, weight_decay=0.1, ema_decay=0.9, grad_clip=1.0, impl=impl
        )
        for _ in range(3):
            p.grad = torch.randn(1027, generator=generator).to(device)
            optimizer.step()
        results.append({"weights": p.detach(), "ema": optimizer.state[p]["ema"]})
    ours, plain = results
    return worst(
        Finding("AdamWEMA", "three steps", name, "float32", relative_rms(x, plain[name]), 1e-6)
        for name, x in ours.items()
    )
