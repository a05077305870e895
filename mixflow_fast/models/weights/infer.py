"""How a network was built, read off the shapes of its state dict.

Shapes alone are looked at, so that a state dict on the meta device is as good as a real one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from warnings import warn

from torch import Tensor

from mixflow_fast.messages import shorten
from mixflow_fast.models.network import ModelConfig
from mixflow_fast.models.registry import DITDH_HEAD, SIT_SIZES
from mixflow_fast.models.weights.naming import (
    DITDH_MARK,
    HEAD_KEYS,
    SONGUNET_MARK,
    ClassName,
    depth,
)

_SIT_NAMES = (
    "pos_embed",
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "blocks.0.mlp.fc1.weight",
    HEAD_KEYS[0],
    HEAD_KEYS[1],
)
_DITDH_NAMES = (
    DITDH_MARK,
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "blocks.0.attn.qkv.weight",
    "blocks.0.adaLN_modulation.1.weight",
    HEAD_KEYS[0],
)
_HEADS_OF_WIDTH = {sizes["hidden_size"]: sizes["num_heads"] for sizes in SIT_SIZES.values()}


def infer_kwargs(
    state: Mapping[str, Tensor],
    num_heads: int | tuple[int, int] | None = None,
    encoder_depth: int | None = None,
) -> tuple[ClassName, ModelConfig]:
    """(class, constructor arguments) of the network that a state dict belongs to.

    Args:
        state: name -> tensor; only shapes are looked at.
        num_heads: where neither published widths nor the shapes tell; a DiTDH has a pair.
        encoder_depth: of REPA's SiT the block that is projected, of a DiTDH the blocks before the
            head; where the shapes cannot tell.

    Raises:
        ValueError: names or shapes of neither, or a number that must be given.
    """
    if SONGUNET_MARK in state:
        return "SongUNet", infer_songunet_kwargs(state)
    if DITDH_MARK in state:
        return "DiTDH", infer_ditdh_kwargs(state, num_heads, encoder_depth)
    if isinstance(num_heads, tuple):
        raise ValueError(f"num_heads of a SiT must be an int, got {num_heads}")
    return "SiT", infer_sit_kwargs(state, num_heads, encoder_depth)


def infer_sit_kwargs(
    state: Mapping[str, Tensor], num_heads: int | None = None, encoder_depth: int | None = None
) -> ModelConfig:
    """Constructor arguments of the SiT (or REPA SiT) that a state dict belongs to, by its shapes.

    Not in the shapes: `num_heads`, known for the published widths (384, 768, 1024, 1152) and where
    q and k norms give the head width; `encoder_depth`, left to the default 8 unless given;
    the clock, which follows from the projectors (`SiT(clock=...)` overrides it); whether the last
    row of the label table is the null class, as in every official file and taken for granted.

    Raises:
        ValueError: if names or shapes are not those of a SiT, or `num_heads` must be given.
    """
    if DITDH_MARK in state:
        raise ValueError(
            "state must be the state dict of a SiT, got one with the s_embedder of a DiT-DH: "
            "infer_kwargs knows both"
        )
    _require(state, "SiT", _SIT_NAMES)
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    learn_sigma = _has_sigma(state, channels, patch)
    kwargs: ModelConfig = {
        "input_size": _side(state["pos_embed"].shape[1], "pos_embed") * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": depth(state),
        "num_heads": _sit_heads(state, width) if num_heads is None else num_heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": learn_sigma,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
    }
    # The last of the three linear layers of each projector, which has a row for each channel.
    z_dims: list[int] = []
    while (last := state.get(f"projectors.{len(z_dims)}.4.weight")) is not None:
        z_dims.append(last.shape[0])
    if z_dims:
        kwargs |= {"z_dims": z_dims, "projector_dim": state["projectors.0.0.weight"].shape[0]}
        kwargs |= {} if encoder_depth is None else {"encoder_depth": encoder_depth}
    return kwargs


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


def _has_sigma(state: Mapping[str, Tensor], channels: int, patch: int) -> bool:
    rows = patch * patch * channels
    head_rows = state[HEAD_KEYS[0]].shape[0]
    if head_rows not in (rows, 2 * rows):
        raise ValueError(
            f"final_layer.linear.weight must have {rows} or, with sigma channels, {2 * rows} rows "
            f"for {channels} channels and patch {patch}, got {head_rows}"
        )
    return head_rows == 2 * rows


def _sit_heads(state: Mapping[str, Tensor], width: int) -> int:
    q_norm = state.get("blocks.0.attn.q_norm.weight")
    return _published_heads(width, _HEADS_OF_WIDTH) if q_norm is None else width // q_norm.shape[0]


def _published_heads(width: int, published: Mapping[int, int]) -> int:
    if width not in published:
        raise ValueError(
            f"num_heads cannot be read from the weights of width {width}, known widths: "
            f"{sorted(published)}: pass num_heads= (`mixflow-fast export --to ema --num-heads N` "
            "writes a file that says it)"
        )
    return published[width]


def infer_ditdh_kwargs(
    state: Mapping[str, Tensor],
    num_heads: int | tuple[int, int] | None = None,
    encoder_depth: int | None = None,
) -> ModelConfig:
    """Constructor arguments of the DiT-DH that a state dict belongs to, by its shapes.

    Encoder blocks are those of the first block's width. If encoder and head are equally wide, a
    head of two blocks, as published, is taken with a warning unless `encoder_depth` is given. Head
    counts come from the rotary tables or the q norms, else from the published widths.

    Raises:
        ValueError: names or shapes of something else, or a number that must be given.
    """
    _require(state, "DiT-DH", _DITDH_NAMES)
    width, channels, patch, _ = state[DITDH_MARK].shape
    head_width = state["x_embedder.proj.weight"].shape[0]
    split, total = _encoder_blocks(state, width, head_width, encoder_depth), depth(state)
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
        # Four vectors without shifts, six with them.
        "wo_shift": state["blocks.0.adaLN_modulation.1.weight"].shape[0] == 4 * width,
        "use_pos_embed": "pos_embed" in state,
    }


def _encoder_blocks(
    state: Mapping[str, Tensor], width: int, head_width: int, encoder_depth: int | None
) -> int:
    """Number of blocks before the head, whose blocks are the first of another width."""
    total = depth(state)
    if width != head_width:
        for i in range(total):
            # A block that lacks its weights belongs to no side; comparing names reports it later.
            qkv = state.get(f"blocks.{i}.attn.qkv.weight")
            if qkv is not None and qkv.shape[1] != width:
                return i
        return total
    if encoder_depth is not None:
        return encoder_depth
    head_depth = DITDH_HEAD["depth"]
    warn(
        f"encoder and head are both {width} wide, so the weights do not say where the head "
        f"begins: took the published {head_depth} head blocks; encoder_depth= says otherwise",
        stacklevel=4,
    )
    return total - head_depth


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
    # Rotary tables and q norms are as wide as one head.
    if (table := state.get(f"{rope}.freqs_cos")) is not None:
        return width // table.shape[1]
    if (norm := state.get(f"blocks.{block}.attn.q_norm.weight")) is not None:
        return width // norm.shape[0]
    head = {DITDH_HEAD["hidden_size"]: DITDH_HEAD["num_heads"]}
    return _published_heads(width, _HEADS_OF_WIDTH | head)


def _mlp_ratio(width: int, inner: int, swiglu: bool) -> float:
    """The mlp_ratio that gives this inner width; 4 where it does, as it is published."""
    # Both int() may have cut a fraction off, so the plain quotient need not lead back.
    for ratio in (4.0, inner / width, 1.5 * inner / width, 1.5 * (inner + 0.5) / width):
        wide = int(width * ratio)
        if (int(2 / 3 * wide) if swiglu else wide) == inner:
            return ratio
    raise ValueError(f"no mlp_ratio gives an inner width of {inner} at width {width}")


def infer_songunet_kwargs(state: Mapping[str, Tensor]) -> ModelConfig:
    """Constructor arguments of the SongUNet that a state dict belongs to, by its names and shapes.

    Not in them: the probability of dropout, which is left to the class and drops nothing in
    evaluation mode.

    Raises:
        ValueError: names or shapes of something else.
    """
    _require(state, "SongUNet", (SONGUNET_MARK, "map_layer1.weight"))
    blocks = [name.split(".")[1] for name in state if name.startswith("enc.")]
    found = {match for name in blocks if (match := re.match(r"(\d+)x\1_", name))}
    sides = sorted({int(match[1]) for match in found}, reverse=True)
    # The highest number and not a count: a missing block is for the comparison to report.
    numbers = [int(match[1]) for name in blocks if (match := re.search(r"_block(\d+)$", name))]
    ends = [f"enc.{side}x{side}_block0.conv0.weight" for side in sides]
    first = f"enc.{sides[0]}x{sides[0]}_conv.weight" if sides else "enc.*_conv.weight"
    _require(state, "SongUNet", (first, *ends))
    (width, channels), (emb, features) = state[first].shape[:2], state[SONGUNET_MARK].shape
    return {
        "img_resolution": sides[0],
        "in_channels": channels,
        "out_channels": channels,
        "model_channels": width,
        "channel_mult": [state[name].shape[0] // width for name in ends],
        "channel_mult_emb": emb // width,
        "num_blocks": 1 + max(numbers),
        "attn_resolutions": [s for s in sides if f"enc.{s}x{s}_block0.qkv.weight" in state],
        "channel_mult_noise": features // width,
        "activate_w_mode": "map_w.1.weight" in state,
    }
