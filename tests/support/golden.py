"""Tensors that the official implementations computed (tests/golden/)."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden"


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of tests/golden/NAME.safetensors and the configuration they were made with."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        config = json.loads((file.metadata() or {}).get("config", "{}"))
        return {key: file.get_tensor(key) for key in file.keys()}, config
