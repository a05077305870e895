"""`mixflow-fast demo`: both methods named MixFlow on small real images, with their controls."""

from __future__ import annotations

import argparse

from mixflow_fast.files import user_path

# Options that replace a field of the demo's settings.
_SETTINGS = (
    *("gamma", "lam", "fc_lam", "size", "base_images", "post_images", "base_lr", "post_lr"),
    "samples",
)
# Those that a method does not have.
_OF_OTHERS = {
    "slowed": ("lam", "fc_lam"),
    "mixed": ("gamma", "post_images", "post_lr"),
    "both": ("fc_lam",),
}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "demo",
        help="both MixFlows on small real images, with a report",
        description="Trains small models on crops of photographs, samples, measures and writes a "
        "report. --method slowed: a base, post-trained with and without slowed interpolation. "
        "mixed: from random weights with plain, learned and mixed sources. both: slowed "
        "interpolation on top of a mixed source and of a plain one. Finished arms are kept: "
        "interrupted, the same command goes on, and more seeds or --sweep add to what is there; "
        "both adds to mixed in the same folder.",
    )
    command.add_argument("--method", choices=("slowed", "mixed", "both"), default="slowed")
    command.add_argument("--out", type=user_path, default="runs/demo")
    command.add_argument(
        "--data", choices=("photos", "digits"), default="photos", help="digits: slowed alone"
    )
    command.add_argument("--seed", type=int, default=0, help="first seed")
    command.add_argument("--seeds", type=int, default=1, help="how many seeds")
    command.add_argument(
        "--sweep", action="store_true", help="add gammas and ablation rows; mixed: lambdas"
    )
    command.add_argument(
        "--fresh", action="store_true", help="start over instead of keeping finished arms"
    )
    command.add_argument("--gamma", type=float, help="of the slowed arms")
    command.add_argument("--lam", type=float, help="lambda of MixFlow's source")
    command.add_argument("--fc-lam", type=float, help="lambda of kappa-FC at its own best")
    command.add_argument("--size", type=int, help="side in pixels")
    command.add_argument("--base-images", type=int, help="of the base; mixed: of every arm")
    command.add_argument("--post-images", type=int)
    command.add_argument("--base-lr", type=float)
    command.add_argument("--post-lr", type=float)
    command.add_argument("--samples", type=int, help="generated images per cell")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from mixflow_fast.demo import MIXED, SETTINGS, run_demo

    if options.seeds < 1:
        raise ValueError(f"--seeds must be >= 1, got {options.seeds}")
    given = {name: getattr(options, name) for name in _SETTINGS}
    changes = {name: value for name, value in given.items() if value is not None}
    for name in _OF_OTHERS[options.method]:
        if name in changes:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} has no meaning for --method {options.method}: leave it out")
    if options.method != "slowed" and options.data != "photos":
        raise ValueError(
            f"--data {options.data} has no meaning for --method {options.method}, which is shown "
            "on photos: leave it out"
        )
    settings = SETTINGS[options.data] if options.method == "slowed" else MIXED
    try:
        result = run_demo(
            out=options.out,
            seeds=range(options.seed, options.seed + options.seeds),
            sweep=options.sweep,
            settings=replace(settings, **changes),
            method=options.method,
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
