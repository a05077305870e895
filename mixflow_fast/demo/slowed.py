"""The demo's first method: a base model, post-trained with and without slowed interpolation."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from mixflow_fast.config.schema import Config
from mixflow_fast.demo.measure import Measure, measure_notes
from mixflow_fast.demo.plan import Finished, Plan, Words
from mixflow_fast.demo.settings import (
    CHOSEN_ON,
    PHOTOS,
    Settings,
    arm_config,
    arms_of,
    base_config,
    check_settings,
)
from mixflow_fast.reports.demo_report import render_demo_report
from mixflow_fast.reports.demo_result import ArmResult, DemoResult
from mixflow_fast.sampling.remedies import Remedy


class SlowedPlan(Plan):
    """Base, control and MixFlow, each with a remedy.

    Args:
        settings: sizes, gamma, remedies.
        sweep: add the gamma sweep and the paper's ablation rows.
    """

    method = "slowed"

    def __init__(self, settings: Settings, sweep: bool = False) -> None:
        self._settings = settings
        self.arms = arms_of(settings, sweep)

    @property
    def settings(self) -> Settings:
        return self._settings

    def config(self, name: str, seed: int, folder: Path) -> Config:
        base = base_config(self.settings, seed, folder / "base")
        trained = self.arms[name].weights_of or name
        if trained == "base":
            return base
        return arm_config(base, self.arms[trained], self.settings, seed, folder / trained)

    def check(self, out: Path) -> None:
        check_settings(self.settings, self.arms, out)

    def remedy(self, name: str, steps: int) -> Remedy | None:
        return self.settings.remedy(name, steps)

    def arm_result(self, name: str, runs: Sequence[Finished]) -> ArmResult:
        arm = self.arms[name]
        remedies = {steps: self.remedy(name, steps) for steps in self.settings.steps}
        return {
            "label": arm.label,
            "gamma": arm.gamma,
            "timesteps": arm.timesteps,
            "interval": arm.interval,
            "weights_of": arm.weights_of,
            "remedies": {
                str(steps): remedy.describe()
                for steps, remedy in remedies.items()
                if remedy is not None
            },
            "folded": arm.folded,
        }

    def words(self, seeds: Sequence[int], measure: Measure) -> Words:
        what = "photo crops" if self.settings.data == "photos" else "handwritten digits"
        notes = measure_notes(self.settings.data, self.settings.size, self.settings.samples)
        notes.insert(2, choice_note(self.settings, seeds))
        if self.settings.control_remedy or self.settings.mixflow_remedy:
            notes.append(
                "A remedy changes the sampling alone, nothing is trained. Its constants were "
                "chosen for each number of steps; where none helped, the row repeats that of its "
                "arm."
            )
        if len(seeds) > 1:
            notes.append("Spread: sample standard deviation over the seeds (base model included).")
        return Words(f"MixFlow post-training on {what}", _about(self.settings), notes)

    def render(self, result: DemoResult, path: Path) -> None:
        render_demo_report(result, path)

    def compare_command(self, out: Path, seed: int) -> str | None:
        """How to compare base and MixFlow by the command that does it for any two models."""
        folder, settings = out / f"seed_{seed}", self.settings
        base, control, mixflow = (folder / name for name in ("base", "control", "mixflow"))
        steps = ",".join(map(str, settings.picture_steps or settings.steps))
        page = out / "compare.html"
        words = ["compare", base, mixflow, "--control", control, "--steps", steps, "--out", page]
        return shlex.join(["mixflow-fast", *map(str, words)])


def _about(settings: Settings) -> str:
    if settings.data == "digits":
        what = f"scikit-learn's handwritten digits at {settings.size}x{settings.size} pixels"
    else:
        what = "16x16 crops of the two photographs that come with scikit-learn"
    return (
        f"A small SiT (4 layers, width 96) was trained on {what}, then trained further in each of "
        "the ways below with the same data and noise. Each arm generated from the same noise with "
        "few and with many Euler steps."
    )


def choice_note(settings: Settings, seeds: Sequence[int]) -> str:
    """On which seeds the settings were chosen, and which of those shown are not free of that."""
    if settings != PHOTOS:
        return "Sizes, gamma, learning rates and remedies were chosen on other seeds than 0 to 4."
    words = (
        f"Gamma, learning rates and remedies were chosen on seeds {', '.join(map(str, CHOSEN_ON))}."
    )
    if 0 in seeds:
        words += " Seed 0 had been seen before with gamma 0.15 and 0.3."
    if tuned := [seed for seed in seeds if seed in CHOSEN_ON]:
        words += f" Of the seeds shown, {', '.join(map(str, tuned))} took part in that choice."
    return words
