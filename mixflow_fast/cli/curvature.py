"""`mixflow-fast curvature`: how straight a network's paths are, and what solvers need on them.

A command of its own: `evaluate` and `compare` measure pictures against real ones, and this needs
neither pictures nor data.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mixflow_fast.cli.of_classes import refuse_text_to_image
from mixflow_fast.cli.sources import add_source_option, chosen_source, describe_start, refuse_unused
from mixflow_fast.files import check_writable, user_path

if TYPE_CHECKING:
    from mixflow_fast.evaluation.curvature import Curvature, SolverRow
    from mixflow_fast.models import Network
    from mixflow_fast.sampling.prepared import PreparedSampling

_TOLERANCE = 1e-5
_SIZES = ("in_channels", "input_size", "num_classes")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "curvature",
        help="how straight a network's paths are, and how many evaluations solvers need on them",
        description="Curvature of the paths from noise to data: mean, standard deviation over "
        "trajectories and standard error of the mean, by Euler steps; and a table of solvers with "
        "their network evaluations and how far their ends are from those of RK45. Several "
        "checkpoints take the same noise and labels and are compared with the first in pairs.",
        epilog="example: mixflow-fast curvature runs/rectified runs/mixed -n 10000 --out "
        "curvature.json",
    )
    command.add_argument(
        "checkpoints",
        type=user_path,
        nargs="+",
        metavar="CHECKPOINT",
        help="run folder, or a weights file of any kind",
    )
    command.add_argument(
        "-n",
        "--num",
        type=int,
        default=1000,
        help="trajectories (default %(default)s; papers: 10,000)",
    )
    command.add_argument(
        "--steps",
        type=int,
        default=128,
        help="Euler steps of each (default %(default)s, as papers)",
    )
    command.add_argument(
        "--solver-samples",
        type=int,
        metavar="N",
        help="samples in the table of solvers; 0: no table (default 256, or -n if that is less)",
    )
    command.add_argument(
        "--rtol", type=float, default=_TOLERANCE, help="of RK45 (default %(default)s)"
    )
    command.add_argument(
        "--atol", type=float, default=_TOLERANCE, help="of RK45 (default %(default)s)"
    )
    command.add_argument("--cfg-scale", type=float, default=1.0, help="1 = no guidance (default)")
    command.add_argument(
        "--seed", type=int, default=0, help="of noise and labels (default %(default)s)"
    )
    command.add_argument(
        "--batch-size",
        type=int,
        default=64,
        help="default %(default)s; RK45 controls the error of a batch, so its count depends on it",
    )
    command.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="default %(default)s"
    )
    command.add_argument(
        "--clock", choices=("data_at_1", "noise_at_1"), help="of files that do not say it"
    )
    add_source_option(command)
    command.add_argument("--out", type=user_path, help="a .json that gets all numbers")
    command.add_argument("--force", action="store_true", help="replace what is at --out")
    command.set_defaults(run=run)


@dataclass(frozen=True)
class _Measured:
    """A checkpoint and what was found of it.

    Attributes:
        path: of the checkpoint.
        sha256: of the network's weights.
        start: where its samples begin, as a line; "" for N(0, I) of a network without a source.
        source: the same as plain values; None is N(0, I).
        curvature: of its paths.
        rows: of the solvers.
    """

    path: Path
    sha256: str
    start: str
    source: Mapping[str, object] | None
    curvature: Curvature
    rows: Sequence[SolverRow]

    def to_record(self) -> dict[str, object]:
        return {
            "checkpoint": str(self.path),
            "weights_sha256": self.sha256,
            "source": self.source,
            "curvature": self.curvature.to_record(),
            "solvers": [row.to_record() for row in self.rows],
        }


def run(options: argparse.Namespace) -> int:
    _check(options)
    from mixflow_fast.files import write_json

    measured = _measure_all(options)
    pairs = [_difference(measured[0], other) for other in measured[1:]]
    print("\n".join([*_lines(measured, pairs), *_table(measured)]))
    if options.out is not None:
        settings = ("num", "steps", "rtol", "atol", "cfg_scale", "seed", "batch_size", "weights")
        record = {
            "command": options.command_line,
            "settings": {name: getattr(options, name) for name in settings},
            "checkpoints": [each.to_record() for each in measured],
            "differences": pairs,
        }
        write_json(options.out, record)  # whole or not at all
        print(options.out)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse what the options alone show to be wrong, before anything is read."""
    if options.solver_samples is None:
        options.solver_samples = min(256, max(options.num, 0))
    for name, least in (("num", 1), ("steps", 1), ("batch_size", 1), ("solver_samples", 0)):
        if getattr(options, name) < least:
            raise ValueError(
                f"--{name.replace('_', '-')} must be >= {least}, got {getattr(options, name)}"
            )
    for name in ("rtol", "atol"):
        if not 0.0 < getattr(options, name) < math.inf:
            raise ValueError(f"--{name} must be a number > 0, got {getattr(options, name)}")
    if options.out is not None:
        if options.out.suffix != ".json":
            raise ValueError(f"--out must end in .json, got {options.out}")
        check_writable(options.out, options.force)


