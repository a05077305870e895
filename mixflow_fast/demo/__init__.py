"""The demo: both methods named MixFlow at a size that a CPU trains in minutes, with a report.

slowed: from one base checkpoint, arms that differ in nothing but the distribution of the two times
train for the same number of steps on the same examples and noise. mixed: arms that differ in
nothing but the source of the noise end train from random weights. both: slowed interpolation on top
of either. Then every arm generates from the same noise with few and with many Euler steps, and is
compared with real crops that no arm has seen. Everything is a function of the seed: the same seed
gives the same bits on the same machine.
"""

from mixflow_fast.demo.measure import Measure
from mixflow_fast.demo.mixed import MIXED, MixedArm, MixedSettings, both_arms, mixed_arms
from mixflow_fast.demo.run import run_demo
from mixflow_fast.demo.settings import (
    SETTINGS,
    Arm,
    Settings,
    arm_config,
    arms_of,
    base_config,
)

__all__ = [
    "MIXED",
    "SETTINGS",
    "Arm",
    "Measure",
    "MixedArm",
    "MixedSettings",
    "Settings",
    "arm_config",
    "arms_of",
    "base_config",
    "both_arms",
    "mixed_arms",
    "run_demo",
]
