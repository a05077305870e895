"""The official state dicts: whose they are, how the network was built, heads and old names.

Works on names and shapes alone, so that a state dict on the meta device is as good as a real one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from mixflow_fast.messages import shorten

HEAD_KEYS = ("final_layer.linear.weight", "final_layer.linear.bias")
_HEADS_OF_WIDTH = {384: 6, 768: 12, 1024: 16, 1152: 16}
_DITDH_MARK = "s_embedder.proj.weight"
_PUBLISHED_HEAD_DEPTH = 2


def kind_of(state: Iterable[str]) -> str | None:
    """ "SiT", "REPA SiT" or "DiT-DH" by the names of a state dict; None for anything else."""
    names = set(state)
    if not {"final_layer.linear.weight", "blocks.0.attn.qkv.weight"} <= names:
        return None
    if _DITDH_MARK in names:
        return "DiT-DH"
    if "x_embedder.proj.weight" not in names or "t_embedder.mlp.0.weight" not in names:
        return None
    return "REPA SiT" if any(name.startswith("projectors.") for name in names) else "SiT"


def infer_kwargs(
    state: Mapping[str, Tensor],
    num_heads: int | tuple[int, int] | None = None,
    encoder_depth: int | None = None,
) -> tuple[str, dict[str, Any]]:
    """("SiT" or "DiTDH", constructor arguments) of the network that a state dict belongs to.

    Args:
        state: name -> tensor; only shapes are looked at.
        num_heads: where neither published widths nor the shapes tell; a DiTDH has a pair.
        encoder_depth: of REPA's SiT the block that is projected, of a DiTDH the blocks before the
            head; where the shapes cannot tell.

    Raises:
        ValueError: names or shapes of neither, or a number that must be given.
    """
    if _DITDH_MARK in state:
        return "DiTDH", infer_ditdh_kwargs(state, num_heads, encoder_depth)
    if isinstance(num_heads, tuple):
        raise ValueError(f"num_heads of a SiT must be an int, got {num_heads}")
    return "SiT", infer_sit_kwargs(state, num_heads, encoder_depth)


def _require(state: Mapping[str, Tensor], what: str, names: tuple[str, ...]) -> None:
    absent = [name for name in names if name not in state]
    if absent:
        raise ValueError(
            f"state must be the state dict of a {what}, got one with no {shorten(absent)}"
        )


def _side(tokens: int, name: str) -> int:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{name} must hold a square number of tokens, got {tokens}")
    return side


def infer_sit_kwargs(
    state: Mapping[str, Tensor], num_heads: int | None = None, encoder_depth: int | None = None
) -> dict[str, Any]:
    """Constructor arguments of the SiT (or REPA SiT) that a state dict belongs to, by its shapes.

    Not in the shapes: `num_heads`, known for the published widths (384, 768, 1024, 1152) and where
    q and k norms give the head width; `encoder_depth`, left to the default 8 unless given;
    the clock, which follows from the projectors (`SiT(clock=...)` overrides it); whether the last
    row of the label table is the null class, as in every official file and taken for granted.

    Raises:
        ValueError: if names or shapes are not those of a SiT, or `num_heads` must be given.
    """
    if _DITDH_MARK in state:
        raise ValueError(
            "state must be the state dict of a SiT, got one with the s_embedder of a DiT-DH: "
            "infer_kwargs knows both"
        )
    _require(
        state,
        "SiT",
        (
            *("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight"),
            *("blocks.0.mlp.fc1.weight", *HEAD_KEYS),
        ),
    )
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    side = _side(state["pos_embed"].shape[1], "pos_embed")
    rows, head_rows = patch * patch * channels, state[HEAD_KEYS[0]].shape[0]
    if head_rows not in (rows, 2 * rows):
        raise ValueError(
            f"final_layer.linear.weight must have {rows} or, with sigma channels, {2 * rows} rows "
            f"for {channels} channels and patch {patch}, got {head_rows}"
        )
    q_norm = state.get("blocks.0.attn.q_norm.weight")
    if num_heads is None:
        num_heads = _HEADS_OF_WIDTH.get(width) if q_norm is None else width // q_norm.shape[0]
    if num_heads is None:
        raise ValueError(
            f"num_heads cannot be read from the weights of width {width}, known widths: "
            f"{sorted(_HEADS_OF_WIDTH)}: pass num_heads="
        )
    kwargs: dict[str, Any] = {
        "input_size": side * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": depth(state),
        "num_heads": num_heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": head_rows == 2 * rows,
        "qk_norm": q_norm is not None,
    }
    z_dims: list[int] = []
    while (last := state.get(f"projectors.{len(z_dims)}.4.weight")) is not None:
        z_dims.append(last.shape[0])
    if z_dims:
        kwargs |= {"z_dims": z_dims, "projector_dim": state["projectors.0.0.weight"].shape[0]}
        kwargs |= {} if encoder_depth is None else {"encoder_depth": encoder_depth}
    return kwargs


def infer_ditdh_kwargs(
    state: Mapping[str, Tensor],
    num_heads: int | tuple[int, int] | None = None,
    encoder_depth: int | None = None,
) -> dict[str, Any]:
    """Constructor arguments of the DiT-DH that a state dict belongs to, by its shapes.

    Encoder blocks are those of the first block's width. If encoder and head are equally wide, a
    head of two blocks, as published, is taken with a warning unless `encoder_depth` is given. Head
    counts come from the rotary tables or the q norms, else from the published widths.

    Raises:
        ValueError: names or shapes of something else, or a number that must be given.
    """
    _require(
        state,
        "DiT-DH",
        (
            *(_DITDH_MARK, "x_embedder.proj.weight", "y_embedder.embedding_table.weight"),
            *("blocks.0.attn.qkv.weight", "blocks.0.adaLN_modulation.1.weight", HEAD_KEYS[0]),
        ),
    )
    width, channels, patch, _ = state[_DITDH_MARK].shape
    head_width = state["x_embedder.proj.weight"].shape[0]
    total = depth(state)
    widths = [
        state[name].shape[1] if (name := f"blocks.{i}.attn.qkv.weight") in state else None
        for i in range(total)
    ]
    if width != head_width:
        split = next((i for i, found in enumerate(widths) if found not in (None, width)), total)
    elif encoder_depth is not None:
        split = encoder_depth
    else:
        split = total - _PUBLISHED_HEAD_DEPTH
        warn(
            f"encoder and head are both {width} wide, so the weights do not say where the head "
            f"begins: took the published {_PUBLISHED_HEAD_DEPTH} head blocks; encoder_depth= "
            "says otherwise",
            stacklevel=3,
        )
    if not 0 < split < total:
        raise ValueError(
            f"state must hold encoder and head blocks, got {split} encoder blocks of {total}"
        )
    swiglu = "blocks.0.mlp.w12.weight" in state
    inner = state.get("blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight")
    if inner is None:
        raise ValueError("state must be the state dict of a DiT-DH, got one with no blocks.0.mlp")
    heads = (num_heads, num_heads) if isinstance(num_heads, int) else num_heads or (None, None)
    return {
        "input_size": _ditdh_side(state) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": [width, head_width],
        "depth": [split, total - split],
        "num_heads": [
            heads[0] or _ditdh_heads(state, width, "enc_feat_rope", 0),
            heads[1] or _ditdh_heads(state, head_width, "dec_feat_rope", split),
        ],
        "mlp_ratio": _mlp_ratio(width, inner.shape[1], swiglu),
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "use_qknorm": "blocks.0.attn.q_norm.weight" in state,
        "use_swiglu": swiglu,
        "use_rope": "enc_feat_rope.freqs_cos" in state,
        "use_rmsnorm": "blocks.0.norm1.weight" in state,
        "wo_shift": state["blocks.0.adaLN_modulation.1.weight"].shape[0] == 4 * width,
        "use_pos_embed": "pos_embed" in state,
    }


def _ditdh_side(state: Mapping[str, Tensor]) -> int:
    if "pos_embed" in state:
        return _side(state["pos_embed"].shape[1], "pos_embed")
    if "enc_feat_rope.freqs_cos" in state:
        return _side(state["enc_feat_rope.freqs_cos"].shape[0], "enc_feat_rope.freqs_cos")
    raise ValueError(
        "input_size cannot be read from a DiT-DH without pos_embed and rotary tables: build "
        "DiTDH(input_size=...) and load_into it"
    )


def _ditdh_heads(state: Mapping[str, Tensor], width: int, rope: str, block: int) -> int:
    if (table := state.get(f"{rope}.freqs_cos")) is not None:
        return width // table.shape[1]
    if (norm := state.get(f"blocks.{block}.attn.q_norm.weight")) is not None:
        return width // norm.shape[0]
    published = _HEADS_OF_WIDTH | {2048: 16}
    if width not in published:
        raise ValueError(
            f"num_heads cannot be read from the weights of width {width}, known widths: "
            f"{sorted(published)}: pass num_heads="
        )
    return published[width]


def _mlp_ratio(width: int, inner: int, swiglu: bool) -> float:
    """The mlp_ratio that gives this inner width; 4 where it does, as it is published."""
    for ratio in (4.0, inner / width, 1.5 * inner / width, 1.5 * (inner + 0.5) / width):
        wide = int(width * ratio)
        if (int(2 / 3 * wide) if swiglu else wide) == inner:
            return ratio
    raise ValueError(f"no mlp_ratio gives an inner width of {inner} at width {width}")


def depth(state: Iterable[str]) -> int:
    """Number of blocks."""
    numbers = (name.split(".")[1] for name in state if name.startswith("blocks."))
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def rename_legacy_repa(
    state: dict[str, Tensor], encoder_depth: int | None, source: str | os.PathLike[str]
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
                f"encoder_depth must be the number of encoder blocks in {source} = {depth(state)}, "
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


def export_official_sit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with a head of velocity channels only, as SiT's samplers demand of `--ckpt`.

    Head row r = (pixel of the patch) * 2 C + channel is kept where channel < C. A head without
    sigma channels stays as it is.

    Raises:
        ValueError: if this is not the state dict of a SiT.
    """
    infer_sit_kwargs(state, num_heads=1)
    return with_velocity_head(state)
