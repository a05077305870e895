"""`mixflow-fast data bench`: examples a second of each loader, on this machine."""

from __future__ import annotations

import argparse
import contextlib
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from mixflow_fast.cli.data.images import add_images, open_data, open_device

if TYPE_CHECKING:
    import torch

    from mixflow_fast.data import Dataset
    from mixflow_fast.data.throughput import Contestant, Rates


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "bench",
        help="measure how fast each loader reads on this machine",
        description="Examples a second, and CPU time of each, of every loader that can read the "
        "data (threads with Pillow, DALI). They take turns; medians over the rounds. With --need, "
        "whether that is enough.",
        epilog="example: mixflow-fast data bench imagenet-256 --need 750",
    )
    add_images(command)
    command.add_argument(
        "--microbatch", type=int, default=64, help="examples of a batch (default %(default)s)"
    )
    command.add_argument("--workers", type=int, help="threads (default: as data.workers)")
    command.add_argument(
        "--rounds", type=int, default=3, help="turns of each loader (default %(default)s)"
    )
    command.add_argument(
        "--seconds", type=float, default=5.0, help="length of a turn (default %(default)s)"
    )
    command.add_argument(
        "--need",
        type=float,
        metavar="N",
        help="examples a second that one GPU takes: images/s of the run divided by its GPUs",
    )
    command.set_defaults(data_command=run)


def run(options: argparse.Namespace) -> int:
    from mixflow_fast.config.data_sections import DataConfig
    from mixflow_fast.data.throughput import race
    from mixflow_fast.metrics.progress import Progress
    from mixflow_fast.training.loading import loader_workers

    workers = loader_workers(DataConfig(workers=options.workers)) or 1
    for name in ("microbatch", "rounds", "seconds"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name} must be above 0, got {getattr(options, name)}")
    dataset, device = open_data(options.path, options.size), open_device(options.device)
    with contextlib.ExitStack() as stack:
        loaders, left_out = loaders_of(dataset, device, workers, options.microbatch, stack)
        turns = len(loaders) * options.rounds
        progress = stack.enter_context(Progress(turns, "measuring", "turns"))
        rates = race(loaders, options.seconds, options.rounds, progress.advance)
    print(
        f"{options.path}: {len(dataset):,} examples, batches of {options.microbatch}, {workers} "
        f"threads, to {device}"
    )
    print("\n".join(_lines(rates, dataset.summary().unit, options.need) + left_out))
    return 0


def loaders_of(
    dataset: Dataset,
    device: torch.device,
    workers: int,
    microbatch: int,
    stack: contextlib.ExitStack,
) -> tuple[dict[str, Contestant], list[str]]:
    """The loaders that can read the data, and a line on each that cannot."""
    import torch

    from mixflow_fast.data import BatchLoader
    from mixflow_fast.data.dali import DaliLoader, dali_problem
    from mixflow_fast.data.throughput import Contestant

    order = dict(seed=0, global_batch_size=microbatch, microbatch_size=microbatch)
    on_gpu = device.type == "cuda"
    finish = partial(torch.cuda.synchronize, device) if on_gpu else (lambda: None)
    threads = stack.enter_context(BatchLoader(dataset, num_workers=workers, **order))
    moved = (batch.to(device) for batch in threads)
    found = {"threads": Contestant(moved, 2 * workers + 1, finish=finish)}
    if problem := dali_problem(dataset):
        return found, [f"dali: {problem}"]
    options = dict(device=device, num_workers=min(2, workers), threads=workers)
    dali = stack.enter_context(DaliLoader(dataset, **options, **order))
    found["dali"] = Contestant(dali, dali.ahead + 1, finish=finish)
    return found, []


def _lines(rates: dict[str, Rates], unit: str, need: float | None) -> list[str]:
    base = next(iter(rates.values()))
    lines = []
    for name, found in rates.items():
        rate, cpu_ms = median(found.per_s), median(found.cpu_ms)
        text = f"{name:8} {rate:10,.0f} {unit}/s {cpu_ms:9.3f} cpu-ms each"
        text += f" {found.ratio(base):7.2f} x {next(iter(rates))}"
        if need is not None:
            enough = "enough for" if rate >= need else "less than"
            text += f"   {enough} {need:,.0f}/s, which takes {need * cpu_ms / 1e3:.1f} cores"
        lines.append(text)
    return lines
