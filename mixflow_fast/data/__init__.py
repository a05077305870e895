"""Training data: order of the samples, datasets, and the loader of one rank's micro-batches."""

from mixflow_fast.data.dataset import Batch, Dataset
from mixflow_fast.data.device_loader import DeviceLoader
from mixflow_fast.data.embedded import Digits, Photos
from mixflow_fast.data.image_folder import ImageFolder, adm_center_crop
from mixflow_fast.data.latents import Latents
from mixflow_fast.data.loader import BatchLoader
from mixflow_fast.data.order import sample_index
from mixflow_fast.data.registry import build_dataset
from mixflow_fast.data.summary import DataSummary

__all__ = [
    "Batch",
    "BatchLoader",
    "DataSummary",
    "Dataset",
    "DeviceLoader",
    "Digits",
    "ImageFolder",
    "Latents",
    "Photos",
    "adm_center_crop",
    "build_dataset",
    "sample_index",
]
