"""The command `mixflow-fast`; `python -m mixflow_fast.cli` is the same."""

import sys

from mixflow_fast.cli import interrupts

try:
    from mixflow_fast.cli.main import main
except KeyboardInterrupt:  # before `main` could take over
    sys.exit(interrupts.say())

__all__ = ["main"]
