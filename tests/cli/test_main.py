"""The command line as a user meets it: one clear line per refusal, and a start that is quick."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixflow_fast.cli.main import COMMANDS, main, parse
from tests.support.command_line import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "photo"], "did you mean 'photos'"),
        (["train", "photos", "optim.lrr=1"], "did you mean 'optim.lr'"),
        (["train", "photos", "train.init=missing.pt", "out=OUT"], "missing.pt does not exist"),
        (["train", "photos", "train.microbatch_size=0"], "microbatch_size"),
        (["train", "photos", "out=FILE"], "FILE"),
        (["train", "photos", "objective.gamma=2", "--dry-run"], "gamma"),
        (["train", "photos", "model.name=SiT-M/9", "--dry-run"], "SiT-"),
        (["demo", "--gamma", "2", "--out", "OUT"], "gamma"),
        (["demo", "--samples", "1", "--out", "OUT"], "samples"),
        (["demo", "--size", "99", "--out", "OUT"], "size"),
        (["sample", "missing.pt"], "missing.pt does not exist"),
        (["sample", "x.pt", "--num", "0"], "--num"),
        (["sample", "x.pt", "--out", "x.jpg"], ".png"),
        (["demo", "--seeds", "0"], "--seeds"),
    ],
)
def test_refusals_exit_with_2_and_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "FILE").write_text("mine")
    argv = [a.replace("FILE", str(tmp_path / "FILE")) for a in argv]
    argv = [a.replace("OUT", str(tmp_path / "run")) for a in argv]
    code, out, err = run(*argv, capsys=capsys)
    assert code == 2 and out == ""
    assert message in err and err.startswith("mixflow-fast: error: ") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_every_command_has_arguments_and_a_body() -> None:
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2].replace("_", "-")
        with pytest.raises(SystemExit, match="0"):
            parse([name, "--help"])
        assert command.run.__module__ == command.__name__


def test_the_help_page_loads_no_command() -> None:
    """What is heavy is imported when a command runs, not when its options are listed."""
    heavy = ("deepspeed", "matplotlib", "PIL", "yaml", "mixflow_fast.models")
    source = (
        "import contextlib, sys\nfrom mixflow_fast.cli.main import main\n"
        "with contextlib.suppress(SystemExit):\n    main(['--help'])\n"
        f"sys.exit(str([name for name in {heavy} if name in sys.modules] or ''))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", source], env=env, capture_output=True, text=True, timeout=120
    )
    assert "COMMAND" in done.stdout and done.stderr.strip() == ""


def test_options_after_the_overrides_and_unknown_ones(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse(["train", "photos", "a=1", "--dry-run", "b=2 3"])
    assert options.overrides == ["a=1", "b=2 3"] and options.dry_run
    assert options.command_line == "mixflow-fast train photos a=1 --dry-run 'b=2 3'"
    with pytest.raises(SystemExit, match="2"):
        main(["report", "x", "y"])
    assert "unrecognized arguments: y" in capsys.readouterr().err
