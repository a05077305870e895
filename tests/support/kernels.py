"""Where kernel tests run: on the GPU if there is one, else in Triton's interpreter on the CPU."""

import pytest
import torch

from mixflow_fast.diagnostics.kernel_checks import FLOORS, against_eager, relative_rms

__all__ = [
    "DEVICE",
    "FLOORS",
    "ON_GPU",
    "assert_as_exact_as_eager",
    "data",
    "moved",
    "relative_rms",
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"


def assert_as_exact_as_eager(
    ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, name: str
) -> None:
    """err(ours) <= 2 err(eager) + floor, against float64."""
    error, limit, eager_error = against_eager(ours, eager, truth)
    assert error <= limit, (name, error, eager_error)


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def data(*shape: int, dtype: torch.dtype = FP32, seed: int = 0, scale: float = 2.0):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g)).to(dtype).to(DEVICE)


def moved(monkeypatch: pytest.MonkeyPatch, kernels: list, call) -> int:
    """Bytes of the tensors given to the kernels while `call` runs."""
    seen = []
    for kernel in kernels:

        def spy(*args, run=kernel.run, **kwargs):
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
            unique = {v.data_ptr(): v.numel() * v.element_size() for v in tensors if v.numel()}
            seen.append(sum(unique.values()))
            return run(*args, **kwargs)

        monkeypatch.setattr(kernel, "run", spy)
    call()
    assert seen
    return sum(seen)
