"""The command line as a user meets it: one clear line per refusal, and a start that is quick."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mixflow_fast
from mixflow_fast.cli.main import COMMANDS, main, parse
from tests.support.command_line import run

ROOT = Path(__file__).resolve().parents[2]
NAMES = [command.__name__.rpartition(".")[2].replace("_", "-") for command in COMMANDS]
# What pip writes for `[project.scripts]`.
CONSOLE_SCRIPT = "import sys; from mixflow_fast.cli import main; sys.exit(main())"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


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


@pytest.mark.parametrize(
    "line",
    [
        "sample MISSING",
        "inspect MISSING",
        "export MISSING --to ema --out OUT.safetensors",
        "consolidate MISSING --out OUT.pt",
        "ema MISSING",
        "ema MISSING --sigma-rel 0.1 --out OUT.pt",
        "ema MISSING --decay 0.99 --out OUT.pt",
        "report MISSING",
        "evaluate MISSING --reference r.npz --pixels",
        "evaluate . --reference MISSING --pixels",
        "reference MISSING --pixels --out OUT.npz",
        "train MISSING.yaml",
        "verify-resume MISSING.yaml",
        "train photos train.init=MISSING out=OUT",
    ],
)
def test_a_path_that_is_not_there_is_named(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the home folder spelled out, since no shell expands what stands after a `=`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    line = line.replace("OUT", f"{tmp_path}/out").replace("MISSING", "~/missing")
    code, out, err = run(*line.split(), capsys=capsys)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "/missing" in err and "does not exist" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    [
        "sample missing.pt --out TAKEN.png",
        "consolidate . --out TAKEN.pt",
        "ema . --sigma-rel 0.1 --out TAKEN.pt",
        "ema . --decay 0.99 --out TAKEN.pt",
        "export weights.pt --to official --out TAKEN.pt",
        "report . --out TAKEN.html",
        "reference . --out TAKEN.npz",
    ],
)
def test_what_is_there_is_not_overwritten(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal comes before the work: there is nothing here to work on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights.pt").write_text("no weights")
    taken = tmp_path / f"taken.{line.rpartition('.')[2]}"
    taken.write_text("mine")
    code, _, err = run(*line.replace("TAKEN", "~/taken").split(), capsys=capsys)
    assert code == 2 and err == (
        f"mixflow-fast: error: {taken} exists: choose another --out, or replace it with --force\n"
    )
    (tmp_path / "a").write_text("no folder")
    code, _, err = run(*line.replace("TAKEN", "a/b").split(), capsys=capsys)
    assert code == 2 and f"because {tmp_path}/a is not a folder: choose another --out" in err
    code, _, err = run(*line.replace("TAKEN", "~/taken").split(), "--force", capsys=capsys)
    assert code == 2 and "exists" not in err
    assert taken.read_text() == "mine"


def test_every_command_has_arguments_and_a_body() -> None:
    for command, name in zip(COMMANDS, NAMES, strict=True):
        with pytest.raises(SystemExit, match="0"):
            parse([name, "--help"])
        assert command.run.__module__ == command.__name__


# Command lines that do no work, and their exit codes.
IDLE = {
    "--help": 0,
    "--version": 0,
    "": 2,
    "trian": 2,
    "export": 2,
    "sample x --num a": 2,
    **{f"{name} --help": 0 for name in NAMES},
}


def test_what_does_no_work_loads_neither_torch_nor_a_command() -> None:
    """What is heavy is imported when a command runs, not when its options are listed."""
    heavy = ("torch", "numpy", "tqdm", "yaml", "mixflow_fast.models", "mixflow_fast.config")
    source = f"""
import contextlib, io, sys
from mixflow_fast.cli import main
for line, expected in {IDLE!r}.items():
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(line.split())
        except SystemExit as end:
            code = end.code
    assert (code or 0) == expected and said.getvalue(), (line, code, said.getvalue())
    assert not [name for name in {heavy} if name in sys.modules], line
"""
    assert python("-c", source).returncode == 0


@pytest.mark.parametrize("how", [["-c", CONSOLE_SCRIPT], ["-m", "mixflow_fast.cli"]])
def test_the_version_is_there_at_once(how: list[str]) -> None:
    """By the processor's time: that of the clock is also what else the machine does."""
    found = []
    for _ in range(5):
        before = os.times()
        done = python(*how, "--version")
        after = os.times()
        user = after.children_user - before.children_user
        found.append(user + after.children_system - before.children_system)
        assert done.stdout == f"{mixflow_fast.__version__}\n" and done.stderr == ""
    assert min(found) < 0.3, found


