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
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypedDict, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from mixflow_fast import extension
from mixflow_fast.optim.power_ema import LARGEST_SIGMA_REL, power_decay, sigma_rel_to_gamma

OptimizerImpl = Literal["auto", "csrc", "foreach"]
IMPLS = get_args(OptimizerImpl)
# As many as one call of the operator in `csrc/` updates.
MAX_EMAS = 16


# Parameters, or parameter groups.
Params = Iterable[Tensor] | Iterable[dict[str, object]]


class State(TypedDict, total=False):
    """State of a parameter; besides "ema" there may be "ema_1", ... and "ema_power_0", ..."""

    step: int
    exp_avg: Tensor
    exp_avg_sq: Tensor
    ema: Tensor


class Group(TypedDict, total=False):
    """Settings of a parameter group, as the arguments of `AdamWEMA`."""

    params: list[Tensor]
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    ema_decay: float | tuple[float, ...]
    ema_sigma_rel: tuple[float, ...]


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

    Raises:
        ValueError: a setting outside its range; impl="csrc" without its library.
    """

    skips = False

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
                "number would stay those of the capture. Capture forward and backward pass, and "
                "call step() after each replay"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with_grad = [
            (group, [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
        ]
        scale = self._clip([p.grad for _, params in with_grad for p in params])
        for group, params in with_grad:
            self._update(group, params, scale)
        return loss

    def _clip(self, grads: list[Tensor]) -> Tensor | None:
        """The factor for all gradients, on the device; None for 1."""
        if not grads:
            return None
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
        square = torch.stack(norms).square().sum()
        if self.sharded and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(square)
        self.grad_norm = square.sqrt()
        if not self.grad_clip:
            return None
        return (self.grad_clip / (self.grad_norm + 1e-6)).clamp(max=1.0)

    def _update(self, group: Group, params: list[Tensor], scale: Tensor | None) -> None:
        """One step of parameters of one group, in calls for those that are alike."""
        alike: dict[_Kind, list[Tensor]] = {}
        for p in params:
            state = self._started(group, p)
            state["step"] += 1
            csrc = (p.device, p.grad.dtype) if self._takes_csrc(p) else None
            kind = _Kind(state["step"], p in self._copies, csrc)
            alike.setdefault(kind, []).append(p)
        for kind, some in alike.items():
            states = [self.state[p] for p in some]
            copies = [self._copies[p] for p in some] if kind.copied else []
            if kind.csrc is not None:
                self._csrc(group, some, states, kind.step, scale, copies)
                continue
            self._adamw(group, some, states, kind.step, scale)
            weights = [p.float() for p in some]
            for name, decay in _ema_decays(group, kind.step).items():
                torch._foreach_lerp_([s[name] for s in states], weights, 1 - decay)
            if kind.copied:
                torch._foreach_copy_(copies, some)

    def _started(self, group: Group, p: Tensor) -> State:
        """The state of a parameter; EMAs that it does not have yet start at the current weights."""
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        for name in _ema_names(group):
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

    def _csrc(
        self,
        group: Group,
        params: list[Tensor],
        states: list[State],
        step: int,
        scale: Tensor | None,
        copies: list[Tensor],
    ) -> None:
        """One pass of the operator, for parameters of one device and gradients of one dtype."""
        decays = _ema_decays(group, step)
        torch.ops.mixflow_fast.adamw_ema_(
            [p.detach() for p in params],
            [p.grad.contiguous() for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s[name] for name in decays for s in states],
            copies,
            scale,
            step=step,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            ema_decays=list(decays.values()),
            grad_norm=self.grad_norm if self.skips else None,
        )

    def _adamw(
        self,
        group: Group,
        params: list[Tensor],
        states: list[State],
        step: int,
        scale: Tensor | None,
    ) -> None:
        """Updates moments and weights of parameters of one group, in their step number `step`."""
        grads = [p.grad.float() for p in params]
        if scale is not None:
            torch._foreach_mul_(grads, scale)
        exp_avg = [s["exp_avg"] for s in states]
        exp_avg_sq = [s["exp_avg_sq"] for s in states]
        (beta1, beta2), lr = group["betas"], group["lr"]
        torch._foreach_lerp_(exp_avg, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sq, beta2)
        torch._foreach_addcmul_(exp_avg_sq, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(exp_avg_sq)
        torch._foreach_div_(denominators, math.sqrt(1 - beta2**step))
        torch._foreach_add_(denominators, group["eps"])
        if group["weight_decay"]:
            # Not a product with 1 - lr wd, in which float32 keeps only a digit or two of lr wd.
            torch._foreach_add_(params, params, alpha=-lr * group["weight_decay"])
        torch._foreach_addcdiv_(params, exp_avg, denominators, -lr / (1 - beta1**step))


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


def _ema_names(group: Group) -> list[str]:
    """State keys of the group's EMAs: those of the fixed decays, then the power functions."""
    decays = group["ema_decay"]
    count = 1 if isinstance(decays, int | float) else len(decays)
    names = ["ema", *(f"ema_{i}" for i in range(1, count))][:count]
    return names + [f"ema_power_{i}" for i in range(len(group.get("ema_sigma_rel", ())))]


def _ema_decays(group: Group, step: int) -> dict[str, float]:
    """Decay of each of the group's EMAs in step number `step`."""
    decays = group["ema_decay"]
    fixed = [decays] if isinstance(decays, int | float) else list(decays)
    widths = group.get("ema_sigma_rel", ())
    powers = [power_decay(sigma_rel_to_gamma(width), step) for width in widths]
    return dict(zip(_ema_names(group), fixed + powers, strict=True))
