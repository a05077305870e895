"""Exceptions as one clear line on stderr and an exit code; with MIXFLOW_DEBUG set, as they are."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

FAILED, REFUSED, INTERRUPTED = 1, 2, 130


def exit_code(command: Callable[[], int]) -> int:
    """Run a command; what users can get wrong becomes a line, anything else a traceback."""
    try:
        return command()
    # ImportError: an extra that is not installed, whose message says how to get it.
    except (ValueError, OSError, ImportError) as error:
        return report(error, REFUSED)
    except KeyboardInterrupt:
        print("mixflow-fast: interrupted; the same command resumes", file=sys.stderr)
        return INTERRUPTED


def report(error: Exception, code: int) -> int:
    """Print an error's line and return the exit code."""
    if os.environ.get("MIXFLOW_DEBUG"):
        raise error
    print(f"mixflow-fast: error: {error}", file=sys.stderr)
    return code


def leave_at_once(code: int) -> NoReturn:
    """End without the clean-up, which would wait for ranks that never answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