def _measure_all(options: argparse.Namespace) -> list[_Measured]:
    """One checkpoint after the other, so that one network at a time needs memory."""
    from mixflow_fast.models.weights.sources import load_source

    if options.source_w is not None:
        sources = {str(path): load_source(path, options.weights) for path in options.checkpoints}
        refuse_unused(options.source_w, sources)
    found: list[_Measured] = []
    sizes: dict[str, object] = {}
    for path in options.checkpoints:
        prepared, model, start, source = _prepared(path, options)
        own = {name: getattr(model, name) for name in _SIZES}
        if sizes and own != sizes:
            raise ValueError(
                f"{options.checkpoints[0]} has {sizes}, {path} has {own}: the same noise and "
                "labels need networks of one size and one number of classes; measure them one by "
                "one"
            )
        sizes = own
        found.append(_measure(path, options, prepared, model, start, source))
    return found


def _prepared(
    path: Path, options: argparse.Namespace
) -> tuple[PreparedSampling, Network, str, Mapping[str, object] | None]:
    """(network as it is sampled, network, line on where samples begin, the same as values)."""
    from mixflow_fast.cli.data.encode import device_of_rank
    from mixflow_fast.models.weights.files import WeightsFile
    from mixflow_fast.models.weights.loading import model_of
    from mixflow_fast.models.weights.sources import source_of
    from mixflow_fast.sampling import Guidance, PreparedSampling, Sampler

    device = device_of_rank("auto")
    file = WeightsFile.open(path)
    refuse_text_to_image("curvature", path, file, options.weights)
    stored = source_of(file, options.weights)
    source = chosen_source(stored, options.source_w)
    if source is not None:
        source.source.predictor.to(device)
    model = model_of(file, options.weights, clock=options.clock).to(device).eval()
    calls = (options.steps + 300) * -(-options.num // options.batch_size)
    prepared = PreparedSampling(
        model,
        Sampler("euler", options.steps),
        Guidance(options.cfg_scale),
        batch_size=min(options.batch_size, max(options.num, options.solver_samples)),
        mode="auto",
        calls=calls,
        source=source,
    )
    record = None if source is None else source.to_record()
    return prepared, model, describe_start(stored, source), record


def _measure(
    path: Path,
    options: argparse.Namespace,
    prepared: PreparedSampling,
    model: Network,
    start: str,
    source: Mapping[str, object] | None,
) -> _Measured:
    from mixflow_fast.evaluation.curvature import network_curvature, solver_rows
    from mixflow_fast.models.weights.digest import weights_sha256
    from mixflow_fast.sampling import Sampler

    curvature = network_curvature(
        prepared, options.num, seed=options.seed, steps=options.steps, progress=True
    )
    rows: list[SolverRow] = []
    if options.solver_samples:
        rows = solver_rows(
            prepared,
            options.solver_samples,
            seed=options.seed,
            adaptive=Sampler("rk45", rtol=options.rtol, atol=options.atol),
            progress=True,
        )
    return _Measured(path, weights_sha256(model), start, source, curvature, rows)


def _difference(first: _Measured, other: _Measured) -> dict[str, object]:
    """Curvature of the other minus that of the first, trajectory by trajectory."""
    from mixflow_fast.evaluation.uncertainty import difference

    apart = difference(other.curvature.estimate, first.curvature.estimate)
    known = apart.n > 1
    low, high = apart.interval() if known else (None, None)
    return {
        "of": str(other.path),
        "minus": str(first.path),
        "value": apart.value,
        "se": apart.se if known else None,
        "low": low,
        "high": high,
    }


def _lines(measured: Sequence[_Measured], pairs: Sequence[Mapping[str, object]]) -> list[str]:
    lines = []
    for each in measured:
        c = each.curvature
        error = f"se {c.se:.2g}" if len(c.values) > 1 else "se not known"
        lines.append(
            f"{each.path}: curvature {c.mean:.6g} ({error}), standard deviation {c.std:.4g} over "
            f"{len(c.values):,} trajectories of {c.steps} Euler steps"
        )
        lines += [f"  {each.start}"] if each.start else []
    for pair in pairs:
        interval = ""
        if pair["low"] is not None:
            interval = f" (95% {pair['low']:+.4g} .. {pair['high']:+.4g})"
        lines.append(
            f"{pair['of']} minus {pair['minus']}: {pair['value']:+.4g}{interval}, in pairs"
        )
    return lines


def _table(measured: Sequence[_Measured]) -> list[str]:
    """Evaluations, and errors of the ends, of each solver and checkpoint."""
    if not measured[0].rows:
        return []
    adaptive = measured[0].rows[-1].method
    lines = [
        f"network evaluations (NFE), and how far ends are from those of {adaptive} (RMS):",
        f"  {'solver':24}" + "".join(f"{_short(each.path):>24}" for each in measured),
    ]
    for number, row in enumerate(measured[0].rows):
        name = row.method if row.steps is None else f"{row.method}, {row.steps} steps"
        cells = [_cell(each.rows[number]) for each in measured]
        lines.append(f"  {name:24}" + "".join(f"{cell:>24}" for cell in cells))
    return lines


def _cell(row: SolverRow) -> str:
    nfe = f"{row.nfe:.0f}" if float(row.nfe).is_integer() else f"{row.nfe:.1f}"
    return f"{nfe} NFE" if row.apart is None else f"{nfe} NFE, {row.apart:.2e}"


def _short(path: Path) -> str:
    name = path.parent.name if path.name == "weights.pt" and path.parent.name else path.name
    return name if len(name) <= 22 else f"..{name[-20:]}"
