"""Training data: order of the samples, sources, and the loader of one rank's micro-batches."""

from mixflow_fast.data.files import ImageFolder, Latents, adm_center_crop
from mixflow_fast.data.loader import BatchLoader
from mixflow_fast.data.order import sample_index
from mixflow_fast.data.sources import Batch, Digits, Photos, Source, build_source

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
