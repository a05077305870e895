"""`mixflow-fast demo`: base, control and MixFlow, each with a remedy, on small real images."""

from __future__ import annotations

import argparse

from mixflow_fast.files import user_path

# Options that replace a field of the demo's `Settings`.
_SETTINGS = ("gamma", "size", "base_images", "post_images", "base_lr", "post_lr", "samples")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "demo",
        help="base, control and MixFlow on small real images, with a report",
        description="Trains a small model on crops of photographs, post-trains it with and without "
        "MixFlow, samples, measures and writes a report. Finished arms are kept: interrupted, the "
        "same command goes on, and more seeds or --sweep add to what is there.",
    )
    command.add_argument("--out", type=user_path, default="runs/demo")
    command.add_argument("--data", choices=("photos", "digits"), default="photos")
    command.add_argument("--seed", type=int, default=0, help="first seed")
    command.add_argument("--seeds", type=int, default=1, help="how many seeds")
    command.add_argument("--sweep", action="store_true", help="add gammas and ablation rows")
    command.add_argument(
        "--fresh", action="store_true", help="start over instead of keeping finished arms"
    )
    command.add_argument("--gamma", type=float, help="of the mixflow arm")
    command.add_argument("--size", type=int, help="side in pixels")
    command.add_argument("--base-images", type=int)
    command.add_argument("--post-images", type=int)
    command.add_argument("--base-lr", type=float)
    command.add_argument("--post-lr", type=float)
    command.add_argument("--samples", type=int, help="generated images per cell")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from mixflow_fast.demo import SETTINGS, run_demo

    if options.seeds < 1:
        raise ValueError(f"--seeds must be >= 1, got {options.seeds}")
    given = {name: getattr(options, name) for name in _SETTINGS}
    changes = {name: value for name, value in given.items() if value is not None}
    try:
        result = run_demo(
            out=options.out,
            seeds=range(options.seed, options.seed + options.seeds),
            sweep=options.sweep,
            settings=replace(SETTINGS[options.data], **changes),
            command=options.command_line,
            fresh=options.fresh,
        )
    except KeyboardInterrupt:
        if not any(options.out.glob("seed_*/*/checkpoints/step_*")):
            raise
        same = "the same command without --fresh" if options.fresh else "the same command"
        raise KeyboardInterrupt(f"{same} goes on from what is done") from None
    print((options.out / "report.md").read_text())
    print(f"{result['seconds']:.0f} s. Report: {options.out / 'report.html'}")
    if result["compare"] is not None:
        print(f"In detail: {result['compare']}")
    return 0
