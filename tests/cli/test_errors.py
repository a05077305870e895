"""Exceptions as a line and an exit code."""

import pytest

from mixflow_fast.cli.errors import exit_code


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


def test_an_interruption_and_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(raising(KeyboardInterrupt())) == 130
    assert "the same command resumes" in capsys.readouterr().err
    with pytest.raises(AssertionError):
        exit_code(raising(AssertionError()))
    assert exit_code(lambda: 1) == 1
