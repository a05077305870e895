"""AdamW with exponential moving averages of the weights as optimizer state, and LR schedules.

    m = beta1 m + (1 - beta1) g              v = beta2 v + (1 - beta2) g^2
    w = (1 - lr wd) w - lr (m / (1 - beta1^k)) / (sqrt(v / (1 - beta2^k)) + eps)
    ema = decay ema + (1 - decay) w          after every step, from the first one

Decoupled weight decay: arXiv 1711.05101. The EMA starts as a copy of the weights before the first
step, so a run that starts from a checkpoint's EMA weights starts its EMA there too. Because it is
ordinary optimizer state, DeepSpeed's ZeRO shards, saves and restores it with the moments.

Clipping by the global norm is done here, on the device: DeepSpeed's own reads the norm on the host
every step, which stalls a GPU.

`AdamWEMA` runs anywhere, as foreach calls. `ApexAdamWEMA` leaves all but the EMA to a kernel of
NVIDIA apex, on a GPU; the state of both is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixflow_fast.optional import apex_message, detect_apex

SCHEDULES = ("constant", "linear", "cosine")


class AdamWEMA(torch.optim.Optimizer):
    """AdamW that keeps an EMA of every parameter in its state under "ema".

    Args:
        params: parameters or parameter groups, float32 (under ZeRO: its flat float32 partitions).
        lr: learning rate > 0 (or 0).
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay >= 0.
        ema_decay: decay per step in [0, 1).
        grad_clip: largest global gradient norm; larger gradients are scaled down to it. 0 = off.
        sharded: the parameters are this rank's partition of the whole (ZeRO 1 and 2): the norm is
            summed over the ranks.

    Attributes:
        grad_norm: global gradient norm of the last step before clipping, a scalar on the device.

    Raises:
        ValueError: a setting outside its range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decay: float = 0.9999,
        grad_clip: float = 0.0,
        sharded: bool = False,
    ) -> None:
        for name, value, low, high in (
            ("lr", lr, 0.0, math.inf),
            ("betas[0]", betas[0], 0.0, 1.0),
            ("betas[1]", betas[1], 0.0, 1.0),
            ("eps", eps, 0.0, math.inf),
            ("weight_decay", weight_decay, 0.0, math.inf),
            ("ema_decay", ema_decay, 0.0, 1.0),
            ("grad_clip", grad_clip, 0.0, math.inf),
        ):
            if not low <= value < high:
                raise ValueError(f"{name} must be in [{low:g}, {high:g}), got {value!r}")
        defaults = dict(
            lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, ema_decay=ema_decay
        )
        super().__init__(params, defaults)
        self.grad_clip = grad_clip
        self.sharded = sharded
        self.grad_norm: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient; no device sync."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with_grad = [
            (group, [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
        ]
        self._clip([p.grad for _, params in with_grad for p in params])
        for group, params in with_grad:
            if params:
                self._update(group, params)
        return loss

    def _clip(self, grads: list[Tensor]) -> None:
        if not grads:
            return
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
        square = torch.stack(norms).square().sum()
        if self.sharded and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(square)
        self.grad_norm = square.sqrt()
        if self.grad_clip:
            scale = (self.grad_clip / (self.grad_norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(grads, scale)

    def _update(self, group: dict, params: list[Tensor]) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
                state["ema"] = p.detach().to(torch.float32, copy=True)
            state["step"] += 1
        states = [self.state[p] for p in params]
        self._adamw(group, params, states)
        weights = [p.float() for p in params]
        torch._foreach_lerp_([s["ema"] for s in states], weights, 1 - group["ema_decay"])

    def _adamw(self, group: dict, params: list[Tensor], states: list[dict]) -> None:
        """Moments and weights of parameters of one group; `step` counts this step already."""
        grads = [p.grad.float() for p in params]
        exp_avg = [s["exp_avg"] for s in states]
        exp_avg_sq = [s["exp_avg_sq"] for s in states]
        (beta1, beta2), lr = group["betas"], group["lr"]
        torch._foreach_lerp_(exp_avg, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sq, beta2)
        torch._foreach_addcmul_(exp_avg_sq, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(exp_avg_sq)
        torch._foreach_div_(denominators, [math.sqrt(1 - beta2 ** s["step"]) for s in states])
        torch._foreach_add_(denominators, group["eps"])
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        steps = [-lr / (1 - beta1 ** s["step"]) for s in states]
        torch._foreach_addcdiv_(params, exp_avg, denominators, steps)


class ApexAdamWEMA(AdamWEMA):
    """`AdamWEMA` whose AdamW is NVIDIA apex's FusedAdam: a few launches on a GPU.

    apex is not on PyPI: it is built from source with its CUDA extensions
    (https://github.com/NVIDIA/apex, `apex/optimizers/fused_adam.py`). State, clipping and EMA are
    `AdamWEMA`'s, so the `state_dict` of one loads into the other; the weights then agree to
    rounding, not to the bit.

    Not verified on a GPU: no machine of this project has had NVIDIA's apex. The tests run it on
    FusedAdam's interface and arithmetic in PyTorch (`tests/apex_stand_in.py`), and on FusedAdam
    itself where they find it and a GPU.

    Args:
        params: contiguous float32 parameters or parameter groups; on the GPU by the first step.
        **settings: those of `AdamWEMA`.

    Attributes:
        grad_norm: as in `AdamWEMA`.

    Raises:
        ValueError: a setting outside its range; no NVIDIA apex, or one without CUDA extensions.
    """

    def __init__(self, params: Iterable, **settings: Any) -> None:
        super().__init__(params, **settings)
        self._fused = _fused_adam([p for group in self.param_groups for p in group["params"]])

    def _adamw(self, group: dict, params: list[Tensor], states: list[dict]) -> None:
        # The kernel sees storage only: another layout than the moments' would go unnoticed.
        for p in params:
            for name, tensor in (("parameters", p), ("gradients", p.grad)):
                if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                    raise ValueError(
                        f"{name} must be contiguous float32 for ApexAdamWEMA, got {tensor.dtype} "
                        f"of shape {tuple(tensor.shape)} and strides {tensor.stride()}: use "
                        "AdamWEMA (optim.name=adamw_ema)"
                    )
        # FusedAdam has one step count for a group. Parameters that had no gradient in some step,
        # and the parts of a group that ZeRO 3 updates one after another, need their own.
        by_step: dict[int, list[Tensor]] = {}
        for p, state in zip(params, states, strict=True):
            by_step.setdefault(state["step"], []).append(p)
        # DeepSpeed and `load_state_dict` replace both: handed over anew each time.
        self._fused.state = self.state
        self._fused.param_groups = [
            {**group, "params": some, "bias_correction": True, "step": step - 1}
            for step, some in by_step.items()
        ]
        # It pairs the groups with those of its first step, and leaves out what has no partner.
        self._fused.param_groups_master = None
        self._fused.step()


# By `optim.name`.
OPTIMIZERS: dict[str, type[AdamWEMA]] = {"adamw_ema": AdamWEMA, "apex_fused_adam": ApexAdamWEMA}


def _fused_adam(params: list[Tensor]) -> Any:
    if detect_apex() != "nvidia":
        raise ValueError(f"ApexAdamWEMA needs NVIDIA apex (AdamWEMA does not): {apex_message()}")
    try:
        from apex.optimizers import FusedAdam

        fused = FusedAdam(params, bias_correction=True, adam_w_mode=True)
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"NVIDIA apex is installed, but its FusedAdam does not start ({error}): build apex "
            "with its CUDA extensions for this torch, or use AdamWEMA (optim.name=adamw_ema)"
        ) from error
    fused.param_groups = []  # these parameters may be replaced, and their memory is wanted back
    return fused


def learning_rate(
    images_seen: int,
    *,
    lr: float,
    schedule: str = "constant",
    warmup_images: int = 0,
    decay_images: int = 0,
    final_lr: float = 0.0,
) -> float:
    """Learning rate of the step that ends at `images_seen` training images.

    Linear warm-up from 0 over `warmup_images`, then `lr` ("constant"), or a "linear" or "cosine"
    descent that reaches `final_lr` at `decay_images` and stays there.

    Args:
        images_seen: training images including this step's batch, across all ranks.
        lr: peak learning rate.
        schedule: "constant", "linear" or "cosine".
        warmup_images, decay_images: lengths in images; `decay_images` counts from 0.
        final_lr: value after the descent.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    if images_seen < warmup_images:
        return lr * images_seen / warmup_images
    if schedule == "constant":
        return lr
    span = max(decay_images - warmup_images, 1)
    progress = min((images_seen - warmup_images) / span, 1.0)
    left = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return final_lr + (lr - final_lr) * left
