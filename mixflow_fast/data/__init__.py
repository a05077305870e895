"""Training data: order of the samples, sources, and the loader of one rank's micro-batches."""

from mixflow_fast.data.dataset import Batch, Source
from mixflow_fast.data.embedded import Digits, Photos
from mixflow_fast.data.image_folder import ImageFolder, adm_center_crop
from mixflow_fast.data.latents import Latents
from mixflow_fast.data.loader import BatchLoader
from mixflow_fast.data.order import sample_index
from mixflow_fast.data.registry import build_source

__all__ = [
    "Batch",
    "BatchLoader",
    "Digits",
    "ImageFolder",
    "Latents",
    "Photos",
    "Source",
    "adm_center_crop",
    "build_source",
    "sample_index",
]
