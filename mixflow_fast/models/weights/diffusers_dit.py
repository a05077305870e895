"""A SiT as Hugging Face diffusers' `DiTTransformer2DModel`.

The two classes compute the same but for the features of the time: SiT's are cos and sin of t w_j,
w_j = 10000^(-j / 128), diffusers' those of t v_k, v_k = 10000^(-k / 127), j and k from 0 to 127.
Every w_j lies between two v_k, and over t in [0, 1] cos(t w) and sin(t w) are smooth in log w, so
Lagrange interpolation in log w over the 12 nearest v_k gives

    cos(t w_j) = sum_k L_jk cos(t v_k),  the same L for sin,   |error| < 2e-13 for t in [0, 1]

The first layer of the time's perceptron, W cos(t w), then becomes (W L) cos(t v): the same function
to below float32 rounding. Everything else is renamed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mixflow_fast.models.embedders import TIME_FEATURES, sincos_position_embedding
from mixflow_fast.models.sit import SiT, SiTConfig

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

_POINTS = 12  # error 2e-13; the sum of |L| stays below 2, so rounding is not amplified
_POINTS_BEYOND = 4  # error 3e-9 in a feature of 1e-4; the sum of |L| is 15
# What the class's own position table may differ by: SiT's EMA shifts its copy by rounding.
MAX_POSITION_DRIFT = 1e-3
NORM_EPS = 1e-6
RECORD = "mixflow.json"  # beside an export: its network, clock and origin
_MARKS = ("transformer_blocks.0.attn1.to_q.weight", "proj_out_2.weight", "pos_embed.proj.weight")


def is_diffusers_dit(names: Iterable[str]) -> bool:
    """Whether the tensors' names are those of `DiTTransformer2DModel`."""
    return set(_MARKS) <= set(names)


def read_record(folder: Path) -> dict[str, object]:
    """What an export says of itself; empty where there is none, or none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def time_basis() -> Tensor:
    """B with sit_features(t) = diffusers_features(t) B^T for t in [0, 1]; (256, 256) float64."""
    half = TIME_FEATURES // 2
    # Positions on the log axis, in units of the distance between two v_k.
    return _interpolation(torch.arange(half, dtype=torch.float64) * (half - 1) / half)


def inverse_time_basis() -> Tensor:
    """C with diffusers_features(t) = sit_features(t) C^T for t in [0, 1]; (256, 256) float64.

    C is not the inverse of B: the features of low frequencies are nearly the same functions, and
    such an inverse would amplify rounding.
    """
    half = TIME_FEATURES // 2
    # In units of the distance between two w_j.
    return _interpolation(torch.arange(half, dtype=torch.float64) * half / (half - 1))


def _interpolation(points: Tensor) -> Tensor:
    """Lagrange interpolation from the nodes 0 .. 127 to 128 points, for cosines and for sines."""
    half = len(points)
    nodes = torch.arange(half, dtype=torch.float64)
    basis = torch.zeros(half, half, dtype=torch.float64)
    for j, point in enumerate(points):
        # Beyond the last node, where a frequency of 1e-4 makes the functions all but straight, a
        # few do, and many would amplify rounding.
        count = _POINTS if point <= half - 1 else _POINTS_BEYOND
        start = min(max(int(point) - count // 2 + 1, 0), half - count)
        near = nodes[start : start + count]
        gaps = near[:, None] - near[None, :]
        factors = (point - near)[None, :] / gaps.masked_fill(gaps == 0, 1.0)
        factors.fill_diagonal_(1.0)
        basis[j, start : start + count] = factors.prod(dim=1)
    return torch.block_diag(basis, basis)


def diffusers_config(kwargs: SiTConfig) -> dict[str, int | float]:
    """`DiTTransformer2DModel`'s arguments for a SiT's (`SiT.config`).

    Raises:
        ValueError: the diffusers class has no such network.
    """
    for wrong, what in (
        (kwargs["qk_norm"], "norms of q and k"),
        (kwargs["mlp_ratio"] != 4.0, f"mlp_ratio {kwargs['mlp_ratio']} (it is fixed at 4)"),
        (kwargs["class_dropout_prob"] == 0, "a label table without a null class"),
    ):
        if wrong:
            raise ValueError(
                f"diffusers' DiTTransformer2DModel has no {what}, which this network needs: export "
                "--to official or --to ema"
            )
    return {
        "num_attention_heads": kwargs["num_heads"],
        "attention_head_dim": kwargs["hidden_size"] // kwargs["num_heads"],
        "in_channels": kwargs["in_channels"],
        "out_channels": kwargs["in_channels"] * (2 if kwargs["learn_sigma"] else 1),
        "num_layers": kwargs["depth"],
        "sample_size": kwargs["input_size"],
        "patch_size": kwargs["patch_size"],
        "num_embeds_ada_norm": kwargs["num_classes"],
        "norm_eps": NORM_EPS,
    }


def position_drift(state: Mapping[str, Tensor]) -> float:
    """Largest difference of the state's position table from the one that diffusers computes.

    Raises:
        ValueError: it is another table.
    """
    table = state["pos_embed"]
    side = int(table.shape[1] ** 0.5)
    drift = (table[0] - sincos_position_embedding(table.shape[-1], side)).abs().max().item()
    if not drift <= MAX_POSITION_DRIFT:
        raise ValueError(
            f"pos_embed is not the fixed sine-cosine table (it is up to {drift:.2g} away), and "
            "diffusers' DiTTransformer2DModel computes that table itself: export --to official or "
            "--to ema"
        )
    return drift


# Names there and here, of tensors that have a weight and a bias.
_OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_IN_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
# The class repeats the time and label embedders in every block.
_EMBEDDERS = {
    "timestep_embedder.linear_1.weight": "t_embedder.mlp.0.weight",
    "timestep_embedder.linear_1.bias": "t_embedder.mlp.0.bias",
    "timestep_embedder.linear_2.weight": "t_embedder.mlp.2.weight",
    "timestep_embedder.linear_2.bias": "t_embedder.mlp.2.bias",
    "class_embedder.embedding_table.weight": "y_embedder.embedding_table.weight",
}
_TIME = "t_embedder.mlp.0.weight"


def to_diffusers(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """A SiT's state dict under the names of `DiTTransformer2DModel`; projectors are left out."""
    shared = {name: state[ours] for name, ours in _EMBEDDERS.items()}
    shared["timestep_embedder.linear_1.weight"] = _in_basis(state[_TIME], time_basis())
    out: dict[str, Tensor] = {}
    for part in ("weight", "bias"):
        out |= {f"{name}.{part}": state[f"{ours}.{part}"] for name, ours in _OUTER.items()}
        for i in range(depth):
            block, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
            qkv = state[f"{block}.attn.qkv.{part}"].chunk(3)
            for name, tensor in zip("qkv", qkv, strict=True):
                out[f"{theirs}.attn1.to_{name}.{part}"] = tensor
            for name, ours in _IN_BLOCK.items():
                out[f"{theirs}.{name}.{part}"] = state[f"{block}.{ours}.{part}"]
    for i in range(depth):
        out |= {f"transformer_blocks.{i}.norm1.emb.{name}": t for name, t in shared.items()}
    return out


