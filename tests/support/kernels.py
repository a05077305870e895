"""Where kernel tests run: on the GPU if there is one, else in Triton's interpreter on the CPU."""

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
FLOORS = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}


def relative_rms(value: torch.Tensor, truth: torch.Tensor) -> float:
    """||value - truth|| / ||truth||, in float64."""
    value, truth = value.double().cpu(), truth.double().cpu()
    return ((value - truth).norm() / truth.norm()).item()


def assert_as_exact_as_eager(
    ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, name: str
) -> None:
    """err(ours) <= 2 err(eager) + floor, against float64."""
    error, allowed = relative_rms(ours, truth), relative_rms(eager, truth)
    assert error <= 2 * allowed + FLOORS[ours.dtype], (name, error, allowed)


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
