"""Weights in every official layout, and the commands that read and write them."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from torch import Tensor

from mixflow_fast.cli.main import main
from mixflow_fast.models import SiT, build
from tests.support.golden import load

# Head counts of the golden networks, whose widths are not published ones.
HEADS = {"sit_0": 4, "repa_0": 4, "rae_ddt_0": (4, 4)}
HEAD = "final_layer.linear.weight"
# Layouts of `OFFICIAL` with bookkeeping, and what `inspect` calls them.
LAYOUTS = {"SiT": "SiT", "REPA": "REPA", "RAE": "RAE", "RAE first release": "RAE"}


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit status, output and error output of a command."""
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def network(**kwargs: Any) -> SiT:
    """A SiT-S/8 of one block whose every weight matters."""
    torch.manual_seed(0)
    model = build("SiT-S/8", input_size=16, depth=1, num_classes=3, **kwargs)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def golden(name: str = "sit_0") -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(state dict, every golden tensor, constructor arguments) of a golden network."""
    tensors, config = load(name)
    config.pop("grad_of", None)
    return {k[6:]: v for k, v in tensors.items() if k.startswith("state.")}, tensors, config


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


def shifted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + 1 for name, tensor in state.items()}


OFFICIAL = {
    "SiT": lambda state: {
        **{"model": shifted(state), "ema": state, "opt": {"state": {}, "param_groups": []}},
        "args": argparse.Namespace(model="SiT-XL/2", prediction="velocity"),
    },
    "REPA": lambda state: {
        **{"model": shifted(state), "ema": state, "opt": {"state": {}, "param_groups": []}},
        "args": argparse.Namespace(model="SiT-XL/2", prediction="v", encoder_depth=2),
        "steps": 400000,
    },
    "RAE": lambda state: {
        **{"step": 5, "epoch": 3, "model": shifted(state), "ema": state},
        **{"optimizer": {"state": {}}, "scheduler": {"last_epoch": 3}},
    },
    "RAE first release": lambda state: {
        **{"model": shifted(state), "ema": state, "opt": {"state": {}}, "scheduler": {}},
        **{"train_steps": 7, "config_path": "xl.yaml", "training_cfg": {"epochs": 80}},
        "cli_overrides": {"data_path": "/data", "global_seed": 0},
    },
    "under ema": lambda state: {"ema": state},
    "bare": lambda state: state,
    "wrapped": lambda state: {"model": {f"module._orig_mod.{n}": t for n, t in state.items()}},
}
