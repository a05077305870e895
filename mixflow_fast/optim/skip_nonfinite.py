"""Optimizers whose step changes nothing where the gradient is not finite.

    weights, moments, EMAs = new if the global gradient norm is finite else old

The choice is made on the device, so no step waits for it. The operator of `csrc/` reads the norm
and writes nothing where it is not finite: one pass, as without skipping. For parameters that go
through foreach calls or apex, old values are kept for a bounded number of elements at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mixflow_fast.optim.adamw_ema import AdamWEMA, Group, State
from mixflow_fast.optim.apex import ApexAdamWEMA

# Elements whose old values are kept at a time: large for few launches on a GPU, small enough for
# the cache on a CPU.
PIECE = {"cuda": 1 << 24, "cpu": 1 << 18}


class SkippingAdamWEMA(AdamWEMA):
    """`AdamWEMA` that skips: same arguments, same state, same bits where the norm is finite.

    The step count of the bias corrections and of power-function EMAs goes on over a skipped step:
    it is a number of the host, which does not know.
    """

    skips = True

    def _update(self, group: Group, params: list[Tensor], scale: Tensor | None) -> None:
        kept = [p for p in params if not self._takes_csrc(p)]
        super()._update(group, [p for p in params if self._takes_csrc(p)], scale)
        if kept:
            self._update_in_pieces(group, kept, scale)

    def _update_in_pieces(self, group: Group, params: list[Tensor], scale: Tensor | None) -> None:
        """By calls that do not know of skipping, after which old values are put back."""
        good = torch.isfinite(self.grad_norm)
        for batch in _batches([(p, self._started(group, p)) for p in params]):
            for piece, state in batch:
                self.state[piece] = state
            live = [t for piece, state in batch for t in (piece, *_tensors(state))]
            old = [t.clone() for t in live]
            super()._update(group, [piece for piece, _ in batch], scale)
            for tensor, value in zip(live, old, strict=True):
                torch.where(good, tensor, value, out=tensor)
            for piece, _ in batch:
                del self.state[piece]
        for p in params:
            # The slices had the count as a copy of their own, and are no keys of the copies.
            self.state[p]["step"] += 1
            if p in self._copies:
                self._copies[p].copy_(torch.where(good, p, self._copies[p].float()))


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


def _batches(parameters: list[tuple[Tensor, State]]) -> Iterator[list[tuple[Tensor, State]]]:
    """All elements once, in lists of at most `PIECE`: views of parameters with views of states."""
    most = _max_elements(parameters[0][0])
    batch: list[tuple[Tensor, State]] = []
    numel = 0
    for parameter, state in parameters:
        for piece in _slices(parameter, state):
            if batch and numel + piece[0].numel() > most:
                yield batch
                batch, numel = [], 0
            batch.append(piece)
            numel += piece[0].numel()
    if batch:
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
