"""The adapters of a LoRA run as one file that pipelines and interfaces load beside their network.

    transformer.LAYER.lora_A.weight     (rank, in)
    transformer.LAYER.lora_B.weight     (out, rank), times alpha / rank, so that alpha is rank

A program that looks for an alpha elsewhere, or nowhere, computes the same. The header says how the
adapters were trained, and the hash of the weights that they belong to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mixflow_fast.checkpoints.export_text_to_image import (
    DTYPES,
    Dtype,
    TextToImageWeights,
    Written,
)
from mixflow_fast.files import replacing
from mixflow_fast.messages import shorten
from mixflow_fast.models.text_to_image.lora import PREFIX, LoraSpec, fold_alpha, read_lora

# Relative RMS difference of an adapter's output to what was trained; half a digit of the dtype at
# each of A and B.
_TOLERANCE: Mapping[Dtype, float] = {"fp32": 1e-6, "bf16": 1e-2, "fp16": 2e-3}


def write_lora(weights: TextToImageWeights, out: Path, dtype: Dtype | None = None) -> Written:
    """Write adapters in diffusers' layout, whole or not at all.

    Args:
        weights: of a file of a LoRA run.
        out: the .safetensors file; what is there is replaced.
        dtype: of the adapters; None: fp32, as they were trained.

    Raises:
        ValueError: a whole network; numbers that the dtype cannot hold; a difference after reading
            back.
        OSError: it could not be written.
    """
    from safetensors.torch import save_file

    spec = weights.lora
    if spec is None:
        raise ValueError(
            f"{weights.file} holds the whole network, and --to lora writes the adapters of a run "
            "with lora.rank: export --to diffusers"
        )
    chosen: Dtype = dtype or "fp32"
    folded = fold_alpha(weights.state, spec)
    ready = {n: t.to(DTYPES[chosen]).contiguous() for n, t in folded.items()}
    if bad := [name for name, tensor in ready.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(f"{shorten(bad)} holds numbers that {chosen} cannot hold: --dtype fp32")
    with replacing(out) as partial:
        header = _header(weights, spec, chosen)
        save_file({f"{PREFIX}{name}": tensor for name, tensor in ready.items()}, partial, header)
        back, _ = read_lora(partial)
        error = _difference(weights.state, back, spec)
        if back.keys() != ready.keys() or not error <= _TOLERANCE[chosen]:
            raise ValueError(
                f"the file computes something else than the adapters (relative RMS {error:.2g}); "
                "nothing was written: please report it with the versions of torch and safetensors"
            )
    layers = len(ready) // 2
    numbers = sum(tensor.numel() for tensor in ready.values())
    notes = [
        f"read back: {layers} adapters of rank {spec.rank}, {numbers:,} numbers in {chosen}, "
        f"relative difference {error:.1e} to what was trained",
        f"pipeline.load_lora_weights({str(out)!r}) adds them to "
        f"{weights.folder or 'the network that they were trained beside'}",
    ]
    if spec.scale != 1:
        notes.append(f"alpha / rank = {spec.scale:g} is in lora_B: use the file with strength 1")
    return Written(len(ready), notes)


def _header(weights: TextToImageWeights, spec: LoraSpec, dtype: Dtype) -> dict[str, str]:
    """Names that no program takes for an alpha."""
    return {
        "format": "pt",
        **weights.record(dtype),
        "rank": str(spec.rank),
        "trained_alpha": f"{spec.alpha:g}",
        "targets": json.dumps(spec.targets),
        "base": spec.base or "",
    }


def _difference(trained: Mapping[str, Tensor], back: Mapping[str, Tensor], spec: LoraSpec) -> float:
    """The largest relative RMS difference over the adapters, on random inputs, in float64."""
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for name in (n for n in trained if n.endswith(".lora_A.weight")):
        x = torch.randn(trained[name].shape[1], generator=generator, dtype=torch.float64)
        up = name.replace(".lora_A.", ".lora_B.")
        if name not in back or up not in back:
            return float("inf")
        expected = spec.scale * (trained[up].double() @ (trained[name].double() @ x))
        found = back[up].double() @ (back[name].double() @ x)
        # Adapters that were not trained give zero, and so must the file's.
        size = expected.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        error = (found - expected).square().mean().sqrt() / size
        largest = max(largest, error.item())
    return largest
