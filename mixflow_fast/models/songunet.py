"""SongUNet: the U-Net of DDPM++ (Song et al., arXiv 2011.13456) on pixels, as a velocity network.

It is the network of MixFlow's mixed sources (arXiv 2604.09181), written from their descriptions.
Parameter and buffer names and shapes are those of the official state dicts, which load with
`strict=True`.

Shapes by suffix: B batch, C channels, H height, W width, N places (H W), E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixflow_fast.flow.clock import CLOCKS
from mixflow_fast.kernels.dropout import dropout, layer_keys
from mixflow_fast.models.execution import Execution, runner
from mixflow_fast.models.network import Network, check, check_sizes, zero_

EPS = 1e-6
# Both ends of a residual connection have variance 1, and so has this much of their sum.
SKIP_SCALE = math.sqrt(0.5)
# Ways of running it, by the fields of `Execution`; the others are those of transformers' blocks.
WAYS: dict[str, tuple[str, ...]] = {
    "mode": ("eager", "compile"),
    "attention": ("auto",),
    "checkpointing": ("none", "full"),
    "compile_unit": ("block",),
}
# Arguments of the official class of which one value is known to work, and that value.
_ONLY = {
    "label_dim": 0,
    "augment_dim": 0,
    "label_dropout": 0,
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}


class SongUNetConfig(TypedDict):
    """Arguments of `SongUNet` with the defaults filled in, in the order that files keep."""

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int
    augment_dim: int
    model_channels: int
    channel_mult: list[int]
    channel_mult_emb: int
    num_blocks: int
    attn_resolutions: list[int]
    dropout: float
    label_dropout: float
    embedding_type: str
    channel_mult_noise: int
    encoder_type: str
    decoder_type: str
    resample_filter: list[int]
    activate_w_mode: bool
    clock: str


class _Draws(NamedTuple):
    """Where the masks of dropout come from: a key a layer, and the examples' positions."""

    keys: Tensor
    positions: Tensor


def _group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, width // 4), width, eps=EPS)


def positional_embedding(values: Tensor, features: int) -> Tensor:
    """[cos(v f), sin(v f)] with f_j = 10000^(-j / (features / 2 - 1)), cosines first.

    The values are times or mixing weights in [0, 1], unscaled, so most frequencies hardly move.

    Args:
        values: (B,) floating point.
        features: even number of features.

    Returns:
        (B, features) float32, or float64 for float64 values.
    """
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    half = features // 2
    # float32 as the official code makes them, whatever the values are.
    steps = torch.arange(half, dtype=torch.float32, device=values.device) / max(half - 1, 1)
    angles = values.to(dtype)[:, None] * (1 / 10000) ** steps
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class _Conv(nn.Conv2d):
    """A convolution, of the image twice as large or half as large where `resample` says so.

    Larger by repeating, smaller by the mean of four, which is the filter [1, 1]; the buffer holds
    it because official state dicts do.
    """

    def __init__(self, in_width: int, width: int, kernel: int, resample: str | None) -> None:
        super().__init__(in_width, width, kernel, padding=kernel // 2)
        self.resample = resample
        if resample is not None:
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        elif self.resample == "down":
            x = F.avg_pool2d(x, 2)
        return super().forward(x)


class UNetBlock(nn.Module):
    """Residual block with the embedding added in between, and self-attention where it has it.

        h = conv1(dropout(silu(norm1(conv0(silu(norm0(x))) + affine(emb)))))
        y = (skip(x) + h) / sqrt(2);   y = (y + proj(attention(norm2(y)))) / sqrt(2)

    Args:
        in_width, width: C before and after.
        emb: E.
        resample: "up" or "down" for a block between two resolutions, else None.
        attention: self-attention with one head.
    """

    def __init__(
        self, in_width: int, width: int, emb: int, resample: str | None, attention: bool
    ) -> None:
        super().__init__()
        self.norm0 = _group_norm(in_width)
        self.conv0 = _Conv(in_width, width, 3, resample)
        self.affine = nn.Linear(emb, width)
        self.norm1 = _group_norm(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.skip: _Conv | None = None
        if in_width != width or resample is not None:
            self.skip = _Conv(in_width, width, 1, resample)
        self.attends = attention
        if attention:
            self.norm2 = _group_norm(width)
            self.qkv = nn.Conv2d(width, 3 * width, 1)
            self.proj = nn.Conv2d(width, width, 1)

    @property
    def signature(self) -> tuple[int, int, str | None, bool]:
        """Blocks of one resolution with the same signature compute the same function."""
        # Not by the weights, which ZeRO 3 cuts.
        conv = self.conv0
        return conv.in_channels, conv.out_channels, conv.resample, self.attends

    def forward(
        self, x: Tensor, emb_BE: Tensor, p: float, key: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        """(B, C, H, W) -> the same or another resolution; dropout of p where there are draws."""
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(emb_BE)[:, :, None, None]))
        if positions is not None:
            h = dropout(h, p, key, positions)
        h = (self.conv1(h) + (x if self.skip is None else self.skip(x))) * SKIP_SCALE
        return (self._attention(h) + h) * SKIP_SCALE if self.attends else h

    def _attention(self, x: Tensor) -> Tensor:
        # Channel c of q, k and v are neighbours in the official product.
        qkv_BC3N = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (-1, 3))
        q, k, v = (part.transpose(1, 2).unsqueeze(1) for part in qkv_BC3N.unbind(2))
        out_BNC = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return self.proj(out_BNC.transpose(1, 2).reshape(x.shape))


