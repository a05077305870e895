"""How fast training data are read, in turns with what other trainers do.

    python -m benchmarks.data [PART ...] [--threads 2] [--seconds S] [--rounds N] [--folder FOLDER]

Parts (default: all):

    images-256, images-512   images/s, and CPU time of each: JPEG files and prepared sets through
        Pillow threads and DALI, against PyTorch's DataLoader with Pillow on the JPEG files, which
        is what SiT's and RAE's trainers do (`dataloader`)
    latents   rows/s of one thread, files in memory: a set of `mixflow-fast data encode` against two
        small files an image as REPA's trainer reads them (`repa`: a PNG and a .npy; `repa_npy`: the
        .npy alone), and against safetensors that are opened for every item as LightningDiT's does
        (`lightningdit`)
    encode    images/s of `encode`, its start and its end in it, against the bare autoencoder on
        the same batches: 32 images of 64 pixels, random weights of Stable Diffusion's size, one
        thread computes

The loaders of a part take turns in one process; a row is one loader in one round, a JSON object,
and the last lines are medians: rate, CPU time of an example, and the ratio to the first loader,
round by round. Times of a shared CPU are no speeds; the ratios are what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.data_files import write_jpegs, write_latents, write_prepared, write_vae
from mixflow_fast.cli.errors import quiet_without_reader
from mixflow_fast.data import Batch, BatchLoader, ImageFolder, Latents
from mixflow_fast.data.dali import DaliLoader
from mixflow_fast.data.image_folder import adm_center_crop
from mixflow_fast.data.prepared_images import PreparedImages
from mixflow_fast.data.throughput import Contestant, Rates, race

BATCH = 16
ROWS = 256  # of a gather
PARTS = ("images-256", "images-512", "latents", "encode")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--threads", type=int, default=2, help="of each loader (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (%(default)s)")
    parser.add_argument("--images", type=int, default=256, help="images (%(default)s)")
    parser.add_argument("--rows", type=int, default=4096, help="latents (%(default)s)")
    parser.add_argument(
        "--folder", default=tempfile.gettempdir(), help="for the data (%(default)s)"
    )
    options = parser.parse_args(argv)
    if unknown := [part for part in options.part if part not in PARTS]:
        parser.error(f"PART must be one of {', '.join(PARTS)}, got {unknown[0]!r}")
    torch.set_num_threads(1)
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
        f"{options.threads} threads a loader, turns of {options.seconds} s"
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for part in options.part or PARTS:
            with contextlib.ExitStack() as stack:
                loaders = LOADERS[part](Path(folder), options, stack)
                seconds = 0.0 if part == "encode" else options.seconds
                _print(part, race(loaders, seconds, options.rounds))
    return 0


def _print(part: str, rates: dict[str, Rates]) -> None:
    base = next(iter(rates))
    for name, found in rates.items():
        for number, (rate, cpu) in enumerate(zip(found.per_s, found.cpu_ms, strict=True)):
            row = {"part": part, "loader": name, "round": number}
            print(json.dumps(row | {"per_s": round(rate, 2), "cpu_ms": round(cpu, 4)}))
    print(f"{part}: medians of {len(rates[base].per_s)} rounds, ratio to {base} in the same round")
    for name, found in rates.items():
        cpu = median(b / a for a, b in zip(found.cpu_ms, rates[base].cpu_ms, strict=True))
        print(
            f"  {name:16} {median(found.per_s):12,.1f} /s {median(found.cpu_ms):10.4f} cpu-ms   "
            f"{found.ratio(rates[base]):8.3f} x by time   {cpu:8.3f} x by CPU time",
            flush=True,
        )


class JpegFiles(torch.utils.data.Dataset):
    """Files as SiT's and RAE's trainers read them: Pillow, ADM's crop, a random flip, floats."""

    def __init__(self, files: Sequence[str], size: int) -> None:
        self._files, self._size = files, size

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self._files[index]) as image:
            image = adm_center_crop(image.convert("RGB"), self._size)
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return x.sub_(0.5).div_(0.5), 0


