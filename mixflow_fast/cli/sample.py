"""`mixflow-fast sample`: generate from a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mixflow_fast.cli import extractors, sample_text_to_image
from mixflow_fast.cli.sampler_options import add_sampler_options, chosen_sampler
from mixflow_fast.cli.sources import add_source_option, chosen_source, describe_start, refuse_unused
from mixflow_fast.files import check_folder_writable, check_writable, user_path

if TYPE_CHECKING:
    from mixflow_fast.cli.picture_sets import Drawer, Measure
    from mixflow_fast.models import Network
    from mixflow_fast.models.weights.sources import StoredSource
    from mixflow_fast.sampling.samples import SampleResult

_BATCH_SIZE = 64
_NUM = 32
_UNDO_SCALE = (
    "the latents are scaled as those in training: undo data.scale before the decoder "
    "(SD-VAE: x / 0.18215)"
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "sample",
        help="generate from a checkpoint",
        description="Generates a picture of some; arrays x (N, C, H, W) and y (N,) as the network "
        "makes them, in a .npz; or a set of 8-bit pictures of any size: a folder, and beside it a "
        ".npz that ADM's evaluator reads (arr_0) with the labels in a file of their own. A set is "
        "made in shards by any number of ranks (torchrun or srun), and the same command goes on "
        "after a stop. The samples of a seed are the same however many are drawn. Of a "
        "text-to-image run, or of a pipeline's folder, --prompts makes pictures in a folder.",
        epilog="examples: mixflow-fast sample runs/post --out samples.npz --steps 10; torchrun "
        "--nproc-per-node 8 -m mixflow_fast.cli sample runs/post --decoder sd-vae-ft-ema -n "
        "50000 --out sets/post; mixflow-fast sample runs/t2i --prompts 'a fox' --out foxes",
    )
    command.add_argument(
        "checkpoint", type=user_path, help="run folder, or a weights file of any kind"
    )
    command.add_argument(
        "--out",
        type=user_path,
        default="samples.png",
        help=".png: a grid; .npz: arrays x, y, or with --decoder or --quantise a set of pictures; "
        "without an ending: a set, SET/ and SET.npz (default %(default)s)",
    )
    command.add_argument("--force", action="store_true", help="replace what is at --out")
    command.add_argument(
        "-n",
        "--num",
        type=int,
        help="how many (default 32); -n under torchrun, which takes --num for a prefix of "
        "an option of its own",
    )
    command.add_argument(
        "--label",
        type=int,
        nargs="+",
        help="classes, repeated; the number of classes itself is the null class, without a label; "
        "default: all in turn",
    )
    command.add_argument("--seed", type=int, default=0, help="default %(default)s")
    command.add_argument(
        "--batch-size",
        type=int,
        help=f"default {_BATCH_SIZE}, with --prompts {sample_text_to_image.BATCH_SIZE}",
    )
    command.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="default %(default)s"
    )
    command.add_argument(
        "--mode",
        choices=("auto", "eager", "compile", "graph"),
        default="auto",
        help="how the network is run: compile sends its blocks through torch.compile, graph makes "
        "each step one CUDA graph as well (no GPU has run that yet); auto is compile for much work "
        "on a GPU, else eager (default %(default)s)",
    )
    command.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        help="of the network; state, guidance and update are float32 in any case (default: as the "
        "weights are)",
    )
    command.add_argument(
        "--clock",
        choices=("data_at_1", "noise_at_1"),
        help="of a file that does not say it (the guide's, too)",
    )
    pixels = command.add_argument_group("pixels")
    pixels.add_argument(
        "--decoder",
        metavar="FOLDER",
        help="local folder that decodes latents: a diffusers AutoencoderKL (SiT: sd-vae-ft-ema, "
        "REPA: sd-vae-ft-mse), or RAE's config.json and model.pt",
    )
    pixels.add_argument("--decoder-stats", metavar="FILE", help="RAE's stat.pt")
    pixels.add_argument(
        "--decoder-scale",
        type=float,
        metavar="F",
        help="what training latents were multiplied by (SD-VAE; default: its scaling_factor)",
    )
    pixels.add_argument(
        "--decoder-precision", choices=("fp32", "bf16"), help="of an SD-VAE (default fp32)"
    )
    pixels.add_argument(
        "--quantise",
        choices=("round", "floor", "round_even"),
        help="to 8 bits: round as SiT, floor as REPA, RAE and ADM, round_even as diffusers "
        "(default: the preset's, else round)",
    )
    sets = command.add_argument_group("sets of pictures")
    sets.add_argument(
        "--keep-shards", action="store_true", help="keep SET/shards beside the file of all pictures"
    )
    sets.add_argument(
        "--keep-latents",
        action="store_true",
        help="keep what was decoded, as SET/latents/00000.npy, float16 (1000, C, h, w) each",
    )
    sets.add_argument(
        "--png", action="store_true", help="write each picture as SET/png/000000.png, too"
    )
    sets.add_argument(
        "--evaluate",
        action="store_true",
        help="compute features of each shard when it is made, and the numbers of `mixflow-fast "
        "evaluate` when all are; they are appended to SET.metrics.jsonl; needs --reference and "
        "features",
    )
    sets.add_argument(
        "--reference",
        type=user_path,
        metavar="FILE",
        help="of --evaluate: ADM's .npz, EDM2's .pkl, or what `mixflow-fast reference` made",
    )
    sample_text_to_image.add_options(command)
    add_sampler_options(command)
    add_source_option(command)
    extractors.add_options(command, "features for --evaluate", device=False)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.prompts is not None:
        return sample_text_to_image.run(options)
    sample_text_to_image.refuse_without_prompts(options)
    if options.batch_size is None:
        options.batch_size = _BATCH_SIZE
    if options.num is None:
        options.num = _NUM
    out = options.out
    _check(options)
    from mixflow_fast.cli.picture_sets import Extras, make_set
    from mixflow_fast.distributed.process_group import rank, world_size

    pictures = _makes_set(options)
    if not pictures and world_size() > 1:
        raise ValueError(
            f"{world_size()} processes make a set of pictures together, and {out} is made by one: "
            "give a folder as --out, or start one process"
        )
    measure = _measure(options)
    drawer, stored = _drawer(options)
    if options.keep_latents and drawer.decoder is None:
        raise ValueError(
            f"--keep-latents keeps what --decoder decodes, and {options.checkpoint} is sampled "
            "without one: leave it out"
        )
    if rank() == 0:
        print(drawer.chosen.describe())
        print(f"network: {drawer.prepared.describe()}")
        if start := describe_start(stored, drawer.source):
            print(start)
    if pictures:
        extras = Extras(
            keep_shards=options.keep_shards,
            keep_latents=options.keep_latents,
            png=options.png,
            measure=measure,
        )
        return make_set(drawer, options.num, out.with_suffix(""), extras)
    import torch

    result = drawer.samples(torch.arange(options.num), progress=True)
    picture = out.suffix == ".png"
    save(out, replace(result, x=drawer.to_pixels(result.x)) if picture else result)
    print(f"{out}: {options.num} samples, {result.nfe} network evaluations each")
    if drawer.latent and drawer.decoder is None:
        print(f"  {_UNDO_SCALE}")
    return 0


def _makes_set(options: argparse.Namespace) -> bool:
    """Whether a set of pictures is made: a folder, or a .npz of what is decoded or rounded."""
    rounded = options.decoder is not None or options.quantise is not None
    return not options.out.suffix or (options.out.suffix == ".npz" and rounded)


def _check(options: argparse.Namespace) -> None:
    """Refuse what the options alone show to be wrong, before anything is read."""
    out = options.out
    if options.num < 1:
        raise ValueError(f"--num must be >= 1, got {options.num}")
    if out.suffix not in (".png", ".npz", ""):
        raise ValueError(
            f"--out must end in .png (picture) or .npz (array), or be a folder's name without a "
            f"dot (a set), got {out}"
        )
    for name in ("decoder_stats", "decoder_scale", "decoder_precision"):
        if options.decoder is None and getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} needs --decoder FOLDER")
    _check_measure(options)
    if not _makes_set(options):
        for name in ("keep_shards", "keep_latents", "png", "evaluate"):
            if getattr(options, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} belongs to a set of pictures: give a folder as "
                    "--out"
                )
        check_writable(out, options.force)
        return
    if options.force:
        raise ValueError(
            f"a set is never replaced: leave --force out, and delete {out.with_suffix('')} and "
            "what lies beside it under its name to make it again"
        )
    check_folder_writable(out.with_suffix(""))


def _check_measure(options: argparse.Namespace) -> None:
    """Refuse --evaluate without what it needs, and what does nothing without it."""
    chosen = extractors.given(options)
    if options.evaluate and options.reference is None:
        raise ValueError("--evaluate needs --reference FILE, which the set is measured against")
    if not options.evaluate and (options.reference is not None or chosen):
        what = "--reference" if options.reference is not None else chosen[0]
        raise ValueError(f"{what} does nothing without --evaluate")


def _measure(options: argparse.Namespace) -> Measure | None:
    """What --evaluate asks for, read and checked before anything is sampled."""
    if not options.evaluate:
        return None
    from mixflow_fast.cli.data.encode import device_of_rank
    from mixflow_fast.cli.picture_sets import Measure
    from mixflow_fast.evaluation.evaluate import check_measurable
    from mixflow_fast.evaluation.reference import read_reference

    reference, device = read_reference(options.reference), str(device_of_rank("auto"))
    networks = extractors.chosen(options, device)
    check_measurable(networks, reference)
    return Measure(reference, networks, device)


def _drawer(options: argparse.Namespace) -> tuple[Drawer, StoredSource | None]:
    """The networks, on this process's device, and how they are sampled; the source of the file."""
    from mixflow_fast.cli.data.encode import device_of_rank
    from mixflow_fast.cli.picture_sets import Drawer
    from mixflow_fast.distributed.process_group import rank
    from mixflow_fast.models.autoencoders.decoding import load_decoder

    chosen = chosen_sampler(options)
    loaded = _network(options.checkpoint, options)
    model = loaded.model
    refuse_unused(options.source_w, {str(options.checkpoint): loaded.source})
    source = chosen_source(loaded.source, options.source_w)
    if options.path is None:
        chosen = chosen.for_network(model.path)
    preset = chosen.preset
    rule = options.quantise or ("round" if preset is None else preset.quantisation)
    decoder, latent = None, model.in_channels not in (1, 3)
    shown = options.out.suffix != ".npz" or options.quantise is not None  # and not kept as floats
    if options.decoder is not None:
        decoder = load_decoder(
            options.decoder,
            stats=options.decoder_stats,
            scale=options.decoder_scale,
            precision=options.decoder_precision or "fp32",
            quantisation=rule,
        )
        decoder.check((model.in_channels, model.input_size, model.input_size))
    elif latent and shown:
        raise ValueError(
            f"{options.checkpoint} makes {model.in_channels}-channel latents, not pictures: give "
            "the autoencoder that they were made by with --decoder FOLDER, or use --out FILE.npz "
            f"and decode them elsewhere; {_UNDO_SCALE}"
        )
    elif loaded.latent and not latent and shown and rank() == 0:
        # By the channels alone these might be pictures.
        print(
            f"note: {options.checkpoint} was trained on latents of {model.in_channels} channels, "
            "which are taken for pictures as they are: give their autoencoder with --decoder "
            "FOLDER if they are none",
            file=sys.stderr,
        )
    device, guide = device_of_rank("auto"), None
    if chosen.guide is not None:
        guide = _network(chosen.guide, options, guide=True).model.to(device)
    if source is not None:
        source.source.predictor.to(device)
    drawer = Drawer(
        model=model.to(device),
        chosen=chosen,
        guide=guide,
        weights=options.weights,
        step=loaded.step,
        seed=options.seed,
        labels=options.label,
        balanced=preset is None or preset.labels == "balanced",
        batch_size=options.batch_size,
        decoder=None if decoder is None else decoder.to(device),
        quantisation=rule,
        mode=options.mode,
        precision=options.precision,
        num=options.num,
        source=source,
    )
    return drawer, loaded.source


