"""Networks with the official parameter names, and readers and writers of their official files."""

from mixflow_fast.models.checkpoints import (
    export_official_sit,
    infer_sit_kwargs,
    load_into,
    load_model,
    load_weights,
    read_model_config,
    save_weights,
)
from mixflow_fast.models.sit import MODELS, SIT_SIZES, SiT, build, repa_alignment_loss

__all__ = [
    "MODELS",
    "SIT_SIZES",
    "SiT",
    "build",
    "export_official_sit",
    "infer_sit_kwargs",
    "load_into",
    "load_model",
    "load_weights",
    "read_model_config",
    "repa_alignment_loss",
    "save_weights",
]
