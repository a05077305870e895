"""Ctrl-C wherever it comes: one line and exit code 130."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixflow_fast import demo
from mixflow_fast.checkpoints import manifest
from mixflow_fast.training import trainer
from tests.support.command_line import run

ROOT = Path(__file__).resolve().parents[2]
LINE = "mixflow-fast: interrupted\n"
# SIGINT when a module is looked for, as a user's Ctrl-C at that moment.
AT_IMPORT = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
        return None

sys.meta_path.insert(0, Interrupt())
sys.argv = ["mixflow-fast", *{argv!r}]
from mixflow_fast.cli import main
sys.exit(main())
"""
# A process in which Ctrl-C is handled as in the command, with something of its own as the command.
OWN_COMMAND = """
import os, signal, sys, time
from mixflow_fast.cli import errors, interrupts

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)

interrupts.PATIENCE_S = 0.3
interrupts.take_over()
def command():
    {body}
code = errors.exit_code(command)
{after}
sys.exit(code)
"""
TWICE = """
    try:
        interrupt()
    finally:
        interrupt()
        time.sleep(60)
"""
WAIT_IN_C = """
    from datetime import timedelta
    from threading import Timer
    from torch.distributed import TCPStore
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    Timer(0.2, interrupt).start()
    store.wait(["never"], timedelta(seconds=60))
"""


def ran(source: str) -> tuple[int, str]:
    """(exit code, stderr) of a script."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("mixflow_fast.cli.sample", ["--version"]),
        ("torch", ["doctor"]),
        ("torch.nn", ["sample", "x.pt"]),
        ("numpy.linalg", ["inspect", "x.pt"]),
        ("yaml", ["train", "digits", "--dry-run"]),
        ("mixflow_fast.diagnostics.verify_resume", ["verify-resume", "digits"]),
        ("mixflow_fast.demo", ["demo", "--out", "/nowhere/at/all"]),
    ],
)
def test_during_imports(module: str, argv: list[str]) -> None:
    assert ran(AT_IMPORT.format(module=module, argv=argv)) == (130, LINE)


@pytest.mark.parametrize(
    ("body", "after"),
    {
        "in Python": ("interrupt()", ""),
        "swallowed by an import": ("sys.path.insert(0, {folder!r}); import swallows", ""),
        "in a destructor": ("type('A', (), {'__del__': lambda self: interrupt()})()", ""),
        "a second one, in the clean-up": (TWICE, ""),
        "a second one, after the command": ("interrupt()", "interrupt(); print('on')"),
        "at the exit": ("return 0", "import atexit; atexit.register(interrupt)"),
    }.values(),
)
def test_once_and_again(body: str, after: str, tmp_path: Path) -> None:
    (tmp_path / "swallows.py").write_text(
        "import __main__\ntry:\n    __main__.interrupt()\nexcept BaseException:\n    pass\n"
    )
    source = OWN_COMMAND.format(body=body.replace("{folder!r}", repr(str(tmp_path))), after=after)
    assert ran(source) == (130, LINE)


def test_where_the_main_thread_waits_in_c() -> None:
    """As a rank does that waits for the others: no KeyboardInterrupt gets through."""
    started = time.monotonic()
    assert ran(OWN_COMMAND.format(body=WAIT_IN_C, after="")) == (130, LINE)
    assert time.monotonic() - started < 40


def test_other_ranks_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert ran(OWN_COMMAND.format(body="interrupt()", after="")) == (130, "")


def test_a_caller_keeps_its_own_handling() -> None:
    """`main(arguments)` from Python, and a process that is started with SIGINT ignored."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        from mixflow_fast.cli import main

        main(["--version"])
    assert signal.getsignal(signal.SIGINT) is before
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    source = OWN_COMMAND.format(body="interrupt(); return 0", after="")
    assert ran(f"{ignoring}\n{source}") == (0, "")


def test_before_it_is_handled() -> None:
    """Python's own KeyboardInterrupt, while the thread is started that watches for more."""
    source = (
        "import os, signal, sys, threading\n"
        "from mixflow_fast.cli import main\n"
        "start = threading.Thread.start\n"
        "def interrupted(thread):\n    os.kill(os.getpid(), signal.SIGINT)\n    start(thread)\n"
        "threading.Thread.start = interrupted\n"
        "sys.argv = ['mixflow-fast', 'doctor']\nsys.exit(main())"
    )
    assert ran(source) == (130, LINE)


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_only_what_is_there_is_promised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is a checkpoint, it is named; `demo --fresh` would begin again."""
    monkeypatch.setattr(trainer, "train", interrupt)
    monkeypatch.setattr(demo, "run_demo", interrupt)
    train_it, run_it = ["train", "digits", f"out={tmp_path}/run"], ["demo", "--out", f"{tmp_path}"]
    for command in (train_it, run_it, [*run_it, "--fresh"]):
        assert run(*command, capsys=capsys) == (130, "", LINE)
    step = tmp_path / "run" / "checkpoints" / "step_00000004"
    for folder in (step, tmp_path / "seed_0" / "base" / "checkpoints" / "step_00000001"):
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
        manifest.write(folder, {"state.json": manifest.entry(folder / "state.json")})
    for command, promise in (
        (train_it, f"{step} is there to resume from"),
        (run_it, "the same command goes on from what is done"),
        ([*run_it, "--fresh"], "the same command without --fresh goes on from what is done"),
    ):
        expected = f"mixflow-fast: interrupted; {promise}\n"
        assert run(*command, capsys=capsys) == (130, "", expected)
