"""Pictures of what a run's EMA weights generate, from the same noise and labels each time.

OUT/previews/step_N.png. Noise and labels are functions of the picture's number alone, so previews
of different steps, and of different runs on the same data, can be laid side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixflow_fast.config.schema import ModelConfig, TrainConfig
from mixflow_fast.models import Network
from mixflow_fast.models.autoencoders.decoding import Decoder, load_decoder
from mixflow_fast.models.weights.source_record import SourceRecord, predictor_of
from mixflow_fast.reports.images import save_grid
from mixflow_fast.sampling.samples import sample
from mixflow_fast.sampling.source import sample_source

SEED = 0
_LATENT_RANGE = 3.0  # latents of about unit variance; the same for every preview
_SMALLEST = 64  # pixels a side, by enlargement


def preview_file(out: Path, step: int) -> Path:
    """Where the preview of a step is written."""
    return out / "previews" / f"step_{step:08d}.png"


def preview_labels(num: int, num_classes: int) -> Tensor:
    """(num,) int64, spread evenly over all classes: 0 .. num_classes - 1 in order."""
    return torch.arange(num) * num_classes // num


@dataclass(frozen=True)
class PreviewOptions:
    """How the pictures of a run come about.

    Attributes:
        pictures: how many in one preview.
        steps: Euler steps.
        cfg_scale: guidance; 1 is none.
        shift: of the time grid, as the objective's.
        batch_size: pictures in one forward pass, at most.
        num_classes, channels: of the network.
        latent: the network makes latents; without a decoder only channels of them can be shown.
        decoder: folder of the latents' decoder; None for none.
        stats: RAE's statistics for it; None for none.
    """

    pictures: int
    steps: int
    cfg_scale: float
    shift: float
    batch_size: int
    num_classes: int
    channels: int
    latent: bool
    decoder: str | None = None
    stats: str | None = None

    @classmethod
    def of(
        cls,
        train: TrainConfig,
        model: ModelConfig,
        shift: float,
        latents: bool,
        stats: str | None = None,
    ) -> PreviewOptions:
        """Those of a configuration.

        Args:
            train, model: its sections.
            shift: `objective.shift`.
            latents: whether the network makes latents, `Config.latent`.
            stats: `encoder.stats`.
        """
        return cls(
            pictures=train.previews,
            steps=train.preview_steps,
            cfg_scale=train.preview_cfg,
            shift=shift,
            batch_size=min(train.previews, train.microbatch_size),
            num_classes=model.num_classes,
            channels=model.in_channels,
            latent=latents or model.in_channels not in (1, 3),
            decoder=train.preview_decoder,
            stats=train.preview_stats or stats if train.preview_decoder else None,
        )

    def load_decoder(self) -> Decoder | None:
        """What makes pictures of the latents; None where no decoder is given.

        Raises:
            ValueError: it cannot be read.
        """
        if self.decoder is None:
            return None
        return load_decoder(self.decoder, stats=self.stats, name="train.preview_decoder")

    @property
    def shown(self) -> int:
        """Channels of a latent that a picture shows."""
        return 3 if self.channels >= 3 else 1

    def caption(self) -> str:
        """How the pictures came about, in a sentence."""
        words = f"{self.steps} Euler steps from EMA weights, the same noise and labels each time"
        if self.cfg_scale != 1:
            words += f", guidance {self.cfg_scale:g}"
        if self.decoder is not None:
            words += f", decoded by {Path(self.decoder).name}"
        elif self.latent:
            words += (
                f". These are latents, not pictures: the first {self.shown} of {self.channels} "
                f"channels, values from -{_LATENT_RANGE:g} to {_LATENT_RANGE:g}, without the "
                "decoder"
            )
        return words


def write_preview(
    net: Network,
    options: PreviewOptions,
    path: Path,
    decoder: Decoder | None = None,
    source: SourceRecord | None = None,
) -> None:
    """Sample and write one preview, whole or not at all.

    Args:
        net: with the weights to show, on the device where to sample.
        options: how the pictures come about.
        path: the PNG; its folder is made.
        decoder: `options.load_decoder()`, on the device where it is to work.
        source: the mixed source whose predictor the network carries; None for N(0, I).

    Raises:
        ValueError: the samples are not finite, or not what the decoder takes.
        OSError: the file could not be written.
    """
    begins = None
    if source is not None:
        begins = sample_source(source.source(predictor_of(net)), source.sample_w)
    x = sample(
        net,
        labels=preview_labels(options.pictures, options.num_classes),
        steps=options.steps,
        cfg_scale=options.cfg_scale,
        shift=options.shift,
        seed=SEED,
        batch_size=options.batch_size,
        source=begins,
    ).x
    if decoder is not None:
        x = decoder(x)
    elif options.latent:
        x = x[:, : options.shown] / _LATENT_RANGE
    columns = min(8, math.isqrt(options.pictures - 1) + 1)
    save_grid(path, x, columns=columns, scale=max(1, _SMALLEST // x.shape[-1]))
