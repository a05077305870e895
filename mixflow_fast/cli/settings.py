"""`mixflow-fast settings`: what can be set, what it takes, its default and its meaning."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "settings",
        help="list what can be set: values, defaults, meaning",
        description="Lists the settings that `train` takes after the recipe, with the default, "
        "the values it takes and the meaning of each. A recipe may have other defaults.",
        epilog="example: mixflow-fast settings optim",
    )
    command.add_argument("part", nargs="?", default="", help="a section or a setting; default: all")
    command.add_argument(
        "--markdown", action="store_true", help="the page docs/settings.md, always of all settings"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from mixflow_fast.config.describe import settings_markdown, settings_text

    if options.markdown:
        print(settings_markdown(), end="")
    else:
        print(settings_text(options.part.rstrip("=")))
    return 0
