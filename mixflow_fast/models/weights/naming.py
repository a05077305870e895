"""Names in the official state dicts: whose they are, wrappers, REPA's old ones, the head's rows.

Works on names and shapes alone, so that a state dict on the meta device is as good as a real one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

ClassName = Literal["SiT", "DiTDH", "SongUNet", "TextToImage"]
Kind = Literal["SiT", "REPA SiT", "DiT-DH", "SongUNet", "text-to-image"]
HEAD_KEYS = ("final_layer.linear.weight", "final_layer.linear.bias")
DITDH_MARK = "s_embedder.proj.weight"
SONGUNET_MARK = "map_layer0.weight"
# Of a text-to-image network of another library, which a run has as its one submodule.
TEXT_TO_IMAGE_PREFIX = "transformer."
# Conditions that EDM's networks of the same names have, and this class has not.
_EDM = ("map_label.", "map_augment.")
# What DDP, torch.compile, FSDP and activation checkpointing put into names, wherever they wrap.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module")
_WRAPPERS += ("_checkpoint_wrapped_module",)


def kind_of(state: Iterable[str]) -> Kind | None:
    """ "SiT", "REPA SiT", "DiT-DH", "SongUNet" or, of a run of ours, "text-to-image" by the names
    of a state dict; None for others.
    """
    names = set(state)
    if names and all(name.startswith(TEXT_TO_IMAGE_PREFIX) for name in names):
        return "text-to-image"
    if SONGUNET_MARK in names:
        last = any(n.startswith("dec.") and n.endswith("_aux_conv.weight") for n in names)
        whole = last and "map_layer1.weight" in names
        return "SongUNet" if whole and not any(n.startswith(_EDM) for n in names) else None
    if not {"final_layer.linear.weight", "blocks.0.attn.qkv.weight"} <= names:
        return None
    if DITDH_MARK in names:
        return "DiT-DH"
    if "x_embedder.proj.weight" not in names or "t_embedder.mlp.0.weight" not in names:
        return None
    if "blocks.0.mlp.w12.weight" in names:  # LightningDiT, which has SiT's other names
        return None
    return "REPA SiT" if any(name.startswith("projectors.") for name in names) else "SiT"


def without_wrappers(name: object) -> str:
    """A tensor's name without what wrappers put into it, at its beginning or between its parts."""
    return ".".join(part for part in str(name).split(".") if part not in _WRAPPERS)


def prefixes_of_networks(names: Iterable[str]) -> list[str]:
    """What stands before the names of each known network in a state dict; "" where nothing does.

    Lightning's modules and EMA wrappers hold the network as `model.`, `net.` or `ema_model.`.
    """
    names = list(names)
    marks = (HEAD_KEYS[0], SONGUNET_MARK)
    ends = [name.removesuffix(mark) for name in names for mark in marks if name.endswith(mark)]
    return [
        prefix
        for prefix in ends
        if (not prefix or prefix.endswith("."))
        and kind_of(name.removeprefix(prefix) for name in names if name.startswith(prefix))
    ]


def class_of(state: Iterable[str]) -> ClassName:
    """The class that computes a network which `kind_of` knows."""
    names = set(state)
    if kind_of(names) == "text-to-image":
        return "TextToImage"
    if SONGUNET_MARK in names:
        return "SongUNet"
    return "DiTDH" if DITDH_MARK in names else "SiT"


def depth(state: Iterable[str]) -> int:
    """Number of blocks in a state dict, legacy `decoder_blocks` aside."""
    # The highest number and not a count: a missing block is for the comparison to report.
    numbers = (name.split(".")[1] for name in state if name.startswith("blocks."))
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def rename_legacy_repa(
    state: dict[str, Tensor], encoder_depth: int | None, path: str | os.PathLike[str]
) -> dict[str, Tensor]:
    """REPA's old names `decoder_blocks.{j}` turned into `blocks.{j + encoder_depth}`."""
    if not any(name.startswith("decoder_blocks.") for name in state):
        return state
    offset = depth(state) if encoder_depth is None else encoder_depth
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("decoder_blocks."):
            _, number, rest = name.split(".", 2)
            name = f"blocks.{int(number) + offset}.{rest}"
        if name in out:
            raise ValueError(
                f"encoder_depth must be the number of encoder blocks in {path} = {depth(state)}, "
                f"got {offset}: {name} would be there twice"
            )
        out[name] = tensor
    return out


def fit_head(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop or zero-fill the sigma rows of the head where that alone makes its shape right."""
    out = dict(state)
    if not all(name in own and name in state for name in (*HEAD_KEYS, "x_embedder.proj.weight")):
        return out
    have, want = state[HEAD_KEYS[0]].shape, own[HEAD_KEYS[0]].shape
    _, channels, patch, _ = state["x_embedder.proj.weight"].shape
    rows = patch * patch * channels
    if have[1:] == want[1:] and (have[0], want[0]) == (2 * rows, rows):
        return with_velocity_head(out)
    if have[1:] == want[1:] and (have[0], want[0]) == (rows, 2 * rows):
        return with_sigma_head(out)
    return out


def with_velocity_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sigma rows of a SiT's head dropped: row (pixel of the patch) 2 C + channel, channel >= C.

    A head without them stays as it is.
    """
    return _with_head(state, sigma=False)


def with_sigma_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sigma rows of zeros put into a SiT's head, as untrained; a head with them stays as it is."""
    return _with_head(state, sigma=True)


def _with_head(state: Mapping[str, Tensor], sigma: bool) -> dict[str, Tensor]:
    _, channels, patch, _ = state["x_embedder.proj.weight"].shape
    has_sigma = state[HEAD_KEYS[0]].shape[0] == 2 * patch * patch * channels
    if has_sigma == sigma:
        return dict(state)
    change = _add_sigma if sigma else _drop_sigma
    return dict(state) | {name: change(state[name], channels) for name in HEAD_KEYS}


def _drop_sigma(rows: Tensor, channels: int) -> Tensor:
    return rows.unflatten(0, (-1, 2, channels))[:, 0].flatten(0, 1).clone()


def _add_sigma(rows: Tensor, channels: int) -> Tensor:
    velocity = rows.unflatten(0, (-1, channels))
    return torch.cat([velocity, torch.zeros_like(velocity)], dim=1).flatten(0, 1)
