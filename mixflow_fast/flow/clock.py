"""Which end of [0, 1] is data. Inside the engine t = 0 is noise and t = 1 is data."""

from __future__ import annotations

from torch import Tensor

DATA_AT_1 = "data_at_1"
NOISE_AT_1 = "noise_at_1"
CLOCKS = (DATA_AT_1, NOISE_AT_1)


def check_clock(clock: str | None) -> str:
    """Return `clock` if it is one of `CLOCKS`, else raise a ValueError that says how to choose."""
    if clock in CLOCKS:
        return clock
    what = "clock is required" if clock is None else f"clock must be one of {CLOCKS}, got {clock!r}"
    raise ValueError(
        f'{what}: "data_at_1" if your model\'s t = 1 is data (SiT, LightningDiT, the paper), '
        '"noise_at_1" if its t = 1 is noise (REPA, RAE, SD3 and Flux sigmas). '
        "Slowing in the wrong direction raises no error and only shows in FID."
    )


def engine_times(t: Tensor, clock: str) -> tuple[Tensor, Tensor]:
    """The pair (t, 1 - t) in the engine's clock for times in the caller's clock.

    The caller's number is one of the two, untouched, so neither end loses precision: near the data
    end of a noise-at-1 clock the noise level is the small number itself, not 1 - (1 - s).
    """
    return (t, 1 - t) if clock == DATA_AT_1 else (1 - t, t)
