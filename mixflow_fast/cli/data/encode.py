"""`mixflow-fast data encode`: the latents of a prepared set."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from mixflow_fast.cli.data.resumable import resumable
from mixflow_fast.files import check_folder_writable, user_path

if TYPE_CHECKING:
    import torch

    from mixflow_fast.data.preparation.encode import EncodeOptions
    from mixflow_fast.models.autoencoders.sdvae import SDVAE

_SHARD_SAMPLES = 8192


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "encode",
        help="make the latents of a prepared set with Stable Diffusion's autoencoder",
        description="Writes mean | std of the posterior of every image, and of its mirror image, "
        "as a set that is trained on with data.kind=latents data.path=OUT. Shards are the unit of "
        "work: a run that was stopped goes on when the same command is given again, with any "
        "number of ranks (torchrun or srun).",
        epilog="example: torchrun --nproc-per-node 8 -m mixflow_fast.cli data encode imagenet-256 "
        "--vae sd-vae-ft-ema --out imagenet-256-latents",
    )
    command.add_argument(
        "prepared", type=user_path, help="folder that `mixflow-fast data prepare` wrote"
    )
    command.add_argument(
        "--vae",
        required=True,
        metavar="FOLDER",
        help="local folder of a diffusers AutoencoderKL (SiT: sd-vae-ft-ema, REPA: sd-vae-ft-mse)",
    )
    command.add_argument("--out", type=user_path, required=True, help="folder of the latents")
    command.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="images of one call of the encoder (64 at 256 pixels, 16 at 512)",
    )
    command.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="bf16 is about 1%% off in the mean (default: fp32)",
    )
    command.add_argument(
        "--mirrors",
        type=int,
        choices=(1, 2),
        default=2,
        help="2: also of the mirror images, as SiT trains; 1: as REPA trains (default: 2)",
    )
    command.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    command.add_argument(
        "--threads", type=int, default=0, help="that decode images (default: the rank's cores)"
    )
    command.add_argument(
        "--shard-samples",
        type=int,
        default=_SHARD_SAMPLES,
        metavar="N",
        help="images a shard (default %(default)s)",
    )
    command.add_argument(
        "--allow-lossy", action="store_true", help="take a set whose images are JPEG"
    )
    command.set_defaults(data_command=run)


def run(options: argparse.Namespace) -> int:
    _check_numbers(options)
    check_folder_writable(options.out)
    from mixflow_fast.data.preparation.encode import EncodeOptions
    from mixflow_fast.data.preparation.scan import core_count
    from mixflow_fast.data.preparation.shard_work import ranks_of_environment
    from mixflow_fast.data.prepared_images import IMAGES_FORMAT
    from mixflow_fast.data.set_files import read_manifest
    from mixflow_fast.models.autoencoders.sdvae import SDVAE

    rank, world = ranks_of_environment()
    size = int(str(read_manifest(options.prepared, IMAGES_FORMAT)["size"]))
    device = device_of_rank(options.device)
    vae = SDVAE(options.vae, size, precision=options.precision, name="--vae").to(device)
    how = EncodeOptions(
        mirrors=options.mirrors,
        batch=options.batch,
        threads=options.threads or core_count(),
        allow_lossy=options.allow_lossy,
        shard_samples=options.shard_samples,
    )

    def work() -> int:
        return _encode(options, vae, device, how, rank, world)

    return resumable(work, options.out, speaks=rank == 0)


def _check_numbers(options: argparse.Namespace) -> None:
    for name, least in (("batch", 1), ("threads", 0), ("shard_samples", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be >= {least}, got {value}")


def _encode(
    options: argparse.Namespace,
    vae: SDVAE,
    device: torch.device,
    how: EncodeOptions,
    rank: int,
    world: int,
) -> int:
    from mixflow_fast.data.preparation.encode import encode
    from mixflow_fast.messages import duration

    done = encode(options.prepared, options.out, vae, device, how, rank, world)
    if done.made:
        pace = f"{done.made / done.seconds:.3g} images/s"
        print(f"encoded {done.made:,} images in {duration(done.seconds)} ({pace})")
    if done.unfinished:
        print(
            f"{options.out}: {done.unfinished} shards are left to the other processes, and whoever "
            "makes the last one completes the set"
        )
    elif rank == 0 or done.made:
        print(
            f"{options.out}: complete, latents of {done.samples:,} images\n  train on it with "
            f"data.kind=latents data.path={options.out}"
        )
    return 0


def device_of_rank(name: str) -> torch.device:
    """The device of one of several processes that need not meet; ValueError where there is none."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU: give --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    # Slurm may give each task a GPU of its own, which is then the only one.
    device = torch.device("cuda", int(local) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
