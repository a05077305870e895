"""`mixflow-fast report`: a run's curves, previews and settings as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "report",
        help="a run's curves, previews and settings as one HTML page",
        description="Reads a run folder, whether the run goes on, was interrupted or is done, and "
        "writes a page that loads nothing.",
        epilog="example: mixflow-fast report runs/post",
    )
    command.add_argument("run_folder", metavar="RUN", help="run folder (out= of the run)")
    command.add_argument("--out", metavar="FILE", help="the .html; default: RUN/report.html")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from mixflow_fast.reports.run_report import write_run_report

    path = Path(options.out) if options.out else None
    print(write_run_report(Path(options.run_folder), path))
    return 0