def test_completion_of_commands_options_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit, match="0"):
        main(["--completion", "bash"])
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)

    def completed(*words: str) -> set[str]:
        ask = f"COMP_WORDS=({' '.join(words)} ''); COMP_CWORD={len(words)}\n"
        ask += "_shtab_mixflow_fast; printf '%s\\n' \"${COMPREPLY[@]}\""
        done = subprocess.run(
            ["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True
        )
        return set(done.stdout.split())

    assert {"train", "verify-resume", "ema"} <= completed("mixflow-fast")
    assert {"digits", "sit-xl2-256"} <= completed("mixflow-fast", "train")
    forms = {"official", "ema", "diffusers", "lora"}
    assert completed("mixflow-fast", "export", "x.pt", "--to") == forms


def test_completion_without_its_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert run("--completion", "bash", capsys=capsys)[::2] == (
        2,
        "mixflow-fast: error: completion needs shtab, which is not installed: pip install "
        '"mixflow_fast[completion]"\n',
    )


def test_a_mistyped_command_or_choice(capsys: pytest.CaptureFixture[str]) -> None:
    for line, message in (
        ("trian photos", "'trian' is not one of train, "),
        ("trian photos", "ema; did you mean 'train'?"),
        ("verify_resume photos", "did you mean 'verify-resume'?"),
        ("export x --to offical --out y", "argument --to: 'offical' is not one of official, ema"),
        ("", "arguments are required: COMMAND (`mixflow-fast --help` lists them)\n"),
        ("train", "the following arguments are required: recipe\n"),
        ("train photos --train.images=5", "written without dashes, train.images=5 (`mixflow"),
        ("train photos --dryrun", "arguments: --dryrun; did you mean '--dry-run'?\n"),
        ("train photos --resume-never", "written without dashes, resume-never=VALUE"),
        ("sample x.pt --cfgscale=2", "arguments: --cfgscale=2; did you mean '--cfg-scale'?\n"),
        ("report x --gamma", "arguments: --gamma\n"),
        ("train photos --steps 5", "--steps: a setting is written without dashes, steps=VALUE"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(line.split())
        assert message in capsys.readouterr().err


def test_a_usage_error_on_a_machine_with_a_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes' operators number machines by RANK; launchers set LOCAL_RANK beside it."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("RANK", "1")
    for local, speaks in ((None, True), ("1", False)):
        if local is not None:
            monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(SystemExit, match="2"):
            main(["sampel"])
        assert ("did you mean 'sample'?" in capsys.readouterr().err) == speaks


def test_options_after_the_overrides_and_unknown_ones(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse(["train", "photos", "a=1", "--dry-run", "b=2 3"])
    assert options.overrides == ["a=1", "b=2 3"] and options.dry_run
    assert options.command_line == "mixflow-fast train photos a=1 --dry-run 'b=2 3'"
    with pytest.raises(SystemExit, match="2"):
        main(["report", "x", "y"])
    assert "unrecognized arguments: y" in capsys.readouterr().err


@pytest.mark.parametrize(("argument", "code"), [("recipes", 0), ("inspect missing.pt", 2)])
@pytest.mark.parametrize("talked", [True, False])
def test_several_cpu_ranks_end_after_their_exit_handlers(
    argument: str, code: int, talked: bool
) -> None:
    """What the interpreter does after them can abort a rank; its code and output are whole."""
    program = f"""
import atexit, os, sys
from mixflow_fast.distributed import process_group

class Last:
    def __del__(self, write=os.write):
        write(1, b"<the interpreter ended>")

last = Last()
process_group._gloo_with_others = {talked}
atexit.register(print, "<handlers ran>")
sys.argv = ["mixflow-fast", *{argument.split()}]
{CONSOLE_SCRIPT}
"""
    done = python("-c", program)
    assert done.returncode == code, done.stderr
    assert "<handlers ran>" in done.stdout
    assert ("photos-mixed" in done.stdout) if code == 0 else ("missing.pt" in done.stderr)
    assert ("<the interpreter ended>" in done.stdout) != talked
