"""AdamW with exponential moving averages of the weights as optimizer state.

    m = beta1 m + (1 - beta1) g              v = beta2 v + (1 - beta2) g^2
    w = (1 - lr wd) w - lr (m / (1 - beta1^k)) / (sqrt(v / (1 - beta2^k)) + eps)
    ema = decay ema + (1 - decay) w          after every step, from the first one

Decoupled weight decay: arXiv 1711.05101. The EMA starts as a copy of the weights before the first
step, so a run that starts from a checkpoint's EMA weights starts its EMA there too. Because it is
ordinary optimizer state, DeepSpeed's ZeRO shards, saves and restores it with the moments. There may
be several, of fixed decays and of power functions (`optim/power_ema.py`).

Clipping by the global norm is done here, on the device: DeepSpeed's own reads the norm on the host
every step, which stalls a GPU.

Where `csrc/` was built (`mixflow_fast.extension`) a step is one pass over the memory, elsewhere a
series of foreach calls. The state of both is the same, so a run can change from one to the other.
A CUDA graph takes the device's half of a step, `AdamWEMA.update`; `AdamWEMA.advance` is the host's.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from mixflow_fast import extension
from mixflow_fast.optim.power_ema import LARGEST_SIGMA_REL
from mixflow_fast.optim.step_calls import (
    CONSTANTS,
    MAX_EMAS,
    Call,
    State,
    csrc_settings,
    ema_names,
    ema_shares,
    foreach_constants,
    frozen_in_graphs,
    send_constants,
)

OptimizerImpl = Literal["auto", "csrc", "foreach"]
IMPLS = get_args(OptimizerImpl)
# Parameters, or parameter groups.
Params = Iterable[Tensor] | Iterable[dict[str, object]]


class _Kind(NamedTuple):
    """Properties that parameters must share to be updated in one call."""

    step: int
    copied: bool
    csrc: tuple[torch.device, torch.dtype] | None  # of parameter and gradient; None: foreach


class AdamWEMA(torch.optim.Optimizer):
    """AdamW that keeps EMAs of every parameter in its state.

    State of a parameter: "step", "exp_avg", "exp_avg_sq"; "ema", "ema_1", ... of the fixed decays;
    "ema_power_0", ... of the power functions. All but the step are float32.

    Args:
        params: parameters or parameter groups, float32 (under ZeRO: its flat float32 partitions).
        lr: learning rate > 0 (or 0).
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay >= 0.
        ema_decay: decay per step in [0, 1), or several, or none.
        ema_sigma_rel: widths of power-function EMAs, in (0, 12^-0.5].
        grad_clip: largest global gradient norm; larger gradients are scaled down to it. 0 = off.
            "foreach" scales the gradients in place, "csrc" leaves them as they are.
        sharded: the parameters are this rank's partition of the whole (ZeRO 1 and 2): the norm is
            summed over the ranks.
        impl: "csrc" (one pass in C++ or CUDA), "foreach", or "auto": "csrc" for contiguous float32
            parameters with float32 or bfloat16 gradients where the library is there, else
            "foreach", with one warning where it is not. They agree to rounding, not to the bit.

    Attributes:
        grad_norm: global gradient norm of the last step before clipping, a scalar on the device.
        skips: whether steps whose norm is not finite change nothing; see `skip_nonfinite`.
        capturable: whether a CUDA graph can have its steps, by `advance` and `update`.

    Raises:
        ValueError: a setting outside its range; impl="csrc" without its library.
    """

    skips = False
    capturable = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decay: float | Sequence[float] = 0.9999,
        grad_clip: float = 0.0,
        sharded: bool = False,
        ema_sigma_rel: Sequence[float] = (),
        impl: OptimizerImpl = "auto",
    ) -> None:
        several = not isinstance(ema_decay, int | float)
        decays = tuple(ema_decay) if several else (ema_decay,)
        for name, value, low, high in (
            ("lr", lr, 0.0, math.inf),
            ("betas[0]", betas[0], 0.0, 1.0),
            ("betas[1]", betas[1], 0.0, 1.0),
            ("eps", eps, 0.0, math.inf),
            ("weight_decay", weight_decay, 0.0, math.inf),
            *(("ema_decay", decay, 0.0, 1.0) for decay in decays),
            ("grad_clip", grad_clip, 0.0, math.inf),
        ):
            if not low <= value < high:
                raise ValueError(f"{name} must be in [{low:g}, {high:g}), got {value!r}")
        widths = tuple(ema_sigma_rel)
        if not all(0 < width <= LARGEST_SIGMA_REL for width in widths):
            raise ValueError(
                f"ema_sigma_rel must be in (0, {LARGEST_SIGMA_REL:.4f}], got {ema_sigma_rel!r}"
            )
        if len(decays) + len(widths) > MAX_EMAS:
            raise ValueError(
                f"ema_decay and ema_sigma_rel must name at most {MAX_EMAS} EMAs, got "
                f"{len(decays)} and {len(widths)}"
            )
        if impl not in IMPLS:
            raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")
        if impl == "csrc" and extension.load().state == "absent":
            raise ValueError(
                f'impl="csrc" needs the library of csrc/ ({extension.load().reason}): build it '
                f'with `{extension.COMMAND}`, or use impl="auto"'
            )
        defaults = dict(
            lr=lr,
            betas=tuple(betas),
            eps=eps,
            weight_decay=weight_decay,
            ema_decay=decays if several else ema_decay,
            ema_sigma_rel=widths,
        )
        super().__init__(params, defaults)
        self.grad_clip = grad_clip
        self.sharded = sharded
        self.impl = impl
        self.grad_norm: Tensor | None = None
        self._copies: dict[Tensor, Tensor] = {}
        self._advanced: list[Call] | None = None
        self._frozen: tuple[object, ...] | None = None
        self._constants: list[Tensor] = []
        self._norm: Tensor | None = None

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        # Checkpoints of versions without power-function EMAs do not have the setting.
        for group in self.param_groups:
            group.setdefault("ema_sigma_rel", ())

    def set_copies(self, copies: Mapping[Tensor, Tensor]) -> None:
        """Makes every later step write the new weights as bfloat16 too, into the caller's tensors.

        For trainers that keep float32 master weights and compute with a bfloat16 copy. Not for
        DeepSpeed, which makes its own copies. They are no part of the state.

        Args:
            copies: parameter -> bfloat16 tensor of its shape, contiguous, on its device. Replaces
                earlier ones; an empty mapping ends it.

        Raises:
            ValueError: a key that is no parameter of this optimizer, or a tensor that does not fit.
        """
        own = {p for group in self.param_groups for p in group["params"]}
        for p, copy in copies.items():
            if p not in own:
                raise ValueError(
                    f"copies must be keyed by this optimizer's parameters, got a tensor of shape "
                    f"{tuple(p.shape)} that is none of them"
                )
            fits = copy.dtype == torch.bfloat16 and copy.is_contiguous()
            if not fits or copy.shape != p.shape or copy.device != p.device:
                raise ValueError(
                    f"copies must be contiguous bfloat16 of shape {tuple(p.shape)} on {p.device} "
                    f"like their parameters, got {copy.dtype} of shape {tuple(copy.shape)}, "
                    f"strides {copy.stride()}, on {copy.device}"
                )
        self._copies = dict(copies)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient; no device sync.

        Raises:
            RuntimeError: a CUDA graph is captured: learning rate and bias corrections are numbers
                of this step, which every replay would repeat.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "AdamWEMA.step cannot be captured in a CUDA graph: its learning rate and step "
                "number would stay those of the capture. Capture update(), and call advance() "
                "before each replay"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_all(self._count())
        return loss

    @torch.no_grad()
    def advance(self) -> bool:
        """The host's half of a step in a CUDA graph: counts it, and sends its constants.

        A step then is `advance()`, and `update()` or the replay of a graph that has it:

            if optimizer.advance():
                optimizer.update()
                graph = None
            else:
                if graph is None:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        optimizer.update()  # captured, and not run
                graph.replay()

        The constants are those of `step`, computed in float64 and rounded to float32. They travel
        as arguments of a kernel into memory that the graph reads: a step that is under way has read
        its own before, and no memory of the host has to be kept for it.

        Returns:
            whether an earlier capture of `update` no longer holds: there was no step before, or
            gradients, weights, state or copies lie elsewhere than in the last one (a capture
            reads and writes where they lay), or a setting besides the learning rate and the factor
            of the weight decay is another.

        Raises:
            RuntimeError: this kind of optimizer cannot be captured.
        """
        if not self.capturable:
            raise RuntimeError(
                f"{type(self).__name__} cannot be captured in a CUDA graph: the step number of its "
                "kernel comes from the host. Call step(), or use AdamWEMA (optim.name=adamw_ema)"
            )
        calls = self._count()
        frozen = (self.grad_clip, *(frozen_in_graphs(call) for call in calls))
        moved = frozen != self._frozen
        if moved:
            devices = [call.params[0].device for call in calls]
            self._constants = [torch.zeros(CONSTANTS, device=device) for device in devices]
            self._norm = torch.zeros((), device=devices[0]) if calls else None
            self._frozen = frozen
        for call, constants in zip(calls, self._constants, strict=True):
            call.constants = constants
            send_constants(call)
        self._advanced = calls
        return moved

    @torch.no_grad()
    def update(self) -> None:
        """The device's half of the step that `advance` has begun. May be captured in a CUDA graph.

        It has the bits of `step` on a CPU, and on a GPU with "csrc"; with "foreach" on a GPU it
        agrees with `step` to rounding. `grad_norm` is one tensor that every replay writes again.

        Raises:
            RuntimeError: `advance` was not called.
        """
        if self._advanced is None:
            raise RuntimeError("update() is the second half of a step: call advance() before it")
        self._update_all(self._advanced)

    def _count(self) -> list[Call]:
        """Counts a step of every parameter that has a gradient, in calls for those alike."""
        calls: list[Call] = []
        for group in self.param_groups:
            names = ema_names(group)
            alike: dict[_Kind, Call] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._started(p, names)
                state["step"] += 1
                csrc = (p.device, p.grad.dtype) if self._takes_csrc(p) else None
                kind = _Kind(state["step"], p in self._copies, csrc)
                if kind not in alike:
                    alike[kind] = Call(group, kind.step, csrc is not None)
                alike[kind].params.append(p)
                alike[kind].states.append(state)
                if kind.copied:
                    alike[kind].copies.append(self._copies[p])
            calls += alike.values()
        return calls

    def _update_all(self, calls: list[Call]) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        scale = self._clip([p.grad for p in params if p.grad is not None], calls)
        for call in calls:
            self._update(call, scale)

    def _clip(self, grads: list[Tensor], calls: list[Call]) -> Tensor | None:
        """The factor for all gradients, on the device; None for 1."""
        if not grads:
            return None
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
        square = torch.stack(norms).square().sum()
        if self.sharded and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(square)
        # Of a capture's own memory other graphs may make use later.
        captured = calls[0].constants is not None
        self.grad_norm = torch.sqrt(square, out=self._norm if captured else None)
        if not self.grad_clip:
            return None
        return (self.grad_clip / (self.grad_norm + 1e-6)).clamp(max=1.0)

    def _update(self, call: Call, scale: Tensor | None) -> None:
        """One step of the parameters of a call."""
        if call.csrc:
            self._csrc(call, scale)
            return
        self._adamw(call, scale)
        weights = [p.float() for p in call.params]
        for name, share in ema_shares(call).items():
            # A tensor is one number for all: foreach calls take it as one for each.
            shares = [share] * len(weights) if isinstance(share, Tensor) else share
            torch._foreach_lerp_([s[name] for s in call.states], weights, shares)
        if call.copies:
            torch._foreach_copy_(call.copies, call.params)

    def _started(self, p: Tensor, names: list[str]) -> State:
        """The state of a parameter; EMAs that it does not have yet start at the current weights."""
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        for name in names:
            if name not in state:
                state[name] = p.detach().to(torch.float32, copy=True)
        return state

    def _takes_csrc(self, p: Tensor) -> bool:
        """Whether the operator updates this parameter; a ValueError where it must and cannot."""
        if self.impl == "foreach":
            return False
        status = extension.load()
        fits = p.dtype == torch.float32 and p.is_contiguous() and type(p.data) is Tensor
        fits = fits and p.grad.dtype in (torch.float32, torch.bfloat16)
        if fits and status.serves(p.device.type):
            return True
        if self.impl == "csrc":
            raise ValueError(
                'impl="csrc" updates contiguous float32 parameters with float32 or bfloat16 '
                f"gradients, here on {'cpu or cuda' if status.cuda else 'cpu'}, got {p.dtype} of "
                f"shape {tuple(p.shape)} and strides {p.stride()} with {p.grad.dtype} on "
                f'{p.device}: use impl="auto"'
            )
        if fits and p.device.type in ("cpu", "cuda"):
            _warn_once(status, p.device.type)
        return False

    def _csrc(self, call: Call, scale: Tensor | None) -> None:
        """One pass of the operator, for parameters of one device and gradients of one dtype."""
        lists = (
            [p.detach() for p in call.params],
            [p.grad.contiguous() for p in call.params],
            [s["exp_avg"] for s in call.states],
            [s["exp_avg_sq"] for s in call.states],
            [s[name] for name in ema_names(call.group) for s in call.states],
            call.copies,
        )
        norm = self.grad_norm if self.skips else None
        if call.constants is None:
            torch.ops.mixflow_fast.adamw_ema_(*lists, scale, **csrc_settings(call), grad_norm=norm)
        else:
            torch.ops.mixflow_fast.adamw_ema_from_constants_(
                *lists, scale, constants=call.constants, grad_norm=norm
            )

    def _adamw(self, call: Call, scale: Tensor | None) -> None:
        """Updates moments and weights of a call."""
        group, params = call.group, call.params
        grads = [p.grad.float() for p in params]
        if scale is not None:
            torch._foreach_mul_(grads, scale)
        exp_avg = [s["exp_avg"] for s in call.states]
        exp_avg_sq = [s["exp_avg_sq"] for s in call.states]
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(exp_avg, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sq, beta2)
        torch._foreach_addcmul_(exp_avg_sq, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(exp_avg_sq)
        if call.constants is None:
            root, decay, size = foreach_constants(call)[:3]
            torch._foreach_div_(denominators, root)
            torch._foreach_add_(denominators, group["eps"])
            if group["weight_decay"]:
                # Not a product with 1 - lr wd, in which float32 keeps only a digit or two of lr wd.
                torch._foreach_add_(params, params, alpha=-decay)
            torch._foreach_addcdiv_(params, exp_avg, denominators, -size)
            return
        # The same by calls that take tensors: neither alpha nor value may be one.
        root, decay, size = call.constants[:3].unbind()
        torch._foreach_div_(denominators, root)
        torch._foreach_add_(denominators, group["eps"])
        if group["weight_decay"]:
            zeros = [torch.zeros_like(decay)] * len(params)
            torch._foreach_lerp_(params, zeros, [decay] * len(params))
        steps = torch._foreach_mul(exp_avg, size)
        torch._foreach_div_(steps, denominators)
        torch._foreach_sub_(params, steps)


# Device types that a warning was given for.
_warned: set[str] = set()


def _warn_once(status: extension.Status, device_type: str) -> None:
    """Says on rank 0, once for each device type, that the operator is not used, and why."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))
    if device_type in _warned or rank:
        return
    _warned.add(device_type)
    reason = status.reason
    if status.state != "absent":
        reason = f"the library of csrc/ has no {device_type} part: {status.path}"
    warnings.warn(
        f"AdamWEMA runs as foreach calls, which is slower ({reason}): build the library with "
        f'`{extension.COMMAND}`, or say impl="foreach"',
        stacklevel=2,
    )
