"""SiT (Ma et al., arXiv 2401.08740) and its REPA variant (Yu et al., arXiv 2410.06940).

Parameter names, shapes and order are those of the official classes, so official state dicts load
with `strict=True` and exports need no renaming.

Shapes by suffix: B batch, N tokens, D width, H heads, K head dim, C channels.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLOCKS = ("data_at_1", "noise_at_1")
TIME_FEATURES = 256


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def timestep_sinusoid(t: Tensor, features: int = TIME_FEATURES) -> Tensor:
    """[cos(t f), sin(t f)] with f_j = 10000^(-j / (features / 2)), cosines first.

    Args:
        t: (B,) times in [0, 1], unscaled.
        features: even number of features.

    Returns:
        (B, features) float32, or float64 for float64 times.
    """
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    half = features // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=dtype, device=t.device) * (-math.log(10000.0) / half)
    )
    angles = t.to(dtype)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_position_embedding(width: int, side: int) -> Tensor:
    """The fixed 2-D sine-cosine table: the first half of the width encodes the column.

    Each half of size d is [sin(p w_k), cos(p w_k)] with w_k = 10000^(-k / (d / 2)), p = 0..side-1,
    computed in float64.

    Returns:
        (side * side, width) float32 on the CPU, rows first.
    """
    half = width // 2
    position = torch.arange(side, dtype=torch.float64, device="cpu")
    k = torch.arange(half // 2, dtype=torch.float64, device="cpu")
    angles = position[:, None] * 10000.0 ** (-k / (half / 2))
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    by_column = axis[None, :, :].expand(side, side, half)
    by_row = axis[:, None, :].expand(side, side, half)
    return torch.cat([by_column, by_row], dim=-1).reshape(side * side, width).float()


def _modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    return x_BND * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)


class PatchEmbed(nn.Module):
    """(B, C, side, side) -> (B, N, D), tokens row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoid in float32, then a two-layer perceptron in the dtype of its weights."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FEATURES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_sinusoid(t).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """A table of class embeddings; its last row is the null class where there is one."""

    def __init__(self, rows: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention with a fused, biased qkv and optional LayerNorm on q and k."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        qkv_BN3HK = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q_BHNK, k_BHNK, v_BHNK = qkv_BN3HK.permute(2, 0, 3, 1, 4).unbind(0)
        out_BHNK = F.scaled_dot_product_attention(self.q_norm(q_BHNK), self.k_norm(k_BHNK), v_BHNK)
        return self.proj(out_BHNK.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """adaLN-Zero transformer block."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(
            c_BD
        ).chunk(6, dim=1)
        attended = self.attn(_modulate(self.norm1(x_BND), shift_msa, scale_msa))
        x_BND = x_BND + gate_msa.unsqueeze(1) * attended
        fed = self.mlp(_modulate(self.norm2(x_BND), shift_mlp, scale_mlp))
        return x_BND + gate_mlp.unsqueeze(1) * fed


class FinalLayer(nn.Module):
    """Modulated norm and projection to patches: (B, N, D) -> (B, N, patch * patch * channels)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=1)
        return self.linear(_modulate(self.norm_final(x_BND), shift, scale))


def _projector(hidden_size: int, projector_dim: int, z_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(hidden_size, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, z_dim),
    )


class SiT(nn.Module):
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
        z_dims = None if z_dims is None else list(z_dims)
        decoder_hidden_size = hidden_size if decoder_hidden_size is None else decoder_hidden_size
        if clock is None:
            clock = "data_at_1" if z_dims is None else "noise_at_1"
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.config: dict[str, Any] = config | {"learn_sigma": learn_sigma and z_dims is None}
        _check_config(self.config)
        self.clock = clock
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.null_class: int | None = num_classes if class_dropout_prob > 0 else None
        self.learn_sigma: bool = self.config["learn_sigma"]
        # Guidance of the official samplers: SiT's covers the first three channels, REPA's all.
        self.cfg_channels: int | None = min(3, in_channels) if z_dims is None else None
        self.out_channels = in_channels * (2 if self.learn_sigma else 1)
        self.encoder_depth = encoder_depth

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes + (self.null_class is not None), hidden_size)
        side = input_size // patch_size
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth)
        )
        self.projectors: nn.ModuleList | None = None
        if z_dims is not None:
            self.projectors = nn.ModuleList(
                _projector(hidden_size, projector_dim, z_dim) for z_dim in z_dims
            )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

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
        zeroed = [block.adaLN_modulation[-1] for block in self.blocks]
        for linear in [*zeroed, self.final_layer.adaLN_modulation[-1], self.final_layer.linear]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

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

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, channels: int | None = 3
    ) -> Tensor:
        """Classifier-free guidance as the official samplers batch it.

        The first half of `x` is fed twice, with the labels of both halves; on the first `channels`
        channels both halves of the result are u + cfg_scale (c - u), with c of the first half and u
        of the second. The other channels keep each half's own prediction.

        Args:
            x, t, y: a batch of 2 B: [z; z], [t; t], [labels; null_class]. The second z is unused.
            cfg_scale: 1 is the conditional prediction.
            channels: how many leading channels are guided: 3 as in SiT, None = all as in REPA's
                samplers.

        Returns:
            (2 B, in_channels, input_size, input_size); the first half is the one to keep.
        """
        _check(
            x.shape[0] % 2 == 0,
            f"x must hold an even batch [z; z], got {x.shape[0]} samples: concatenate z with "
            "itself and the labels with null_class",
        )
        guided = self.in_channels if channels is None else channels
        _check(
            1 <= guided <= self.in_channels,
            f"channels must be in 1..{self.in_channels} or None for all, got {channels}",
        )
        half = x[: x.shape[0] // 2]
        out = self.velocity(torch.cat([half, half]), t, y)
        cond, uncond = out[:, :guided].chunk(2)
        mixed = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([mixed, mixed]), out[:, guided:]], dim=1)

    def _run(
        self, x: Tensor, t: Tensor, y: Tensor, *, project: bool
    ) -> tuple[Tensor, list[Tensor]]:
        self._check_inputs(x, t, y)
        h_BND = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed
        c_BD = self.t_embedder(t) + self.y_embedder(y)
        zs: list[Tensor] = []
        for number, block in enumerate(self.blocks, start=1):
            h_BND = block(h_BND, c_BD)
            if project and self.projectors is not None and number == self.encoder_depth:
                zs = [projector(h_BND) for projector in self.projectors]
        return self._unpatchify(self.final_layer(h_BND, c_BD)), zs

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(B, N, p * p * out_channels), channel fastest -> (B, in_channels, side, side)."""
        p, side = self.patch_size, self.input_size // self.patch_size
        grid = patches.unflatten(2, (p, p, self.out_channels)).unflatten(1, (side, side))
        velocity = grid[..., : self.in_channels]
        return velocity.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        image = (self.in_channels, self.input_size, self.input_size)
        _check(
            x.ndim == 4 and tuple(x.shape[1:]) == image and x.is_floating_point(),
            f"x must be a floating (B, C, H, W) = (B, {', '.join(map(str, image))}), got {x.dtype} "
            f"{tuple(x.shape)}; another resolution needs a model with another input_size",
        )
        batch = x.shape[0]
        _check(
            tuple(t.shape) == (batch,) and t.dtype in (torch.float32, torch.float64),
            f"t must be (B,) = ({batch},) float32, got {tuple(t.shape)} {t.dtype}: one time per "
            "sample, never in half precision",
        )
        _check(
            tuple(y.shape) == (batch,) and y.dtype == torch.int64,
            f"y must be (B,) = ({batch},) int64 labels, got {tuple(y.shape)} {y.dtype}",
        )
        if y.device.type != "cpu" or torch.compiler.is_compiling() or batch == 0:
            return
        top = self.num_classes - (self.null_class is None)
        low, high = int(y.min()), int(y.max())
        null = f"null class {top}" if self.null_class is not None else "no null class"
        _check(
            low >= 0 and high <= top,
            f"y must be in 0..{top} ({self.num_classes} classes, {null}), got {low}..{high}",
        )


