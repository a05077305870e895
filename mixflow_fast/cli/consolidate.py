"""`mixflow-fast consolidate`: make one weights file from a checkpoint's shards."""

from __future__ import annotations

import argparse

from mixflow_fast.files import user_path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "consolidate",
        help="make one weights file from a checkpoint's shards",
        description="Writes the weights.pt that a run with train.save_weights=always writes "
        "itself. Needs no GPU, no DeepSpeed and no launcher.",
        epilog="example: mixflow-fast consolidate runs/post --out post.pt",
    )
    command.add_argument(
        "checkpoint", type=user_path, help="run folder (its newest), or a checkpoints/step_N"
    )
    command.add_argument("--out", type=user_path, required=True, help="the .pt to write")
    command.add_argument("--force", action="store_true", help="replace what is at --out")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from mixflow_fast.checkpoints.consolidate import consolidate

    metadata = consolidate(options.checkpoint, options.out, options.force)
    print(f"{options.out}: {metadata.images_seen} images, step {metadata.steps}")
    return 0
