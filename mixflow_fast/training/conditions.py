"""What the network is told beside x and t, from a batch on the device: a class, or prompts.

    prompts: parts of a cache, or token ids that the encoders embed now
             -> zeros in place of single encoders (`cond.drop_each`)
             -> what the adapter takes

A whole prompt that is dropped (`cond.drop`) is another row of the cache, which the data give.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mixflow_fast.data import Batch
from mixflow_fast.kernels.philox import Stream, uniform
from mixflow_fast.messages import did_you_mean
from mixflow_fast.models.text_to_image import Condition
from mixflow_fast.models.text_to_image.prompts import PromptEncoder, PromptLayout


class Conditions:
    """The class labels of a batch, as they are."""

    def __call__(self, batch: Batch) -> Tensor | Condition:
        """What the network is told of the examples of a batch."""
        return batch.y

    def undropped(self) -> Conditions:
        """The same without dropout of its own, for validation."""
        return self


class Prompts(Conditions):
    """The embeddings of a batch's prompts.

    Args:
        layout: makes of a prompt's parts what the network's adapter takes.
        drop_each: probability of zeros in place of what an encoder gives, by its name.
        seed: of the run.
        encoder: embeds token ids, loaded at the first batch; None where the cache holds embeddings.

    Raises:
        ValueError: an encoder that the network has not.
    """

    def __init__(
        self,
        layout: PromptLayout,
        drop_each: Mapping[str, float],
        seed: int,
        encoder: PromptEncoder | None = None,
    ) -> None:
        for name in drop_each:
            if name not in layout.encoders:
                raise ValueError(
                    f"cond.drop_each names the text encoder {name!r}, this network has "
                    f"{', '.join(layout.encoders)}{did_you_mean(name, layout.encoders)}"
                )
        self.layout, self.encoder = layout, encoder
        self._drop_each, self._seed = dict(drop_each), seed

    def __call__(self, batch: Batch) -> Condition:
        """What the adapter takes, B of each.

        Raises:
            ValueError: a batch without prompts.
        """
        if batch.cond is None:
            raise ValueError(
                "a text-to-image network needs prompts, which these data do not give: set "
                "data.kind=captioned"
            )
        parts = batch.cond if self.encoder is None else self._embedded(batch.cond)
        return self.layout.assemble(self._dropped(parts, batch.positions))

    def undropped(self) -> Prompts:
        """As `Conditions`."""
        return Prompts(self.layout, {}, self._seed, self.encoder)

    def on_meta(self, batch: Batch) -> Condition:
        """What the adapter takes of one example like those of a batch, without storage."""
        if self.encoder is not None:
            shapes = {n: (part.shape, part.dtype) for n, part in self.encoder.parts.items()}
        else:
            shapes = {n: (tuple(part.shape[1:]), part.dtype) for n, part in batch.cond.items()}
        parts = {
            name: torch.empty(1, *shape, dtype=dtype, device="meta")
            for name, (shape, dtype) in shapes.items()
        }
        return self.layout.assemble(parts)

    @torch.no_grad()
    def _embedded(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for stage in self.encoder.stages:
            parts |= self.encoder.embed(stage.name, dict(tokens))
        return parts

    def _dropped(self, parts: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
        """Zeros for single encoders, a function of (seed, position) alone."""
        if not self._drop_each:
            return parts
        names = self.layout.encoders
        # A column for each encoder of the network, whichever of them are dropped.
        draws = uniform(self._seed, Stream.ENCODER_DROP, positions, len(names))
        for column, name in enumerate(names):
            if probability := self._drop_each.get(name):
                parts = self.layout.without(parts, name, draws[:, column] < probability)
        return parts
