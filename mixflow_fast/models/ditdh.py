"""DiT-DH: a diffusion transformer with a wide, shallow head (RAE, arXiv 2510.11690).

Parameter and buffer names, shapes and order are those of the official class, so official state
dicts load with `strict=True` and exports need no renaming.

Shapes by suffix: B batch, N tokens, E encoder width, D head width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixflow_fast.flow.clock import CLOCKS
from mixflow_fast.models.blocks import Block, FinalLayer
from mixflow_fast.models.embedders import (
    GaussianFourierEmbedder,
    LabelEmbedder,
    PatchEmbed,
    RotaryEmbedding,
    sincos_position_embedding,
)
from mixflow_fast.models.fused.block import resolve
from mixflow_fast.models.network import check, check_sizes, zero_
from mixflow_fast.models.transformer import Transformer, check_width


class DiTDHConfig(TypedDict):
    """Arguments of `DiTDH` with the defaults filled in, in the order in which files keep them."""

    input_size: int
    patch_size: int
    in_channels: int
    hidden_size: list[int]
    depth: list[int]
    num_heads: list[int]
    mlp_ratio: float
    class_dropout_prob: float
    num_classes: int
    use_qknorm: bool
    use_swiglu: bool
    use_rope: bool
    use_rmsnorm: bool
    wo_shift: bool
    use_pos_embed: bool
    train_embeddings: bool
    clock: str


class DiTDH(Transformer):
    """RAE's DiT-DH on latents, with the official constructor arguments.

    An encoder of narrow blocks, conditioned on time and label, makes one condition per token; a
    head of a few wide blocks turns the latent into the velocity under these conditions:

        c = silu(temb(t) + yemb(y));   s = s_embed(x) + pos;   s = encoder(s, c)
        s = s_projector(silu(temb + s));   out = final(head(x_embed(x), s), s)

    Every block applies another SiLU to its condition, as the official class does. There is no label
    dropout inside the model: the caller replaces labels by `null_class`.

    Args:
        input_size: side of the square latent (16 for 256 px, 32 for 512 px).
        patch_size, in_channels, mlp_ratio: the usual.
        hidden_size, depth, num_heads: (encoder, head) pairs; a number stands for both.
        class_dropout_prob: only decides whether the label table has a null row (> 0: it has).
        num_classes: number of real classes; the null class is `num_classes`.
        use_qknorm: norms on q and k, with the `q_norm` and `k_norm` keys.
        use_swiglu: SwiGLU of int(2/3 of the inner width), else the GELU perceptron.
        use_rope: rotary positions in every block; their tables are buffers of the state dict.
        use_rmsnorm: RMSNorm with weights, else LayerNorm without.
        wo_shift: blocks have no shifts.
        use_pos_embed: the fixed sine-cosine table is added to the encoder's tokens.
        train_embeddings: lets `pos_embed` and the Fourier frequencies `t_embedder.W` be trained.
            They are made frozen, and stay so in RAE's first release, on which MixFlow was built;
            its `main` branch unfreezes them by accident.
        clock: what t = 1 means, "data_at_1" or "noise_at_1"; None: RAE's, noise.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    float32_names = ("t_embedder.W",)

    def __init__(
        self,
        input_size: int = 16,
        patch_size: int = 1,
        in_channels: int = 768,
        hidden_size: Sequence[int] | int = (1152, 2048),
        depth: Sequence[int] | int = (28, 2),
        num_heads: Sequence[int] | int = (16, 16),
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        use_qknorm: bool = False,
        use_swiglu: bool = True,
        use_rope: bool = True,
        use_rmsnorm: bool = True,
        wo_shift: bool = False,
        use_pos_embed: bool = True,
        train_embeddings: bool = False,
        clock: str | None = None,
    ) -> None:
        super().__init__()
        self.config: DiTDHConfig = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": _pair("hidden_size", hidden_size),
            "depth": _pair("depth", depth),
            "num_heads": _pair("num_heads", num_heads),
            "mlp_ratio": mlp_ratio,
            "class_dropout_prob": class_dropout_prob,
            "num_classes": num_classes,
            "use_qknorm": use_qknorm,
            "use_swiglu": use_swiglu,
            "use_rope": use_rope,
            "use_rmsnorm": use_rmsnorm,
            "wo_shift": wo_shift,
            "use_pos_embed": use_pos_embed,
            "train_embeddings": train_embeddings,
            "clock": "noise_at_1" if clock is None else clock,
        }
        _check_config(self.config)
        self.clock = self.config["clock"]
        self.input_size, self.patch_size = input_size, patch_size
        self.in_channels = self.out_channels = in_channels
        self.num_classes = num_classes
        self.null_class = num_classes if class_dropout_prob > 0 else None
        self.cfg_channels = None
        self.encoder_depth = self.config["depth"][0]
        self.use_pos_embed = use_pos_embed
        self._build_layers()
        self.initialize_weights()
        self.set_execution()

    def _build_layers(self) -> None:
        # In the official order, which numbers the parameters in optimizer states.
        c, patch_size, in_channels = self.config, self.patch_size, self.in_channels
        width, head_width = c["hidden_size"]
        side = self.input_size // patch_size
        if self.use_pos_embed:
            self.pos_embed = nn.Parameter(
                torch.zeros(1, side * side, width), requires_grad=c["train_embeddings"]
            )
        self.x_embedder = PatchEmbed(patch_size, in_channels, head_width)
        self.s_embedder = PatchEmbed(patch_size, in_channels, width)
        self.s_projector = nn.Identity() if width == head_width else nn.Linear(width, head_width)
        self.t_embedder = GaussianFourierEmbedder(width)
        self.t_embedder.W.requires_grad_(c["train_embeddings"])
        self.y_embedder = LabelEmbedder(self.num_classes + (self.null_class is not None), width)
        self.final_layer = FinalLayer(head_width, patch_size, in_channels, c["use_rmsnorm"])
        self.enc_feat_rope: RotaryEmbedding | None = None
        self.dec_feat_rope: RotaryEmbedding | None = None
        if c["use_rope"]:
            self.enc_feat_rope = RotaryEmbedding(width // c["num_heads"][0], side)
            self.dec_feat_rope = RotaryEmbedding(head_width // c["num_heads"][1], side)
        self.blocks = nn.ModuleList(
            Block(
                c["hidden_size"][part],
                c["num_heads"][part],
                c["mlp_ratio"],
                qk_norm=c["use_qknorm"],
                swiglu=c["use_swiglu"],
                rms_norm=c["use_rmsnorm"],
                shift=not c["wo_shift"],
            )
            for part in (0, 1)
            for _ in range(c["depth"][part])
        )

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """The official initialisation, from torch's default generator; harmless on meta tensors.

        Linears keep PyTorch's own; patch convolutions are Xavier-uniform.
        """
        for embedder in (self.x_embedder, self.s_embedder):
            weight = embedder.proj.weight
            nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
            nn.init.zeros_(embedder.proj.bias)
        if self.use_pos_embed and not self.pos_embed.is_meta:
            side = self.input_size // self.patch_size
            self.pos_embed.copy_(sincos_position_embedding(self.pos_embed.shape[-1], side)[None])
        # On the meta device a table has no storage; loading a state dict gives it one.
        for rope in (self.enc_feat_rope, self.dec_feat_rope):
            if rope is not None and not rope.freqs_cos.is_meta:
                rope.reset_parameters()
        nn.init.normal_(self.t_embedder.W)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        modulated = [*self.blocks, self.final_layer]
        zero_([*(layer.adaLN_modulation[-1] for layer in modulated), self.final_layer.linear])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The velocity in the model's own clock.

        Args:
            x: (B, in_channels, input_size, input_size) floating point; cast to the weights' dtype.
            t: (B,) float32 (or float64) in [0, 1], in the model's clock.
            y: (B,) int64 labels in 0..num_classes-1, or `null_class`. The range is checked on the
                CPU only: on a GPU the check would be a synchronisation.

        Returns:
            (B, in_channels, input_size, input_size) in the weights' dtype.

        Raises:
            ValueError: for wrong shapes, dtypes or labels.
        """
        self._check_inputs(x, t, y)
        x = x.to(self.x_embedder.proj.weight.dtype)
        encoder, head = self._chains
        temb_BE = self.t_embedder(t)
        c_BE = F.silu(temb_BE + self.y_embedder(y))
        s_BNE = self.s_embedder(x)
        if self.use_pos_embed:
            s_BNE = s_BNE + self.pos_embed
        split = self.encoder_depth
        s_BNE = resolve(encoder((s_BNE, None), c_BE, _tables(self.enc_feat_rope), range(split)))
        # The time enters once more, without the class: RAE's official class does the same.
        s_BND = self.s_projector(F.silu(temb_BE.unsqueeze(1) + s_BNE))
        residual = self.x_embedder(x), None
        rope = _tables(self.dec_feat_rope)
        residual = head(residual, s_BND, rope, range(len(self.blocks) - split))
        return self._unpatchify(head.finish(self.final_layer, residual, s_BND))

    def velocity(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """As `forward`: the name that sampling uses for every network."""
        return self(x, t, y)

    def _block_groups(self) -> list[list[nn.Module]]:
        blocks = list(self.blocks)
        return [blocks[: self.encoder_depth], blocks[self.encoder_depth :]]


def _tables(rope: RotaryEmbedding | None) -> tuple[Tensor, Tensor] | None:
    return None if rope is None else (rope.freqs_cos, rope.freqs_sin)


def _pair(name: str, value: Sequence[int] | int) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    check(len(pair) == 2, f"{name} must be a number or an (encoder, head) pair, got {value!r}")
    return pair


def _check_config(config: DiTDHConfig) -> None:
    check_sizes(config, ("input_size", "patch_size", "in_channels", "num_classes"))
    size, patch = config["input_size"], config["patch_size"]
    check(size % patch == 0, f"input_size must be a multiple of patch_size={patch}, got {size}")
    for part, what in enumerate(("encoder", "head")):
        width, heads = config["hidden_size"][part], config["num_heads"][part]
        sizes = {
            f"hidden_size of the {what}": width,
            f"depth of the {what}": config["depth"][part],
            f"num_heads of the {what}": heads,
        }
        check_sizes(sizes, tuple(sizes))
        check_width(width, heads)
        check(
            not config["use_rope"] or width // heads % 4 == 0,
            f"hidden_size / num_heads of the {what} must be a multiple of 4 for use_rope (row and "
            f"column, in pairs), got {width} / {heads}",
        )
    ratio, dropout, clock = config["mlp_ratio"], config["class_dropout_prob"], config["clock"]
    positive = isinstance(ratio, (int, float)) and math.isfinite(ratio) and ratio > 0
    check(positive, f"mlp_ratio must be positive, got {ratio!r}")
    check(0 <= dropout < 1, f"class_dropout_prob must be in [0, 1), got {dropout!r}")
    check(clock in CLOCKS, f"clock must be one of {CLOCKS} or None, got {clock!r}")
