"""AdamW with EMAs by NVIDIA apex's FusedAdam, and the optimizers by their names in a configuration.

`AdamWEMA` is the engine's own. `ApexAdamWEMA` leaves all but clipping and EMAs to apex's kernel, on
a GPU, and has the same state.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from mixflow_fast.environment import apex_message, detect_apex
from mixflow_fast.optim.adamw_ema import AdamWEMA, Params
from mixflow_fast.optim.step_calls import Call, State


class FusedAdam(Protocol):
    """The parts of apex's FusedAdam that are used here."""

    state: MutableMapping[Tensor, State]
    param_groups: list[dict[str, object]]
    param_groups_master: list[dict[str, object]] | None

    def step(self) -> None: ...


class ApexAdamWEMA(AdamWEMA):
    """`AdamWEMA` whose AdamW is NVIDIA apex's FusedAdam: a few launches on a GPU.

    apex is not on PyPI: it is built from source with its CUDA extensions
    (https://github.com/NVIDIA/apex, `apex/optimizers/fused_adam.py`). State, clipping and EMA are
    `AdamWEMA`'s, so the `state_dict` of one loads into the other; the weights then agree to
    rounding, not to the bit.

    Not verified on a GPU: no machine of this project has had NVIDIA's apex. The tests run it on a
    stand-in with FusedAdam's interface and arithmetic (`tests/support/apex_stand_in.py`), and on
    FusedAdam itself where they find it and a GPU.

    Args:
        params: contiguous float32 parameters or parameter groups; on the GPU by the first step.
        **settings: arguments of `AdamWEMA` other than `impl`.

    Attributes:
        grad_norm: as in `AdamWEMA`.

    Raises:
        ValueError: a setting outside its range; no NVIDIA apex, or one without CUDA extensions.
    """

    capturable = False

    def __init__(self, params: Params, **settings: object) -> None:
        super().__init__(params, impl="foreach", **settings)
        self._fused = _fused_adam([p for group in self.param_groups for p in group["params"]])

    def _adamw(self, call: Call, scale: Tensor | None) -> None:
        params = call.params
        # The kernel sees storage only and would not notice another layout than the moments have.
        for p in params:
            for name, tensor in (("parameters", p), ("gradients", p.grad)):
                if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                    raise ValueError(
                        f"{name} must be contiguous float32 for ApexAdamWEMA, got {tensor.dtype} "
                        f"of shape {tuple(tensor.shape)} and strides {tensor.stride()}: use "
                        "AdamWEMA (optim.name=adamw_ema)"
                    )
        if scale is not None:
            torch._foreach_mul_([p.grad for p in params], scale)
        # Handed over in every step because DeepSpeed and `load_state_dict` replace both. The
        # parameters of a call have one step count, as FusedAdam has for a group.
        self._fused.state = dict(zip(params, call.states, strict=True))
        self._fused.param_groups = [
            {**call.group, "params": params, "bias_correction": True, "step": call.step - 1}
        ]
        # FusedAdam pairs groups with those of its first step and skips those without a partner.
        self._fused.param_groups_master = None
        self._fused.step()


OptimizerName = Literal["adamw_ema", "apex_fused_adam"]
# Optimizers by `optim.name`.
OPTIMIZERS: dict[OptimizerName, type[AdamWEMA]] = {
    "adamw_ema": AdamWEMA,
    "apex_fused_adam": ApexAdamWEMA,
}


def _fused_adam(params: list[Tensor]) -> FusedAdam:
    if detect_apex() != "nvidia":
        raise ValueError(f"ApexAdamWEMA needs NVIDIA apex (AdamWEMA does not): {apex_message()}")
    try:
        from apex.optimizers import FusedAdam as ApexFusedAdam

        fused = ApexFusedAdam(params, bias_correction=True, adam_w_mode=True)
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"NVIDIA apex is installed, but its FusedAdam does not start ({error}): build apex "
            "with its CUDA extensions for this torch, or use AdamWEMA (optim.name=adamw_ema)"
        ) from error
    fused.param_groups = []  # or it would keep the memory of parameters that are replaced later
    return fused
