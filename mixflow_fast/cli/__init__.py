"""The command `mixflow-fast`; `python -m mixflow_fast.cli` is the same."""

import sys

try:
    from mixflow_fast.cli.main import main
except KeyboardInterrupt:  # before `main` could take over
    sys.stderr.write("mixflow-fast: interrupted\n")
    sys.exit(130)

__all__ = ["main"]
