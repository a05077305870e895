"""`mixflow-fast doctor`: what this machine has, and whether it computes right."""

from __future__ import annotations

import argparse
import json


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "doctor",
        help="what this machine has, and whether it computes right",
        description="Versions, devices, every kernel against its reference on this device, "
        "attention backends, DeepSpeed, optional packages, disk. Exit code: 0 healthy (warnings "
        "are allowed), 1 not.",
    )
    command.add_argument("--json", action="store_true", help="one object instead of text")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from mixflow_fast.diagnostics.doctor import diagnose

    found = diagnose(quiet=False)
    print(json.dumps(found.as_json(), indent=1) if options.json else found.as_text())
    return 0 if found.healthy else 1
