"""Options of the commands that sample: preset, method and grid, guidance, remedy."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mixflow_fast.files import user_path

if TYPE_CHECKING:
    from mixflow_fast.sampling.guidance import Guidance
    from mixflow_fast.sampling.presets import Preset
    from mixflow_fast.sampling.remedies import Remedy
    from mixflow_fast.sampling.sampler import Sampler

# Repeated from the sampling package, whose import takes seconds that --help should not; tested.
METHODS = (
    "euler",
    "heun",
    "heun_last_euler",
    "midpoint",
    "rk4",
    "dopri5",
    "rk45",
    "dpmpp2m",
    "unipc",
    "sde_euler",
    "sde_heun",
)
FORMS = ("sigma", "linear", "constant", "sbdm", "decreasing", "increasing-decreasing")
LAST_STEPS = ("mean", "euler", "tweedie", "none")
PATHS = ("linear", "gvp", "vp")
REMEDIES = ("ssc", "label_scale", "time_shift", "epsilon")


def add_sampler_options(command: argparse.ArgumentParser, *, several: bool = False) -> None:
    """The options; without a preset 50 Euler intervals and no guidance.

    Args:
        command: gets them.
        several: it samples with several numbers of steps, with and without a remedy, and has
            `--steps` and `--remedy` of its own.
    """
    steps = command.add_argument_group(
        "sampler", "Times run from 0, noise, to 1, data. What is given here replaces a preset's."
    )
    steps.add_argument(
        "--preset",
        metavar="NAME",
        help="a paper's sampler, guidance and labels",
    )
    steps.add_argument(
        "--list-presets", action=_ListPresets, nargs=0, help="print all presets in full and exit"
    )
    if not several:
        steps.add_argument("--steps", type=int, help="intervals (default 50)")
    steps.add_argument("--method", choices=METHODS, help="default euler")
    steps.add_argument("--shift", type=float, help="RAE's time shift of the grid (default 1)")
    steps.add_argument("--grid-start", type=float, metavar="T", help="raw first time (default 0)")
    steps.add_argument("--grid-end", type=float, metavar="T", help="raw last time (default 1)")
    steps.add_argument(
        "--last-size",
        type=float,
        metavar="H",
        help="raw size of the last interval (default: as the others; 0.04 for sde_*)",
    )
    steps.add_argument(
        "--rtol",
        type=float,
        metavar="R",
        help="relative error of a step of dopri5 (default 1e-3) or rk45 (1e-5)",
    )
    steps.add_argument(
        "--atol", type=float, metavar="A", help="absolute error of a step (default 1e-6 and 1e-5)"
    )
    steps.add_argument("--sde-form", choices=FORMS, help="w(t) of sde_* (default sigma)")
    steps.add_argument("--sde-norm", type=float, help="factor of w(t) (default 1)")
    steps.add_argument("--sde-last", choices=LAST_STEPS, help="last step of sde_* (default mean)")
    steps.add_argument(
        "--path",
        choices=PATHS,
        help="that the network was trained on, for sde_* if the file does not say it (linear); "
        "refused for methods that do not ask for it",
    )
    guidance = command.add_argument_group("guidance")
    guidance.add_argument("--cfg-scale", type=float, help="1 = no guidance (default)")
    guidance.add_argument(
        "--cfg-channels",
        type=_channels,
        metavar="N|all|auto",
        help="guide the first N channels; auto: as the official model does (SiT 3, REPA all)",
    )
    guidance.add_argument(
        "--cfg-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide for LOW <= t <= HIGH (REPA's guidance_high 0.7 is 0.3 1 here)",
    )
    guidance.add_argument(
        "--guide",
        type=user_path,
        metavar="CHECKPOINT",
        help="autoguidance by this smaller or less trained network; --cfg-scale is its scale",
    )
    if not several:
        guidance.add_argument(
            "--remedy",
            metavar="NAME[=NUMBERS]",
            help=f"{', '.join(REMEDIES)}: without training, e.g. ssc=0.1,1 or label_scale=0.9",
        )


class _ListPresets(argparse.Action):
    """Prints and exits, as --help does: no checkpoint is needed."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from mixflow_fast.sampling.presets import PRESETS

        for name, preset in PRESETS.items():
            print(f"{name}\n  " + preset.describe().replace("\n", "\n  "))
        parser.exit()


def _channels(text: str) -> int | str:
    if text in ("all", "auto"):
        return text
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number, all or auto, got {text!r}") from error


