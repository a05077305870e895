"""RAE's decoder (Zheng et al., arXiv 2510.11690), a ViT of diffusers', with the official weights.

z sqrt(var + 1e-5) + mean -> ViT -> patches -> image std + mean, in [0, 1]
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mixflow_fast.files import existing_path, sha256, user_path
from mixflow_fast.messages import error_line
from mixflow_fast.models.autoencoders.rae import Statistics
from mixflow_fast.models.dinov2 import IMAGENET_MEAN, IMAGENET_STD, Precision
from mixflow_fast.models.weights.damage import refuse_not_finite
from mixflow_fast.models.weights.files import WeightsFile

# Of a block of the official decoder -> diffusers' names.
_RENAMED = {
    "attention.attention.query": "attention.to_q",
    "attention.attention.key": "attention.to_k",
    "attention.attention.value": "attention.to_v",
    "attention.output.dense": "attention.to_out.0",
}
_TABLE = "decoder_pos_embed"
_WAY_OUT = "give the file of an official decoder of RAE and its config.json"


class RAEDecoder:
    """RAE's normalised latents in, images out: diffusers' `RAEDecoder` with the official weights.

    diffusers makes the table of positions by itself, which is another one than the official one
    for 32 x 32 tokens, and ignores the one in the file. Here the file's is used.

    Args:
        path: the official file of the decoder, a state dict.
        config: the decoder's config.json (configs/decoder/ViTXL/config.json of RAE's repository).
        stats: the encoder's `stat.pt`; None for latents that were not normalised.
        device: where it stays.

    Attributes:
        kind: "rae", of a protocol.
        low: what black is, of images that reach to 1.
        shape: (D, h, w) of the latents.
        channels, upsampling: D, and pixels along the side of a place of the latent.
        precision: float32 always, as the official code.
        model: the network, in eval mode, without gradients.

    Raises:
        ValueError: missing or foreign files, weights that do not fit the config, diffusers not
            installed.
    """

    kind, low = "rae", 0.0
    precision: Precision = "fp32"

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: str | os.PathLike[str],
        *,
        stats: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        file = WeightsFile.open(path)
        state = {_renamed(key): value for key, value in file.state().items()}
        self.model = _decoder(state, _decoder_config(config), file.path)
        width, side = self.model.decoder_embed.in_features, round(self.model.num_patches**0.5)
        self.shape = (width, side, side)
        self.channels, self.upsampling = width, self.model.patch_size
        self._pixels = (side * self.model.patch_size,) * 2
        self._statistics = None if stats is None else Statistics.read(stats, self.shape)
        self._files = [file.path] if stats is None else [file.path, user_path(stats)]
        # Where the decoder works, not what ImageNet's images are: decoded patches are normalised.
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        self._images = Statistics(mean, std)
        self.to(device)

    def to(self, device: str | torch.device) -> RAEDecoder:
        """Take it to a device; returns itself."""
        self.model.to(device)
        self._images = self._images.to(device)
        if self._statistics is not None:
            self._statistics = self._statistics.to(device)
        return self

    def record(self) -> dict[str, str]:
        """Of a protocol: kind, SHA-256 of the weights, and of the statistics or "none"."""
        digests = [sha256(path) for path in self._files]
        return {"kind": self.kind, "sha256": digests[0], "stats": (*digests, "none")[1]}

    def __call__(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) -> images (B, 3, H, H) float32 in [0, 1]."""
        return self.decode(latents).clamp(0.0, 1.0)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) -> images (B, 3, H, H) float32 around [0, 1], as the official code.

        Raises:
            ValueError: latents of another shape.
        """
        patches = self.patches(latents)
        return self._images.denormalise(self.model.unpatchify(patches, self._pixels))

    @torch.no_grad()
    def patches(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) -> what the network gives, (B, h w, 3 P P): normalised pixels of patches.

        Raises:
            ValueError: latents of another shape.
        """
        if tuple(latents.shape[1:]) != self.shape:
            raise ValueError(f"latents must be (B, *{self.shape}), got {tuple(latents.shape)}")
        z = latents.float() if self._statistics is None else self._statistics.denormalise(latents)
        with torch.autocast(z.device.type, enabled=False):
            return self.model(z.flatten(2).mT).logits


def _renamed(key: str) -> str:
    """A key of the official decoder by diffusers' name."""
    for ours, theirs in _RENAMED.items():
        key = key.replace(ours, theirs)
    return key


def _decoder_config(path: str | os.PathLike[str]) -> Mapping[str, object]:
    """What weights do not tell, of a ViT-MAE's config.json, by diffusers' names."""
    file = existing_path(path, "the decoder's config")
    try:
        config = json.loads(file.read_text())
        return {
            "decoder_num_attention_heads": config["decoder_num_attention_heads"],
            "layer_norm_eps": config["layer_norm_eps"],
            "hidden_act": config["hidden_act"],
            "qkv_bias": config["qkv_bias"],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} must be the config.json of RAE's decoder (a ViT-MAE's), got {error!r}"
        ) from error


def _decoder(state: dict[str, Tensor], config: Mapping[str, object], path: Path) -> nn.Module:
    """diffusers' decoder with all weights of a state dict, its table of positions among them."""
    try:
        from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder as Network
    except ImportError as error:
        raise ValueError(
            f'RAE\'s decoder needs diffusers ({error}): pip install "mixflow_fast[vae]"'
        ) from None
    try:
        embed, out, table = (
            state[f"decoder_{name}"] for name in ("embed.weight", "pred.weight", "pos_embed")
        )
        inner = state["decoder_layers.0.intermediate.dense.weight"]
    except KeyError as error:
        raise ValueError(f"{path} holds no {error.args[0]}: {_WAY_OUT}") from None
    layers = {key.split(".")[1] for key in state if key.startswith("decoder_layers.")}
    patch, tokens = round((out.shape[0] / 3) ** 0.5), table.shape[1] - 1
    with torch.device("meta"):
        network = Network(
            hidden_size=embed.shape[1],
            decoder_hidden_size=embed.shape[0],
            decoder_num_hidden_layers=len(layers),
            decoder_intermediate_size=inner.shape[0],
            num_patches=tokens,
            patch_size=patch,
            image_size=round(tokens**0.5) * patch,
            **config,
        )
    network = network.to_empty(device="cpu")
    # diffusers leaves it out of the state dict and makes it by a rule that is not the official one.
    network.decoder_pos_embed.copy_(table)
    try:
        network.load_state_dict({key: value for key, value in state.items() if key != _TABLE})
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit RAE's decoder: {error_line(error)}: {_WAY_OUT}"
        ) from error
    refuse_not_finite(state, path, _WAY_OUT)
    return network.eval().requires_grad_(False)
