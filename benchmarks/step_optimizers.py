"""Optimizers of the step, alone and under DeepSpeed: rows of "optimizer" and "deepspeed"."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.rows import CellRows, Times, Writer, paired_ratio, percentiles
from mixflow_fast import extension
from mixflow_fast.diagnostics.kernel_replays import optimizer_replays
from mixflow_fast.environment import apex_message, detect_apex
from mixflow_fast.messages import error_line
from mixflow_fast.models import Transformer
from mixflow_fast.optim.apex import OPTIMIZERS
from mixflow_fast.training.capture import CapturedStep, CudaRecorder

if TYPE_CHECKING:
    from mixflow_fast.config.schema import Config
    from mixflow_fast.training.engines import Engine

LR, DECAY = 1e-4, 0.9999
# What nobody can avoid moving for a parameter, all float32: gradient, weight, moments, EMA.
STEP_BYTES = 4 + 4 * 8
DEEPSPEED_ROUNDS, DEEPSPEED_SECONDS = 15, 0.5


@dataclass(frozen=True)
class Kind:
    """A way to run AdamW and an EMA.

    Attributes:
        note: what stands in the rows.
        state_bytes: bytes a parameter between steps, float32: two moments, gradients of bf16
            weights, an EMA of its own.
        name: `optim.name` of the package's own, which have an EMA of their own.
        captured: whether its steps are replays of a CUDA graph.
    """

    note: str
    state_bytes: int
    name: str | None = None
    captured: bool = False


KINDS = {
    "plain": Kind("AdamW, casts and EMA in a Python loop", 8),
    "tuned": Kind("fused AdamW, foreach EMA", 12),
    # One pass of `csrc/` where it was built, foreach calls elsewhere.
    "adamwema": Kind("AdamWEMA, with the gradient norm", 16, "adamw_ema"),
    "captured": Kind(
        "AdamWEMA in a CUDA graph, with the gradient norm", 16, "adamw_ema", captured=True
    ),
    "apex": Kind("apex FusedAdam, foreach EMA", 12),
    "apex_adamwema": Kind(
        "ApexAdamWEMA: apex FusedAdam, with the gradient norm and EMA", 16, "apex_fused_adam"
    ),
}


class Weights:
    """A network's weights in float32 and in bf16, and one EMA; all arms train the same.

    The parameters of `single` are the masters of those of `half`; `masters` and `params` are what
    is trained of the two, and `ema` is of the masters.
    """

    def __init__(self, net: Transformer) -> None:
        self.single, self.half = net, copy.deepcopy(net).to(torch.bfloat16)
        self.masters, self.params = (
            [p for p in network.parameters() if p.requires_grad] for network in (net, self.half)
        )
        self.ema = [p.detach().clone() for p in self.masters]

    @torch.no_grad()
    def copy_from_masters(self) -> None:
        """The bf16 weights are those of the masters again, whoever stepped last."""
        for p, master in zip(self.params, self.masters, strict=True):
            p.copy_(master)

    def nbytes(self, half: bool, ema: bool) -> int:
        """Bytes that a run with these weights holds: network, masters, the EMA if it is used."""
        networks = (self.single, self.half) if half else (self.single,)
        held = [t for net in networks for t in (*net.parameters(), *net.buffers())]
        return sum(t.nbytes for t in (*held, *(self.ema if ema else ())))


class OptimizerStep:
    """One of `KINDS` on some weights; `half`: gradients come from the bf16 network.

    `has_ema`: it has an EMA of its own, and leaves that of `weights` alone.
    """

    def __init__(self, kind: str, weights: Weights, half: bool) -> None:
        self._loop, self._weights, self._half = kind == "plain", weights, half
        self._inner = _inner(kind, weights.masters)
        self._step: Callable[[], object] = self._inner.step
        if KINDS[kind].captured:
            recorder = CudaRecorder(weights.masters[0].device)
            self._step = CapturedStep(self._inner, recorder)
        self.has_ema = KINDS[kind].name is not None
        self._gradients: list[Tensor] = []

    @torch.no_grad()
    def step(self) -> None:
        """Gradients are read from the network's parameters, or from the masters without `half`."""
        w = self._weights
        if self._half:
            self._take_gradients()
        self._step()
        if self._loop:
            for ema, p in zip(w.ema, w.masters, strict=True):
                ema.mul_(DECAY).add_(p, alpha=1 - DECAY)
        elif not self.has_ema:
            torch._foreach_lerp_(w.ema, w.masters, 1 - DECAY)
        if self._half and self._loop:
            w.copy_from_masters()
        elif self._half:
            torch._foreach_copy_(w.params, w.masters)

    def _take_gradients(self) -> None:
        w = self._weights
        if self._loop:
            for p, master in zip(w.params, w.masters, strict=True):
                master.grad = p.grad.float()
            return
        if not self._gradients:
            self._gradients = [torch.empty_like(master) for master in w.masters]
        torch._foreach_copy_(self._gradients, [p.grad for p in w.params])
        for master, gradient in zip(w.masters, self._gradients, strict=True):
            master.grad = gradient

    def reset(self) -> None:
        """Gives the memory of moments and gradients back; the next step starts them anew."""
        self._inner.state.clear()
        self._gradients = []

    def state_bytes(self) -> int:
        """Bytes of moments, of float32 gradients that are kept, and of an EMA of its own."""
        states = [v for state in self._inner.state.values() for v in state.values()]
        return sum(v.nbytes for v in (*states, *self._gradients) if isinstance(v, Tensor))


