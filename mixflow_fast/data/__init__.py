"""Training data: order of the samples, sources, and the loader of one rank's micro-batches."""

from mixflow_fast.data.embedded import Batch, Digits, Photos, Source, build_source
from mixflow_fast.data.latents import ImageFolder, Latents, adm_center_crop
from mixflow_fast.data.loader import BatchLoader
from mixflow_fast.data.order import sample_index

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
