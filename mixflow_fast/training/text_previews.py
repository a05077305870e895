"""Previews of a text-to-image run: prompts of its own cache, as its pipeline samples them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mixflow_fast.config.schema import ModelConfig, TrainConfig
from mixflow_fast.data import Batch
from mixflow_fast.models.autoencoders.decoding import Decoder
from mixflow_fast.models.text_to_image.folder import autoencoder_folder, scheduler_shift
from mixflow_fast.models.text_to_image.network import TextToImage
from mixflow_fast.reports.text_previews import (
    TextPreviewOptions,
    write_settings,
    write_text_preview,
)
from mixflow_fast.training.conditions import Conditions
from mixflow_fast.training.duty import RunContext, Timetable
from mixflow_fast.training.periodic import Previews, WatchedCopy

_TEXTS = "prompts.jsonl"


class PromptSet(Protocol):
    """The prompts of a cache: row 0 is the empty one.

    Attributes:
        root: folder with prompts.jsonl, whose lines hold "row" and "text".
    """

    root: Path

    def take(self, rows: Tensor) -> dict[str, Tensor]:
        """Parts of these rows, on the CPU."""
        ...


class TextPreviews(Previews):
    """The duty that draws pictures of prompts from the EMA weights on rank 0, into OUT/previews.

    Args:
        context, timetable, watched: as `Previews`.
        options: how the pictures come about.
        rows: rows of the prompts set, one a picture.
        prompts: the set.
        conditions: what the network is told, of training.
    """

    def __init__(
        self,
        context: RunContext,
        timetable: Timetable,
        options: TextPreviewOptions,
        watched: WatchedCopy,
        rows: tuple[int, ...],
        prompts: PromptSet,
        conditions: Conditions,
    ) -> None:
        super().__init__(context, timetable, options, watched)
        self._rows = torch.tensor([0, *rows])
        self._prompts, self._conditions = prompts, conditions.undropped()

    def _write(self, path: Path, decoder: Decoder | None) -> None:
        net = self._watched.net
        assert isinstance(net, TextToImage)
        device = next(net.parameters()).device
        cond = self._told(device)
        write_settings(self._options, path.parent)
        write_text_preview(
            net.adapter,
            self._options,
            {name: value[1:] for name, value in cond.items()},
            {name: value[:1] for name, value in cond.items()},
            path,
            decoder,
        )

    def _told(self, device: torch.device) -> Mapping[str, Tensor]:
        """What the network is told: the empty prompt, then one for each picture."""
        parts = {name: v.to(device) for name, v in self._prompts.take(self._rows).items()}
        nothing = torch.zeros(len(self._rows), dtype=torch.int64, device=device)
        # Of a batch, the prompts alone are looked at.
        return self._conditions(Batch(nothing, nothing, nothing, cond=parts))


def preview_prompts(prompts: PromptSet, section: TrainConfig) -> dict[int, str]:
    """Row -> text of the prompts to draw: those of `train.preview_prompts`, or the first ones.

    Args:
        prompts: of the cache.
        section: the section `train`.

    Raises:
        ValueError: a prompt that the cache does not hold, or a cache without prompts.
    """
    wanted = list(dict.fromkeys(section.preview_prompts or ()))
    found: dict[int, str] = {}
    with open(prompts.root / _TEXTS, encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            if entry["text"] in wanted or (not wanted and entry["row"] > 0):
                found[entry["row"]] = entry["text"]
            if len(found) == (len(wanted) or section.previews):
                break
    if missing := [text for text in wanted if text not in found.values()]:
        raise ValueError(
            f"train.preview_prompts holds {missing[0]!r}, which is none of the cache's prompts "
            f"({prompts.root / _TEXTS}): previews take the embeddings that are there; "
            "`mixflow-fast sample --prompts` encodes any"
        )
    if not found:
        raise ValueError(f"{prompts.root} holds the empty prompt alone: set train.preview_every=0")
    return found


def text_preview_options(
    train: TrainConfig,
    model: ModelConfig,
    shift: float,
    latent: tuple[int, int, int],
    texts: tuple[str, ...],
) -> TextPreviewOptions:
    """Those of a configuration.

    Args:
        train, model: its sections.
        shift: `objective.shift`, for a folder whose scheduler does not say one.
        latent: (C, h, w) of the data.
        texts: one a picture.
    """
    vae = train.preview_decoder or autoencoder_folder(model.folder)
    return TextPreviewOptions(
        prompts=texts,
        steps=train.preview_steps,
        cfg_scale=train.preview_cfg,
        shift=scheduler_shift(model.folder) or shift,
        grid=train.preview_grid,
        batch_size=min(len(texts), train.microbatch_size),
        latent=latent,
        decoder=None if vae is None else str(vae),
    )
