"""Networks under the keys, prefixes and lists in which trainers keep them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixflow_fast.checkpoints.inspect import inspect_file
from mixflow_fast.models import load_model, load_weights
from tests.support.weights import network, same, shifted

State = dict[str, Tensor]


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def inside(part: str, state: State) -> State:
    """As a block that was wrapped by itself names its tensors."""
    return {name.replace("blocks.0.", f"blocks.0.{part}."): t for name, t in state.items()}


def averaged(state: State) -> State:
    """As torch's own average of a network keeps it."""
    model = network()
    model.load_state_dict(state)
    return torch.optim.swa_utils.AveragedModel(model).state_dict()


def ema_of(state: State) -> list[Tensor]:
    return [tensor + 1 for tensor in state.values()]


# Content of a file, and words of the warning ("" for none); the EMA is `shifted`.
LAYOUTS: dict[str, tuple[Callable[[State], dict[str, Any]], str]] = {
    "compiled blocks": (lambda s: {"ema": inside("_orig_mod", shifted(s))}, ""),
    "DDP in a block": (lambda s: {"ema": inside("module", shifted(s))}, ""),
    "FSDP": (lambda s: {"ema": under("_fsdp_wrapped_module.", shifted(s))}, ""),
    "FSDP blocks": (lambda s: {"ema": inside("_fsdp_wrapped_module", shifted(s))}, ""),
    "recomputed": (lambda s: {"ema": inside("_checkpoint_wrapped_module", shifted(s))}, ""),
    "swa_utils": (lambda s: {"ema": averaged(shifted(s)), "model": s}, ""),
    "Lightning": (
        lambda s: {"state_dict": under("model.", shifted(s)), "epoch": 1},
        "it has no 'ema' weights: took 'state_dict: model.'; names read without .* 'model.'",
    ),
    "Lightning and more": (
        lambda s: {
            "state_dict": under("net.", s)
            | under("ema_model.", shifted(s))
            | under("vae.encoder.", {"conv_in.weight": torch.ones(1)})
        },
        "took 'state_dict' for 'ema'; .* prefix 'ema_model.' .also there: state_dict: net..",
    ),
    "bare, one prefix": (lambda s: under("dit.", shifted(s)), "without their prefix 'dit.'"),
    "ema-pytorch": (
        lambda s: (
            under("online_model.", s)
            | under("ema_model.module.", shifted(s))
            | {"initted": torch.tensor(True), "step": torch.tensor(3)}
        ),
        "without their prefix 'ema_model.' .also there: online_model.",
    ),
    "other keys": (
        lambda s: {"model_state_dict": s, "ema_state_dict": shifted(s)},
        "took 'ema_state_dict' for 'ema'",
    ),
    "one level deeper": (
        lambda s: {"model": s, "ema": {"decay": 0.999, "module": shifted(s)}},
        "took 'ema.module' for 'ema'",
    ),
    "DeepSpeed": (
        lambda s: {"module": shifted(s), "ds_version": "0.19", "optimizer": None},
        "it has no 'ema' weights: took 'module'",
    ),
    "torch_ema": (
        lambda s: {"model": s, "ema": {"decay": 0.999, "shadow_params": ema_of(s)}},
        "'ema' is a list of 22 values without names: read in the order of 'model'",
    ),
    "torch_ema of what is trained": (
        lambda s: {"model": s, "ema": {"shadow_params": ema_of(s)[1:], "decay": 0.9}},
        "'ema' is a list of 21 values without names: read in the order of 'model'",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_networks_are_found_and_it_is_said(layout: str, tmp_path: Path) -> None:
    content, words = LAYOUTS[layout]
    state = network().state_dict()
    path = tmp_path / "a.pt"
    torch.save(content(state), path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read = load_weights(path)
    expected = shifted(state)
    if layout.endswith("is trained"):
        expected["pos_embed"] = state["pos_embed"]
    assert same(read, expected)
    if words:
        with pytest.warns(UserWarning, match=f"a.pt: .*{words}"):
            assert same(dict(load_model(path).state_dict()), expected)
    assert len(caught) == bool(words)
    found = inspect_file(path)
    assert found.fits and found.kind == "SiT" and len(found.notes) >= bool(words)


@pytest.mark.parametrize("layout", ["torch_ema", "other keys", "Lightning and more", "ema-pytorch"])
def test_the_online_weights_beside_an_average(layout: str, tmp_path: Path) -> None:
    state = network().state_dict()
    torch.save(LAYOUTS[layout][0](state), tmp_path / "a.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(load_weights(tmp_path / "a.pt", key="model"), state)


def test_a_list_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    state = network().state_dict()
    torch.save({"model": state, "ema": {"shadow_params": ema_of(state)[:-1]}}, tmp_path / "a.pt")
    words = "'ema' is a list of 21 values .* not fit the 22 names .*'model': took 'model'"
    with pytest.warns(UserWarning, match=words):
        assert same(load_weights(tmp_path / "a.pt"), state)
    torch.save({"ema": {"shadow_params": ema_of(state)}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a list of 22 values without names"):
        load_weights(tmp_path / "a.pt")


def test_names_of_no_known_network_stay(tmp_path: Path) -> None:
    state = under("model.", nn.Linear(2, 2).state_dict())
    torch.save(state, tmp_path / "a.pt")
    assert same(load_weights(tmp_path / "a.pt"), state)
