"""The command `mixflow-fast`; `python -m mixflow_fast.cli` is the same."""

from mixflow_fast.cli.main import main

__all__ = ["main"]
