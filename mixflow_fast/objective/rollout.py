"""Scheduled sampling: the network's input comes from a step of its own (an ablation of slowing).

    h ~ U(0, min(t, 1/N)),   x = x_(t-h) + h v_theta(x_(t-h), t-h)   without a gradient

The network is then told t, and the target stays x1 - x0: it learns to correct the errors that an
Euler step of an N-step sampler makes. It costs one more forward pass. Engine's clock above.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mixflow_fast.flow.clock import DATA_AT_1, engine_times
from mixflow_fast.flow.path import per_sample
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.kernels.runtime import compute_dtype
from mixflow_fast.objective.draws import seed_on
from mixflow_fast.objective.mixflow import Interpolation, MixFlow


def roll_in(
    mix: MixFlow,
    net: Callable[..., Tensor | tuple[Tensor, ...]],
    it: Interpolation,
    y: Tensor | Mapping[str, Tensor] | None,
    steps: int,
) -> Interpolation:
    """The batch with inputs that the network itself made, at the same times, data and noise.

    Args:
        mix: the objective that prepared `it`: linear path, velocity prediction.
        net: called as net(x, t, y), or net(x, t) when y is None; a tuple gives its first item.
        it: with ids, of which the draws of h are functions.
        y: (B,) labels, or the prompts' embeddings.
        steps: N >= 1, the number of steps of the sampler whose errors are meant.

    Returns:
        `it` with another x, and with t - h as its `slowed_t`, in the caller's clock.

    Raises:
        ValueError: another path or prediction, steps < 1, times and noise that were all given, a
            mixed source.
    """
    if mix.path.name != "linear" or mix.prediction != "velocity":
        raise ValueError(
            "a rollout needs the linear path and velocity prediction, whose target is the same at "
            f"every time: got path={mix.path.name!r} and prediction={mix.prediction!r}"
        )
    if mix.source is not None:
        raise ValueError(
            "a rollout takes the noise of a batch as given, which a mixed source does not: use "
            "source=None"
        )
    if steps < 1:
        raise ValueError(f"steps of a rollout must be >= 1, got {steps}")
    if it.ids is None:
        raise ValueError("a rollout draws by ids: pass ids to prepare")
    seed = seed_on(mix.seed, it.t.device)
    share = philox.uniform(seed, Stream.ROLLOUT, it.ids)[:, 0].to(it.t.dtype)
    h = share * engine_times(it.t, mix.clock)[0].clamp(max=1.0 / steps)
    began = it.t - h if mix.clock == DATA_AT_1 else (it.t + h).clamp(max=1.0)
    before = mix.prepare(it.data, it.ids, it.x0(), it.t, began, dtype=it.x.dtype)
    with torch.no_grad():
        v = net(before.x, began) if y is None else net(before.x, began, y)
    v = v[0] if isinstance(v, tuple) else v
    precise = compute_dtype(before.x)
    x = before.x.to(precise) + per_sample(it.t - began, v).to(precise) * v.to(precise)
    return dataclasses.replace(before, x=x.to(it.x.dtype))
