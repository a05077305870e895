"""The maths of the flow: paths between noise and data, distributions of times and of noise."""

from mixflow_fast.flow.clock import CLOCKS, DATA_AT_1, NOISE_AT_1, check_clock, engine_times
from mixflow_fast.flow.path import PATHS, Path, get_path
from mixflow_fast.flow.source import MixedSource, StandardSource
from mixflow_fast.flow.timesteps import (
    TimeDistribution,
    resolution_shift,
    shift_time,
    slow_time,
)

__all__ = [
    "CLOCKS",
    "DATA_AT_1",
    "NOISE_AT_1",
    "PATHS",
    "MixedSource",
    "Path",
    "StandardSource",
    "TimeDistribution",
    "check_clock",
    "engine_times",
    "get_path",
    "resolution_shift",
    "shift_time",
    "slow_time",
]
