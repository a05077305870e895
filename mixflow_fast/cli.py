"""The command `mixflow-fast`: train, sample, demo, inspect, export."""

from __future__ import annotations

import argparse
import atexit
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from mixflow_fast import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        the exit code: 0 done, or stopped by a signal with a checkpoint; 1 training diverged
        (inspect: the weights do not fit); 2 refused input, or a full disk; 130 interrupted. A
        second signal to a training run ends it with 128 + its number (130, 143).
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
    from mixflow_fast.checkpoint import SaveError
    from mixflow_fast.config import load_config
    from mixflow_fast.distributed import RankLost, leave, rank, roll_call, world_size
    from mixflow_fast.trainer import TrainingDiverged, train

    # Of DeepSpeed's own calls, once for each rank.
    warnings.filterwarnings("ignore", r".*`torch\.distributed.* is deprecated", FutureWarning)
    config = load_config(options.recipe, options.overrides)
    check(config, world_size())
    if options.dry_run:
        print(config.to_yaml(), end="")
        return 0
    try:
        with roll_call():
            result = train(config, resume=options.resume, recipe=options.recipe)
    except TrainingDiverged as error:
        return _report(error, 1)
    except SaveError as error:  # all ranks have it
        return _report(error, 2) if rank() == 0 else 2
    except RankLost as error:
        if error.speaks:
            _report(error, 1)
        _leave_at_once(1)
    atexit.register(leave)  # not yet: who calls this function may train again
    if rank() == 0:
        made = result.weights if result.weights.exists() else result.out  # train.save_weights
        print(f"{made}: {result.images_seen} images, step {result.step}")
    return 0  # also when it was asked to stop: its checkpoint is written


