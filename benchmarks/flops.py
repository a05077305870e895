"""Model FLOPs of the networks by formula (two a multiply-add): `python -m benchmarks.flops`.

The formulas are in `mixflow_fast/models/flops.py`.

Importing this module tells PyTorch's `FlopCounterMode` what the fused attention counts for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from mixflow_fast.cli.errors import quiet_without_reader
from mixflow_fast.models import Transformer, build
from mixflow_fast.models.flops import Flops, count, train_flops

# Measured with a product of 8192^3 on an H200, and the dense bf16 peak of H100 and H200 SXM.
MEASURED_TFLOPS, PEAK_TFLOPS = 790.0, 989.4

__all__ = ["Flops", "count", "main", "on_meta", "train_flops"]


@register_flop_formula(torch.ops.mixflow_fast.attention)
def _attention_flops(qkv: Sequence[int], *_: object, **__: object) -> int:
    B, N, _, H, K = qkv
    return 4 * B * H * N * N * K


@register_flop_formula(torch.ops.mixflow_fast.attention_backward)
def _attention_backward_flops(dout: Sequence[int], *args: Sequence[int], **_: object) -> int:
    """Four products; the fifth, scores computed again, is not the model's."""
    return 2 * _attention_flops(args[3])


SIZES = ("S", "B", "L", "XL")
# As the published tables name them: arguments of `build`.
NETWORKS: dict[str, tuple[str, Mapping[str, object]]] = {
    **{f"SiT-{s}/2 {8 * n}": (f"SiT-{s}/2", {"input_size": n}) for s in SIZES for n in (32, 64)},
    **{f"REPA XL/2 {8 * n}": ("SiT-XL/2", {"input_size": n, "z_dims": [768]}) for n in (32, 64)},
    **{f"DiTDH-{s} {16 * n}": (f"DiTDH-{s}", {"input_size": n}) for s in SIZES for n in (16, 32)},
}


def on_meta(label: str, **options: object) -> Transformer:
    """A network of `NETWORKS` without memory; `options` replace those of the published one."""
    name, published = NETWORKS[label]
    with torch.device("meta"):
        return build(name, **{**published, **options})


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table of all networks."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    print("GFLOP an image: forward, training (in brackets with the zeros of padding), share of")
    print(f"attention; images/s at {MEASURED_TFLOPS:g} (product of 8192^3) and at {PEAK_TFLOPS:g}")
    print("TFLOP/s (peak): no step reaches either\n")
    columns = "network", "forward", "train", "(padded)", "attn %", "@790", "@989"
    print("{:<15} {:>8} {:>8} {:>10} {:>7} {:>7} {:>7}".format(*columns))
    for name in NETWORKS:
        net = on_meta(name)
        flops, padded = count(net), count(net, padded=True)
        more = f"({padded.train / 1e9:.1f})" if padded != flops else ""
        rates = [peak * 1e12 / flops.train for peak in (MEASURED_TFLOPS, PEAK_TFLOPS)]
        print(
            f"{name:<15} {flops.forward / 1e9:8.1f} {flops.train / 1e9:8.1f} {more:>10} "
            f"{300 * flops.attention / flops.train:7.1f} {rates[0]:7.0f} {rates[1]:7.0f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(quiet_without_reader(main))
