"""What the commands of `mixflow-fast` take."""

from __future__ import annotations

import argparse

from mixflow_fast import __version__


def _channels(text: str) -> int | str | None:
    return {"all": None, "auto": "auto"}[text] if text in ("all", "auto") else int(text)


def parser() -> argparse.ArgumentParser:
    """The parser; `run` of what it returns is the name of a command's function in `cli`."""
    found = argparse.ArgumentParser(
        prog="mixflow-fast",
        description="Post-train flow-matching diffusion transformers with MixFlow.",
    )
    found.add_argument("--version", action="version", version=__version__)
    found.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher gives it
    commands = found.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "train",
        help="train or post-train from a recipe",
        description="Train or post-train. Started again in the same folder, it resumes. Several "
        "processes: torchrun --nproc-per-node N -m mixflow_fast.cli train ... The train.keep_last "
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
    command.set_defaults(run="train")

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
    command.set_defaults(run="sample")

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
    command.set_defaults(run="demo")

    _add_inspect(commands)
    _add_export(commands)
    _add_doctor(commands)
    _add_report(commands)
    _add_verify_resume(commands)
    _add_consolidate(commands)
    _add_ema(commands)
    return found


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
    command.set_defaults(run="inspect")


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "doctor",
        help="what this machine has, and whether it computes right",
        description="Versions, devices, every kernel against its reference on this device, "
        "attention backends, DeepSpeed, optional packages, disk. Exit code: 0 healthy (warnings "
        "are allowed), 1 not.",
    )
    command.add_argument("--json", action="store_true", help="one object instead of text")
    command.set_defaults(run="doctor")


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
    command.set_defaults(run="export")


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
    command.set_defaults(run="run_report")


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
    command.set_defaults(run="verify_resume")


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
    width.add_argument("--decay", type=float, metavar="D", help="one of optim.ema_decays")
    command.add_argument("--step", type=int, help="snapshot that it ends at (default: the last)")
    command.add_argument("--out", help="the .pt to write")
    command.add_argument("--force", action="store_true", help="replace what is at --out")
    command.set_defaults(run="ema")


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
    command.set_defaults(run="consolidate")
