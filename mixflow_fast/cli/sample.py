"""`mixflow-fast sample`: generate from a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mixflow_fast.cli.sampler_options import add_sampler_options, chosen_sampler
from mixflow_fast.files import check_writable, user_path

if TYPE_CHECKING:
    from torch import Tensor

    from mixflow_fast.sampling.samples import SampleResult

_UNDO_SCALE = (
    "the latents are scaled as those in training: undo data.scale before the decoder "
    "(SD-VAE: x / 0.18215)"
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "sample",
        help="generate from a checkpoint",
        description="Generates a picture, or arrays x (N, C, H, W) and y (N,) of a .npz. The "
        "samples of a seed are the same however many are drawn.",
        epilog="example: mixflow-fast sample runs/post --out samples.npz --num 50000 --steps 10",
    )
    command.add_argument(
        "checkpoint", type=user_path, help="run folder, or a weights file of any kind"
    )
    command.add_argument(
        "--out",
        type=user_path,
        default="samples.png",
        help=".png grid or .npz arrays x, y (default %(default)s)",
    )
    command.add_argument("--force", action="store_true", help="replace what is at --out")
    command.add_argument("--num", type=int, default=32, help="how many (default %(default)s)")
    command.add_argument(
        "--label",
        type=int,
        nargs="+",
        help="classes, repeated; the number of classes itself is the null class, without a label; "
        "default: all in turn",
    )
    command.add_argument("--seed", type=int, default=0, help="default %(default)s")
    command.add_argument("--batch-size", type=int, default=64, help="default %(default)s")
    command.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="default %(default)s"
    )
    command.add_argument(
        "--clock", choices=("data_at_1", "noise_at_1"), help="if the file does not say it"
    )
    add_sampler_options(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    out = options.out
    if options.num < 1:
        raise ValueError(f"--num must be >= 1, got {options.num}")
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out must end in .png (picture) or .npz (array), got {out}")
    check_writable(out, options.force)
    import torch

    from mixflow_fast.models import load_model
    from mixflow_fast.sampling.samples import sample

    chosen = chosen_sampler(options)
    model = load_model(options.checkpoint, options.weights, clock=options.clock)
    if options.path is None:
        chosen = chosen.for_network(model.path)
    if out.suffix == ".png" and model.in_channels not in (1, 3):
        raise ValueError(
            f"{options.checkpoint} makes {model.in_channels}-channel latents, not pictures: use "
            f"--out FILE.npz and decode them with the autoencoder they were made by; {_UNDO_SCALE}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    guide = None
    if chosen.guide is not None:
        guide = load_model(chosen.guide, options.weights, clock=options.clock).to(device)
    labels = None
    if options.label is not None:
        # Repeated rather than grouped: a few samples already show every class.
        labels = torch.tensor([options.label[i % len(options.label)] for i in range(options.num)])
    print(chosen.describe())
    result = sample(
        model.to(device),
        labels=labels,
        num=options.num,
        sampler=chosen.sampler,
        guidance=chosen.guidance,
        guide=guide,
        remedy=chosen.remedy,
        seed=options.seed,
        balanced=chosen.preset is None or chosen.preset.labels == "balanced",
        batch_size=options.batch_size,
        progress=True,
    )
    _refuse_not_finite(result.x)
    save(out, result)
    print(f"{out}: {options.num} samples, {result.nfe} network evaluations each")
    if model.in_channels not in (1, 3):
        print(f"  {_UNDO_SCALE}")
    return 0


def _refuse_not_finite(x: Tensor) -> None:
    """Nothing is written of samples that are no numbers: a picture would show them as black."""
    wrong = (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(x)} samples are not finite (the first has id {wrong[0]}), and "
            "nothing was written: the weights are finite, so what the network makes of them is "
            "too large; check --clock, --cfg-scale and --steps, or choose another checkpoint"
        )


def save(out: Path, result: SampleResult) -> None:
    """A picture or arrays, whole or not at all."""
    import io

    import numpy as np

    from mixflow_fast.files import write_bytes
    from mixflow_fast.reports.images import save_grid

    if out.suffix == ".png":
        columns = min(len(result.x), 8)
        save_grid(out, result.x, columns=columns, scale=max(1, 64 // result.x.shape[-1]))
        return
    buffer = io.BytesIO()
    # A network without classes has no labels.
    arrays = {"x": result.x} | ({} if result.labels is None else {"y": result.labels})
    np.savez(buffer, **{name: tensor.numpy() for name, tensor in arrays.items()})
    write_bytes(out, buffer.getvalue())
