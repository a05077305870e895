"""Choice of the attention backend: each is tested on this device and at this shape before its use.

A backend serves a shape after its forward and backward pass agreed with float64 as closely as
plain attention in the data's own dtype does (twice its error), were finite, also where every score
is far below zero (there the backward passes of several cuDNN versions give NaN), and ran. On CUDA
devices "auto" is the fastest of those that gave the same bits twice; if none did, the fastest; on
CPUs the first. "math" comes last in any case. Times differ from run to run, so "auto" may take
another backend tomorrow, and other last bits with it: name one to fix it.
"""

from __future__ import annotations

import statistics
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mixflow_fast.kernels.attention.backends import (
    BACKENDS,
    REGISTRY,
    Backend,
    Gradients,
    math_backward,
    math_forward,
    run_backward,
    run_forward,
)

# Relative RMS error against float64 that is allowed on top of twice that of eager attention. In 16
# bits it is one rounding of `out`: flash attention computes gradients from it, eager does not.
FLOORS = {torch.float64: 1e-9, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
NAMES = ("out", "dq", "dk", "dv")
# Low enough for exp(-lse) to overflow float32.
FAR_BELOW = -120.0
TIMED_RUNS = 10


@dataclass(frozen=True)
class AttentionChoice:
    """The answer of `choose_backend`.

    Attributes:
        backend: the name to pass as `backend`.
        tested: the result of each candidate: "ok 0.123 ms, same bits twice", "not installed",
            "refused: ...", "NaN in dq", "error 3.0e-01 > 1.0e-02 in dk", "not tested: ...".
    """

    backend: str
    tested: dict[str, str]


class _Key(NamedTuple):
    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    backward: bool
    # Part of the key because backends that split sums may be told not to.
    deterministic: bool


@dataclass(frozen=True)
class _Result:
    text: str
    ok: bool = False
    ms: float = 0.0
    same_bits: bool = False
    # False where a later test may end otherwise: there may be memory by then.
    keep: bool = True


_results: dict[tuple[str, _Key], _Result] = {}
_choices: dict[tuple[_Key, tuple[str, ...]], AttentionChoice] = {}


def reset_choices() -> None:
    """Forgets all results: backends are tested anew when they are next needed."""
    _results.clear()
    _choices.clear()


class _Problem(NamedTuple):
    """Two kinds of samples in turn: sharp random scores, and scores around `FAR_BELOW`."""

    qkv: Tensor
    dout: Tensor
    # Results of one sample of each kind, in float64 and in the data's dtype.
    truth: dict[str, Tensor]
    eager: dict[str, Tensor]


def _problem(key: _Key) -> _Problem:
    shape = (key.tokens, key.heads, key.head_dim)
    # A generator of its own: a choice must not change what the program draws.
    generator = torch.Generator("cpu").manual_seed(0)
    options = dict(generator=generator, device="cpu")
    qkv = torch.randn(2, key.tokens, 3, key.heads, key.head_dim, **options)
    qkv[0, :, 0] *= 3  # sharp: few keys get most of the weight
    qkv[1, :, 0, :, 0] = 1
    qkv[1, :, 1, :, 0] = FAR_BELOW * key.head_dim**0.5
    dout = torch.randn(2, *shape, **options)
    qkv, dout = (x.to(key.device, key.dtype) for x in (qkv, dout))
    exact, plain = (_math(qkv, dout, dtype) for dtype in (torch.float64, key.dtype))
    # Every sample as often as the batch has it, the last ones behind the largest offsets.
    index = torch.arange(key.batch, device=key.device) % 2
    return _Problem(qkv[index], dout[index], exact, plain)


def _math(qkv: Tensor, dout: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    q, k, v, dout = (x.to(dtype) for x in (*qkv.unbind(2), dout))
    scale = qkv.shape[-1] ** -0.5
    out, lse = math_forward(q, k, v, scale, dtype)
    gradients = math_backward(dout, q, k, v, out, lse, scale, dtype)
    return dict(zip(NAMES, (out, *gradients), strict=True))


def _run(core: Backend, problem: _Problem, backward: bool, separate: bool) -> dict[str, Tensor]:
    """Results by name. `separate` puts q and k into a buffer of their own, as a rotation does."""
    q, k, v = problem.qkv.unbind(2)
    if separate:
        q, k = problem.qkv[:, :, :2].contiguous().unbind(2)
    out, lse = run_forward(core, q, k, v)
    if not backward:
        return {"out": out}
    gradients = run_backward(core, problem.dout, q, k, v, out, lse)
    return dict(zip(NAMES, (out, *slots(gradients)), strict=True))


def slots(gradients: Gradients) -> tuple[Tensor, ...]:
    """(dq, dk, dv), packed or not."""
    return gradients.unbind(2) if isinstance(gradients, Tensor) else tuple(gradients)


def _error(x: Tensor, truth: Tensor, least: Tensor) -> float:
    # Gradients of q and k come out of differences, which a few tokens leave next to nothing of
    # (a single one: nothing). Relative to the output then, whose size the differences have.
    return ((x.double() - truth).norm() / truth.norm().maximum(least)).item()


def _fault(found: dict[str, Tensor], problem: _Problem, dtype: torch.dtype) -> str:
    """The first fault in the results of a backend; "" where there is none."""
    for name, x in found.items():
        if not x.isfinite().all():
            return f"NaN in {name}"
        for kind in (0, 1):
            # Far below zero, column 0 of dq is the small difference of terms a thousand times
            # larger and of the scores' rounding, so it is left out and the rest is given slack.
            columns, slack = slice(kind, None), (1, 8)[kind]
            truth = problem.truth[name][kind][..., columns]
            eager = problem.eager[name][kind][..., columns]
            least = problem.truth["out"][kind].norm()
            allowed = slack * (2 * _error(eager, truth, least) + FLOORS[dtype])
            places = kind, len(x) - 2 + kind
            error = max(_error(x[place][..., columns], truth, least) for place in places)
            if not error <= allowed:
                return f"error {error:.1e} > {allowed:.1e} in {name}"
    return ""


def _self_test(name: str, key: _Key) -> _Result:
    """The test of one backend: packed twice for the bits, then with q and k apart, then timed."""
    core = REGISTRY[name]
    try:
        reason = core.missing(key.device, key.dtype)
        if reason:
            return _Result(reason if reason == "not installed" else f"refused: {reason}")
        problem = _problem(key)
        first, same = _run(core, problem, key.backward, separate=False), True
        fault = _fault(first, problem, key.dtype)
        for separate in (False, True):
            if fault:
                return _Result(fault)
            found = _run(core, problem, key.backward, separate)
            fault = _fault(found, problem, key.dtype)
            if not separate:
                same = all(torch.equal(first[name], found[name]) for name in first)
                first = {}
            del found
        if fault:
            return _Result(fault)
        if key.deterministic and not same:
            return _Result("refused: other bits in a second run, in deterministic mode")
        ms = _time_ms(core, problem, key) if key.device.type == "cuda" else 0.0
    except torch.OutOfMemoryError:
        return _Result("not tested: out of memory", keep=False)
    # Whatever a foreign library raises means that it cannot be used here.
    except Exception as error:
        return _Result(f"refused: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    text = f"ok {ms:.3f} ms" if ms else "ok"
    text += ", same bits twice" if same else ", other bits in a second run"
    padding = core.padding(key.head_dim, key.device)
    if padding:
        text += f", head_dim {key.head_dim} padded to {key.head_dim + padding}"
    return _Result(text, True, ms, same)


def _time_ms(core: Backend, problem: _Problem, key: _Key) -> float:
    # The median, because other work on the device makes single runs slow.
    times = []
    for _ in range(TIMED_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _run(core, problem, key.backward, separate=False)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _result(name: str, key: _Key) -> _Result:
    if (name, key) not in _results or not _results[name, key].keep:
        # Events, streams and captures are those of the current device, wherever tensors lie.
        with _current(key.device):
            _results[name, key] = _tested(name, key)
    return _results[name, key]


def _current(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _tested(name: str, key: _Key) -> _Result:
    if key.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "attention has no backend for this shape yet, and cannot test any inside a CUDA "
                f"graph: call choose_backend(batch={key.batch}, tokens={key.tokens}, "
                f"heads={key.heads}, head_dim={key.head_dim}, dtype={key.dtype}, "
                f"device={str(key.device)!r}, backward={key.backward}), or run one step, before "
                "the capture"
            )
        # An error of what ran before would else be taken for this backend's.
        torch.cuda.synchronize()
    # Without the caller's autocast, which would change the dtype that the truth is computed in.
    with torch.no_grad(), torch.autocast(key.device.type, enabled=False):
        return _self_test(name, key)


def _key(
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    backward: bool,
) -> _Key:
    """The key that results are kept under, from the arguments of `choose_backend`."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    # On CPUs nothing is timed, so two samples say as much as many. Elsewhere a choice holds up to
    # the next power of two: a last, smaller batch needs no tests of its own.
    batch = 2 if device.type == "cpu" else 1 << (max(batch, 2) - 1).bit_length()
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _Key(batch, tokens, heads, head_dim, dtype, device, backward, deterministic)


def choose_backend(
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    backward: bool = True,
    candidates: tuple[str, ...] = BACKENDS,
) -> AttentionChoice:
    """Tests the candidates at this shape and takes one; the answer is kept for the process.

    Args:
        batch, tokens, heads, head_dim: B, N, H, K of qkv.
        dtype, device: qkv's.
        backward: whether gradients are needed: without, only the forward pass counts.
        candidates: names of `BACKENDS`, in order of preference where nothing is timed.

    Returns:
        the choice, with the result of every candidate.

    Raises:
        ValueError: an unknown candidate, or none passed.
        torch.OutOfMemoryError: none passed, and one or more for want of memory.
        RuntimeError: inside the capture of a CUDA graph, if the answer is not known yet.
    """
    unknown = [name for name in candidates if name not in REGISTRY]
    if unknown or not candidates:
        raise ValueError(f"backend must be one of {BACKENDS}, got {unknown or candidates}")
    key = _key(batch, tokens, heads, head_dim, dtype, device, backward)
    candidates = tuple(candidates)
    if (key, candidates) in _choices:
        return _choices[key, candidates]
    choice = _choose(key, candidates)
    if all(_results[name, key].keep for name in candidates if (name, key) in _results):
        _choices[key, candidates] = choice
    return choice


def _choose(key: _Key, candidates: tuple[str, ...]) -> AttentionChoice:
    timed = key.device.type == "cuda"
    tested: dict[str, str] = {}
    # Name -> its place in the order: backends that repeat their bits first, then the fastest.
    passed: dict[str, tuple[bool, float]] = {}
    for name in sorted(candidates, key=lambda name: name == "math"):
        best = min(passed, key=passed.__getitem__, default=None)
        if best and (not timed or name == "math"):
            tested[name] = f"not tested: {best} comes first"
            continue
        result = _result(name, key)
        tested[name] = result.text
        if result.ok:
            passed[name] = not result.same_bits, result.ms
    if not passed:
        text = _none_passed(key, candidates, tested)
        # With less in a batch one may pass, and callers who halve batches know this error.
        if not all(_results[name, key].keep for name in tested if (name, key) in _results):
            raise torch.OutOfMemoryError(text)
        raise ValueError(text)
    return AttentionChoice(min(passed, key=passed.__getitem__), tested)


def _none_passed(key: _Key, candidates: tuple[str, ...], tested: dict[str, str]) -> str:
    others = [name for name in BACKENDS if name not in candidates and _result(name, key).ok]
    found = "; ".join(f"{name}: {text}" for name, text in tested.items())
    shape = f"N={key.tokens}, H={key.heads}, K={key.head_dim}, {key.dtype} on {key.device}"
    way_out = f"passed: {', '.join(others)}" if others else "no other backend passed"
    return f'no attention backend for {shape}: {found} ({way_out}; or backend="auto")'


def resolve(backend: str, qkv: Tensor, backward: bool) -> Backend:
    """The tested backend for qkv (B, N, 3, H, K): `backend` itself, or "auto"'s choice."""
    B, N, _, H, K = qkv.shape
    candidates = BACKENDS if backend == "auto" else (backend,)
    choice = choose_backend(
        B, N, H, K, qkv.dtype, qkv.device, backward=backward, candidates=candidates
    )
    return REGISTRY[choice.backend]
