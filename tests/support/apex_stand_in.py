"""NVIDIA apex's FusedAdam in PyTorch: the interface and arithmetic that `ApexAdamWEMA` uses.

Written from the interface of https://github.com/NVIDIA/apex (`apex/optimizers/fused_adam.py`,
`csrc/multi_tensor_adam.cu`), with its traps:

* one step count for a group, under "step", raised even if no parameter has a gradient;
* groups and parameters are paired with what the first step saw; whatever has no partner is skipped;
* only the moments of a parameter without any state are made;
* `zero_grad` and `step` do not take torch's arguments;
* only float32, float16 and bfloat16; tensors of one launch must be contiguous and of one dtype.
"""

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    launches = 0  # of the kernel, by all instances

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    ) -> None:
        if amsgrad or capturable or master_weights:
            raise RuntimeError("not in this stand-in")
        defaults = dict(
            lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay
        )
        super().__init__(params, defaults)
        self.adam_w_mode = 1 if adam_w_mode else 0
        self.set_grad_none = set_grad_none
        self.param_groups_master = None

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def step(self, closure=None) -> None:
        if self.param_groups_master is None:
            self.param_groups_master = [
                {"params": [None] * len(group["params"])} for group in self.param_groups
            ]
        for group, master in zip(self.param_groups, self.param_groups_master, strict=False):
            if len(group["params"]) == 0:
                continue
            group["step"] = group.get("step", 0) + 1
            lists = []
            for p, _ in zip(group["params"], master["params"], strict=False):
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(p.data).float()
                    state["exp_avg_sq"] = torch.zeros_like(p.data).float()
                if p.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                    raise RuntimeError("FusedAdam only support fp16 and fp32.")
                lists.append((p.grad.data, p.data, state["exp_avg"], state["exp_avg_sq"]))
            if lists:
                self._launch(group, lists)

    def _launch(self, group: dict, lists: list[tuple[Tensor, ...]]) -> None:
        FusedAdam.launches += 1
        # The kernel takes them as float32.
        b1, b2 = (float(torch.tensor(beta, dtype=torch.float32)) for beta in group["betas"])
        c1 = c2 = 1.0
        if group["bias_correction"]:
            c1, c2 = 1 - b1 ** group["step"], 1 - b2 ** group["step"]
        decay, lr = group["weight_decay"], group["lr"]
        for g, p, m, v in lists:
            if not all(t.is_contiguous() for t in (g, p, m, v)) or g.dtype != p.dtype:
                raise RuntimeError("A tensor was not contiguous.")
            if not self.adam_w_mode:
                g = g + decay * p
            m.copy_(b1 * m + (1 - b1) * g)
            v.copy_(b2 * v + (1 - b2) * g * g)
            update = (m / c1) / ((v / c2).sqrt() + group["eps"])
            p.sub_(lr * (update + decay * p if self.adam_w_mode else update))