def _check_config(config: dict[str, Any]) -> None:
    sizes = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
    for name in (*sizes, "num_classes", "encoder_depth", "projector_dim"):
        value = config[name]
        is_int = isinstance(value, int) and not isinstance(value, bool)
        _check(is_int and value >= 1, f"{name} must be a positive int, got {value!r}")
    size, patch, _, width, depth, heads = (config[name] for name in sizes)
    ratio, dropout, z_dims = config["mlp_ratio"], config["class_dropout_prob"], config["z_dims"]
    decoder_width, clock = config["decoder_hidden_size"], config["clock"]
    _check(size % patch == 0, f"input_size must be a multiple of patch_size={patch}, got {size}")
    _check(width % heads == 0, f"hidden_size must be a multiple of num_heads={heads}, got {width}")
    _check(width % 4 == 0, f"hidden_size must be a multiple of 4 (sin-cos positions), got {width}")
    _check(int(width * ratio) >= 1, f"mlp_ratio must be positive, got {ratio!r}")
    _check(0 <= dropout < 1, f"class_dropout_prob must be in [0, 1), got {dropout!r}")
    _check(
        decoder_width == width,
        f"decoder_hidden_size must equal hidden_size={width}, got {decoder_width}: leave it out",
    )
    _check(clock in CLOCKS, f"clock must be one of {CLOCKS} or None, got {clock!r}")
    if z_dims is None:
        return
    _check(
        len(z_dims) > 0 and all(isinstance(z, int) and z >= 1 for z in z_dims),
        f"z_dims must be a non-empty list of positive ints, got {z_dims}: for REPA weights without "
        'projectors use learn_sigma=False and clock="noise_at_1"',
    )
    _check(
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
    _check(
        len(zs) == len(targets) > 0,
        f"zs and targets must hold one tensor per encoder, got {len(zs)} and {len(targets)}",
    )
    total = torch.zeros((), dtype=torch.float32, device=zs[0].device)
    for index, (z, target) in enumerate(zip(zs, targets, strict=True)):
        _check(
            z.shape == target.shape,
            f"targets[{index}] must be (B, N, z_dim) = {tuple(z.shape)} like zs[{index}], got "
            f"{tuple(target.shape)}: teacher and model must cut the image into the same tokens",
        )
        cosine = F.normalize(z.float(), dim=-1) * F.normalize(target.float(), dim=-1)
        total = total - cosine.sum(dim=-1).mean()
    return total / len(zs)


SIT_SIZES: dict[str, dict[str, int]] = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}

MODELS: dict[str, Callable[..., SiT]] = {
    f"SiT-{size}/{patch}": partial(SiT, patch_size=patch, **sizes)
    for size, sizes in SIT_SIZES.items()
    for patch in (2, 4, 8)
}


def build(name: str, **kwargs: Any) -> SiT:
    """A published model by name, `SiT-{S,B,L,XL}/{2,4,8}`; `z_dims=[...]` makes it REPA's.

    Raises:
        ValueError: for an unknown name, with the nearest valid one.
    """
    if name not in MODELS:
        nearest = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"model name must be one of {', '.join(MODELS)}, got {name!r}: did you mean "
            f"{nearest!r}?"
        )
    return MODELS[name](**kwargs)
