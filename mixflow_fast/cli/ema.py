"""`mixflow-fast ema`: list a run's EMA snapshots, or write an average as a weights file."""

from __future__ import annotations

import argparse

from mixflow_fast.files import user_path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "ema",
        help="averages of the weights that a run kept, or of a width chosen afterwards",
        description="Lists a run's snapshots, or writes a weights file: with --sigma-rel the "
        "power-function EMA of that width, made of the snapshots (EDM2's post-hoc EMA), with "
        "--decay the EMA of one of the run's fixed decays.",
        epilog="example: mixflow-fast ema runs/post --sigma-rel 0.08 --out post-0.08.pt",
    )
    command.add_argument("folder", type=user_path, metavar="run", help="run folder")
    width = command.add_mutually_exclusive_group()
    width.add_argument("--sigma-rel", type=float, metavar="S", help="relative width, 0.05 to 0.15")
    width.add_argument("--decay", type=float, metavar="D", help="one of optim.ema_decays")
    command.add_argument("--step", type=int, help="snapshot that it ends at (default: the last)")
    command.add_argument("--out", type=user_path, help="the .pt to write")
    command.add_argument("--force", action="store_true", help="replace what is at --out")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from mixflow_fast.checkpoints import ema_snapshots

    folder, out = options.folder, options.out
    if options.sigma_rel is None and options.decay is None:
        found = ema_snapshots.snapshots(folder)
        none = f"{folder} holds no snapshots: a run writes them with optim.ema_sigma_rel=[0.05,0.1]"
        print(ema_snapshots.table(found) if found else none)
        return 0
    if out is None:
        raise ValueError("--out must be given with --sigma-rel and --decay: the .pt to write")
    if options.decay is not None:
        step = ema_snapshots.extract(folder, options.decay, out, options.force)
        print(f"{out}: EMA of decay {options.decay:g} after step {step}")
        return 0
    made = ema_snapshots.reconstruct(folder, options.sigma_rel, out, options.step, options.force)
    print(
        f"{out}: EMA of relative width {made.sigma_rel:g} after step {made.step}, made of "
        f"snapshots whose profile is {made.error:.1%} off"
    )
    if made.error > 0.1:
        print("warning: more snapshots, or a width between the saved ones, come closer")
    return 0
