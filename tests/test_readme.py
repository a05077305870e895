"""The commands of the README can be pasted: each is run here, in their order, at toy size."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixflow_fast.cli.main import main
from mixflow_fast.models import build
from tests.support.autoencoder import EIGHT_TIMES, write_autoencoder
from tests.support.image_folders import write_folder
from tests.support.launchers import environment

ROOT = Path(__file__).resolve().parents[1]
# Installation and `make`: continuous integration runs them, on a fresh clone.
ELSEWHERE = ("git", "make", "pip")
NETWORK = {"input_size": 8, "depth": 1, "num_classes": 3}
# What makes the recipe small; everything else is as the README says.
TOY = [
    *("model.name=SiT-S/2", "model.input_size=8", "model.depth=1", "model.num_classes=3"),
    *("train.images=8", "train.global_batch_size=4", "train.microbatch_size=2", "train.device=cpu"),
    "optim.ema_sigma_rel=[0.05,0.1]",
]


def commands() -> list[list[str]]:
    """Every line of the README's shell blocks as arguments, comments left out."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def at_toy_size(command: list[str]) -> list[str]:
    # Of `sample --num --steps`, and of `data prepare --size`.
    replaced = {"50000": "4", "50": "2", "256": "64"}
    command = [replaced.get(argument, argument) for argument in command]
    if {"train", "verify-resume"} & set(command):
        command += TOY
    return command


def test_commands_can_be_pasted_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "imagenet" / "train", ("a", "b", "c"), each=3)
    write_autoencoder(tmp_path / "sd-vae-ft-ema", **EIGHT_TIMES)
    state = build("SiT-S/2", **NETWORK).state_dict()
    torch.save({"model": state, "ema": state}, "SiT-XL-2-256x256.pt")
    ran = []
    for program, *arguments in commands():
        if program in ELSEWHERE:
            continue
        arguments = at_toy_size(arguments)
        if program == "mixflow-fast":
            code, name = main(arguments), arguments[1 if arguments[0] == "data" else 0]
        else:
            assert program == "torchrun"
            code, name = torchrun(arguments), "torchrun"
        said = capsys.readouterr()
        assert code == 0, (program, arguments, said.err)
        ran.append(name)
    assert ran == [
        *("prepare", "encode", "recipes", "inspect", "train", "train", "sample", "export"),
        *("torchrun", "doctor", "verify-resume", "report", "ema", "ema", "consolidate"),
    ]
    made = ("samples.npz", "SiT-XL-2-mixflow.pt", "post.pt", "consolidated.pt", "runs/eight")
    assert all(Path(name).exists() for name in (*made, "runs/sit-xl2-256/report.html"))


def torchrun(arguments: list[str]) -> int:
    arguments[arguments.index("--nproc-per-node") + 1] = "2"
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    return subprocess.run([*launcher, *arguments], env=environment(), timeout=300).returncode