def _inner(kind: str, masters: list[Tensor]) -> torch.optim.Optimizer:
    name = KINDS[kind].name
    if name is not None:
        return OPTIMIZERS[name](masters, lr=LR, ema_decay=DECAY)
    if kind == "apex":
        from apex.optimizers import FusedAdam

        return FusedAdam(masters, lr=LR, weight_decay=0.0, adam_w_mode=True)
    fused = True if kind == "tuned" else None
    return torch.optim.AdamW(masters, lr=LR, weight_decay=0.0, fused=fused)


def describe_adamwema(device_type: str) -> str:
    """Which of its implementations `AdamWEMA` takes here."""
    status = extension.load()
    if status.serves(device_type):
        return f"one pass of csrc ({status.state})"
    return f"foreach calls: csrc is not there for {device_type} ({status.reason})"


def time_optimizers(
    weights: Weights,
    writer: Writer,
    rounds: Callable[[Mapping[str, timing.Call], float], Times],
    seconds: float,
    on_gpu: bool,
) -> None:
    """Rows of op "optimizer": the optimizers on the float32 masters alone, gradients in place."""
    kinds = {"torch": "tuned", "mixflow_fast": "adamwema"}
    print(f"  optimizer apex: {apex_message()}{'' if on_gpu else ' (it runs on a GPU)'}")
    if on_gpu:
        wrong = [f for f in optimizer_replays(weights.masters[0].device) if not f.passed]
        for finding in wrong:  # then it has no speed
            print(f"  optimizer captured: {finding.tensor} is off by {finding.error:.3g}: RED")
        kinds |= {} if wrong else {"mixflow_fast_captured": "captured"}
    if on_gpu and detect_apex() == "nvidia":
        kinds |= {"apex": "apex", "mixflow_fast_apex": "apex_adamwema"}
    steppers: dict[str, OptimizerStep] = {}
    notes: dict[str, str] = {}
    for name, kind in kinds.items():
        try:
            steppers[name] = OptimizerStep(kind, weights, half=False)
            notes[name] = KINDS[kind].note
        except Exception as error:  # apex without its CUDA extensions, or of another torch
            print(f"  optimizer {name}: {error_line(error)}")
    for name in notes.keys() & {"mixflow_fast", "mixflow_fast_captured"}:
        notes[name] += f"; {describe_adamwema(weights.masters[0].device.type)}"
    for p in weights.masters:
        p.grad = torch.randn_like(p).mul_(1e-3)
    for stepper in steppers.values():
        for _ in range(2):  # the second one is captured
            stepper.step()
    times = rounds({name: stepper.step for name, stepper in steppers.items()}, seconds)
    for p in weights.masters:
        p.grad = None
    params = sum(p.numel() for p in weights.masters)
    method = timing.rounds_method(seconds)
    cell = CellRows(writer, "optimizer", "step", None, [params], "float32", method)
    for name, note in notes.items():
        ms = percentiles(times[name])
        gb_per_s = ms.rate(STEP_BYTES * params / 1e6)
        cell.add(name, "latency_ms", ms, note)
        cell.add(name, "gb_per_s", gb_per_s, note)
        print(
            f"  optimizer {name:22}{ms.p50:10.2f} ms, {gb_per_s.p50:.0f} GB/s, "
            f"{params / 1e6:.1f} M parameters; {note}"
        )
    cell.add_ratios("mixflow_fast", times, notes)


