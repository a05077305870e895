"""Optimizers whose step changes nothing where the gradient is not finite.

    weights, moments, EMAs = new if the global gradient norm is finite else old

The choice is made on the device, so no step waits for it. The operator of `csrc/` reads the norm
and writes nothing where it is not finite: one pass, as without skipping. For parameters that go
through foreach calls or apex, old values are kept for a bounded number of elements at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mixflow_fast.optim.adamw_ema import AdamWEMA
from mixflow_fast.optim.apex import ApexAdamWEMA
from mixflow_fast.optim.step_calls import Call, State

# Elements whose old values are kept at a time: large for few launches on a GPU, small enough for
# the cache on a CPU.
PIECE = {"cuda": 1 << 24, "cpu": 1 << 18}


class SkippingAdamWEMA(AdamWEMA):
    """`AdamWEMA` that skips: same arguments, same state, same bits where the norm is finite.

    The step count of the bias corrections and of power-function EMAs goes on over a skipped step:
    it is a number of the host, which does not know.
    """

    skips = True

    def _update(self, call: Call, scale: Tensor | None) -> None:
        if call.csrc:
            super()._update(call, scale)
            return
        # By calls that do not know of skipping, after which old values are put back.
        good = torch.isfinite(self.grad_norm)
        for pieces in _pieces(call):
            states = [_tensors(state) for state in pieces.states]
            live = [t for p, some in zip(pieces.params, states, strict=True) for t in (p, *some)]
            old = [t.clone() for t in live]
            super()._update(pieces, scale)
            for tensor, value in zip(live, old, strict=True):
                torch.where(good, tensor, value, out=tensor)
        if call.copies:
            for p, copy in zip(call.params, call.copies, strict=True):
                copy.copy_(torch.where(good, p, copy.float()))


class SkippingApexAdamWEMA(SkippingAdamWEMA, ApexAdamWEMA):
    """`ApexAdamWEMA` that skips, as `SkippingAdamWEMA` does."""


_SKIPPING: dict[type[AdamWEMA], type[SkippingAdamWEMA]] = {
    AdamWEMA: SkippingAdamWEMA,
    ApexAdamWEMA: SkippingApexAdamWEMA,
}


def skipping(optimizer: type[AdamWEMA]) -> type[SkippingAdamWEMA]:
    """The class that does as `optimizer` does, and skips."""
    return _SKIPPING[optimizer]


def _tensors(state: State) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


def _max_elements(tensor: Tensor) -> int:
    return PIECE.get(tensor.device.type, PIECE["cuda"])


def _pieces(call: Call) -> Iterator[Call]:
    """All elements once, at most `PIECE` at a time: views of parameters with views of states."""
    most = _max_elements(call.params[0])
    batch = replace(call, params=[], states=[], copies=[])
    numel = 0
    for parameter, state in zip(call.params, call.states, strict=True):
        for piece, views in _slices(parameter, state):
            if batch.params and numel + piece.numel() > most:
                yield batch
                batch, numel = replace(call, params=[], states=[], copies=[]), 0
            batch.params.append(piece)
            batch.states.append(views)
            numel += piece.numel()
    if batch.params:
        yield batch


def _slices(parameter: Tensor, state: State) -> Iterator[tuple[Tensor, State]]:
    """Views of at most `PIECE` elements; the whole where not all tensors are contiguous."""
    most = _max_elements(parameter)
    flat = all(t.is_contiguous() for t in (parameter, parameter.grad, *_tensors(state)))
    for start in range(0, parameter.numel(), most) if flat else (None,):
        end = None if start is None else start + most
        piece = _view(parameter, start, end)
        piece.grad = _view(parameter.grad, start, end)
        views = {k: _view(v, start, end) if isinstance(v, Tensor) else v for k, v in state.items()}
        yield piece, views


def _view(tensor: Tensor, start: int | None, end: int | None) -> Tensor:
    tensor = tensor.detach()
    return tensor if start is None else tensor.view(-1)[start:end]
