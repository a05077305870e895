"""Model FLOPs of the networks by formula (two a multiply-add), and the peaks of known GPUs.

With N tokens, width D, F columns of the activation, C channels, patches of p x p, per image:

    block      8 N D^2 + 4 N^2 D, MLP 4 N D F (SwiGLU: 6 N D F), adaLN 2 D D_mod
               where D_mod = 6 D; N times the adaLN where the condition is per token
    ends       patches 2 N p^2 C D, final layer 2 N D p^2 C_out, its adaLN 4 D^2,
               times 2 (T D + D^2) for T features
    U-Net      2 C_in C_out k^2 at each place of a convolution's output, attention 4 N^2 C at its
               resolution, 2 E C for the embedding in each block
    training   three times the forward pass, less the gradients of latents and time features

Norms, activations, sums and RoPE do not count, nor what is computed twice (flash attention's
backward pass, checkpointing), nor zeros: DiT-DH's head runs at F = 5504 in the modes compile and
fused, and counts as the 5461 that it has. `padded=True` counts those zeros too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mixflow_fast.models import DiTDH, Network, SiT, SongUNet, Transformer
from mixflow_fast.models.blocks import PAD_TO, Block, SwiGLU
from mixflow_fast.models.text_to_image.network import TextToImage

# Dense bf16 TFLOP/s by the vendor's data sheets, SXM or HGX boards unless named; by the words of
# the name that the driver gives. The first that fits counts.
_PEAKS = (
    (("H100", "PCIe"), 756.0),
    (("H100", "NVL"), 835.5),
    (("H200", "NVL"), 835.5),
    (("A100",), 312.0),
    (("H100",), 989.4),
    (("H200",), 989.4),
    (("B200",), 2250.0),
)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one image.

    Attributes:
        forward: FLOPs of the forward pass.
        attention: the part of them that softmax(q k^T) v takes.
        untaken: products of the backward pass that nobody needs: gradients of the network's inputs.
        per_step: bias products of mode fused, forward; once a step and not per image.
    """

    forward: int
    attention: int
    untaken: int
    per_step: int

    @property
    def train(self) -> int:
        """FLOPs of one image in a training step."""
        # The backward pass takes two products for each of the forward pass.
        return 3 * self.forward - self.untaken


def count(net: Network, padded: bool = False) -> Flops:
    """FLOPs by formula, from the sizes of the layers alone; also of a network on meta.

    Args:
        net: a SiT, REPA's variant, a DiT-DH or a SongUNet.
        padded: with the zeros that the modes compile and fused append to DiT-DH's 5461 columns.
    """
    if isinstance(net, SongUNet):
        return _songunet(net)
    return _transformer(net, padded)


def _transformer(net: Transformer, padded: bool) -> Flops:
    N, area = (net.input_size // net.patch_size) ** 2, net.patch_size**2
    split = net.encoder_depth if isinstance(net, DiTDH) else len(net.blocks)
    groups = list(net.blocks)[:split], list(net.blocks)[split:]
    # Embeddings have the widths of the blocks that follow: the head of DiT-DH has its own.
    widths = [blocks[0].attn.proj.in_features for blocks in groups if blocks]
    times, last = net.t_embedder.mlp[0].in_features, widths[-1]
    # The condition of DiT-DH's head has a row for each token.
    rows = [1, N]
    blocks = sum(_block(block, N, rows[part], padded) for part in (0, 1) for block in groups[part])
    embed = sum(2 * N * area * net.in_channels * D for D in widths)
    first_of_times = 2 * times * widths[0]
    final = 2 * N * last * area * net.out_channels + 4 * last**2 * rows[len(widths) - 1]
    # DiT-DH's s_projector is the identity where both widths are equal.
    between = 2 * N * widths[0] * last if len(widths) > 1 and widths[0] != last else 0
    projectors = _projectors(net, N) if isinstance(net, SiT) else 0
    forward = blocks + embed + first_of_times + 2 * widths[0] ** 2 + final + between + projectors
    attention = sum(4 * N * N * block.attn.proj.in_features for block in net.blocks)
    per_step = sum(2 * block.attn.proj.in_features**2 for block in net.blocks)
    return Flops(forward, attention, embed + first_of_times, per_step)


def _block(block: Block, N: int, rows: int, padded: bool) -> int:
    D = block.attn.proj.in_features
    if isinstance(block.mlp, SwiGLU):
        F = block.mlp.w3.in_features
        # As `SwiGLU.weights` pads, which leaves widths alone that are aligned well enough.
        F += -F % PAD_TO if padded and F % 8 else 0
        mlp = 6 * N * D * F
    else:
        mlp = 4 * N * D * block.mlp.fc1.out_features
    modulation = 2 * D * len(block.parts.split()) * D
    return 8 * N * D * D + 4 * N * N * D + mlp + rows * modulation


def _songunet(net: SongUNet) -> Flops:
    emb, features = net.map_layer0.weight.shape
    first, last = net.ends
    places = net.input_size**2
    first_of_image = 2 * first.weight.numel() * places
    first_of_times = 2 * features * emb
    forward = first_of_image + 2 * last.weight.numel() * places
    forward += first_of_times + 2 * emb * emb
    if net.config["activate_w_mode"]:
        # Its layer stands between the inputs and the first layer of the times.
        first_of_times = 2 * features * features
        forward += first_of_times
    attention = 0
    for block, side in zip(net.unet_blocks, net.block_sides, strict=True):
        N, C = side * side, block.conv1.out_channels
        convolutions = [block.conv0, block.conv1]
        convolutions += [] if block.skip is None else [block.skip]
        convolutions += [block.qkv, block.proj] if block.attends else []
        forward += sum(2 * N * convolution.weight.numel() for convolution in convolutions)
        forward += 2 * block.affine.weight.numel()
        attention += 4 * N * N * C if block.attends else 0
    return Flops(forward + attention, attention, first_of_image + first_of_times, 0)


def _projectors(net: SiT, N: int) -> int:
    c = net.config
    D, P = c["hidden_size"], c["projector_dim"]
    return sum(2 * N * (D * P + P * P + P * z) for z in c["z_dims"] or ())


def train_flops(net: Network) -> int | None:
    """Model FLOPs per image and training step; None for a text-to-image network."""
    return None if isinstance(net, TextToImage) else count(net).train


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name ("NVIDIA H100 80GB HBM3"); None where it is not known.

    A MIG slice has its board's name, and no peak that is known.
    """
    words = re.split(r"[^A-Za-z0-9]+", device_name)
    if "MIG" in words:
        return None
    return next((peak for names, peak in _PEAKS if all(name in words for name in names)), None)
