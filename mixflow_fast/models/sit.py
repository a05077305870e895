"""SiT (Ma et al., arXiv 2401.08740) and its REPA variant (Yu et al., arXiv 2410.06940).

Parameter names, shapes and order are those of the official classes, so official state dicts load
with `strict=True` and exports need no renaming.

Shapes by suffix: B batch, N tokens, D width, H heads, K head dim, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixflow_fast.flow.clock import CLOCKS
from mixflow_fast.models.blocks import Block, FinalLayer
from mixflow_fast.models.embedders import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    sincos_position_embedding,
)
from mixflow_fast.models.fused.block import resolve
from mixflow_fast.models.network import check, check_sizes, zero_
from mixflow_fast.models.transformer import Transformer, check_width

_SIZES = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads",
          "num_classes", "encoder_depth", "projector_dim")  # fmt: skip


class SiTConfig(TypedDict):
    """Arguments of `SiT` with the defaults filled in, in the order in which files keep them."""

    input_size: int
    patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: float
    class_dropout_prob: float
    num_classes: int
    learn_sigma: bool
    path_type: str
    decoder_hidden_size: int
    encoder_depth: int
    use_cfg: bool
    z_dims: list[int] | None
    projector_dim: int
    qk_norm: bool
    fused_attn: bool
    clock: str


def _projector(hidden_size: int, projector_dim: int, z_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(hidden_size, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, z_dim),
    )


class SiT(Transformer):
    """Scalable interpolant transformer on latents, with the official constructor arguments.

    With `z_dims` it is REPA's variant: no sigma channels, one projector per entry of `z_dims` on
    the tokens after block number `encoder_depth`, REPA's clock, and `forward` returns a pair.

    There is no label dropout inside the model, in train mode neither: the caller replaces labels by
    `null_class` from its own random stream. Train and eval mode compute the same.

    Args:
        input_size: side of the square latent (32 for 256 px, 64 for 512 px).
        patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio: the usual.
        class_dropout_prob: only decides whether the label table has a null row (> 0: it has).
        num_classes: number of real classes; the null class is `num_classes`.
        learn_sigma: the head has 2 * in_channels channels of which the first half is the velocity
            and the rest is discarded. Without meaning for REPA's variant, where it is always False.
        path_type, use_cfg, fused_attn: taken because the official REPA class takes them; without
            effect here (attention always goes through `scaled_dot_product_attention`).
        decoder_hidden_size: must equal `hidden_size` if given (the official class needs it too).
        encoder_depth: 1-based number of the block whose output is projected; needs `z_dims`.
        z_dims: widths of the alignment targets, e.g. [768] for DINOv2-B.
        projector_dim: inner width of the projectors.
        qk_norm: LayerNorm on q and k, with the `q_norm` and `k_norm` keys.
        clock: what t = 1 means, "data_at_1" or "noise_at_1". None: REPA's clock (noise) with
            `z_dims`, SiT's (data) without. A state dict does not say which clock it was trained in.

    Attributes:
        clock: as above. The velocity is the derivative by the time of this clock.
        null_class: int, or None without a null row.
        config: the constructor's arguments as a JSON-able dict; `SiT(**model.config)` rebuilds it.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        path_type: str = "linear",
        decoder_hidden_size: int | None = None,
        encoder_depth: int = 8,
        use_cfg: bool = False,
        z_dims: Sequence[int] | None = None,
        projector_dim: int = 2048,
        qk_norm: bool = False,
        fused_attn: bool = True,
        clock: str | None = None,
    ) -> None:
        super().__init__()
        if clock is None:
            clock = "data_at_1" if z_dims is None else "noise_at_1"
        self.config: SiTConfig = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "class_dropout_prob": class_dropout_prob,
            "num_classes": num_classes,
            "learn_sigma": learn_sigma and z_dims is None,
            "path_type": path_type,
            "decoder_hidden_size": (
                hidden_size if decoder_hidden_size is None else decoder_hidden_size
            ),
            "encoder_depth": encoder_depth,
            "use_cfg": use_cfg,
            "z_dims": None if z_dims is None else list(z_dims),
            "projector_dim": projector_dim,
            "qk_norm": qk_norm,
            "fused_attn": fused_attn,
            "clock": clock,
        }
        _check_config(self.config)
        self.clock = clock
        self._set_sizes()
        self._build_layers()
        self.initialize_weights()
        self.set_execution()

    def _set_sizes(self) -> None:
        c = self.config
        self.input_size, self.patch_size = c["input_size"], c["patch_size"]
        self.in_channels, self.num_classes = c["in_channels"], c["num_classes"]
        self.null_class = self.num_classes if c["class_dropout_prob"] > 0 else None
        self.learn_sigma = c["learn_sigma"]
        # Guidance of the official samplers: SiT's covers the first three channels, REPA's all.
        self.cfg_channels = min(3, self.in_channels) if c["z_dims"] is None else None
        self.out_channels = self.in_channels * (2 if self.learn_sigma else 1)
        self.encoder_depth = c["encoder_depth"]

    def _build_layers(self) -> None:
        # In the official order, which numbers the parameters in optimizer states.
        c, width = self.config, self.config["hidden_size"]
        self.x_embedder = PatchEmbed(self.patch_size, self.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(self.num_classes + (self.null_class is not None), width)
        side = self.input_size // self.patch_size
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side, width), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(width, c["num_heads"], c["mlp_ratio"], c["qk_norm"]) for _ in range(c["depth"])
        )
        self.projectors: nn.ModuleList | None = None
        if c["z_dims"] is not None:
            self.projectors = nn.ModuleList(
                _projector(width, c["projector_dim"], z_dim) for z_dim in c["z_dims"]
            )
        self.final_layer = FinalLayer(width, self.patch_size, self.out_channels)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """The official initialisation, from torch's default generator; harmless on meta tensors."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        if not self.pos_embed.is_meta:
            side = self.input_size // self.patch_size
            self.pos_embed.copy_(sincos_position_embedding(self.pos_embed.shape[-1], side)[None])
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.pos_embed.shape[-1], -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        modulated = [*self.blocks, self.final_layer]
        zero_([*(layer.adaLN_modulation[-1] for layer in modulated), self.final_layer.linear])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        """The velocity in the model's own clock.

        Args:
            x: (B, in_channels, input_size, input_size) floating point; cast to the weights' dtype.
            t: (B,) float32 (or float64) in [0, 1], in the model's clock. The sinusoid is computed
                in that precision even where the weights are bfloat16.
            y: (B,) int64 labels in 0..num_classes-1, or `null_class`. The range is checked on the
                CPU only: on a GPU the check would be a synchronisation.

        Returns:
            (B, in_channels, input_size, input_size) in the weights' dtype; for REPA's variant the
            pair (velocity, [z of (B, N, z_dim), ...]).

        Raises:
            ValueError: for wrong shapes, dtypes or labels.
        """
        velocity, zs = self._run(x, t, y, project=True)
        return velocity if self.projectors is None else (velocity, zs)

    def velocity(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The velocity alone, for sampling: as `forward`, but REPA's projectors are not run."""
        return self._run(x, t, y, project=False)[0]

    def projections(self, x: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
        """REPA's projections alone: runs the first `encoder_depth` blocks.

        Args:
            x, t, y: as `forward`.

        Returns:
            [z of (B, N, z_dim), ...] as the second value of `forward`.

        Raises:
            ValueError: for a model without projectors.
        """
        check(self.projectors is not None, "projections needs a model with z_dims (REPA's SiT)")
        h_BND, c_BD = self._embed(x, t, y)
        (chain,) = self._chains
        h_BND = resolve(chain((h_BND, None), c_BD, None, range(self.encoder_depth)))
        return [projector(h_BND) for projector in self.projectors]

    def _block_groups(self) -> list[nn.ModuleList]:
        return [self.blocks]

    def _embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_inputs(x, t, y)
        h_BND = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed
        return h_BND, self.t_embedder(t) + self.y_embedder(y)

    def _run(
        self, x: Tensor, t: Tensor, y: Tensor, *, project: bool
    ) -> tuple[Tensor, list[Tensor]]:
        h_BND, c_BD = self._embed(x, t, y)
        (chain,) = self._chains
        residual, zs, done = (h_BND, None), [], 0
        if project and self.projectors is not None:
            # Projectors need the sum itself, so the residual stream is resolved in between.
            done = self.encoder_depth
            h_BND = resolve(chain(residual, c_BD, None, range(done)))
            zs = [projector(h_BND) for projector in self.projectors]
            residual = h_BND, None
        residual = chain(residual, c_BD, None, range(done, len(self.blocks)))
        return self._unpatchify(chain.finish(self.final_layer, residual, c_BD)), zs


def _check_config(config: SiTConfig) -> None:
    check_sizes(config, _SIZES)
    size, patch, width = config["input_size"], config["patch_size"], config["hidden_size"]
    ratio, dropout, z_dims = config["mlp_ratio"], config["class_dropout_prob"], config["z_dims"]
    decoder_width, clock = config["decoder_hidden_size"], config["clock"]
    depth, heads = config["depth"], config["num_heads"]
    check(size % patch == 0, f"input_size must be a multiple of patch_size={patch}, got {size}")
    check_width(width, heads)
    check(int(width * ratio) >= 1, f"mlp_ratio must be positive, got {ratio!r}")
    check(0 <= dropout < 1, f"class_dropout_prob must be in [0, 1), got {dropout!r}")
    check(
        decoder_width == width,
        f"decoder_hidden_size must equal hidden_size={width}, got {decoder_width}: leave it out",
    )
    check(clock in CLOCKS, f"clock must be one of {CLOCKS} or None, got {clock!r}")
    if z_dims is None:
        return
    check(
        len(z_dims) > 0 and all(isinstance(z, int) and z >= 1 for z in z_dims),
        f"z_dims must be a non-empty list of positive ints, got {z_dims}: for REPA weights without "
        'projectors use learn_sigma=False and clock="noise_at_1"',
    )
    check(
        config["encoder_depth"] <= depth,
        f"encoder_depth must be in 1..depth = 1..{depth}, got {config['encoder_depth']}",
    )


def repa_alignment_loss(zs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """REPA's alignment: minus the cosine of projected and teacher tokens, averaged over everything.

    L = - mean over encoders, samples and tokens of <z, target> / (|z| |target|)

    Args:
        zs: one (B, N, z_dim) tensor per encoder, as `SiT.forward` returns them.
        targets: the teachers' tokens, the same shapes.

    Returns:
        float32 scalar in [-1, 1], computed in float32.

    Raises:
        ValueError: if the numbers of tensors or their shapes differ.
    """
    check(
        len(zs) == len(targets) > 0,
        f"zs and targets must hold one tensor per encoder, got {len(zs)} and {len(targets)}",
    )
    total = torch.zeros((), dtype=torch.float32, device=zs[0].device)
    for index, (z, target) in enumerate(zip(zs, targets, strict=True)):
        check(
            z.shape == target.shape,
            f"targets[{index}] must be (B, N, z_dim) = {tuple(z.shape)} like zs[{index}], got "
            f"{tuple(target.shape)}: teacher and model must cut the image into the same tokens",
        )
        # In bf16 a mean over thousands of tokens would lose most of its digits.
        cosine = F.normalize(z.float(), dim=-1) * F.normalize(target.float(), dim=-1)
        total = total - cosine.sum(dim=-1).mean()
    return total / len(zs)
