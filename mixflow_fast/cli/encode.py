"""`mixflow-fast encode`: the cache of a text-to-image run, of images with captions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mixflow_fast.cli.data.encode import device_of_rank
from mixflow_fast.cli.data.resumable import resumable
from mixflow_fast.files import check_folder_writable, ends_digest, user_path

if TYPE_CHECKING:
    import torch

    from mixflow_fast.data.preparation.captioned_source import CaptionedSource
    from mixflow_fast.data.preparation.encode_buckets import Autoencoder
    from mixflow_fast.data.preparation.encode_captioned import (
        CaptionedEncoded,
        CaptionedJob,
        CaptionedModel,
    )

_SHARD_IMAGES, _SHARD_PROMPTS, _TEXT_BATCH, _MAX_BAD, _SIZE = 2048, 2048, 32, 100, 512
_TRIED = 2000  # prompts that are looked at for tokens that are cut off


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "encode",
        help="make the cache of a text-to-image run from images with captions",
        description="Writes what training reads instead of pictures and words: embeddings of every "
        "prompt, stored once however many images have it, and mean | std of the autoencoder's "
        "posterior of every image. Says what it will take before it begins. One model is loaded at "
        "a time: the text encoders one after the other, then the autoencoder. Shards are the unit "
        "of work: a run that was stopped goes on when the same command is given again, with any "
        "number of ranks (torchrun or srun). Nothing is downloaded.",
        epilog="examples: mixflow-fast encode --model stable-diffusion-3.5-medium --data pictures "
        "--out cache --dry-run; torchrun --nproc-per-node 8 -m mixflow_fast.cli encode --model "
        "stable-diffusion-3.5-medium --data shards --out cache --buckets "
        "1024x1024,1152x896,896x1152 --t5-length 154",
    )
    command.add_argument(
        "--model",
        type=user_path,
        required=True,
        metavar="FOLDER",
        help="local folder of a whole pipeline of diffusers (SD3 and 3.5, FLUX.1, Z-Image): "
        "model_index.json, text encoders, tokenizers, vae, transformer/config.json",
    )
    command.add_argument(
        "--data",
        type=user_path,
        required=True,
        metavar="SOURCE",
        help="a folder of images with NAME.txt beside each; or with metadata.jsonl, .csv or "
        ".parquet (file_name, text); or of webdataset's .tar files (KEY.jpg, KEY.txt)",
    )
    command.add_argument("--out", type=user_path, required=True, help="folder of the cache")
    sizes = command.add_mutually_exclusive_group()
    sizes.add_argument(
        "--size",
        type=int,
        help=f"side of square crops in pixels, a multiple of 16 (default {_SIZE})",
    )
    sizes.add_argument(
        "--buckets",
        metavar="WxH,...",
        help="crops of several shapes, each image the nearest: 1024x1024,1152x896,896x1152",
    )
    command.add_argument(
        "--t5-length",
        type=int,
        metavar="N",
        help="tokens of T5 (Z-Image: of Qwen3). There is no mask, so the padding is seen, and "
        "training and sampling are at this length. Default: the pipeline's own, 256 for SD3 and "
        "512 for FLUX.1 and Z-Image; SD3.5 medium was trained at 77 and 154, which also take less "
        "room",
    )
    command.add_argument(
        "--text",
        choices=("cached", "online"),
        default="cached",
        help="online: store token ids only, and training runs the text encoders (T5 in bf16 is "
        "9.5 GB of the GPU) (default %(default)s)",
    )
    command.add_argument(
        "--mirrors",
        type=int,
        choices=(1, 2),
        default=1,
        help="2: mirrored images, too. Captions say left and right, and pictures hold letters, "
        "which a mirrored image makes wrong (default %(default)s)",
    )
    command.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="images of one call of the autoencoder (16 at 512 pixels, 4 at 1024)",
    )
    command.add_argument(
        "--text-batch",
        type=int,
        default=_TEXT_BATCH,
        metavar="N",
        help="prompts of one call of a text encoder (default %(default)s)",
    )
    command.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        default="bf16",
        help="of the text encoders; embeddings are stored in bf16, the autoencoder runs in fp32 "
        "(default %(default)s)",
    )
    command.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    command.add_argument(
        "--on-bad",
        choices=("refuse", "skip"),
        default="refuse",
        help="images and captions that cannot be used: refuse them and write all other shards, or "
        "leave them out (default %(default)s)",
    )
    command.add_argument(
        "--max-bad",
        type=int,
        default=_MAX_BAD,
        metavar="N",
        help="leave out at most so many (default %(default)s)",
    )
    command.add_argument(
        "--adapter",
        metavar="FILE.py:CLASS",
        help="of a model of your own: a class with prompt_encoder(folder, length, dtype, device), "
        "which returns what mixflow_fast.models.text_to_image.prompts.PromptEncoder is",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="say what it would take, and make nothing"
    )
    command.add_argument(
        "--threads", type=int, default=0, help="that decode images (default: the rank's cores)"
    )
    command.add_argument(
        "--shard-images",
        type=int,
        default=_SHARD_IMAGES,
        metavar="N",
        help="images a shard (default %(default)s)",
    )
    command.add_argument(
        "--shard-prompts",
        type=int,
        default=_SHARD_PROMPTS,
        metavar="N",
        help="prompts a shard (default %(default)s)",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    _check_numbers(options)
    check_folder_writable(options.out, "--out")
    from mixflow_fast.data.buckets import parse_buckets
    from mixflow_fast.data.preparation.encode_captioned import CaptionedJob, CaptionedOptions
    from mixflow_fast.data.preparation.scan import core_count
    from mixflow_fast.data.preparation.shard_work import ranks_of_environment
    from mixflow_fast.models.text_to_image.folder import check_positions

    rank, world = ranks_of_environment()
    buckets = parse_buckets(options.buckets or str(options.size or _SIZE))
    device = device_of_rank(options.device)
    # Before the source, which may take minutes to be listed.
    model = _model(options, device)
    sizes = [(bucket.width, bucket.height) for bucket in buckets]
    check_positions(options.model, sizes, model.autoencoder.factor, "--size or --buckets")
    for name, place in (("--data", options.data), ("--model", options.model)):
        if options.out.resolve().is_relative_to(place.resolve()):
            raise ValueError(
                f"--out {options.out} is inside of {name} {place}: choose a folder beside it"
            )
    how = CaptionedOptions(
        buckets=buckets,
        text=options.text,
        text_dtype=options.dtype,
        mirrors=options.mirrors,
        batch=options.batch,
        text_batch=options.text_batch,
        on_bad=options.on_bad,
        max_bad=options.max_bad,
        threads=options.threads or core_count(),
        shard_images=options.shard_images,
        shard_prompts=options.shard_prompts,
    )

    def work() -> int:
        job = CaptionedJob(_source(options, rank), options.out, model, device, how)
        if rank == 0:
            print("\n".join([*job.describe(), *_cut(job, model)]), flush=True)
        if options.dry_run:
            return 0
        done = job.run(rank, world)
        _say_done(options, done, rank, world)
        return 0

    return resumable(work, options.out, speaks=rank == 0)


def _check_numbers(options: argparse.Namespace) -> None:
    least = {"threads": 0, "max_bad": 0}
    for name in (
        *("size", "t5_length", "batch", "text_batch", "threads", "max_bad"),
        *("shard_images", "shard_prompts"),
    ):
        value = getattr(options, name)
        if value is not None and value < least.get(name, 1):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} must be >= {least.get(name, 1)}, got {value}")


def _source(options: argparse.Namespace, rank: int) -> CaptionedSource:
    from mixflow_fast.data.preparation.captioned_source import open_captioned
    from mixflow_fast.files import existing_path

    existing_path(options.data, "--data")
    if rank == 0:
        print(f"reading captions and headers of {options.data}", file=sys.stderr, flush=True)
    return open_captioned(options.data, options.on_bad, options.max_bad)


def _model(options: argparse.Namespace, device: torch.device) -> CaptionedModel:
    """What encodes. No weights are read."""
    import torch

    from mixflow_fast.data.preparation.encode_captioned import CaptionedModel
    from mixflow_fast.files import existing_path, sha256
    from mixflow_fast.models.text_to_image.loading import adapter_class
    from mixflow_fast.models.text_to_image.prompts import prompt_encoder

    folder = existing_path(options.model, "--model")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    build = prompt_encoder
    if options.adapter is not None:
        try:
            own = adapter_class(options.adapter)
        except ValueError as error:
            raise ValueError(f"--{error}") from error
        build = getattr(own, "prompt_encoder", None)
        if build is None:
            raise ValueError(
                f"--adapter {options.adapter} has no prompt_encoder(folder, length, dtype, "
                "device), which encodes its prompts"
            )
    text = build(folder, length=options.t5_length, dtype=dtype, device=device)
    vae = _autoencoder(folder, device)
    config = folder / "transformer" / "config.json"
    import transformers

    encoders = dict(text.record()) | {"library": f"transformers {transformers.__version__}"}
    if options.text == "cached":
        encoders |= _weights(folder, encoders)
    return CaptionedModel(
        text=text,
        autoencoder=vae,
        class_name=text.class_name,
        text_length=text.length,
        record={
            "transformer": sha256(config) if config.is_file() else "",
            "encoders": encoders,
            "vae": dict(vae.record),
        },
    )


def _autoencoder(folder: Path, device: torch.device) -> Autoencoder:
    """The pipeline's autoencoder, whose weights are read when it is loaded."""
    from mixflow_fast.data.preparation.encode_buckets import Autoencoder
    from mixflow_fast.models.autoencoders.sdvae import ImageVAE, SDVAEFiles

    name = "--model"
    if not (folder / "vae").is_dir():
        raise ValueError(
            f"--model {folder} has no folder vae: give the whole folder of the pipeline"
        )
    files = SDVAEFiles.read(folder / "vae", name)

    def load() -> ImageVAE:
        return ImageVAE(folder / "vae", name=name).to(device)

    return Autoencoder(files.latent_channels, files.downsampling, files.scale, files.record(), load)


