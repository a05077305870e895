"""Text-to-image networks of other libraries, each behind an `Adapter`."""

from mixflow_fast.models.text_to_image.adapter import (
    Adapter,
    Condition,
    DiffusersAdapter,
    LatentMap,
)
from mixflow_fast.models.text_to_image.flux import FluxAdapter
from mixflow_fast.models.text_to_image.loading import (
    adapter_class,
    adapter_for,
    check_adapter,
    load_adapter,
)
from mixflow_fast.models.text_to_image.pipeline_check import check_against_pipeline, record_steps
from mixflow_fast.models.text_to_image.sd3 import SD3Adapter
from mixflow_fast.models.text_to_image.z_image import ZImageAdapter

__all__ = [
    "Adapter",
    "Condition",
    "DiffusersAdapter",
    "FluxAdapter",
    "LatentMap",
    "SD3Adapter",
    "ZImageAdapter",
    "adapter_class",
    "adapter_for",
    "check_adapter",
    "check_against_pipeline",
    "load_adapter",
    "record_steps",
]
