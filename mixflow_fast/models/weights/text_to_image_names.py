"""Which text-to-image network a state dict is of, by its names and shapes alone.

    SD3 medium      no norms of q and k, no second attention
    SD3.5 medium    a second attention (attn2) in the first layers, norms of q and k (ln_q)
    SD3.5 large     norms of q and k alone, width 2432
    FLUX.1          single blocks behind double ones; dev has an embedder of guidance, schnell none
    Z-Image         refiners before its layers

In diffusers' names and, of SD3 and FLUX.1, in those of the original single files. Adapters (LoRA)
are told by what they are added to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

Shapes = Mapping[str, tuple[int, ...]]
Naming = Literal["diffusers", "original"]
# Names that all networks of a class have; the first also tells the prefix before all of them.
_SD3 = (
    "pos_embed.proj.weight",
    "context_embedder.weight",
    "transformer_blocks.0.attn.add_k_proj.weight",
    "transformer_blocks.0.norm1_context.linear.weight",
    "time_text_embed.text_embedder.linear_1.weight",
    "proj_out.weight",
)
_SD3_ORIGINAL = (
    "joint_blocks.0.x_block.attn.qkv.weight",
    "x_embedder.proj.weight",
    "context_embedder.weight",
    "y_embedder.mlp.0.weight",
    "final_layer.linear.weight",
    "pos_embed",
)
_FLUX = (
    "single_transformer_blocks.0.attn.to_q.weight",
    "x_embedder.weight",
    "context_embedder.weight",
    "transformer_blocks.0.norm1.linear.weight",
    "time_text_embed.text_embedder.linear_1.weight",
    "proj_out.weight",
)
_FLUX_ORIGINAL = (
    "double_blocks.0.img_attn.qkv.weight",
    "img_in.weight",
    "txt_in.weight",
    "vector_in.in_layer.weight",
    "final_layer.linear.weight",
)
_Z_IMAGE = (
    "all_x_embedder.2-1.weight",
    "layers.0.attention.to_q.weight",
    "layers.0.attention.norm_q.weight",
    "noise_refiner.0.attention.to_q.weight",
    "cap_embedder.1.weight",
)
SD3_CLASS, FLUX_CLASS = "SD3Transformer2DModel", "FluxTransformer2DModel"
Z_IMAGE_CLASS = "ZImageTransformer2DModel"
_HEAD_WIDTH = 64  # of SD3, where no norm of q tells it
# (width, layers) of the released networks.
_MEDIUM, _LARGE = (1536, 24), (2432, 38)
_FLUX_1, _Z_IMAGE_TURBO = (3072, 19), (3840, 30)
_TABLE = ("pos_embed.pos_embed", "pos_embed")


@dataclass(frozen=True, kw_only=True)
class TextToImageNetwork:
    """A network that the shapes tell.

    Attributes:
        name: such as "SD3.5 medium".
        class_name: diffusers' class.
        config: the arguments of the class that shapes tell.
        naming: whose names the tensors have.
        prefix: what stands before them, such as "model.diffusion_model."
        shapes: of the network's tensors, without the prefix.
        others: names of what else is in the file: text encoders, an autoencoder.
    """

    name: str
    class_name: str
    config: dict[str, int | str | bool | tuple[int, ...] | None]
    naming: Naming
    prefix: str
    shapes: Shapes
    others: tuple[str, ...]

    @property
    def table(self) -> int:
        """Numbers in the table of positions, a buffer and no parameter; 0 without one."""
        if self.class_name != SD3_CLASS:
            return 0
        return next((math.prod(self.shapes[n]) for n in _TABLE if n in self.shapes), 0)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(map(math.prod, self.shapes.values())) - self.table


def text_to_image_network(shapes: Shapes) -> TextToImageNetwork | None:
    """The text-to-image network that names and shapes are of; None for any other."""
    for marks, describe in (
        (_SD3, _sd3),
        (_SD3_ORIGINAL, _sd3_original),
        (_FLUX, _flux),
        (_FLUX_ORIGINAL, _flux_original),
        (_Z_IMAGE, _z_image),
    ):
        for prefix in [n.removesuffix(marks[0]) for n in shapes if n.endswith(marks[0])]:
            own = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
            if (not prefix or prefix.endswith(".")) and set(marks) <= own.keys():
                return describe(own, prefix, tuple(n for n in shapes if not n.startswith(prefix)))
    return None


def _count(names: Collection[str], block: str) -> int:
    """Number of blocks `block.N.`: the highest and not a count, so that a gap is found later."""
    numbers = (n.split(".")[1] for n in names if n.startswith(f"{block}."))
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def _sd3(own: Shapes, prefix: str, others: tuple[str, ...]) -> TextToImageNetwork:
    norm = own.get("transformer_blocks.0.attn.norm_q.weight")
    return _of_sd3(
        own,
        prefix,
        others,
        naming="diffusers",
        patches=own["pos_embed.proj.weight"],
        layers=_count(own, "transformer_blocks"),
        dual=_numbers(own, r"transformer_blocks\.(\d+)\.attn2\.to_q\.weight"),
        head_width=None if norm is None else norm[0],
        text=own["context_embedder.weight"],
        pooled=own["time_text_embed.text_embedder.linear_1.weight"][1],
        table=own.get("pos_embed.pos_embed"),
        head=own["proj_out.weight"][0],
    )


def _sd3_original(own: Shapes, prefix: str, others: tuple[str, ...]) -> TextToImageNetwork:
    norm = own.get("joint_blocks.0.x_block.attn.ln_q.weight")
    return _of_sd3(
        own,
        prefix,
        others,
        naming="original",
        patches=own["x_embedder.proj.weight"],
        layers=_count(own, "joint_blocks"),
        dual=_numbers(own, r"joint_blocks\.(\d+)\.x_block\.attn2\.qkv\.weight"),
        head_width=None if norm is None else norm[0],
        text=own["context_embedder.weight"],
        pooled=own["y_embedder.mlp.0.weight"][1],
        table=own["pos_embed"],
        head=own["final_layer.linear.weight"][0],
    )


def _numbers(names: Collection[str], pattern: str) -> tuple[int, ...]:
    found = (re.fullmatch(pattern, name) for name in names)
    return tuple(sorted(int(match[1]) for match in found if match))


def _of_sd3(
    own: Shapes,
    prefix: str,
    others: tuple[str, ...],
    *,
    naming: Naming,
    patches: tuple[int, ...],
    layers: int,
    dual: tuple[int, ...],
    head_width: int | None,
    text: tuple[int, ...],
    pooled: int,
    table: tuple[int, ...] | None,
    head: int,
) -> TextToImageNetwork:
    width, channels, patch, _ = patches
    kind, released = "SD3 medium", _MEDIUM
    if dual:
        kind = "SD3.5 medium"
    elif head_width is not None:
        kind, released = "SD3.5 large", _LARGE
    per_head = head_width or _HEAD_WIDTH
    return TextToImageNetwork(
        name=_named(kind, (width, layers), released),
        class_name=SD3_CLASS,
        config={
            "patch_size": patch,
            "in_channels": channels,
            "out_channels": head // patch**2,
            "num_layers": layers,
            "attention_head_dim": per_head,
            "num_attention_heads": width // per_head,
            "joint_attention_dim": text[1],
            "caption_projection_dim": text[0],
            "pooled_projection_dim": pooled,
            "pos_embed_max_size": 0 if table is None else math.isqrt(table[1]),
            "dual_attention_layers": dual,
            "qk_norm": None if head_width is None else "rms_norm",
        },
        naming=naming,
        prefix=prefix,
        shapes=own,
        others=others,
    )


def _flux(own: Shapes, prefix: str, others: tuple[str, ...]) -> TextToImageNetwork:
    width, channels = own["x_embedder.weight"]
    return _of_flux(
        own,
        prefix,
        others,
        naming="diffusers",
        width=width,
        channels=channels,
        layers=(_count(own, "transformer_blocks"), _count(own, "single_transformer_blocks")),
        head_width=own["single_transformer_blocks.0.attn.norm_q.weight"][0],
        text=own["context_embedder.weight"][1],
        pooled=own["time_text_embed.text_embedder.linear_1.weight"][1],
        guided="time_text_embed.guidance_embedder.linear_1.weight" in own,
    )


def _flux_original(own: Shapes, prefix: str, others: tuple[str, ...]) -> TextToImageNetwork:
    width, channels = own["img_in.weight"]
    norm = own.get("double_blocks.0.img_attn.norm.query_norm.scale", (128,))
    return _of_flux(
        own,
        prefix,
        others,
        naming="original",
        width=width,
        channels=channels,
        layers=(_count(own, "double_blocks"), _count(own, "single_blocks")),
        head_width=norm[0],
        text=own["txt_in.weight"][1],
        pooled=own["vector_in.in_layer.weight"][1],
        guided="guidance_in.in_layer.weight" in own,
    )


def _of_flux(
    own: Shapes,
    prefix: str,
    others: tuple[str, ...],
    *,
    naming: Naming,
    width: int,
    channels: int,
    layers: tuple[int, int],
    head_width: int,
    text: int,
    pooled: int,
    guided: bool,
) -> TextToImageNetwork:
    kind = "FLUX.1 dev" if guided else "FLUX.1 schnell"
    return TextToImageNetwork(
        name=_named(kind, (width, layers[0]), _FLUX_1),
        class_name=FLUX_CLASS,
        config={
            "in_channels": channels,
            "num_layers": layers[0],
            "num_single_layers": layers[1],
            "attention_head_dim": head_width,
            "num_attention_heads": width // head_width,
            "joint_attention_dim": text,
            "pooled_projection_dim": pooled,
            "guidance_embeds": guided,
        },
        naming=naming,
        prefix=prefix,
        shapes=own,
        others=others,
    )


def _z_image(own: Shapes, prefix: str, others: tuple[str, ...]) -> TextToImageNetwork:
    width, features = own["all_x_embedder.2-1.weight"]
    head_width = own["layers.0.attention.norm_q.weight"][0]
    layers = _count(own, "layers")
    return TextToImageNetwork(
        name=_named("Z-Image", (width, layers), _Z_IMAGE_TURBO),
        class_name=Z_IMAGE_CLASS,
        config={
            "in_channels": features // 4,
            "dim": width,
            "n_layers": layers,
            "n_refiner_layers": _count(own, "noise_refiner"),
            "n_heads": width // head_width,
            "n_kv_heads": own["layers.0.attention.to_k.weight"][0] // head_width,
            "cap_feat_dim": own["cap_embedder.1.weight"][1],
        },
        naming="diffusers",
        prefix=prefix,
        shapes=own,
        others=others,
    )


def _named(kind: str, size: tuple[int, int], released: tuple[int, int]) -> str:
    if size == released:
        return kind
    return f"a network of {kind}'s kind, width {size[0]}, {size[1]} layers"


# Ends of names of the two factors: peft's, diffusers' older ones, sd-scripts'.
_DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight")
_UP = (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight")
_BEFORE = ("base_model.model.", "diffusion_model.", "transformer.", "model.")
_SD_SCRIPTS = {"lora_unet_joint_blocks_": "SD3 or SD3.5", "lora_unet_double_blocks_": "FLUX.1"}
_BLOCK = re.compile(r"(single_transformer_blocks|transformer_blocks|layers)\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class LoraWeights:
    """An adapter that names and shapes tell.

    Attributes:
        fits: the networks that it can be added to, in words.
        ranks: of its products, without repetition.
        modules: how many linear maps it changes.
        targets: their names inside a block.
        parameters: numbers in all factors.
        prefix: what stands before diffusers' names.
        alone: modules with one factor only, or factors that do not fit each other.
        scaled: modules with an alpha of their own, which programs read in different ways.
    """

    fits: str
    ranks: tuple[int, ...]
    modules: int
    targets: tuple[str, ...]
    parameters: int
    prefix: str
    alone: tuple[str, ...]
    scaled: int


def lora_weights(shapes: Shapes) -> LoraWeights | None:
    """The adapter that names and shapes are of; None where they are of none."""
    downs, ups = _factors(shapes, _DOWN), _factors(shapes, _UP)
    if not downs and not ups:
        return None
    alone = sorted(downs.keys() ^ ups.keys())
    alone += [n for n in downs.keys() & ups.keys() if downs[n][0] != ups[n][1]]
    plain = {_without_prefix(name): name for name in downs}
    prefixes = {full.removesuffix(name) for name, full in plain.items()}
    inside = [_BLOCK.fullmatch(name) for name in plain]
    targets = {match[3] for match in inside if match}
    return LoraWeights(
        fits=_fits({name: downs[full] for name, full in plain.items()}),
        ranks=tuple(sorted({shape[0] for shape in downs.values()})),
        modules=len(downs),
        targets=tuple(sorted(targets or plain)),
        parameters=sum(math.prod(s) for part in (downs, ups) for s in part.values()),
        prefix=", ".join(sorted(prefixes)),
        alone=tuple(alone),
        scaled=sum(name.endswith(".alpha") for name in shapes),
    )


def _factors(shapes: Shapes, ends: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    return {
        name.removesuffix(end): shape
        for name, shape in shapes.items()
        for end in ends
        if name.endswith(end) and len(shape) == 2
    }


def _without_prefix(name: str) -> str:
    for before in _BEFORE:
        name = name.removeprefix(before)
    return name


def _fits(downs: Shapes) -> str:
    """What an adapter's linear maps are part of, by their names and widths."""
    for mark, what in _SD_SCRIPTS.items():
        if any(name.startswith(mark) for name in downs):
            return f"{what} in sd-scripts' names"
    blocks = [(match, shape) for n, shape in downs.items() if (match := _BLOCK.fullmatch(n))]
    if not blocks:
        return "no network that this engine knows"
    # Maps from the image's features; those of an MLP's inner layer are wider.
    widths = [shape[1] for match, shape in blocks if match[3].endswith(("to_q", "to_k", "to_v"))]
    width = min(widths or [shape[1] for _, shape in blocks])
    layers = 1 + max(int(match[2]) for match, _ in blocks)
    kinds = {match[1] for match, _ in blocks}
    second = any(match[3].startswith("attn2.") for match, _ in blocks)
    if kinds == {"layers"}:
        return "Z-Image" if width == _Z_IMAGE_TURBO[0] else f"a Z-Image of width {width}"
    if "single_transformer_blocks" in kinds:
        return "FLUX.1" if width == _FLUX_1[0] else f"a FLUX of width {width}"
    if second:
        return "SD3.5 medium" if width == _MEDIUM[0] else f"an SD3.5 with attn2 of width {width}"
    if width == _MEDIUM[0] and layers <= _MEDIUM[1]:
        return "SD3 medium or SD3.5 medium, whose attn2 it leaves as they are"
    if width == _LARGE[0] and layers <= _LARGE[1]:
        return "SD3.5 large"
    if width == _FLUX_1[0] and layers <= _FLUX_1[1]:
        return "FLUX.1, its double blocks"
    return f"a network with transformer_blocks of width {width}, at least {layers} of them"
