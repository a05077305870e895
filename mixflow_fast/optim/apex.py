"""Optimizers by their names in a configuration, and learning rates in images seen.

`AdamWEMA` (`adamw_ema.py`) is the engine's own. `ApexAdamWEMA` leaves all but the EMAs to a
kernel of NVIDIA apex, on a GPU, and has the same state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from mixflow_fast.environment import apex_message, detect_apex
from mixflow_fast.optim.adamw_ema import AdamWEMA


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
        **settings: those of `AdamWEMA` but `impl`.

    Attributes:
        grad_norm: as in `AdamWEMA`.

    Raises:
        ValueError: a setting outside its range; no NVIDIA apex, or one without CUDA extensions.
    """

    def __init__(self, params: Iterable, **settings: Any) -> None:
        super().__init__(params, impl="foreach", **settings)
        self._fused = _fused_adam([p for group in self.param_groups for p in group["params"]])

    def _adamw(
        self,
        group: dict,
        params: list[Tensor],
        states: list[dict],
        step: int,
        scale: Tensor | None,
    ) -> None:
        # The kernel sees storage only: another layout than the moments' would go unnoticed.
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
        # DeepSpeed and `load_state_dict` replace both: handed over anew each time. The parameters
        # of a call have one step count, as FusedAdam has for a group.
        self._fused.state = self.state
        self._fused.param_groups = [
            {**group, "params": params, "bias_correction": True, "step": step - 1}
        ]
        # It pairs the groups with those of its first step, and leaves out what has no partner.
        self._fused.param_groups_master = None
        self._fused.step()


# By `optim.name`.
OptimizerName = Literal["adamw_ema", "apex_fused_adam"]
OPTIMIZERS: dict[OptimizerName, type[AdamWEMA]] = {
    "adamw_ema": AdamWEMA,
    "apex_fused_adam": ApexAdamWEMA,
}


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
