"""`mixflow-fast verify-resume`: prove that an interrupted run goes on to the bit."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from mixflow_fast.files import user_path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "verify-resume",
        help="prove that an interrupted run goes on to the bit",
        description="Trains N steps, and N/2 + a save + fresh processes + the other half, and "
        "compares every tensor of the last checkpoints and what each step saw, bit for bit. Exit "
        "code: 0 the same, 1 something differs, 2 it could not be run.",
        epilog="example: mixflow-fast verify-resume photos train.zero_stage=3 --ranks 2",
    )
    command.add_argument("recipe", help="name of a recipe, or a .yaml file")
    command.add_argument("overrides", nargs="*", default=[], metavar="section.field=value")
    command.add_argument("--steps", type=int, default=6, help="N (default %(default)s)")
    command.add_argument("--ranks", type=int, default=1, help="processes of each run (default 1)")
    command.add_argument(
        "--out",
        type=user_path,
        help="empty folder for both runs, which keeps them; default: a temporary one, which is "
        "removed where the bits are the same",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import torch

    from mixflow_fast.config.loading import load_config
    from mixflow_fast.diagnostics.verify_resume import table, verify_resume

    config = load_config(options.recipe, options.overrides)
    out = options.out or Path(tempfile.mkdtemp(prefix="verify-resume-"))
    remove = options.out is None
    try:
        rows = verify_resume(config, out, options.steps, options.ranks, quiet=False)
        differing = sum(row.differing for row in rows)
        remove = remove and not differing
    except Exception:  # a run's log may say why
        remove = remove and not any(out.iterdir())
        raise
    finally:
        if remove:
            shutil.rmtree(out, ignore_errors=True)
    half, steps, c = options.steps // 2, options.steps, config.train
    engine = "ddp" if c.engine == "ddp" else f"ZeRO {c.zero_stage}"
    repeats = ", deterministic" * c.deterministic
    print(
        f"{options.recipe}, {engine}, {c.precision}{repeats}, "
        f"{options.ranks} rank{'s' * (options.ranks > 1)}: {steps} steps against {half}, a save, "
        f"fresh processes and {steps - half} more\n\n{table(rows)}\n"
    )
    found = f"{differing:,} differ" if differing else "the same bits"
    print(found if remove else f"{found} (both runs: {out})")
    if differing and not c.deterministic and c.device != "cpu" and torch.cuda.is_available():
        print("on a GPU the same bits are promised with train.deterministic=true only")
    return 1 if differing else 0