def _weights(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """What tells the weights of text encoders from others without reading gigabytes.

    Args:
        folder: of the pipeline.
        files: names in it, such as text_encoder/config.json, of the encoders.

    Returns:
        name of each file of weights -> SHA-256 of its size, its first and its last MiB.

    Raises:
        ValueError: an encoder without weights.
    """
    found = {}
    for name in sorted({n.split("/")[0] for n in files if n.startswith("text_encoder")}):
        paths = sorted((folder / name).glob("*.safetensors"))
        if not paths:
            raise ValueError(
                f"--model {folder} has no .safetensors in {name}: give the whole folder of the "
                "pipeline (a .bin is a pickle, which is not read), or --text online"
            )
        for path in paths:
            found[f"{name}/{path.name}"] = ends_digest(path)
    return found


def _cut(job: CaptionedJob, model: CaptionedModel) -> list[str]:
    """A line on prompts that are longer than an encoder sees."""
    count = getattr(model.text, "cut", None)  # a user's own class need not have it
    texts = job.prompts.texts[:_TRIED]
    if count is None:
        return []
    cut = ", ".join(f"{n:,} by {name}" for name, n in count(texts).items() if n)
    of = f"of the first {len(texts):,} prompts" if len(job.prompts.texts) > _TRIED else "prompts"
    return [f"cut       {of}, which are too long: {cut}"] if cut else []


def _say_done(options: argparse.Namespace, done: CaptionedEncoded, rank: int, world: int) -> None:
    from mixflow_fast.messages import duration

    if done.unfinished:
        print(
            f"{options.out}: process {rank} of {world} made {done.made} shards; {done.unfinished} "
            f"of {done.shards} are left to the others, and whoever makes the last one completes "
            "the cache"
        )
        return
    if rank and not done.made:
        return
    how = f"complete in {duration(done.seconds)}" if done.made else "complete already"
    skipped = f", {done.skipped:,} left out" if done.skipped else ""
    if skipped and not done.made:
        skipped += "; once good files are in their place, make the cache in another --out"
    print(
        f"{options.out}: {how}, {done.items - done.skipped:,} images and {done.prompts:,} prompts "
        f"in {done.shards:,} shards{skipped}\n  train on it with data.kind=captioned "
        f"data.path={options.out} model.folder={options.model}"
    )
