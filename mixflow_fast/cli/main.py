"""The command `mixflow-fast`: the parser of all commands, and the dispatch to one of them.

Each command is a file of this folder with `add(commands)`, its arguments, and `run(options)`, what
it does, which returns the exit code; `data/` is a command with a file for each of its own. Heavy
imports stand inside `run`.
"""

from __future__ import annotations

import argparse
import atexit
import difflib
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

from mixflow_fast import __version__
from mixflow_fast.cli import (
    compare,
    consolidate,
    curvature,
    data,
    demo,
    doctor,
    ema,
    encode,
    evaluate,
    export,
    inspect,
    interrupts,
    recipes,
    reference,
    report,
    sample,
    settings,
    slowflow,
    train,
    verify_resume,
)
from mixflow_fast.cli.errors import exit_code, leave_at_once, warning_line
from mixflow_fast.files import user_path
from mixflow_fast.messages import did_you_mean
from mixflow_fast.openmp import choose_waiting
from mixflow_fast.recipes import recipe_names

# As every version of argparse says it, with quotes around the choices or without.
_NO_CHOICE = re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)")
# What the parser returns and no user gives with dashes.
_NO_OPTIONS = {
    "run",
    "data_command",
    "set",
    "local_rank",
    "recipe",
    "overrides",
    "checkpoint",
    "before",
    "part",
}
# In the order of the help page.
COMMANDS = (
    train, recipes, settings, data, encode, sample, evaluate, reference, slowflow, curvature,
    compare, demo, inspect, export, doctor, report, verify_resume, consolidate, ema,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: its arguments; None: those of the process, whose Ctrl-C is then handled from here on.

    Returns:
        the exit code: 0 done, or stopped by a signal with a checkpoint; 1 training diverged
        (inspect: the weights do not fit; doctor: something failed; verify-resume: bits differ; data
        scan: images that cannot be used; data verify: damage); 2 refused input, or a full disk; 130
        interrupted; 141 nobody reads the output any more. A second signal to a training run ends it
        with 128 + its number (130, 143), and so does the first one to `data prepare`
        and to `sample` of a set.
    """
    code = exit_code(lambda: _run(argv))
    if argv is None and _talked_by_gloo():
        # A finished run of two ranks was seen to abort (-6) in what the interpreter does after its
        # exit handlers; gloo's threads are the suspects. So they run, and nothing after them.
        atexit._run_exitfuncs()
        leave_at_once(code)
    return code


def _talked_by_gloo() -> bool:
    # Looked up and not imported: most commands end without torch.
    module = sys.modules.get("mixflow_fast.distributed.process_group")
    return module is not None and module.talked_by_gloo()


def _run(argv: Sequence[str] | None) -> int:
    if argv is None:
        interrupts.take_over()
        warnings.formatwarning = warning_line
    options = parse(list(sys.argv[1:] if argv is None else argv))
    choose_waiting()  # before the command brings torch
    return options.run(options)


class Parser(argparse.ArgumentParser):
    """argparse's, whose refusal of a choice names the nearest one."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with 2."""
        if match := _NO_CHOICE.search(message):
            value, choices = match[1], [name.strip(" '") for name in match[2].split(",")]
            found = f"{value!r} is not one of {', '.join(choices)}{did_you_mean(value, choices)}"
            message = message[: match.start()] + found
        if message.endswith("required: COMMAND"):
            message += f" (`{self.prog} --help` lists them)"
        # All ranks have the same command line. RANK alone may be the number of a machine.
        if "LOCAL_RANK" in os.environ and os.environ.get("RANK", "0") != "0":
            self.exit(2)
        super().error(message)


class PrintCompletion(argparse.Action):
    """Prints a script that completes commands, options, recipes and paths in a shell."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> NoReturn:
        try:
            import shtab
        except ImportError:
            way = 'pip install "mixflow_fast[completion]"'
            raise ImportError(f"completion needs shtab, which is not installed: {way}") from None
        for action in _actions(parser):
            if action.dest == "recipe":
                action.choices = recipe_names()
            elif action.type is user_path:
                action.complete = shtab.FILE
        print(shtab.complete(parser, shell=str(values)))
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Of all commands, and the commands of commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


def parser() -> Parser:
    """The parser; what it returns has the command's function as `run`."""
    found = Parser(
        prog="mixflow-fast",
        description="Post-train flow-matching diffusion transformers with MixFlow.",
    )
    found.add_argument("--version", action="version", version=__version__)
    found.add_argument(
        "--completion",
        choices=("bash", "zsh", "tcsh"),
        action=PrintCompletion,
        help='print a script for the shell; in ~/.bashrc: eval "$(mixflow-fast --completion bash)"',
    )
    found.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher gives it
    commands = found.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return found


def _nearest_option(flag: str, options: argparse.Namespace) -> str:
    """A hint at the command's option that a flag is a slip for, if there is one."""
    names = [name.replace("_", "-") for name in vars(options).keys() - _NO_OPTIONS]
    near = difflib.get_close_matches(flag.lstrip("-").partition("=")[0], names, n=1, cutoff=0.75)
    return f"; did you mean '--{near[0]}'?" if near else ""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line, which itself is among them as `command_line`."""
    commands = parser()
    options, rest = commands.parse_known_args(arguments)
    # argparse takes overrides before the options or after them, not both.
    if rest and hasattr(options, "overrides") and not any(a.startswith("-") for a in rest):
        options.overrides = [*options.overrides, *rest]
    elif rest:
        flags = [a for a in rest if a.startswith("-")]
        hint = _nearest_option(flags[0], options) if flags else ""
        if flags and not hint and hasattr(options, "overrides"):
            value = "" if "=" in flags[0] else "=VALUE"
            hint = (
                f": a setting is written without dashes, {flags[0].lstrip('-')}{value} "
                "(`mixflow-fast settings` lists them)"
            )
        commands.error(f"unrecognized arguments: {' '.join(flags or rest)}{hint}")
    options.command_line = shlex.join(["mixflow-fast", *arguments])
    return options
