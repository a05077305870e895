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
from mixflow_fast.models.text_to_image.folder import autoencoder_folder, pipeline_grid
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
        prompts: the set that the rows are of.
        conditions: what the network is told, of training.
    """

    def __init__(
        self,
        context: RunContext,
        timetable: Timetable,
        options: TextPreviewOptions,
        watched: WatchedCopy,
        prompts: PromptSet,
        conditions: Conditions,
    ) -> None:
        super().__init__(context, timetable, options, watched)
        self._rows = torch.tensor([0, *options.rows])
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


class PromptedData(Protocol):
    """Examples with prompts; shape is (C, h, w) of a latent, of the largest where they differ."""

    prompts: PromptSet
    shape: tuple[int, int, int]


def text_preview_options(
    train: TrainConfig, model: ModelConfig, shift: float, data: PromptedData
) -> TextPreviewOptions:
    """Those of a configuration, with the prompts of `train.preview_prompts` or the first ones.

    Args:
        train, model: its sections.
        shift: `objective.shift`, for a folder without a scheduler.
        data: the examples.

    Raises:
        ValueError: a prompt that the cache does not hold, or a cache without prompts.
    """
    own = pipeline_grid(model.folder, data.shape[1] * data.shape[2] // 4)
    vae = train.preview_decoder or autoencoder_folder(model.folder)
    chosen = _chosen_prompts(data.prompts, train)
    return TextPreviewOptions(
        prompts=tuple(chosen.values()),
        rows=tuple(chosen),
        steps=train.preview_steps,
        cfg_scale=train.preview_cfg,
        shift=own.shift or shift,
        grid=train.preview_grid or own.grid,
        batch_size=min(len(chosen), train.microbatch_size),
        latent=tuple(data.shape),
        decoder=None if vae is None else str(vae),
    )


def _chosen_prompts(prompts: PromptSet, section: TrainConfig) -> dict[int, str]:
    """Row -> text of the prompts to draw, in the order of the rows."""
    wanted = set(section.preview_prompts or ())
    found: dict[int, str] = {}
    with open(prompts.root / _TEXTS, encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            if entry["text"] in wanted or (not wanted and entry["row"] > 0):
                found[entry["row"]] = entry["text"]
            if len(found) == (len(wanted) or section.previews):
                break
    if missing := sorted(wanted - set(found.values())):
        raise ValueError(
            f"train.preview_prompts holds {missing[0]!r}, which is none of the cache's prompts "
            f"({prompts.root / _TEXTS}): previews take the embeddings that are there; "
            "`mixflow-fast sample --prompts` encodes any"
        )
    if not found:
        raise ValueError(f"{prompts.root} holds the empty prompt alone: set train.preview_every=0")
    return found