def from_diffusers(state: Mapping[str, Tensor], kwargs: SiTConfig) -> dict[str, Tensor]:
    """The state dict of the SiT that `to_diffusers` wrote: the same function to rounding.

    Args:
        state: of `DiTTransformer2DModel`.
        kwargs: the SiT's arguments (`SiT.config`).

    Raises:
        ValueError: tensors that are missing, or embedders that differ from block to block.
    """
    side, depth = kwargs["input_size"] // kwargs["patch_size"], kwargs["depth"]
    try:
        out = {"pos_embed": sincos_position_embedding(kwargs["hidden_size"], side)[None]}
        for name, ours in _EMBEDDERS.items():
            every = [state[f"transformer_blocks.{i}.norm1.emb.{name}"] for i in range(depth)]
            if not all(torch.equal(tensor, every[0]) for tensor in every):
                raise ValueError(
                    f"norm1.emb.{name} differs from block to block, and a SiT has one for all: it "
                    "was trained in diffusers, and cannot be read back"
                )
            out[ours] = every[0]
        out[_TIME] = _in_basis(out[_TIME], inverse_time_basis())
        for part in ("weight", "bias"):
            out |= {f"{ours}.{part}": state[f"{name}.{part}"] for name, ours in _OUTER.items()}
            for i in range(depth):
                block, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
                qkv = [state[f"{theirs}.attn1.to_{name}.{part}"] for name in "qkv"]
                out[f"{block}.attn.qkv.{part}"] = torch.cat(qkv)
                for name, ours in _IN_BLOCK.items():
                    out[f"{block}.{ours}.{part}"] = state[f"{theirs}.{name}.{part}"]
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from None
    return out


def _in_basis(weight: Tensor, basis: Tensor) -> Tensor:
    return (weight.double() @ basis).to(weight.dtype)


def build_diffusers(state: Mapping[str, Tensor], kwargs: SiTConfig) -> DiTTransformer2DModel:
    """The diffusers model with a SiT's weights, float32 on the CPU, in eval mode.

    Raises:
        ValueError: the class cannot represent this network.
        ImportError: diffusers is not installed.
    """
    config = diffusers_config(kwargs)
    position_drift(state)
    model = diffusers_class()(**config)
    model.load_state_dict(to_diffusers(state, kwargs["depth"]), strict=True)
    return model.eval()


def diffusers_class() -> type[DiTTransformer2DModel]:
    """`diffusers.DiTTransformer2DModel`; ImportError that says how to get it."""
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as error:
        raise ImportError(
            f"export --to diffusers needs it: pip install diffusers ({error})"
        ) from None
    return DiTTransformer2DModel


@torch.no_grad()
def largest_difference(ours: SiT, theirs: nn.Module, batch: int = 3) -> float:
    """Relative RMS difference of the two networks on random inputs, times from 0 to 1.

    `ours` is a SiT whose head has as many channels as it gives velocities, or more; sigma channels
    of `theirs` are not compared.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (batch, ours.in_channels, ours.input_size, ours.input_size)
    x = torch.randn(shape, generator=generator)
    t = torch.linspace(0.0, 1.0, batch)
    y = torch.randint(ours.num_classes, (batch,), generator=generator)
    y[-1] = ours.num_classes  # the null class
    expected = ours.velocity(x, t, y)
    found = theirs(x, timestep=t, class_labels=y).sample[:, : ours.in_channels]
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