def _block(
    block: UNetBlock,
    emb_BE: Tensor,
    p: float,
    key: Tensor | None,
    positions: Tensor | None,
    x: Tensor,
) -> Tensor:
    return block(x, emb_BE, p, key, positions)


class SongUNet(Network):
    """U-Net of DDPM++ with the official constructor arguments; unconditional.

    Its output is the velocity itself: no preconditioning, and times are not scaled. It takes labels
    and does not look at them, so that it trains on any data.

    In training mode with dropout its masks are functions of (seed, layer, position, element), which
    `set_draws` gives before each forward pass; without them it refuses, rather than draw from
    torch's global state what no resumed run could draw again. Evaluation mode drops nothing.

    Args:
        img_resolution: side of the square image; a multiple of 2^(levels - 1).
        in_channels, out_channels: equal, C.
        model_channels: width that `channel_mult` multiplies.
        channel_mult: one entry a level; each has half the resolution of the one before.
        channel_mult_emb: width of the embedding, over `model_channels`.
        num_blocks: blocks of a level on the way down; one more on the way up.
        attn_resolutions: resolutions whose blocks have self-attention; the deepest always has one.
        dropout: probability in every block.
        channel_mult_noise: number of time features over `model_channels`.
        activate_w_mode: the network is told the mixing weight w of its source too (`forward`).
        clock: what t = 1 means, "data_at_1" or "noise_at_1"; None: the official one, data.
        label_dim, augment_dim, label_dropout, embedding_type, encoder_type, decoder_type,
            resample_filter: taken because the official class takes them, at the published values
            alone: labels (label_dim > 0) cannot be run by the official code either.

    Attributes:
        num_classes, null_class: None.

    Raises:
        ValueError: sizes that do not fit together, or another value of what has only one.
    """

    def __init__(
        self,
        img_resolution: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.13,
        label_dropout: float = 0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[int] = (1, 1),
        activate_w_mode: bool = False,
        clock: str | None = None,
    ) -> None:
        super().__init__()
        self.config: SongUNetConfig = {
            "img_resolution": img_resolution,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "label_dim": label_dim,
            "augment_dim": augment_dim,
            "model_channels": model_channels,
            "channel_mult": list(channel_mult),
            "channel_mult_emb": channel_mult_emb,
            "num_blocks": num_blocks,
            "attn_resolutions": list(attn_resolutions),
            "dropout": dropout,
            "label_dropout": label_dropout,
            "embedding_type": embedding_type,
            "channel_mult_noise": channel_mult_noise,
            "encoder_type": encoder_type,
            "decoder_type": decoder_type,
            "resample_filter": list(resample_filter),
            "activate_w_mode": activate_w_mode,
            "clock": "data_at_1" if clock is None else clock,
        }
        _check_config(self.config)
        self.clock = self.config["clock"]
        self.input_size, self.in_channels = img_resolution, in_channels
        self.num_classes = self.null_class = self.cfg_channels = None
        self._draws: _Draws | None = None
        self._layer_keys: tuple[int, Tensor] | None = None
        self._build_layers()
        self.initialize_weights()
        self.set_execution()

    def _build_layers(self) -> None:
        # In the official order, which numbers the parameters in optimizer states.
        c = self.config
        features, emb = c["model_channels"] * c["channel_mult_noise"], self._emb
        widths = [c["model_channels"] * multiplier for multiplier in c["channel_mult"]]
        sides = [self.input_size >> level for level in range(len(widths))]
        if c["activate_w_mode"]:
            # The name's number is the place behind the embedding, which has no weights.
            self.map_w = nn.ModuleDict({"1": nn.Linear(features, features)})
        self.map_layer0 = nn.Linear(features, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        # Widths of what the way down leaves for the way up, which takes it from the end.
        width = c["model_channels"]
        self.enc[f"{sides[0]}x{sides[0]}_conv"] = nn.Conv2d(self.in_channels, width, 3, padding=1)
        left = [width]
        for side, level_width in zip(sides, widths, strict=True):
            name, attends = f"{side}x{side}", side in c["attn_resolutions"]
            if side != sides[0]:
                self.enc[f"{name}_down"] = UNetBlock(width, width, emb, "down", False)
                left.append(width)
            for number in range(c["num_blocks"]):
                self.enc[f"{name}_block{number}"] = UNetBlock(
                    width, level_width, emb, None, attends
                )
                width = level_width
                left.append(width)
        for side, level_width in reversed(list(zip(sides, widths, strict=True))):
            name, attends = f"{side}x{side}", side in c["attn_resolutions"]
            if side == sides[-1]:
                self.dec[f"{name}_in0"] = UNetBlock(width, width, emb, None, True)
                self.dec[f"{name}_in1"] = UNetBlock(width, width, emb, None, False)
            else:
                self.dec[f"{name}_up"] = UNetBlock(width, width, emb, "up", False)
            for number in range(c["num_blocks"] + 1):
                last = number == c["num_blocks"]
                self.dec[f"{name}_block{number}"] = UNetBlock(
                    width + left.pop(), level_width, emb, None, attends and last
                )
                width = level_width
        self.dec[f"{sides[0]}x{sides[0]}_aux_norm"] = _group_norm(width)
        self.dec[f"{sides[0]}x{sides[0]}_aux_conv"] = nn.Conv2d(
            width, c["out_channels"], 3, padding=1
        )

    @property
    def _emb(self) -> int:
        return self.config["model_channels"] * self.config["channel_mult_emb"]

    @property
    def unet_blocks(self) -> list[UNetBlock]:
        """All blocks, in the order in which they run and number the layers of dropout."""
        parts = [*self.enc.values(), *self.dec.values()]
        return [part for part in parts if isinstance(part, UNetBlock)]

    @property
    def ends(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        """The first and the last convolution."""
        return next(iter(self.enc.values())), list(self.dec.values())[-1]

    @property
    def product_dtype(self) -> torch.dtype:
        """Dtype of the weights that are multiplied by activations."""
        return self.map_layer0.weight.dtype

    @property
    def block_sides(self) -> list[int]:
        """Resolution of the output of each of `unet_blocks`."""
        sides, side = [], self.input_size
        for block in self.unet_blocks:
            side = {"up": side * 2, "down": side // 2, None: side}[block.conv0.resample]
            sides.append(side)
        return sides

    def kept_elements(self) -> int:
        """Elements of an image that a forward pass keeps for its backward pass, about.

        Of a block its input, the norm's and the activation's output before conv0; as much before
        conv1, with what dropout returns; of attention norm, q, k, v and result. Recomputed, its
        input alone.
        """
        full, kept = self.execution.checkpointing == "full", 0
        for block, side in zip(self.unet_blocks, self.block_sides, strict=True):
            in_width, width, resample, attends = block.signature
            before = {"up": side // 2, "down": side * 2, None: side}[resample]
            kept += in_width * before**2 * (1 if full else 3)
            kept += 0 if full else width * side**2 * (4 + 5 * attends)
        return kept

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """DDPM++'s initialisation, from torch's default generator; harmless on meta tensors.

        Xavier-uniform weights, biases of zero; zero too what a residual block or attention adds at
        its end, and the last convolution.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in self.unet_blocks:
            zero_([block.conv1, block.proj] if block.attends else [block.conv1])
        zero_([self.ends[1]])

    def set_execution(self, execution: Execution | None = None, **options: str | bool) -> SongUNet:
        """Choose how the network is run; returns it. Weights and their names do not change.

        Its ways are the modes eager and compile, and checkpointing none or full (each block).

        Raises:
            ValueError: unknown values, or ways that are those of transformers' blocks.
        """
        execution = Execution(**options) if execution is None else execution
        for name, allowed in WAYS.items():
            value = getattr(execution, name)
            check(
                value in allowed,
                f"{name}={value!r} is not for SongUNet, which has no transformer blocks: use "
                f"{' or '.join(f'{name}={one!r}' for one in allowed)}",
            )
        self.execution = execution
        self._build_runners()
        return self

    def _build_runners(self) -> None:
        # Beside the module's own registries. Blocks that compute the same share one compilation.
        keys = [
            (side, *block.signature)
            for side, block in zip(self.block_sides, self.unet_blocks, strict=True)
        ]
        shared = {key: runner(_block, self.execution, ()) for key in dict.fromkeys(keys)}
        self.__dict__["_runners"] = [shared[key] for key in keys]

    def __getstate__(self) -> dict[str, object]:
        # Copies make their own: compiled functions cannot be pickled, and draws are of one pass.
        state = {key: value for key, value in self.__dict__.items() if key != "_runners"}
        return state | {"_draws": None, "_layer_keys": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._build_runners()

    def set_draws(self, seed: int, positions: Tensor) -> None:
        """What the masks of dropout are drawn from, until the next call.

        Args:
            seed: of the run.
            positions: (B,) int64 global positions of the examples of the next forward passes, on
                the network's device.

        Raises:
            ValueError: a seed or positions of another kind.
        """
        check(
            positions.ndim == 1 and positions.dtype == torch.int64,
            f"positions must be (B,) int64, got {tuple(positions.shape)} {positions.dtype}",
        )
        device = positions.device
        if self._layer_keys is None or self._layer_keys[0] != seed:
            self._layer_keys = seed, layer_keys(seed, len(self.unet_blocks))
        keys = self._layer_keys[1]
        if keys.device != device:
            keys = keys.to(device)
            self._layer_keys = seed, keys
        self._draws = _Draws(keys, positions)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, w: Tensor | float | None = None
    ) -> Tensor:
        """The velocity in the model's own clock.

        Args:
            x: (B, C, img_resolution, img_resolution) floating point; cast to the weights' dtype.
            t: (B,) float32 (or float64) in [0, 1]. Its embedding is made in float32.
            y: (B,) int64 labels or None; not looked at.
            w: (B,) floating point, or one number for all: the mixing weight, with
                `activate_w_mode` alone and always there. An integer counts as its float.

        Returns:
            (B, C, img_resolution, img_resolution) in the weights' dtype.

        Raises:
            ValueError: for wrong shapes or dtypes; a weight that is missing or has no meaning; in
                training mode with dropout for draws that are missing or of another batch.
        """
        self._check_image(x, t)
        draws = self._checked_draws(len(x))
        dtype = self.map_layer0.weight.dtype
        emb_BE = self._embed(t, self._checked_weight(w, x)).to(dtype)
        h, left, number = x.to(dtype), [], 0
        for part in self.enc.values():
            if isinstance(part, UNetBlock):
                h = self._run(part, number, h, emb_BE, draws)
                number += 1
            else:
                h = part(h)
            left.append(h)
        *blocks, norm, last = self.dec.values()
        for part in blocks:
            if h.shape[1] != part.norm0.num_channels:
                h = torch.cat([h, left.pop()], dim=1)
            h = self._run(part, number, h, emb_BE, draws)
            number += 1
        return last(F.silu(norm(h)))

    def velocity(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """As `forward`: the name that sampling uses for every network."""
        return self(x, t, y)

    def _run(
        self, block: UNetBlock, number: int, x: Tensor, emb_BE: Tensor, draws: _Draws | None
    ) -> Tensor:
        key, positions = (None, None) if draws is None else (draws.keys[number], draws.positions)
        return self._runners[number](block, emb_BE, self.config["dropout"], key, positions, x)

    def _embed(self, t: Tensor, w: Tensor | None) -> Tensor:
        features = self.map_layer0.in_features
        emb = positional_embedding(t, features)
        # The official class turns them round, sines first.
        emb = emb.roll(features // 2, dims=1).to(self.map_layer0.weight.dtype)
        if w is not None:
            told = positional_embedding(w, features).to(self.map_layer0.weight.dtype)
            emb = emb + self.map_w["1"](told)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def _checked_weight(self, w: Tensor | float | None, x: Tensor) -> Tensor | None:
        if not self.config["activate_w_mode"]:
            check(
                w is None, "w has no meaning for a SongUNet without activate_w_mode: leave it out"
            )
            return None
        check(w is not None, "w must be given to a SongUNet with activate_w_mode: (B,) in [0, 1]")
        w = torch.as_tensor(w, device=x.device)
        w = w if w.is_floating_point() else w.float()
        w = w.expand(len(x)) if w.ndim == 0 else w
        check(w.shape == x.shape[:1], f"w must be (B,) = ({len(x)},), got {tuple(w.shape)}")
        return w

    def _checked_draws(self, batch: int) -> _Draws | None:
        if not self.training or not self.config["dropout"]:
            return None
        draws = self._draws
        check(
            draws is not None,
            f"SongUNet in training mode with dropout={self.config['dropout']} needs "
            "set_draws(seed, positions) before the forward pass: masks must be those of the "
            "examples, or a resumed run would drop others. Call it, or eval(), or build it with "
            "dropout=0",
        )
        check(
            len(draws.positions) == batch,
            f"set_draws was given {len(draws.positions)} positions, the batch has {batch} samples: "
            "call it before each forward pass",
        )
        return draws


def _check_config(config: SongUNetConfig) -> None:
    for name, only in _ONLY.items():
        check(config[name] == only, f"{name} must be {only!r}, got {config[name]!r}")
    check_sizes(
        config,
        ("img_resolution", "in_channels", "out_channels", "model_channels", "channel_mult_emb",
         "num_blocks", "channel_mult_noise"),
    )  # fmt: skip
    check(
        config["in_channels"] == config["out_channels"],
        f"out_channels must be in_channels = {config['in_channels']}, which the velocity has, got "
        f"{config['out_channels']}",
    )
    multipliers, width = config["channel_mult"], config["model_channels"]
    check(len(multipliers) > 0, "channel_mult must hold one multiplier a level, got []")
    names = [f"channel_mult[{level}]" for level in range(len(multipliers))]
    check_sizes(dict(zip(names, multipliers, strict=True)), names)
    side, halvings = config["img_resolution"], len(multipliers) - 1
    check(
        side % (1 << halvings) == 0,
        f"img_resolution must be a multiple of {1 << halvings} for {halvings + 1} levels, got "
        f"{side}",
    )
    sides = [side >> level for level in range(halvings + 1)]
    odd = [attended for attended in config["attn_resolutions"] if attended not in sides]
    check(
        not odd,
        f"attn_resolutions must be sides of levels ({', '.join(map(str, sides))}), got "
        f"{', '.join(map(str, odd))}",
    )
    check(width % 4 == 0, f"model_channels must be a multiple of 4 (groups of 4), got {width}")
    p = config["dropout"]
    check(0 <= p < 1, f"dropout must be in [0, 1), got {p!r}")
    clock = config["clock"]
    check(clock in CLOCKS, f"clock must be one of {CLOCKS} or None, got {clock!r}")
