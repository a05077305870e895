"""Small random DINOv2 teachers, saved as transformers saves them."""

from pathlib import Path

import torch

WIDTH, PATCH, TABLE = 32, 14, 4  # channels; pixels; side of the position table


def save_teacher(folder: Path, kind: str = "dinov2") -> Path:
    """A two-layer teacher whose every weight is random: LayerScale and biases are not 1 and 0."""
    import transformers

    name = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}[kind]
    config = getattr(transformers, f"{name}Config")(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=PATCH * TABLE,
        patch_size=PATCH,
    )
    g = torch.Generator().manual_seed(5)
    model = getattr(transformers, f"{name}Model")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.2)
    model.save_pretrained(folder)
    return folder


def images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """(count, 3, size, size) uint8."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=g, dtype=torch.uint8)