class EngineSteps:
    """A configuration's training step under both engines of the trainer and in a bare loop.

    All have the same network, objective, batch and `AdamWEMA` on one rank. In bf16 the bare loop
    has float32 masters and float32 gradients of its own, as the engines have. No data loading,
    logging or saving in any.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        # DeepSpeed is an extra, and the other suites run without it.
        from mixflow_fast.training.build import build_execution, build_model, build_objective
        from mixflow_fast.training.ddp_engine import DDPEngine
        from mixflow_fast.training.engine import DeepSpeedEngine

        train, batch = config.train, config.train.global_batch_size
        model = build_model(config.model)
        copied, side = copy.deepcopy(model), model.input_size
        whole = copy.deepcopy(model)
        self._mix = build_objective(config.objective, model.clock, train.seed)
        self._lr, self._half = config.optim.lr, train.precision == "bf16"
        self.x1 = torch.randn(batch, model.in_channels, side, side, device=device)
        self._ids = torch.arange(batch, device=device)
        self._y = self._ids % model.num_classes
        execution = build_execution(config.model, train.zero_stage, device)
        without = dataclasses.replace(train, engine="ddp", zero_stage=0, overlap_comm=False)
        self.engine = DeepSpeedEngine(train, config.optim, batch, model.set_execution(execution))
        self.ddp_engine = DDPEngine(without, config.optim, batch, whole.set_execution(execution))
        self.engine.start(None)
        self.ddp_engine.start(None)
        self.weights = Weights(copied.to(device))
        self._net = self.weights.half if self._half else self.weights.single
        self._net.set_execution(execution)
        self._optimizer = OptimizerStep("adamwema", self.weights, self._half)

    def _loss(self, net: Callable[..., Tensor | tuple[Tensor, ...]]) -> Tensor:
        x1 = self.x1.to(torch.bfloat16) if self._half else self.x1
        it = self._mix.prepare(x1, ids=self._ids)
        out = net(it.x, it.t, self._y)
        return self._mix.loss(out[0] if isinstance(out, tuple) else out, it)

    def deepspeed(self) -> None:
        """One step under DeepSpeed."""
        self._step(self.engine)

    def ddp(self) -> None:
        """One step of the engine without ZeRO."""
        self._step(self.ddp_engine)

    def _step(self, engine: Engine) -> None:
        engine.set_lr(self._lr)
        engine.backward(self._loss(engine))
        engine.step()

    def bare(self) -> None:
        """One step of the bare loop."""
        self._loss(self._net).backward()
        self._optimizer.step()
        self._net.zero_grad(set_to_none=True)


def time_deepspeed(config: Config, device: torch.device, writer: Writer, smoke: bool) -> None:
    """Rows of op "deepspeed": the steps of one rank, in turns, and their ratios to the bare one."""
    from mixflow_fast.distributed import process_group

    process_group.init_process_group(device.type)
    steps, c = EngineSteps(config, device), config.train
    calls = {"deepspeed": steps.deepspeed, "ddp": steps.ddp, "bare": steps.bare}
    for call in calls.values():
        for _ in range(3):
            call()
    seconds = 0.0 if smoke else DEEPSPEED_SECONDS
    times = timing.rounds_ms(calls, device, seconds, 3 if smoke else DEEPSPEED_ROUNDS)
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[c.precision]
    method, shape = timing.rounds_method(seconds), list(steps.x1.shape)
    cell = CellRows(writer, "deepspeed", "step", config.model.name, shape, dtype, method)
    same = f"AdamWEMA: {describe_adamwema(device.type)}"
    notes = {"deepspeed": f"ZeRO {c.zero_stage}, {same}", "ddp": f"no ZeRO, {same}"}
    notes["bare"] = f"no engine, {same}"
    for name, note in notes.items():
        cell.add(name, "latency_ms", percentiles(times[name]), note)
    cell.add_ratios("bare", times, notes)
    cell.add_ratios("ddp", {name: times[name] for name in ("deepspeed", "ddp")}, notes)
    for name, how in (("deepspeed", f"ZeRO {c.zero_stage}"), ("ddp", "no ZeRO")):
        ratio = paired_ratio(times[name], times["bare"])
        print(
            f"a step under {name} takes {ratio.p50:.3f} times a bare one ({ratio.low95:.3f} to "
            f"{ratio.high95:.3f}), {config.model.name}, {c.precision}, {how}"
            + (": a smoke run, no speed" if smoke else "")
        )
    steps.engine.close()
