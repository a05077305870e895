"""The command `mixflow-fast`: the parser of all commands, and the dispatch to one of them.

Each command is a file of this folder with `add(commands)`, its arguments, and `run(options)`, what
it does, which returns the exit code. Heavy imports stand inside `run`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from mixflow_fast import __version__
from mixflow_fast.cli import (
    consolidate,
    demo,
    doctor,
    ema,
    export,
    inspect,
    recipes,
    report,
    sample,
    settings,
    train,
    verify_resume,
)
from mixflow_fast.cli.errors import exit_code

# In the order of the help page.
COMMANDS = (
    train, recipes, settings, sample, demo, inspect, export, doctor, report, verify_resume,
    consolidate, ema,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        the exit code: 0 done, or stopped by a signal with a checkpoint; 1 training diverged
        (inspect: the weights do not fit); 2 refused input, or a full disk; 130 interrupted. A
        second signal to a training run ends it with 128 + its number (130, 143).
    """
    options = parse(list(sys.argv[1:] if argv is None else argv))
    return exit_code(lambda: options.run(options))


def parser() -> argparse.ArgumentParser:
    """The parser; what it returns has the command's function as `run`."""
    found = argparse.ArgumentParser(
        prog="mixflow-fast",
        description="Post-train flow-matching diffusion transformers with MixFlow.",
    )
    found.add_argument("--version", action="version", version=__version__)
    found.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher gives it
    commands = found.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line, which itself is among them as `command_line`."""
    commands = parser()
    options, rest = commands.parse_known_args(arguments)
    # argparse takes overrides before the options or after them, not both.
    if rest and hasattr(options, "overrides") and not any(a.startswith("-") for a in rest):
        options.overrides += rest
    elif rest:
        flags = [a for a in rest if a.startswith("-")]
        commands.error(f"unrecognized arguments: {' '.join(flags or rest)}")
    options.command_line = shlex.join(["mixflow-fast", *arguments])
    return options
