"""The command `mixflow-fast`: train, sample, demo, inspect, export."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mixflow_fast import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        the exit code: 0 done, 1 training diverged (inspect: the weights do not fit), 2 refused
        input, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes overrides before the options or after them, not both.
    if rest and hasattr(options, "overrides") and not any(a.startswith("-") for a in rest):
        options.overrides += rest
    elif rest:
        flags = [a for a in rest if a.startswith("-")]
        parser.error(f"unrecognized arguments: {' '.join(flags or rest)}")
    try:
        return options.run(options, arguments)
    except (ValueError, OSError, ImportError) as error:
        return _report(error, 2)
    except KeyboardInterrupt:
        print("mixflow-fast: interrupted; the same command resumes", file=sys.stderr)
        return 130


def _report(error: Exception, code: int) -> int:
    if os.environ.get("MIXFLOW_DEBUG"):
        raise error
    print(f"mixflow-fast: error: {error}", file=sys.stderr)
    return code


def _train(options: argparse.Namespace, _arguments: list[str]) -> int:
    from mixflow_fast.build import check
    from mixflow_fast.config import load_config
    from mixflow_fast.distributed import rank, world_size
    from mixflow_fast.trainer import TrainingDiverged, train

    config = load_config(options.recipe, options.overrides)
    check(config, world_size())
    if options.dry_run:
        print(config.to_yaml(), end="")
        return 0
    try:
        result = train(config, resume=options.resume)
    except TrainingDiverged as error:
        return _report(error, 1)
    if rank() == 0:
        print(f"{result.weights}: {result.images_seen} images, step {result.step}")
    return 0 if result.finished else 130


def _sample(options: argparse.Namespace, _arguments: list[str]) -> int:
    import torch

    from mixflow_fast.checkpoint import weights_file
    from mixflow_fast.images import save_grid
    from mixflow_fast.models import load_model
    from mixflow_fast.sampling import sample

    if options.num < 1:
        raise ValueError(f"--num must be >= 1, got {options.num}")
    out = Path(options.out)
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out must end in .png (picture) or .npz (array), got {options.out}")
    model = load_model(weights_file(options.checkpoint), options.weights, clock=options.clock)
    if out.suffix == ".png" and model.in_channels not in (1, 3):
        raise ValueError(
            f"{options.checkpoint} makes {model.in_channels}-channel latents, not pictures: use "
            "--out FILE.npz and decode them with the autoencoder they were made by"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    labels = None
    if options.label is not None:
        labels = torch.tensor([options.label[i % len(options.label)] for i in range(options.num)])
    result = sample(
        model.to(device),
        labels=labels,
        num=options.num,
        steps=options.steps,
        method=options.method,
        cfg_scale=options.cfg_scale,
        cfg_channels=options.cfg_channels,
        shift=options.shift,
        seed=options.seed,
        balanced=True,
        batch_size=options.batch_size,
        progress=True,
    )
    if out.suffix == ".png":
        columns = min(options.num, 8)
        save_grid(out, result.x, columns=columns, scale=max(1, 64 // result.x.shape[-1]))
    else:
        _save_npz(out, result.x, result.labels)
    print(f"{out}: {options.num} samples, {options.method}, {result.nfe} network evaluations each")
    return 0


def _save_npz(path: Path, x: object, labels: object) -> None:
    import io

    import numpy as np

    from mixflow_fast.images import write_bytes

    buffer = io.BytesIO()
    np.savez(buffer, x=x.numpy(), y=labels.numpy())
    write_bytes(path, buffer.getvalue())


def _channels(text: str) -> int | str | None:
    return {"all": None, "auto": "auto"}[text] if text in ("all", "auto") else int(text)


def _demo(options: argparse.Namespace, arguments: list[str]) -> int:
    from dataclasses import replace

    from mixflow_fast.demo import SETTINGS, run_demo

    if options.seeds < 1:
        raise ValueError(f"--seeds must be >= 1, got {options.seeds}")
    settings = SETTINGS[options.data]
    changes = {
        name: value
        for name in ("gamma", "size", "base_images", "post_images", "base_lr", "post_lr", "samples")
        if (value := getattr(options, name)) is not None
    }
    result = run_demo(
        out=options.out,
        seeds=range(options.seed, options.seed + options.seeds),
        sweep=options.sweep,
        settings=replace(settings, **changes),
        command=shlex.join(["mixflow-fast", *arguments]),
        fresh=options.fresh,
    )
    print(Path(options.out, "report.md").read_text())
    print(f"{result['seconds']:.0f} s. Report: {Path(options.out, 'report.html')}")
    return 0


def _inspect(options: argparse.Namespace, _arguments: list[str]) -> int:
    import json

    from mixflow_fast.inspection import as_json, inspect_file
    from mixflow_fast.inspection_text import as_text

    found = inspect_file(options.checkpoint, options.weights, options.against)
    print(json.dumps(as_json(found), indent=1) if options.json else as_text(found))
    return 0 if found.fits else 1


def _export(options: argparse.Namespace, _arguments: list[str]) -> int:
    from mixflow_fast.export import export
    from mixflow_fast.inspection_text import size_text

    heads = options.num_heads
    done = export(
        options.checkpoint,
        options.to,
        options.out,
        weights=options.weights,
        head=options.head,
        bare=options.bare,
        clock=options.clock,
        num_heads=heads if heads is None or len(heads) > 1 else heads[0],
        force=options.force,
    )
    size = size_text(done.size_bytes)
    print(f"{done.path}: {done.model}, clock {done.clock}, {done.tensors} tensors, {size}")
    for note in done.notes:
        print(f"  {note}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mixflow-fast",
        description="Post-train flow-matching diffusion transformers with MixFlow.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher gives it
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "train",
        help="train or post-train from a recipe",
        description="Train or post-train. Started again in the same folder, it resumes. Several "
        "processes: torchrun --nproc-per-node N -m mixflow_fast.cli train ...",
        epilog="example: mixflow-fast train sit-xl2-256 data.path=latents/ "
        "train.init=SiT-XL-2-256.pt objective.gamma=0.8",
    )
    command.add_argument("recipe", help="name of a recipe, or a .yaml file")
    command.add_argument("overrides", nargs="*", metavar="section.field=value")
    command.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto continues the run in out= if there is one; never refuses such a folder",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="check and print the resolved configuration"
    )
    command.set_defaults(run=_train)

    command = commands.add_parser("sample", help="generate from a checkpoint")
    command.add_argument("checkpoint", help="run folder, or a .pt or .safetensors file")
    command.add_argument("--out", default="samples.png", help=".png grid or .npz arrays x, y")
    command.add_argument("--num", type=int, default=32, help="how many (default %(default)s)")
    command.add_argument("--steps", type=int, default=50, help="intervals (default %(default)s)")
    command.add_argument("--method", choices=("euler", "heun", "dopri5"), default="euler")
    command.add_argument("--label", type=int, nargs="+", help="classes, repeated; default: all")
    command.add_argument("--cfg-scale", type=float, default=1.0, help="1 = no guidance")
    command.add_argument(
        "--cfg-channels",
        type=_channels,
        default="auto",
        metavar="N|all|auto",
        help="guide the first N channels; auto: as the official model does (SiT 3, REPA all)",
    )
    command.add_argument("--shift", type=float, default=1.0, help="RAE's time shift of the grid")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument("--weights", choices=("ema", "model"), default="ema")
    command.add_argument(
        "--clock", choices=("data_at_1", "noise_at_1"), help="if the file does not say it"
    )
    command.set_defaults(run=_sample)

    command = commands.add_parser(
        "demo",
        help="base, control and MixFlow on small real images, with a report",
        description="Trains a small model on crops of photographs, post-trains it with and without "
        "MixFlow, samples, measures and writes a report. Finished arms are kept: interrupted, the "
        "same command goes on, and more seeds or --sweep add to what is there.",
    )
    command.add_argument("--out", default="runs/demo")
    command.add_argument("--data", choices=("photos", "digits"), default="photos")
    command.add_argument("--seed", type=int, default=0, help="first seed")
    command.add_argument("--seeds", type=int, default=1, help="how many seeds")
    command.add_argument("--sweep", action="store_true", help="add gammas and ablation rows")
    command.add_argument(
        "--fresh", action="store_true", help="start over instead of keeping finished arms"
    )
    command.add_argument("--gamma", type=float, help="of the mixflow arm")
    command.add_argument("--size", type=int, help="side in pixels")
    command.add_argument("--base-images", type=int)
    command.add_argument("--post-images", type=int)
    command.add_argument("--base-lr", type=float)
    command.add_argument("--post-lr", type=float)
    command.add_argument("--samples", type=int, help="generated images per cell")
    command.set_defaults(run=_demo)

    _add_inspect(commands)
    _add_export(commands)
    return parser


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "inspect",
        help="what is in a checkpoint, and whether its weights fit",
        description="Says whose checkpoint it is, which network, clock and settings, and whether "
        "names, shapes and values are right. Nothing in the file is executed. Exit code: 0 it "
        "fits, 1 it does not, 2 it cannot be read.",
        epilog="example: mixflow-fast inspect SiT-XL-2-256.pt --against SiT-XL/2",
    )
    command.add_argument("checkpoint", help="run folder, or a .pt or .safetensors file")
    command.add_argument(
        "--against",
        metavar="NAME",
        help="hold it against SiT-{S,B,L,XL}/{2,4,8} or DiTDH-{S,B,L,XL}; default: what the "
        "shapes tell",
    )
    command.add_argument("--weights", choices=("ema", "model"), default="ema")
    command.add_argument("--json", action="store_true", help="all findings as JSON")
    command.set_defaults(run=_inspect)


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "export",
        help="write a checkpoint for official samplers, as safetensors, or for diffusers",
        description="official: a .pt that the samplers of SiT, REPA and RAE load. ema: one "
        ".safetensors that says how its network is built. diffusers: a DiTTransformer2DModel "
        "folder (SiT and REPA), compared with the network when it is written.",
        epilog="example: mixflow-fast export runs/post --to official --out post.pt",
    )
    command.add_argument("checkpoint", help="run folder, or a .pt or .safetensors file")
    command.add_argument("--to", choices=("official", "ema", "diffusers"), required=True)
    command.add_argument("--out", required=True, help="the .pt, .safetensors or folder to write")
    command.add_argument("--weights", choices=("ema", "model"), default="ema")
    command.add_argument(
        "--head",
        choices=("velocity", "sigma", "as-is"),
        help="of a SiT: velocity for its sample scripts with --ckpt, sigma for its train script "
        "and for pretrained_models/ (with --bare); default velocity, for ema as-is",
    )
    command.add_argument(
        "--bare", action="store_true", help="official: the state dict without a dict around it"
    )
    command.add_argument(
        "--clock", choices=("data_at_1", "noise_at_1"), help="if the file does not say it"
    )
    command.add_argument(
        "--num-heads",
        type=int,
        nargs="+",
        metavar="N",
        help="if the shapes cannot tell; DiT-DH: two, encoder and head",
    )
    command.add_argument("--force", action="store_true", help="replace what is at --out")
    command.set_defaults(run=_export)


if __name__ == "__main__":
    sys.exit(main())
