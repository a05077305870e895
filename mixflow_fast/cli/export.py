"""`mixflow-fast export`: a checkpoint for official samplers, as safetensors, or for diffusers."""

from __future__ import annotations

import argparse

from mixflow_fast.files import user_path
from mixflow_fast.messages import size_text


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "export",
        help="write a checkpoint for official samplers, as safetensors, or for diffusers",
        description="official: a .pt that the samplers of SiT, REPA and RAE load. ema: one "
        ".safetensors that says how its network is built. diffusers: a DiTTransformer2DModel "
        "folder (SiT and REPA), compared with the network when it is written; of a "
        "text-to-image run the folder that it was trained from, copied, with its transformer. "
        "lora: the adapters of a text-to-image run with lora.rank, for load_lora_weights.",
        epilog="example: mixflow-fast export runs/post --to official --out post.pt",
    )
    command.add_argument(
        "checkpoint", type=user_path, help="run folder, or a weights file of any kind"
    )
    command.add_argument("--to", choices=("official", "ema", "diffusers", "lora"), required=True)
    command.add_argument(
        "--out", type=user_path, required=True, help="the .pt, .safetensors or folder to write"
    )
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
    text_to_image = command.add_argument_group("text-to-image runs")
    text_to_image.add_argument(
        "--model",
        type=user_path,
        metavar="FOLDER",
        help="diffusers: the folder that it was trained from (default: the one that it records)",
    )
    text_to_image.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        help="of the transformer (default: that of the folder's weights; ema, lora: fp32)",
    )
    text_to_image.add_argument(
        "--link",
        action="store_true",
        help="diffusers: symbolic links to text encoders, autoencoder and the rest, not copies",
    )
    command.add_argument("--force", action="store_true", help="replace what is at --out")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from mixflow_fast.checkpoints.export import export

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
        model=options.model,
        dtype=options.dtype,
        link=options.link,
    )
    size = size_text(done.size_bytes)
    print(f"{done.path}: {done.model}, clock {done.clock}, {done.tensors} tensors, {size}")
    for note in done.notes:
        print(f"  {note}")
    return 0