@dataclass(frozen=True)
class SamplerChoice:
    """What the options ask for.

    Attributes:
        sampler, guidance, remedy: as `mixflow_fast.sampling.sample` takes them.
        preset: the preset that they began with.
        guide: file or folder of the network of autoguidance.
    """

    sampler: Sampler
    guidance: Guidance
    remedy: Remedy | None
    preset: Preset | None
    guide: Path | None

    def for_network(self, path: str | None) -> SamplerChoice:
        """The same for a network that was trained on a path, where its file says which."""
        if path is None or not self.sampler.path_matters:
            return self
        return replace(self, sampler=replace(self.sampler, path=path))

    def describe(self) -> str:
        """All of it, a line each."""
        lines = [f"sampler: {self.sampler.describe()}", f"guidance: {self.guidance.describe()}"]
        if self.remedy is not None:
            lines.append(f"remedy: {self.remedy.describe()}")
        if self.preset is not None:
            named = (self.preset.sampler, self.preset.guidance)
            changed = "" if named == (self.sampler, self.guidance) else "; here changed by options"
            lines.append(f"preset: {self.preset.note}{changed}")
        return "\n".join(lines)


def chosen_sampler(options: argparse.Namespace) -> SamplerChoice:
    """Read the options of `add_sampler_options`.

    Raises:
        ValueError: an unknown preset or remedy, values that do not fit, autoguidance without a
            guide.
    """
    from mixflow_fast.sampling.guidance import Guidance
    from mixflow_fast.sampling.presets import get_preset
    from mixflow_fast.sampling.remedies import parse_remedy
    from mixflow_fast.sampling.sampler import Sampler

    preset = None if options.preset is None else get_preset(options.preset)
    steps = _given(
        steps=options.steps,
        method=options.method,
        shift=options.shift,
        start=options.grid_start,
        end=options.grid_end,
        last_size=options.last_size,
        form=options.sde_form,
        norm=options.sde_norm,
        last=options.sde_last,
        path=options.path,
        rtol=options.rtol,
        atol=options.atol,
    )
    sampler = replace(Sampler() if preset is None else preset.sampler, **steps)
    _refuse_unused(options, sampler)
    guidance = Guidance() if preset is None else preset.guidance
    if options.guide is not None and guidance.kind != "autoguidance":
        if guidance.scale != 1.0 and options.cfg_scale is None:
            raise ValueError(
                f"--guide takes autoguidance, and the preset {options.preset} guides otherwise: "
                "give --cfg-scale, or leave --guide out"
            )
        guidance = Guidance(kind="autoguidance")
    interval = None if options.cfg_interval is None else tuple(options.cfg_interval)
    guidance = replace(guidance, **_given(scale=options.cfg_scale, interval=interval))
    if options.cfg_channels is not None:
        channels = None if options.cfg_channels == "all" else options.cfg_channels
        guidance = replace(guidance, channels=channels)
    without_scale = guidance.scale == 1.0 and options.cfg_scale is None and options.guide is None
    if without_scale and (interval is not None or options.cfg_channels is not None):
        raise ValueError(
            "--cfg-interval and --cfg-channels do nothing without guidance: give --cfg-scale"
        )
    if guidance.kind == "autoguidance" and options.guide is None:
        if guidance.scale != 1.0:
            raise ValueError(
                f"the preset {options.preset} has autoguidance: give the other network with "
                "--guide CHECKPOINT, or --cfg-scale 1 for none"
            )
        guidance = replace(guidance, kind="cfg")
    if options.guide is not None and guidance.scale == 1.0:
        raise ValueError("--guide does nothing at scale 1: give --cfg-scale")
    remedy = None if options.remedy is None else parse_remedy(options.remedy)
    return SamplerChoice(sampler, guidance, remedy, preset, options.guide)


def _refuse_unused(options: argparse.Namespace, sampler: Sampler) -> None:
    """Refuse what is on the command line and changes nothing with this method."""
    if sampler.nfe is None:
        for name in ("steps", "last_size"):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} does nothing for {sampler.method}, which chooses "
                    "its steps itself: leave it out"
                )
    if options.path is not None and not sampler.path_matters:
        raise ValueError(
            f"--path does nothing for {sampler.method}, which takes the network's velocity alone: "
            "leave it out, or choose a method that asks for the path, such as sde_euler"
        )


def _given(**options: object) -> dict[str, object]:
    """The options that are on the command line."""
    return {name: value for name, value in options.items() if value is not None}
