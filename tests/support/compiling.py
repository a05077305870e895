"""torch.compile for tests, without Inductor."""

from __future__ import annotations

from collections.abc import Callable

import torch


def compiler(backend: str | Callable[..., object]) -> Callable[..., object]:
    """A stand-in for torch.compile that takes another backend, to which `options` mean nothing."""
    original = torch.compile

    def compile_without_inductor(fn: Callable[..., object], **how: object) -> object:
        how.pop("options", None)
        return original(fn, backend=backend, **how)

    return compile_without_inductor
