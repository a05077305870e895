"""The progress line on terminals of every kind."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import sys
import termios

import pytest

from mixflow_fast.metrics.progress import Progress
from tests.support.runs import training_row


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_other_lines_do_not_break_the_progress(monkeypatch, terminal) -> None:
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    progress = Progress(4, 0, "run")
    for step in (1, 2):
        progress.step()
        progress.report(training_row(step))
        progress.log(f"run: step {step} validation loss ema 0.5")
    progress.close()
    lines = screen.getvalue().replace("\r", "\n").splitlines()
    for step in (1, 2):
        assert f"run: step {step} validation loss ema 0.5" in lines
        assert (f"run: step {step}/4 loss 0.5000 lr 1.00e-04 10 img/s" in lines) is not terminal
    assert ("2/4" in screen.getvalue().replace("step 2/4", "")) is terminal


@pytest.mark.parametrize("size", [(0, 0), (30, 100)])
def test_a_terminal_without_a_size_gets_lines(monkeypatch, size) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    with os.fdopen(theirs, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        progress = Progress(2, 0, "run")
        progress.step()
        progress.report(training_row(1))
        progress.close()
        text = os.read(ours, 4096).decode()
    os.close(ours)
    assert ("run: step 1/2 loss 0.5000" in text) is (size == (0, 0))
    assert ("1/2 [" in text) is (size != (0, 0))
