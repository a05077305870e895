"""`mixflow-fast recipes`: the recipes that come with the package."""

from __future__ import annotations

import argparse
import textwrap


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "recipes",
        help="list the recipes: what each trains, and what has to be given with it",
        description="Lists the recipes that come with the package. `mixflow-fast train NAME "
        "--dry-run` prints all settings of one; a copy of such a print is a recipe of your own.",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from mixflow_fast.config.describe import recipes

    for recipe in recipes():
        print(recipe.name)
        needs = "; ".join(f"{name}=..." for name in recipe.asks_for)
        for text in (recipe.text, f"Needs {needs}" if needs else ""):
            print(textwrap.indent(textwrap.fill(text, 96), "    ") + "\n" * bool(text), end="")
    return 0
