"""Mean and std of latents as the network sees them, and what a wrong std comes from."""

from __future__ import annotations

import math
from typing import NamedTuple

_VAE_SCALE = 0.18215  # Stable Diffusion's autoencoder


class Statistics(NamedTuple):
    """Of latents as the network sees them.

    Attributes:
        examples: how many were looked at.
        mean, std: over all their numbers.
        scale: they were multiplied by it.
    """

    examples: int
    mean: float
    std: float
    scale: float

    def describe(self) -> str:
        """ "mean 0.01, std 0.98 after scale 0.18215 (256 examples)"."""
        return (
            f"mean {self.mean:.3g}, std {self.std:.3g} after scale {self.scale:g} "
            f"({self.examples:,} examples)"
        )

    def warning(self) -> str:
        """What is probably wrong with the scale; "" for a std from 0.5 to 2."""
        if _is_usual(self.std):
            return ""
        stored = self.std / abs(self.scale)
        if not math.isfinite(stored):
            why = "some of them are NaN or infinite"
        elif self.scale != 1 and _is_usual(stored):
            why = (
                f"the stored ones have {stored:.3g}, so they were scaled when they were made, and "
                "are scaled twice: set data.scale=1"
            )
        elif _is_usual(stored * _VAE_SCALE):
            why = (
                f"the stored ones have {stored:.3g}, as those of Stable Diffusion's autoencoder "
                f"before they are scaled: set data.scale={_VAE_SCALE}"
            )
        else:
            why = f"the stored ones have {stored:.3g}: check how they were made, and data.scale"
        return (
            f"the latents have a std of {self.std:.3g}, expected about 1 (0.5 to 2), to which the "
            f"noise is matched: {why}"
        )


def _is_usual(std: float) -> bool:
    return 0.5 <= std <= 2
