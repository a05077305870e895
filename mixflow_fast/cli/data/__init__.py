"""`mixflow-fast data`: from a folder of images to what training reads. One file a command."""

from __future__ import annotations

import argparse

from mixflow_fast.cli.data import bench, compare, encode, info, prepare, scan, verify

# In the order of the help page.
PARTS = (scan, prepare, encode, verify, info, compare, bench)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "data",
        help="make sets of images and latents, and look at them",
        description="From a folder of images to what training reads. `scan` tells what a folder "
        "holds, `prepare` makes the crops once, `encode` their latents.",
        epilog="example: mixflow-fast data prepare imagenet/train --size 256 --out imagenet-256",
    )
    parts = command.add_subparsers(required=True, metavar="COMMAND")
    for part in PARTS:
        part.add(parts)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    return options.data_command(options)