def _leave_at_once(code: int) -> None:
    """End without the clean-up that would wait for ranks that never answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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


def _verify_resume(options: argparse.Namespace, _arguments: list[str]) -> int:
    import tempfile

    from mixflow_fast.config import load_config
    from mixflow_fast.verify_resume import table, verify_resume

    config = load_config(options.recipe, options.overrides)
    out = Path(options.out or tempfile.mkdtemp(prefix="verify-resume-"))
    rows = verify_resume(config, out, options.steps, options.ranks)
    half, steps = options.steps // 2, options.steps
    print(
        f"{options.recipe}, ZeRO {config.train.zero_stage}, {config.train.precision}, "
        f"{options.ranks} rank{'s' * (options.ranks > 1)}: {steps} steps against {half}, a save, "
        f"fresh processes and {steps - half} more\n\n{table(rows)}\n"
    )
    differing = sum(row.differing for row in rows)
    print(f"{differing:,} differ" if differing else "the same bits", f"(both runs: {out})")
    return 1 if differing else 0


def _consolidate(options: argparse.Namespace, _arguments: list[str]) -> int:
    from mixflow_fast.consolidation import consolidate

    metadata = consolidate(Path(options.checkpoint), Path(options.out), options.force)
    print(f"{options.out}: {metadata['images_seen']} images, step {metadata['steps']}")
    return 0


def _ema(options: argparse.Namespace, _arguments: list[str]) -> int:
    from mixflow_fast import snapshots

    run = Path(options.folder)
    if options.sigma_rel is None and options.decay is None:
        found = snapshots.snapshots(run)
        print(snapshots.table(found) if found else f"{run} holds no snapshots")
        return 0
    if options.out is None:
        raise ValueError("--out must be given with --sigma-rel and --decay: the .pt to write")
    out = Path(options.out)
    if options.decay is not None:
        step = snapshots.extract(run, options.decay, out, options.force)
        print(f"{out}: EMA of decay {options.decay:g} after step {step}")
        return 0
    made = snapshots.reconstruct(run, options.sigma_rel, out, options.step, options.force)
    print(
        f"{out}: EMA of relative width {made.sigma_rel:g} after step {made.step}, made of "
        f"snapshots whose profile is {made.error:.1%} off"
    )
    if made.error > 0.1:
        print("warning: more snapshots, or a width between the saved ones, come closer")
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


def _run_report(options: argparse.Namespace, _arguments: list[str]) -> int:
    from mixflow_fast.run_report import write_run_report

    print(write_run_report(Path(options.run_folder), options.out and Path(options.out)))
    return 0


def _doctor(options: argparse.Namespace, _arguments: list[str]) -> int:
    import json

    from mixflow_fast.doctor import diagnose

    tell = sys.stderr.isatty()
    found = diagnose(lambda section: print(f"{section} ...", file=sys.stderr) if tell else None)
    print(json.dumps(found.as_json(), indent=1) if options.json else found.as_text())
    return 0 if found.healthy else 1


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
        "processes: torchrun --nproc-per-node N -m mixflow_fast.cli train ... The train.keep "
        "newest checkpoints stay, and those of each train.keep_every steps. Ctrl-C, SIGTERM or "
        "SIGUSR1 saves and ends with exit code 0; a second one ends at once.",
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
    _add_doctor(commands)
    _add_report(commands)
    _add_verify_resume(commands)
    _add_consolidate(commands)
    _add_ema(commands)
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


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "doctor",
        help="what this machine has, and whether it computes right",
        description="Versions, devices, every kernel against its reference on this device, "
        "attention backends, DeepSpeed, optional packages, disk. Exit code: 0 healthy (warnings "
        "are allowed), 1 not.",
    )
    command.add_argument("--json", action="store_true", help="one object instead of text")
    command.set_defaults(run=_doctor)


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


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "report",
        help="a run's curves, previews and settings as one HTML page",
        description="Reads a run folder, whether the run goes on, was interrupted or is done, and "
        "writes a page that loads nothing.",
        epilog="example: mixflow-fast report runs/post",
    )
    command.add_argument("run_folder", metavar="RUN", help="run folder (out= of the run)")
    command.add_argument("--out", metavar="FILE", help="the .html; default: RUN/report.html")
    command.set_defaults(run=_run_report)


def _add_verify_resume(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "verify-resume",
        help="prove that an interrupted run goes on to the bit",
        description="Trains N steps, and N/2 + a save + fresh processes + the other half, and "
        "compares every tensor of the last checkpoints and what each step saw, bit for bit. Exit "
        "code: 0 the same, 1 something differs, 2 it could not be run.",
        epilog="example: mixflow-fast verify-resume photos train.zero_stage=3 --ranks 2",
    )
    command.add_argument("recipe", help="name of a recipe, or a .yaml file")
    command.add_argument("overrides", nargs="*", metavar="section.field=value")
    command.add_argument("--steps", type=int, default=6, help="N (default %(default)s)")
    command.add_argument("--ranks", type=int, default=1, help="processes of each run (default 1)")
    command.add_argument("--out", help="empty folder for both runs; default: a temporary one")
    command.set_defaults(run=_verify_resume)


def _add_ema(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "ema",
        help="averages of the weights that a run kept, or of a width chosen afterwards",
        description="Lists a run's snapshots, or writes a weights file: with --sigma-rel the "
        "power-function EMA of that width, made of the snapshots (EDM2's post-hoc EMA), with "
        "--decay the EMA of one of the run's fixed decays.",
        epilog="example: mixflow-fast ema runs/post --sigma-rel 0.08 --out post-0.08.pt",
    )
    command.add_argument("folder", metavar="run", help="run folder")
    width = command.add_mutually_exclusive_group()
    width.add_argument("--sigma-rel", type=float, metavar="S", help="relative width, 0.05 to 0.15")
    width.add_argument("--decay", type=float, metavar="D", help="one of optim.ema_*decay*")
    command.add_argument("--step", type=int, help="snapshot that it ends at (default: the last)")
    command.add_argument("--out", help="the .pt to write")
    command.add_argument("--force", action="store_true", help="replace what is at --out")
    command.set_defaults(run=_ema)


def _add_consolidate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "consolidate",
        help="make one weights file from a checkpoint's shards",
        description="Writes the weights.pt that a run with train.save_weights=always writes "
        "itself. Needs no GPU, no DeepSpeed and no launcher.",
        epilog="example: mixflow-fast consolidate runs/post --out post.pt",
    )
    command.add_argument("checkpoint", help="run folder (its newest), or a checkpoints/step_N")
    command.add_argument("--out", required=True, help="the .pt to write")
    command.add_argument("--force", action="store_true", help="replace what is at --out")
    command.set_defaults(run=_consolidate)


if __name__ == "__main__":
    sys.exit(main())
