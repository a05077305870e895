"""Networks with the official parameter names, and readers and writers of their official files."""

from mixflow_fast.models.ditdh import DiTDH
from mixflow_fast.models.execution import Execution
from mixflow_fast.models.network import Network
from mixflow_fast.models.registry import DITDH_SIZES, MODELS, SIT_SIZES, SONGUNET_SIZES, build
from mixflow_fast.models.sit import SiT, repa_alignment_loss
from mixflow_fast.models.songunet import SongUNet
from mixflow_fast.models.source_predictor import SourceTable, SourceUNet
from mixflow_fast.models.transformer import Transformer
from mixflow_fast.models.weights.files import load_weights, save_weights
from mixflow_fast.models.weights.infer import infer_kwargs, infer_sit_kwargs
from mixflow_fast.models.weights.loading import (
    export_official_sit,
    load_into,
    load_model,
    read_model_config,
)

__all__ = [
    "DITDH_SIZES",
    "MODELS",
    "SIT_SIZES",
    "SONGUNET_SIZES",
    "DiTDH",
    "Execution",
    "Network",
    "SiT",
    "SongUNet",
    "SourceTable",
    "SourceUNet",
    "Transformer",
    "build",
    "export_official_sit",
    "infer_kwargs",
    "infer_sit_kwargs",
    "load_into",
    "load_model",
    "load_weights",
    "read_model_config",
    "repa_alignment_loss",
    "save_weights",
]
