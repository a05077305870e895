"""The report of a run, in every state a run folder can be in."""

import fcntl
import json
from pathlib import Path

import pytest
import torch

from mixflow_fast.cli.main import main
from mixflow_fast.config.loading import load_config
from mixflow_fast.metrics.metrics_file import MetricsFile
from mixflow_fast.reports.images import save_grid
from mixflow_fast.reports.previews import preview_file
from mixflow_fast.reports.run_history import read_run
from mixflow_fast.reports.run_report import MOST_PREVIEWS, render, write_run_report
from tests.support.pages import Page, assert_loads_nothing

pytest.importorskip("matplotlib")
GRID = [[0.5 + 0.1 * m if m <= t else None for t in range(8)] for m in range(8)]
TIMES = [(i + 0.5) / 8 for i in range(8)]


def page_of(out: Path) -> Page:
    return assert_loads_nothing(render(read_run(out)))


def make_run(out: Path, steps: int = 40, previews: int = 3) -> None:
    """A folder as the trainer leaves it: 10 steps, a resume, then on to `steps` of 40."""
    config = load_config(
        "photos", [f"out={out}", "train.images=2560", "optim.lr=1e-4", "train.log_every=1"]
    )
    out.mkdir(parents=True)
    (out / "config.yaml").write_text(config.to_yaml())
    for first, last in ((0, 10), (8, steps)):
        file = MetricsFile(out / "metrics.jsonl", first)
        environment = {"torch": "2.13", "device": "GPU <x>"}
        file.write({"kind": "start", "step": first, "time": 1e9, "ranks": 2, "recipe": "photos",
                    "clock": "noise_at_1", "environment": environment})  # fmt: skip
        for step in range(first + 1, last + 1):
            row = {"step": step, "images_seen": 64 * step, "loss": 1.0 / step, "grad_norm": None,
                   "lr": 1e-4, "images_per_s": 100.0, "seconds": 0.64, "data_wait_s": 0.064,
                   "model_tflops": 494.7, "peak_tflops": 989.4, "peak_memory_mib": 2048.0,
                   "loss_by_t": [0.1, None, 0.3, 0.4]}  # fmt: skip
            file.write(row)
            if step % 4 == 0:
                found = {"loss": 1 / step, "loss_by_t": TIMES, "grid": GRID}
                file.write({"kind": "validation", "step": step, "examples": 32, "t": TIMES,
                            "data": "held-out examples", "grid_t": TIMES,
                            "ema": found, "model": found})  # fmt: skip
        file.close()
    for number in range(previews):
        save_grid(preview_file(out, 4 * number), torch.zeros(1, 3, 8, 8), columns=1)


def test_a_finished_run(tmp_path: Path) -> None:
    make_run(tmp_path / "my <run>", previews=30)
    run = read_run(tmp_path / "my <run>")
    # Steps 9 and 10 were done twice.
    assert [row["step"] for row in run.training] == list(range(1, 41))
    assert [row["step"] for row in run.validation] == list(range(4, 41, 4))
    page = page_of(tmp_path / "my <run>")
    assert sum(tag == "img" for tag, _ in page.tags) == MOST_PREVIEWS
    assert "my <run>" in page.words and "GPU <x>" in page.words
    for words in (
        "status finished",
        "step 40 of 40",
        "images seen 2,560",
        "time in training 26 s",
        "Loss by label time, network's clock: 0 is data, 1 is noise",
        "50.0% of 989.4 (dense bf16)",
        "32 held-out examples",
        "Change since step 4, in percent",
        "step 0",
        "step 116",
        f"{MOST_PREVIEWS} of the 30 in",
        "Parts of the run",
    ):
        assert words in page.words, words


def test_what_differs_from_the_recipe_comes_first(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    text = page_of(tmp_path / "run").words
    table = text[text.index("What differs") : text.index("All of it")]
    assert "optim.lr 0.001 0.0001" in table
    assert "train.images 160000 2560" in table and "train.log_every 50 1" in table
    assert table.count(".") == 3 + len("0.001 0.0001".split())  # and nothing else


def test_a_recipe_with_open_places_and_one_that_is_gone(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    given = ["data.path=latents", "train.init=a.pt", "out=x"]
    (tmp_path / "run" / "config.yaml").write_text(load_config("sit-xl2-256", given).to_yaml())
    metrics = tmp_path / "run" / "metrics.jsonl"
    for recipe, words in (
        ("sit-xl2-256", "train.init to be given a.pt"),
        ("gone.yaml", "What differs from the defaults:"),
    ):
        rows = metrics.read_text().splitlines()
        rows.append(json.dumps({"kind": "start", "step": 40, "recipe": recipe}))
        metrics.write_text("\n".join(rows))
        assert words in page_of(tmp_path / "run").words


def test_a_run_that_goes_on_and_one_that_was_cut_off(tmp_path: Path) -> None:
    make_run(tmp_path / "r", steps=20)
    out = tmp_path / "r"
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')
    text = page_of(out).words
    assert "status interrupted" in text and "The same command resumes it." in text
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_run(out).status == "running"
        assert "to go, at this rate 13 s" in page_of(out).words
    assert read_run(out).status == "interrupted"


def test_an_empty_run_and_damaged_files(tmp_path: Path) -> None:
    out = tmp_path / "empty"
    out.mkdir()
    (out / "config.yaml").write_text(load_config("photos").to_yaml())
    text = page_of(out).words
    assert "status no step yet" in text and "step 0 of 2,500" in text
    (out / "metrics.jsonl").write_text('{"kind": "start", "step": 0}\n{"step": 1}\nnonsense\n')
    (out / "previews").mkdir()
    (out / "previews" / "step_00000001.png").write_bytes(b"cut off")
    (out / "config.yaml").write_text("train: {nonsense: 1}")
    text = page_of(out).words
    assert "config.yaml is missing or damaged" in text and "train.nonsense" in text
    # The key's name at the time the run was made.
    (out / "config.yaml").write_text("train: {keep: 3}")
    assert "train.keep is now train.keep_last" in page_of(out).words


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_run(tmp_path / "run", steps=9)
    assert main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'report.html'}\n"
    assert main(["report", str(tmp_path / "run")]) == 0  # its own page is renewed
    other = tmp_path / "a" / "b.html"
    assert write_run_report(tmp_path / "run", other).is_file()
    with pytest.raises(ValueError, match="b.html exists: choose another --out, or replace it"):
        write_run_report(tmp_path / "run", other)
    assert write_run_report(tmp_path / "run", other, force=True) == other
    same = tmp_path / "run" / ".." / "run" / "report.html"
    assert write_run_report(tmp_path / "run", same) == same
    (tmp_path / "nothing").mkdir()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "holds no run: give the folder that out= named" in capsys.readouterr().err
