"""Sections on the way from files to what the network trains on: data, encoder, teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mixflow_fast.config.section import NotNegative, Positive, Section
from mixflow_fast.models.dinov2 import Positions, Precision

DataKind = Literal["photos", "digits", "folder", "images", "webdataset", "latents", "captioned"]
EncoderKind = Literal["none", "sdvae", "rae"]
LoaderName = Literal["auto", "threads", "dali"]
Resident = Literal["off", "on", "auto"]

# What each kind of data takes from the section `data` beside `ANY_KIND`; anything else that is set
# is refused.
DATA_FIELDS: Mapping[DataKind, tuple[str, ...]] = {
    "photos": ("size", "flip"),
    "digits": ("size",),
    "folder": ("path", "size", "flip", "loader"),
    "images": ("path", "size", "flip", "loader"),
    "webdataset": ("path", "size", "flip", "loader"),
    "latents": ("path", "scale", "moments", "mirrors", "resident"),
    "captioned": ("path", "buckets", "mirrors"),
}
ANY_KIND = ("kind", "workers", "depth")
# The same for the section `encoder`, but for its kind.
ENCODER_FIELDS: Mapping[EncoderKind, tuple[str, ...]] = {
    "none": (),
    "sdvae": ("path", "precision"),
    "rae": ("path", "stats", "precision"),
}
# Images as uint8, from files: the network trains on x / 127.5 - 1, or on what an encoder makes.
IMAGE_KINDS: tuple[DataKind, ...] = ("folder", "images", "webdataset")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section, name="data"):
    """Where the examples come from, and how they come to the device."""

    kind: DataKind = "latents"
    """Where the examples come from: latents; captioned, a cache of `mixflow-fast encode`; images of
    a prepared set, a folder of class folders or webdataset tars; photos and digits come with
    scikit-learn."""
    path: str | None = None
    """Folder of class folders, a prepared set, a folder of tars; latents: a set of `mixflow-fast
    data encode`, .npz, .npy or a folder; captioned: a cache of `mixflow-fast encode`."""
    size: Positive | None = None
    """Side of the images in pixels; null: model.input_size, of a prepared set its own."""
    flip: bool = False
    """Random horizontal flips of images; of latents see data.mirrors."""
    moments: bool | None = None
    """Latents hold VAE mean | std: the posterior is sampled every step. null: what the set's
    manifest says, else false."""
    scale: float | None = None
    """Latents are multiplied by this (SD-VAE: 0.18215). null: what the set's manifest says, else
    1."""
    mirrors: Literal[1, 2] | None = None
    """Latents, captioned: 2 draws the stored latent of the image or of its mirror image, 1 takes
    the image's own; null: all that are stored."""
    buckets: tuple[str, ...] | None = None
    """Captioned: shapes to train on, width x height in pixels, as [1024x1024,1152x896]; null: all
    that the cache has. A batch has one of them, chosen by the step."""
    features: str | None = None
    """.npy of a teacher's features (N, T, z), for REPA."""
    images: str | None = None
    """Uint8 images of the latents for REPA's teacher: a prepared set, a folder, .npy or .npz."""
    loader: LoaderName = "auto"
    """Who decodes images: threads (Pillow) or dali (NVIDIA DALI, on a GPU); auto takes DALI where
    it is installed and the run is on a GPU."""
    workers: NotNegative | None = None
    """Threads that prepare examples; 0 prepares them in the training loop, null: the cores of this
    rank less one, at most 8."""
    depth: Positive = 3
    """Batches that have a place in pinned memory and on the GPU; the training step has one of
    them."""
    resident: Resident = "off"
    """on: latents are copied to the GPU once; auto: if 8 GB stay free beside them."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(Section, name="encoder"):
    """A frozen encoder that makes the latents of images during training."""

    kind: EncoderKind = "none"
    """none: the network trains on what data gives."""
    path: str | None = None
    """Local folder with the encoder's weights and config.json."""
    stats: str | None = None
    """RAE: stat.pt with the latents' mean and variance; null: they are not normalised."""
    precision: Precision = "fp32"
    """Of the encoder's forward pass."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Section, name="teacher"):
    """REPA's frozen DINOv2, run during training instead of reading `data.features`."""

    path: str | None = None
    """Local folder with config.json and model.safetensors of a DINOv2."""
    resolution: Positive | None = None
    """Pixels that the teacher sees; null is REPA's: 224 for 256 px, 448 for 512 px."""
    precision: Precision | None = None
    """null is that of train.precision."""
    positions: Positions = "repa"
    """repa resamples the position table once as REPA does, model as transformers does."""
