"""`mixflow-fast report`: a run's curves, previews and settings as one HTML page."""

from __future__ import annotations

import argparse

from mixflow_fast.files import user_path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "report",
        help="a run's curves, previews and settings as one HTML page",
        description="Reads a run folder, whether the run goes on, was interrupted or is done, and "
        "writes a page that loads nothing.",
        epilog="example: mixflow-fast report runs/post",
    )
    command.add_argument(
        "run_folder", type=user_path, metavar="RUN", help="run folder (out= of the run)"
    )
    command.add_argument(
        "--out", type=user_path, metavar="FILE", help="the .html; default: RUN/report.html, renewed"
    )
    command.add_argument("--force", action="store_true", help="replace what is at --out")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from mixflow_fast.reports.run_report import write_run_report

    print(write_run_report(options.run_folder, options.out, options.force))
    return 0
