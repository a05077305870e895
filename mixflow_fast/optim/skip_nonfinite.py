"""An optimizer's step that leaves everything as it was where the gradient is not finite.

    weights, moments, EMAs = new if the global gradient norm is finite else old

The choice is made on the device, so no step waits for it. Old values are kept for a bounded number
of elements at a time, not for the whole network.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mixflow_fast.optim.adamw_ema import AdamWEMA

# Elements whose old values are kept at once: few launches on a GPU, a cache's worth on a CPU.
PIECE = {"cuda": 1 << 24, "cpu": 1 << 18}


def skipping(base: type[AdamWEMA]) -> type[AdamWEMA]:
    """A subclass that skips: same arguments, same state, same bits where the norm is finite.

    The step count of the bias corrections and of power-function EMAs goes on over a skipped step:
    it is a number of the host, which does not know.
    """
    return type(f"Skipping{base.__name__}", (_Skipping, base), {})


class _Skipping:
    """Before `AdamWEMA` in the order of bases."""

    def _update(self, group: dict, params: list[Tensor], scale: Tensor | None) -> None:
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
            self.state[p]["step"] += 1


def _tensors(state: dict) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


def _most(tensor: Tensor) -> int:
    return PIECE.get(tensor.device.type, PIECE["cuda"])


def _batches(parameters: list[tuple[Tensor, dict]]) -> Iterator[list[tuple[Tensor, dict]]]:
    """All elements once, in lists of at most `PIECE`: views of parameters with views of states."""
    most = _most(parameters[0][0])
    batch: list[tuple[Tensor, dict]] = []
    numel = 0
    for parameter, state in parameters:
        for piece in _pieces(parameter, state):
            if batch and numel + piece[0].numel() > most:
                yield batch
                batch, numel = [], 0
            batch.append(piece)
            numel += piece[0].numel()
    if batch:
        yield batch


def _pieces(parameter: Tensor, state: dict) -> Iterator[tuple[Tensor, dict]]:
    most = _most(parameter)
    flat = all(t.is_contiguous() for t in (parameter, parameter.grad, *_tensors(state)))
    for start in range(0, parameter.numel(), most) if flat else (None,):

        def cut(tensor: Tensor, start: int | None = start) -> Tensor:
            tensor = tensor.detach()
            return tensor if start is None else tensor.view(-1)[start : start + most]

        piece = cut(parameter)
        piece.grad = cut(parameter.grad)
        yield piece, {k: cut(v) if isinstance(v, Tensor) else v for k, v in state.items()}
