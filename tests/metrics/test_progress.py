"""The progress of long work, on terminals of every kind and in logs."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import struct
import sys
import termios
import time

import pytest

from mixflow_fast.metrics import progress as module
from mixflow_fast.metrics.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def log_of(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed from here on, where stderr is no terminal."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


@pytest.mark.parametrize("terminal", [True, False])
def test_other_lines_do_not_break_the_progress(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress(4000, "run", "images") as progress:
        for step in (1, 2):
            progress.advance(1000)
            progress.show(f"loss 0.{step}")
            progress.log(f"run: step {step} validation loss ema 0.5")
    lines = screen.getvalue().replace("\r", "\n").splitlines()
    for step in (1, 2):
        assert f"run: step {step} validation loss ema 0.5" in lines
    assert ("50%|" in screen.getvalue()) is terminal
    assert ("\r" in screen.getvalue()) is terminal
    assert terminal or len(lines) == 2


@pytest.mark.parametrize("size", [(0, 0), (30, 100)])
def test_a_terminal_without_a_size_gets_lines(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    with os.fdopen(theirs, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        with Progress(2, "run", "steps") as progress:
            progress.advance()
            progress.show("loss 0.5000")
            progress.log(progress.line())
        screen.flush()
        text = ""
        while select.select([ours], [], [], 0.2)[0]:
            text += os.read(ours, 4096).decode()
    os.close(ours)
    assert "run: 1 of 2 steps  loss 0.5000" in text
    assert ("%|" in text) is (size != (0, 0))


def test_a_log_is_never_silent_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing is counted: a first step that compiles, a rank that is waited for."""
    log = log_of(monkeypatch)
    monkeypatch.setattr(module, "EVERY_S", 0.1)
    with Progress(10, "run", "steps", even=False) as progress:
        time.sleep(0.35)
        progress.log("something else")  # after which silence counts from anew
        progress.advance(3)
        time.sleep(0.35)
    lines = log.getvalue().splitlines()
    assert 3 <= len(lines) <= 9 and "\r" not in log.getvalue()
    assert set(lines) == {"run: 0 of 10 steps", "something else", "run: 3 of 10 steps"}
    time.sleep(0.3)
    assert log.getvalue().splitlines() == lines  # nothing after its end


def test_what_is_said_counts_as_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_of(monkeypatch)
    monkeypatch.setattr(module, "EVERY_S", 1.0)
    with Progress(10, "run", "steps") as progress:
        for _ in range(12):
            time.sleep(0.1)
            progress.log("something else")
    assert set(log.getvalue().splitlines()) == {"something else"}


def test_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    log_of(monkeypatch)
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with Progress(1_000_000, "run", "images", start=500_000) as progress:
        assert progress.line() == "run: 500,000 of 1,000,000 images"
        for _ in range(100):  # ten minutes at 100 images/s: a slow start
            now += 6
            progress.advance(600)
        progress.show("loss 0.123")
        assert progress.line() == "run: 560,000 of 1,000,000 images  loss 0.123  73 min left"
        for _ in range(100):  # then 1000 images/s, which is what counts
            now += 1
            progress.advance(1000)
        assert progress.line() == "run: 660,000 of 1,000,000 images  loss 0.123  5.7 min left"
        progress.advance(340_000)
        assert progress.line() == "run: 1,000,000 of 1,000,000 images  loss 0.123"
    with Progress(9, "doctor", "sections", even=False) as progress:
        now += 5
        progress.advance()
        assert progress.line() == "doctor: 1 of 9 sections"


def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_of(monkeypatch)
    monkeypatch.setattr(module, "EVERY_S", 0.05)
    with Progress(4, "run", "steps", quiet=True) as progress:
        progress.show("loss")
        progress.log("text")
        time.sleep(0.2)
    assert log.getvalue() == ""
