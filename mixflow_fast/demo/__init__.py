"""The demo: one base model, post-trained with and without MixFlow, sampled and measured.

From one base checkpoint, arms that differ in nothing but the distribution of the two times train
for the same number of steps on the same examples and noise; then every arm generates from the same
noise with few and with many Euler steps, plainly and with a remedy that needs no training, and is
compared with real crops that no arm has seen. Everything is a function of the seed: the same seed
gives the same bits on the same machine.
"""

from mixflow_fast.demo.measure import Measure
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
    "SETTINGS",
    "Arm",
    "Measure",
    "Settings",
    "arm_config",
    "arms_of",
    "base_config",
    "run_demo",
]
