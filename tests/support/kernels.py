"""Where kernel tests run: on the GPU if there is one, else in Triton's interpreter on the CPU."""

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
