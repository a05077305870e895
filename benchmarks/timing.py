"""Times of calls, in rounds in which the providers take turns; memory and launches of a call.

On a GPU a cell is timed in one of two ways, the same for all its providers:

* events: CUDA events around each call, the L2 cache overwritten before it, and the launch queue
  kept ahead by a short sleep kernel, so that the time is the device's and not Python's.
* graph: where the fastest provider takes under 20 us, events around a CUDA graph of 100 calls, its
  launch hidden behind a short sleep kernel. The data are then in the L2 cache for all providers.

`call_ms` is the other side: wall time per call of 10 calls issued from Python and waited for, with
all that the host spends. On the CPU both are the wall time of single calls.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from benchmarks.rows import synchronize
from mixflow_fast.diagnostics.kernel_cases import Tensors
from mixflow_fast.diagnostics.kernel_replays import capture
from mixflow_fast.messages import error_line

FLUSH_BYTES = 256 << 20
# Many, so that torch's fills before a replay (its generator's seed and offset, where the graph
# draws from it) are a small part of it.
GRAPH_CALLS = 100
# About 0.2 ms.
REPLAY_SLEEP_CYCLES = 400_000
GRAPH_BELOW_MS = 0.020
WALL_CALLS = 10
WARM_ROUNDS = 2
WARM_STEP_ROUNDS = 1

Call = Callable[[], object]
# Milliseconds per call of a provider's turn.
Sampler = Callable[[], list[float]]


@dataclass
class Timing:
    """Milliseconds per call. `rounds[provider][r]` are the samples of round r.

    Attributes:
        method: how they were taken, a sentence for the row.
        wall: per provider one number a round, see `call_ms` above.
    """

    method: str
    rounds: dict[str, list[list[float]]]
    wall: dict[str, list[float]]


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, list[str]]]:
    """(round, names): every name once a round, the order turned by one every round."""
    for number in range(rounds):
        first = number % len(names)
        yield number, [*names[first:], *names[:first]]


def wall_ms(call: Call, calls: int, device: torch.device) -> float:
    """Milliseconds per call of `calls` calls issued back to back and waited for."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3 / calls


def _events_ms(call: Call, calls: int, before: Call = lambda: None) -> list[float]:
    """Device time of each of `calls` calls; `before` is issued before each and not timed."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in pairs:
        before()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


class CudaTimer:
    """Event timing on the current GPU; holds the buffer that clears the L2 cache."""

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def events_ms(self, call: Call, calls: int, host_ms: float) -> list[float]:
        """Device time of each of `calls` calls, cold L2; host_ms: what issuing one costs."""
        # Cycles at 2 GHz: at a lower clock the sleep is longer, which does no harm.
        ahead = int(min(2.0 * host_ms + 0.05, 20.0) * 2e6)

        def before() -> None:
            self._flush.zero_()
            torch.cuda._sleep(ahead)

        return _events_ms(call, calls, before)

    def quick_ms(self, call: Call) -> float:
        """Median device time of a warm call: for choices, not for rows."""
        for _ in range(3):
            call()
        return median(self.events_ms(call, 11, _issue_ms(call)))


def _host_ms(call: Call) -> tuple[float, float]:
    """(what the host spends to issue a warm call, what the call takes)."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    issued = time.perf_counter()
    torch.cuda.synchronize()
    return (issued - start) * 1e3, (time.perf_counter() - start) * 1e3


def _issue_ms(call: Call) -> float:
    return median(_host_ms(call)[0] for _ in range(5))


def _capture(call: Call) -> Call:
    """A replay of a CUDA graph of GRAPH_CALLS calls."""

    def calls() -> Tensors:
        for _ in range(GRAPH_CALLS):
            call()
        return {}

    return capture(calls, torch.device("cuda"))[1]


def _replay_ms(replay: Call, replays: int) -> list[float]:
    """Device time per call in each of `replays` replays."""
    whole = _events_ms(replay, replays, lambda: torch.cuda._sleep(REPLAY_SLEEP_CYCLES))
    return [ms / GRAPH_CALLS for ms in whole]


