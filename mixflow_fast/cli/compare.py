"""`mixflow-fast compare`: before and after a training, on one page with intervals."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mixflow_fast.cli import extractors
from mixflow_fast.cli.data.resumable import resumable
from mixflow_fast.cli.sampler_options import REMEDIES, add_sampler_options
from mixflow_fast.cli.sources import add_source_option
from mixflow_fast.files import check_writable, user_path

if TYPE_CHECKING:
    from mixflow_fast.reports.comparison_result import Comparison

# What the page and its twin were when they were written, in the folder where all is kept.
_PAGE = "page.json"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "compare",
        help="before and after a training: one page with verdicts, intervals and pictures",
        description="Samples the same noise and labels from each checkpoint, measures the samples, "
        "and writes a page that says at each number of steps whether AFTER is better or worse than "
        "BEFORE and than the control, with the same numbers as .json beside it. What is made is "
        "kept in a folder beside the page, and the same command goes on after a stop.",
        epilog="example: mixflow-fast compare runs/base runs/post --control runs/control --steps "
        "5,10 --out report.html",
    )
    command.add_argument(
        "before", type=user_path, metavar="BEFORE", help="run folder or weights file; or a set"
    )
    command.add_argument(
        "after", type=user_path, nargs="+", metavar="AFTER", help="of the same kind, at least one"
    )
    command.add_argument(
        "--control",
        type=user_path,
        metavar="C",
        help="BEFORE trained as long as AFTER, without the method: what plain training gives",
    )
    command.add_argument(
        "--out", type=user_path, default="report.html", help="the page (default %(default)s)"
    )
    command.add_argument("--force", action="store_true", help="replace another page at --out")
    command.add_argument(
        "--fresh", action="store_true", help="make all samples again, delete those that are there"
    )
    samples = command.add_argument_group("samples")
    samples.add_argument(
        "--steps",
        type=_steps,
        metavar="N,N",
        help="intervals (default 5,10,20,50, or the preset's)",
    )
    samples.add_argument("-n", "--num", type=int, help="of each arm and steps (default 1,000)")
    samples.add_argument("--seed", type=int, help="of noise and labels (default 0)")
    samples.add_argument("--batch-size", type=int, help="default 64")
    samples.add_argument("--weights", choices=("ema", "model"), help="default ema")
    samples.add_argument(
        "--clock", choices=("data_at_1", "noise_at_1"), help="if the files do not say it"
    )
    samples.add_argument(
        "--remedy",
        metavar="NAME[=NUMBERS]",
        help="adds control and AFTER with a correction that needs no training: "
        f"{', '.join(REMEDIES)}, e.g. ssc=0.1,1",
    )
    samples.add_argument("--decoder", metavar="FOLDER", help="of latents, as in `sample`")
    samples.add_argument("--decoder-stats", metavar="FILE", help="RAE's stat.pt")
    samples.add_argument("--decoder-scale", type=float, metavar="F", help="as in `sample`")
    samples.add_argument(
        "--decoder-precision", choices=("fp32", "bf16"), help="of an SD-VAE (default fp32)"
    )
    samples.add_argument(
        "--quantise", choices=("round", "floor", "round_even"), help="to 8 bits (default round)"
    )
    add_sampler_options(command, several=True)
    add_source_option(command)
    command.add_argument(
        "--reference",
        type=user_path,
        metavar="FILE",
        help="as `evaluate` takes it; default: held-out images of AFTER's data, else training ones",
    )
    extractors.add_options(
        command,
        "features (default: averaged pixels, a random network, and of small images "
        "EfficientNet-Lite0 where its package is installed)",
    )
    command.add_argument(
        "--allow-different",
        nargs="+",
        default=[],
        metavar="FIELD",
        help="fields of the protocols that may differ, such as sampler.method, and `network`; then "
        "nothing is judged by pairs",
    )
    command.add_argument(
        "--no-slow-flow", action="store_true", help="leave slow flow and maps of losses out"
    )
    command.add_argument("--states", type=int, help="of slow flow (default 250)")
    command.set_defaults(run=run)


def _steps(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        message = f"{text!r} is not a list of whole numbers such as 5,10,20,50"
        raise argparse.ArgumentTypeError(message) from None
    if min(found) < 1 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"must be different numbers >= 1, got {text}")
    return tuple(sorted(found))


def run(options: argparse.Namespace) -> int:
    out, folder = options.out, options.out.with_name(f"{options.out.stem}_files")
    _check(options, folder)
    from mixflow_fast.cli.compared_networks import plan_of_networks
    from mixflow_fast.cli.compared_sets import plan_of_sets
    from mixflow_fast.comparison.work import compare
    from mixflow_fast.distributed.process_group import world_size
    from mixflow_fast.files import json_text, write_text
    from mixflow_fast.reports.comparison_report import render
    from mixflow_fast.reports.comparison_result import record, verdict_words

    if world_size() > 1:
        raise ValueError(
            f"compare is one process, and {world_size()} were started: make sets with torchrun and "
            "`mixflow-fast sample`, and compare these"
        )
    paths = _paths(options)
    kinds = {key: _is_set(path) for key, path in paths.items()}
    if len(set(kinds.values())) > 1:
        sets = ", ".join(str(paths[key]) for key, is_set in kinds.items() if is_set)
        raise ValueError(
            f"{sets} is a set of samples and the others are not: give checkpoints only, or sets "
            "only (`mixflow-fast sample CHECKPOINT --out FOLDER` makes one)"
        )
    plan = (plan_of_sets if kinds["before"] else plan_of_networks)(options, paths)

    def work() -> int:
        found = compare(plan, folder, _log, options.fresh)
        texts = {
            out.with_suffix(".json"): json_text(record(found)),
            out: render(found),
        }
        _note_own(folder, texts)
        for path, text in texts.items():
            write_text(path, text)
        lines = [
            verdict_words(found, pair, steps)
            for steps in found.steps
            for pair in found.pairs
            if pair.main
        ]
        print("\n".join([*_first_lines(found), *lines]))
        print(f"{out}\n{out.with_suffix('.json')}")
        return 0

    return resumable(work, folder)


def _first_lines(found: Comparison) -> list[str]:
    from mixflow_fast.reports.comparison_result import NO_CONTROL

    lines = [f"different by consent: {each}" for each in found.allowed]
    lines += [f"note: {text}" for text in found.notes]
    return [*lines, *([] if "control" in found.arms else [NO_CONTROL])]


def _note_own(folder: Path, texts: Mapping[Path, str]) -> None:
    """Add what is about to be written to what this comparison wrote, so that it knows its own."""
    from mixflow_fast.files import write_json

    known = _known(folder)
    for path, text in texts.items():
        digest = hashlib.sha256(text.encode()).hexdigest()
        known[path.name] = sorted({*known.get(path.name, []), digest})
    write_json(folder / _PAGE, known)


def _known(folder: Path) -> dict[str, list[str]]:
    """SHA-256 of all that was written, by the file's name."""
    try:
        found = json.loads((folder / _PAGE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _check(options: argparse.Namespace, folder: Path) -> None:
    """Refuse what the options alone show to be wrong, before anything is read."""
    out = options.out
    if out.suffix != ".html":
        raise ValueError(f"--out must end in .html, got {out}; the numbers go to .json beside it")
    for path in (out, out.with_suffix(".json")):
        check_writable(path, options.force or _is_own(path, folder))
    for name, least in (("num", 2), ("batch_size", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be >= {least}, got {value}")
    for name in ("decoder_stats", "decoder_scale", "decoder_precision"):
        if options.decoder is None and getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} needs --decoder FOLDER")
    if options.states is not None and options.no_slow_flow:
        raise ValueError("--states has no meaning with --no-slow-flow")


def _is_own(path: Path, folder: Path) -> bool:
    """Whether a file is what an earlier start of this comparison wrote, and nobody changed."""
    known = _known(folder).get(path.name, [])
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() in known


def _paths(options: argparse.Namespace) -> dict[str, Path]:
    """What is compared, by key, in the order of the page."""
    found = {"before": options.before}
    if options.control is not None:
        found["control"] = options.control
    for number, path in enumerate(options.after, 1):
        found["after" if number == 1 else f"after_{number}"] = path
    return found


def _is_set(path: Path) -> bool:
    from mixflow_fast.data.set_files import WORK
    from mixflow_fast.evaluation.sample_sets import SET
    from mixflow_fast.files import existing_path

    found = existing_path(path)
    return found.suffix == ".npz" or any((found / name).exists() for name in (SET, WORK))


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
