"""Exceptions as a line and an exit code, and a reader of the output that goes away."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixflow_fast.cli import errors
from mixflow_fast.cli.errors import (
    end_with_all_ranks,
    exit_code,
    quiet_without_reader,
    warning_line,
)
from mixflow_fast.distributed import process_group

ROOT = Path(__file__).resolve().parents[2]


def raising(error: BaseException):
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize("error", [ValueError("wrong"), OSError("wrong"), ImportError("wrong")])
def test_what_users_can_get_wrong_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MIXFLOW_DEBUG", raising=False)
    assert exit_code(raising(error)) == 2
    assert capsys.readouterr().err == "mixflow-fast: error: wrong\n"
    monkeypatch.setenv("MIXFLOW_DEBUG", "1")
    with pytest.raises(type(error), match="wrong"):
        exit_code(raising(error))


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("wrong"), 2), (RuntimeError("CUDA out of memory"), 1), (KeyboardInterrupt(), 130)],
)
def test_a_rank_on_a_gpu_that_fails_ends_at_once(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its interpreter would wait for the other ranks, whatever the error was."""
    ended: list[int] = []
    monkeypatch.setattr(errors, "leave_at_once", ended.append)
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError):  # alone, or on CPUs
            end_with_all_ranks(raising(error))
    assert not ended
    monkeypatch.setattr(process_group, "with_others_on_gpus", lambda: True)
    end_with_all_ranks(raising(error))
    end_with_all_ranks(lambda: code)
    assert ended == [code, code] and end_with_all_ranks(lambda: 0) == 0 and len(ended) == 2


def test_an_interruption_and_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "mixflow-fast: interrupted\n"
    assert exit_code(raising(KeyboardInterrupt("the same command goes on"))) == 130
    assert capsys.readouterr().err == "mixflow-fast: interrupted; the same command goes on\n"
    with pytest.raises(AssertionError):
        exit_code(raising(AssertionError()))
    assert exit_code(lambda: 1) == 1


def without_reader(*arguments: str, both: bool = False) -> tuple[int, str]:
    """(exit code, stderr) of a Python whose stdout is a pipe that nobody reads; `both`: stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=writer,
        stderr=writer if both else subprocess.PIPE,
        timeout=120,
    )
    os.close(writer)
    return done.returncode, (done.stderr or b"").decode()


CLI = ("-m", "mixflow_fast.cli")
MANY_LINES = (
    "import sys\nfrom mixflow_fast.cli.errors import exit_code\n"
    "def command():\n    print('line\\n' * 100_000)\n    return 0\n"
    "sys.exit(exit_code(command))"
)


@pytest.mark.parametrize(
    "arguments",
    [
        (*CLI, "recipes"),
        (*CLI, "settings"),
        ("-c", MANY_LINES),
        ("-m", "benchmarks.flops"),
        (*CLI, "--help"),
        (*CLI, "--version"),
        (*CLI, "train", "--help"),
        ("-m", "benchmarks.run", "--help"),
    ],
)
def test_a_reader_that_is_gone_ends_the_command_without_a_word(arguments: tuple[str]) -> None:
    code, said = without_reader(*arguments)
    # argparse itself passes over a page that it cannot print.
    asked_for_help = arguments[-1] in ("--help", "--version")
    assert said == "" and code in ((0, 141) if asked_for_help else (141,))


@pytest.mark.parametrize(("command", "code"), [("--version", 0), ("trian", 2)])
def test_closed_streams_are_no_error(command: str, code: int) -> None:
    """`>&- 2>&-`, as some daemons start programs: Python then has None in place of both."""
    line = f"exec {sys.executable} {' '.join(CLI)} {command} >&- 2>&-"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(line, shell=True, cwd=ROOT, env=environment).returncode == code


def test_an_error_that_nobody_can_read() -> None:
    assert without_reader(*CLI, "train", "no-recipe", both=True) == (141, "")
    assert without_reader(*CLI, "trian", both=True)[0] in (2, 141)


def test_a_broken_pipe_of_another_kind_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(raising(BrokenPipeError("the worker"))) == 2
    assert capsys.readouterr().err == "mixflow-fast: error: the worker\n"
    with pytest.raises(BrokenPipeError):
        quiet_without_reader(raising(BrokenPipeError("the worker")))


def test_every_benchmark_ends_quietly() -> None:
    """Each file of `benchmarks/` that can be called goes through `quiet_without_reader`."""
    called = [p for p in (ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text()]
    assert len(called) >= 5
    assert [p.name for p in called if "(quiet_without_reader(main))" not in p.read_text()] == []


def test_a_warning_is_a_line_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    told = warning_line(UserWarning("x.pt: took 'model'"), UserWarning, "f.py", 3)
    assert told == "mixflow-fast: warning: x.pt: took 'model'\n"
    assert "f.py:3" in warning_line("gone soon", FutureWarning, "f.py", 3)
    monkeypatch.setenv("MIXFLOW_DEBUG", "1")
    assert "f.py:3: UserWarning" in warning_line("x", UserWarning, "f.py", 3)