def measure(
    calls: Mapping[str, Call],
    device: torch.device,
    timer: CudaTimer | None = None,
    rounds: int = 12,
    round_ms: float = 10.0,
) -> Timing:
    """Time the providers' calls in interleaved rounds.

    Args:
        timer: needed on a GPU.
        rounds: rounds that count, after two that do not.
        round_ms: device time of a provider's round (at least 5 and at most 50 samples).
    """
    # Compilation, and the allocator's first blocks.
    for call in calls.values():
        for _ in range(2):
            call()
    if timer is None:
        if device.type == "cuda":
            raise ValueError("timer must be a CudaTimer on a GPU, got None")
        method = "perf_counter around single calls on the CPU"
        samplers = {
            name: lambda call=call: [wall_ms(call, 1, device) for _ in range(3)]
            for name, call in calls.items()
        }
    else:
        method, samplers = _gpu_samplers(calls, timer, round_ms)
    timing = Timing(method, {name: [] for name in calls}, {name: [] for name in calls})
    for number, order in turns(list(calls), WARM_ROUNDS + rounds):
        for name in order:
            samples = samplers[name]()
            wall = wall_ms(calls[name], WALL_CALLS, device) if timer else median(samples)
            if number >= WARM_ROUNDS:
                timing.rounds[name].append(samples)
                timing.wall[name].append(wall)
    return timing


def _gpu_samplers(
    calls: Mapping[str, Call], timer: CudaTimer, round_ms: float
) -> tuple[str, dict[str, Sampler]]:
    """The method for all providers of a cell, and a sampler for each."""
    quick = {name: timer.quick_ms(call) for name, call in calls.items()}
    samplers: dict[str, Sampler] = {}
    trouble = ""
    if min(quick.values()) < GRAPH_BELOW_MS:
        try:
            graphs = {name: _capture(call) for name, call in calls.items()}
        except RuntimeError as error:
            trouble = f"; no CUDA graph: {error_line(error, 200)}"
        else:
            for name, graph in graphs.items():
                replays = _samples(round_ms, min(_replay_ms(graph, 5)) * GRAPH_CALLS)
                samplers[name] = partial(_replay_ms, graph, replays)
            return f"CUDA graph of {GRAPH_CALLS} calls, warm L2", samplers
    for name, call in calls.items():
        count = _samples(round_ms, quick[name])
        samplers[name] = partial(timer.events_ms, call, count, _issue_ms(call))
    return f"CUDA events per call, cold L2{trouble}", samplers


def _samples(round_ms: float, each_ms: float) -> int:
    return max(5, min(50, round(round_ms / max(each_ms, 1e-3))))


def rounds_method(seconds: float) -> str:
    """What `rounds_ms` does, a sentence for the row."""
    length = f"rounds of about {seconds} s" if seconds else "single steps"
    return f"wall time of {length}, waited for; providers take turns"


def rounds_ms(
    calls: Mapping[str, Call],
    device: torch.device,
    seconds: float,
    rounds: int,
    enough: Callable[[int], bool] = lambda done: False,
) -> dict[str, list[float]]:
    """Milliseconds per step of each provider and round, wall time of turns of several steps.

    Args:
        seconds: how long a turn takes, about; single steps for 0.
        rounds: rounds that count, after one that does not.
        enough: whether to stop, given the rounds that are done.
    """
    steps = {
        name: max(1, round(seconds / (wall_ms(call, 1, device) * 1e-3)))
        for name, call in calls.items()
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number, order in turns(list(calls), WARM_STEP_ROUNDS + rounds):
        if enough(number - WARM_STEP_ROUNDS):
            break
        for name in order:
            ms = wall_ms(calls[name], steps[name], device)
            if number >= WARM_STEP_ROUNDS:
                times[name].append(ms)
    return times


def peaks_mib(call: Call) -> tuple[float, float, float]:
    """(peak beyond what was allocated, peak reserved, allocated before) of one warm call."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    # Held until the peak is read: the results are part of what a call needs.
    made = call()
    torch.cuda.synchronize()
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    del made
    return (peak - before) / 2**20, reserved / 2**20, before / 2**20


def host_idle_percent(call: Call) -> float:
    """Share of a warm call's time in which Python has issued it all and waits for the device.

    A lower bound where the launch queue is full: the host then waits inside the call.
    """
    issued, whole = _host_ms(call)
    return 100 * (whole - issued) / whole


def count_launches(call: Call) -> int | None:
    """Kernels, copies and fills that one warm call starts; None where the profiler sees none.

    What is timed after this in the same process may be slower: the profiler stays attached.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    launches = sum(
        event.device_type == cuda and not getattr(event, "is_user_annotation", False)
        for event in profile.events()
    )
    return launches or None


def matmul_tflops(size: int) -> float:
    """TFLOP/s of a square bf16 product: what a network of products could reach."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    # The first ones warm up.
    return 2 * size**3 / (median(_events_ms(lambda: a @ b, 25)[5:]) * 1e9)


def copy_bandwidth(timer: CudaTimer) -> float:
    """Bytes per second of a device-to-device copy of 1 GiB, read plus written: the yardstick."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    for _ in range(3):  # the first warms up
        samples = timer.events_ms(lambda: target.copy_(source), 15, 0.05)
    return 2 * source.nbytes / (median(samples) * 1e-3)
