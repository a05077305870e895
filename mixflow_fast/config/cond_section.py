"""The section `cond`: how often the network is not told the prompt, or a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mixflow_fast.config.section import Fraction, Section


@dataclass(frozen=True, kw_only=True)
class CondConfig(Section, name="cond"):
    """Dropout of prompts, for text-to-image networks."""

    drop: Fraction = 0.1
    """Probability that an example has the empty prompt instead of its own, as guidance needs it."""
    drop_each: tuple[str, ...] = ()
    """Probabilities that a single text encoder gives zeros, by its name: [clip_l:0.1, t5:0.1].
    Drawn for each encoder by itself, and beside cond.drop."""

    def check(self) -> None:
        self.drop_by_encoder()

    def drop_by_encoder(self) -> Mapping[str, float]:
        """`drop_each` as probabilities by the encoder's name.

        Raises:
            ValueError: an entry of another form, or an encoder that is named twice.
        """
        found: dict[str, float] = {}
        for entry in self.drop_each:
            name, _, text = entry.partition(":")
            try:
                probability = float(text)
            except ValueError:
                probability = -1.0
            if not name.strip() or not 0 <= probability < 1:
                raise ValueError(
                    "cond.drop_each must hold entries NAME:PROBABILITY with a probability in "
                    f"[0, 1), as [clip_l:0.1], got {entry!r}"
                )
            if name.strip() in found:
                raise ValueError(f"cond.drop_each names {name.strip()} twice, got {self.drop_each}")
            found[name.strip()] = probability
        return found
