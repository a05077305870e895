"""The command line as a test calls it."""

from __future__ import annotations

import pytest

from mixflow_fast.cli.main import main


def run(*argv: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line."""
    code = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err