@dataclass(frozen=True)
class _Loaded:
    """A network, and what its file says of it.

    Attributes:
        model: on the CPU.
        step: optimizer steps of the weights; None where the file does not say them.
        latent: whether it says that its run trained on latents.
        source: the mixed source that it was trained with; None for N(0, I).
    """

    model: Network
    step: int | None
    latent: bool
    source: StoredSource | None


def _network(path: Path, options: argparse.Namespace, guide: bool = False) -> _Loaded:
    """Read a network in the clock that its file says, or else that of --clock.

    A guide that says its clock has it, whatever --clock says of the network.

    Raises:
        ValueError: the file says another clock than --clock.
    """
    from mixflow_fast.models.weights.files import WeightsFile
    from mixflow_fast.models.weights.loading import model_of
    from mixflow_fast.models.weights.naming import kind_of
    from mixflow_fast.models.weights.sources import source_of

    file, clock = WeightsFile.open(path), options.clock
    recorded = None if file.metadata is None else file.metadata.clock
    if clock is not None and recorded is not None and recorded != clock:
        if not guide:
            raise ValueError(
                f"{path} records the clock {recorded}, and --clock says {clock}: leave --clock "
                "out, it is for files that do not say theirs (where a record is wrong, "
                f"mixflow_fast.models.load_model(path, clock={clock!r}) overrides it in Python)"
            )
        clock = recorded
    if kind_of(file.state(options.weights)) == "text-to-image":
        raise ValueError(
            f"{path} is a text-to-image network, which makes pictures of prompts: give --prompts "
            "and a folder as --out"
        )
    run = {} if file.metadata is None else json.loads(file.metadata.config or "{}")
    latent = run.get("data", {}).get("kind") == "latents"
    latent |= run.get("encoder", {}).get("kind", "none") != "none"
    model = model_of(file, options.weights, clock=clock)
    return _Loaded(model, file.steps, latent, None if guide else source_of(file, options.weights))


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