class Endless(torch.utils.data.Sampler[int]):
    """All indices in a random order, again and again: no pause between epochs is measured."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self._count).tolist()


def _images(
    size: int, folder: Path, options: argparse.Namespace, stack: contextlib.ExitStack
) -> dict[str, Contestant]:
    jpegs = folder / "jpegs"
    if not jpegs.exists():
        write_jpegs(jpegs, options.images)
    raw, threads = ImageFolder(jpegs, size), options.threads
    found = {"dataloader": _dataloader(raw.files, size, threads, stack)}
    sets = {"jpeg files": raw}
    for image_format in ("webp", "jpeg", "raw"):
        out = write_prepared(jpegs, folder / f"{image_format}-{size}", size, image_format)
        sets[image_format] = PreparedImages(out)
    order = dict(seed=0, global_batch_size=BATCH, microbatch_size=BATCH)
    for name, dataset in sets.items():
        loader = stack.enter_context(BatchLoader(dataset, num_workers=threads, **order))
        found[f"{name}, threads"] = Contestant(loader, 2 * threads + 1)
        if dataset.encoded:
            dali = stack.enter_context(DaliLoader(dataset, threads=threads, **order))
            found[f"{name}, dali"] = Contestant(dali, dali.ahead + 1)
    return found


def _dataloader(
    files: Sequence[str], size: int, workers: int, stack: contextlib.ExitStack
) -> Contestant:
    # Spawned: torch's operators have hung in processes that were forked after DALI's import.
    loader = torch.utils.data.DataLoader(
        JpegFiles(files, size),
        batch_size=BATCH,
        sampler=Endless(len(files)),
        num_workers=workers,
        multiprocessing_context="spawn",
    )
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    pids = [child.pid for child in multiprocessing.active_children() if child not in before]
    stack.callback(batches._shutdown_workers)
    return Contestant(
        (Batch(x, y, y) for x, y in batches),
        loader.prefetch_factor * workers + 1,
        cpu_s=lambda: time.process_time() + sum(map(_cpu_seconds, pids)),
    )


def _cpu_seconds(pid: int | None) -> float:
    """CPU time of another process so far; Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _latents(
    folder: Path, options: argparse.Namespace, stack: contextlib.ExitStack
) -> dict[str, Contestant]:
    files = write_latents(folder / "latents", options.rows)
    dataset = Latents(files.ours)
    generator = torch.Generator().manual_seed(0)

    def repa(index: int, png: bool = True) -> tuple[Tensor, ...]:
        # As its CustomDataset.__getitem__: both files are opened for every item.
        features = torch.from_numpy(np.load(files.repa_npy[index]))
        if not png:
            return (features,)
        with Image.open(files.repa_png[index]) as image:
            pixels = np.array(image)
        pixels = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)
        return torch.from_numpy(pixels.copy()), features

    def lightningdit(index: int) -> tuple[Tensor, ...]:
        from safetensors import safe_open

        with safe_open(files.lightningdit, framework="pt", device="cpu") as file:
            name = "latents_flip" if np.random.uniform() > 0.5 else "latents"
            features = file.get_slice(name)[index : index + 1]
            label = file.get_slice("labels")[index : index + 1]
        return features.squeeze(0), label.squeeze(0)

    def gather() -> Batch:
        indices = torch.randint(options.rows, (ROWS,), generator=generator)
        return dataset.get(indices, indices, 0)

    def items(item: Callable[[int], tuple[Tensor, ...]]) -> Batch:
        indices = torch.randint(options.rows, (ROWS,), generator=generator)
        rows = torch.utils.data.default_collate([item(index) for index in indices.tolist()])
        return Batch(rows[-1], indices, indices)

    ways: dict[str, Callable[[], Batch]] = {
        "repa": partial(items, repa),
        "repa_npy": partial(items, partial(repa, png=False)),
        "lightningdit": partial(items, lightningdit),
        "mixflow_fast": gather,
    }
    # Once over all, so that no file is read from the disk in a turn.
    for index in range(options.rows):
        repa(index), lightningdit(index)
    dataset.get(torch.arange(options.rows), torch.arange(options.rows), 0)
    return {name: Contestant(iter(way, None), 1) for name, way in ways.items()}


def _encode(
    folder: Path, options: argparse.Namespace, stack: contextlib.ExitStack
) -> dict[str, Contestant]:
    from mixflow_fast.data.preparation.encode import EncodeOptions, encode
    from mixflow_fast.models.autoencoders.sdvae import SDVAE

    # One thread computes: two would wait for each other in a way that counts as CPU time.
    size, batch, count = 64, 16, 32
    jpegs = folder / "few jpegs"
    write_jpegs(jpegs, count)
    prepared = write_prepared(jpegs, folder / f"webp-{size}", size, "webp")
    vae = SDVAE(write_vae(folder / "vae"), size)
    images = PreparedImages(prepared)
    every = torch.arange(count)
    stored = images.pixels(every)
    both = torch.stack([stored, stored.flip(-1)], 1).flatten(0, 1).split(batch)
    runs = iter(range(1 << 30))

    def bare() -> Batch:
        for part in both:
            vae(part)
        return Batch(None, every, every)

    def whole() -> Batch:
        encode(
            prepared,
            folder / "encoded" / str(next(runs)),
            vae,
            torch.device("cpu"),
            EncodeOptions(batch=batch),
            quiet=True,
        )
        return Batch(None, every, every)

    (folder / "encoded").mkdir()
    vae(both[0])
    return {
        "bare autoencoder": Contestant(iter(bare, None), 0),
        "encode": Contestant(iter(whole, None), 0),
    }


LOADERS = {
    "images-256": partial(_images, 256),
    "images-512": partial(_images, 512),
    "latents": _latents,
    "encode": _encode,
}

if __name__ == "__main__":
    raise SystemExit(quiet_without_reader(main))
