"""`mixflow-fast slowflow`: how slow a network's flow is, and which gamma that asks for."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mixflow_fast.cli.of_classes import refuse_text_to_image
from mixflow_fast.files import check_writable, user_path

if TYPE_CHECKING:
    from mixflow_fast.comparison.real_data import RunData
    from mixflow_fast.config.schema import Config
    from mixflow_fast.evaluation.examples import Examples
    from mixflow_fast.evaluation.slow_flow import Settings
    from mixflow_fast.models import Network
    from mixflow_fast.reports.slow_flow_report import Measured, SlowFlowReport


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "slowflow",
        help="how slow a network's flow is, and which gamma that asks for",
        description="Compares the states of an N-step sampler with the true path, by four "
        "estimators, and writes a page and the same numbers as .json beside it. The data are those "
        "of the run that made the checkpoint; --recipe names others.",
        epilog="example: mixflow-fast slowflow runs/base --after runs/post --steps 5,10,20,50 "
        "--out slow.html",
    )
    command.add_argument("checkpoint", type=user_path, help="run folder, or a weights file")
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.field=value",
        help="settings other than the run's, such as data.path=...",
    )
    command.add_argument(
        "--after", type=user_path, metavar="CKPT2", help="the same network, trained further"
    )
    command.add_argument(
        "--recipe", metavar="NAME", help="where the checkpoint does not say what it was trained on"
    )
    command.add_argument(
        "--steps",
        type=_steps,
        default=(5, 10, 20, 50),
        metavar="N,N",
        help="intervals of the sampler (default 5,10,20,50)",
    )
    command.add_argument(
        "--states", type=int, default=2000, help="samples of each (default %(default)s)"
    )
    command.add_argument(
        "--method", choices=("euler", "heun"), default="euler", help="default %(default)s"
    )
    command.add_argument(
        "--fine", type=int, help="Heun intervals of the fine solve (default: 4 N, at least 50)"
    )
    command.add_argument("--seed", type=int, default=0, help="of the noise (default %(default)s)")
    command.add_argument(
        "--grid", type=int, default=8, help="rows of the loss map; 0: none (default %(default)s)"
    )
    command.add_argument("--batch-size", type=int, default=250, help="default %(default)s")
    command.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="default %(default)s"
    )
    command.add_argument(
        "--pilot",
        action="store_true",
        help="train arms with gamma 0, the rule's, twice the rule's and 0.8 on 5%% of the images, "
        "and recommend one; they stand beside --out and are kept",
    )
    command.add_argument(
        "--pilot-images", type=int, metavar="N", help="training images of each arm"
    )
    command.add_argument(
        "--pilot-steps", type=int, metavar="N", help="of the sampler (default: the fewest)"
    )
    command.add_argument(
        "--out", type=user_path, default="slow.html", help="the page (default %(default)s)"
    )
    command.add_argument("--force", action="store_true", help="replace what is at --out")
    command.set_defaults(run=run)


def _steps(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        message = f"{text!r} is not a list of whole numbers such as 5,10,20,50"
        raise argparse.ArgumentTypeError(message) from None


def run(options: argparse.Namespace) -> int:
    out, twin = options.out, options.out.with_suffix(".json")
    _check_options(options)
    import torch

    from mixflow_fast.comparison.real_data import run_data
    from mixflow_fast.evaluation.gamma import pilot_gammas, recommend_gamma
    from mixflow_fast.evaluation.slow_flow import Settings
    from mixflow_fast.files import write_json, write_text
    from mixflow_fast.models import load_model
    from mixflow_fast.models.weights.digest import weights_sha256
    from mixflow_fast.models.weights.files import WeightsFile
    from mixflow_fast.pilot import PilotPlan, check_arms, planned_images, run_pilot
    from mixflow_fast.reports.slow_flow_report import SlowFlowReport, record, render

    for path in filter(None, (options.checkpoint, options.after)):
        refuse_text_to_image("slowflow", path, WeightsFile.open(path), options.weights)
    config = _config(options)
    settings = Settings(
        steps=options.steps,
        states=options.states,
        method=options.method,
        shift=config.objective.shift,
        seed=options.seed,
        fine=options.fine,
        path=config.objective.path,
        batch_size=options.batch_size,
    )
    pilot_folder = out.with_name(f"{out.stem}_pilot")
    if options.pilot:
        check_arms(config, options.checkpoint, (0.0, 0.8), pilot_folder)
    paths = {"network": options.checkpoint}
    if options.after is not None:
        paths = {"before": options.checkpoint, "after": options.after}
    for path in paths.values():
        _check_source(path)
    models = {name: load_model(path, options.weights) for name, path in paths.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first = next(iter(models.values()))
    data = run_data(config, first.clock, device, settings.states, options.batch_size)
    for name, model in models.items():
        _check_fit(paths[name], model, data.examples)
    if options.after is not None:
        _check_same_network(options.checkpoint, first, options.after, models["after"])
    networks = [
        _measured(name, model.to(device), data, settings, options.grid)
        for name, model in models.items()
    ]
    pilot = None
    if options.pilot:
        steps = options.pilot_steps or min(settings.steps)
        recommended = recommend_gamma(networks[0].slow, steps)
        plan = PilotPlan(
            gammas=pilot_gammas(recommended.value),
            images=options.pilot_images or planned_images(config),
            steps=steps,
            method=options.method,
            samples=options.states,
            batch_size=options.batch_size,
        )
        pilot = run_pilot(
            config,
            options.checkpoint,
            plan,
            data.examples,
            pilot_folder,
            _log,
            weights_sha256=weights_sha256(first),
        )
    report = SlowFlowReport(networks, options.command_line, pilot)
    write_text(out, render(report))
    write_json(twin, record(report))
    print("\n".join(_lines(report)))
    print(f"{out} and {twin.name}")
    return 0


def _check_options(options: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is read."""
    out = options.out
    if out.suffix != ".html":
        raise ValueError(f"--out must end in .html, got {out}; the numbers go to .json beside it")
    for path in (out, out.with_suffix(".json")):
        check_writable(path, options.force)
    for name in ("pilot_images", "pilot_steps"):
        if getattr(options, name) is not None and not options.pilot:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning without --pilot")
    if options.grid == 1 or options.grid < 0:
        raise ValueError(f"--grid must be 0 or >= 2, got {options.grid}")
    if options.pilot and options.weights != "ema":
        raise ValueError(
            f"--pilot starts its arms from the EMA weights and measures theirs, got --weights "
            f"{options.weights}: leave one of the two out"
        )
    if options.pilot_steps is not None and options.pilot_steps not in options.steps:
        raise ValueError(
            f"--pilot-steps must be one of --steps {','.join(map(str, options.steps))}, for which "
            f"the rule is known, got {options.pilot_steps}"
        )


def _config(options: argparse.Namespace) -> Config:
    """What the network was trained with: a recipe, or what its run recorded; with the overrides."""
    from mixflow_fast.config.loading import load_config
    from mixflow_fast.models.weights.files import WeightsFile

    if options.recipe is not None:
        return load_config(options.recipe, options.overrides)
    own = options.checkpoint / "config.yaml"
    if own.is_file():
        return load_config(str(own), options.overrides)
    metadata = WeightsFile.open(options.checkpoint).metadata
    if metadata is None or metadata.config is None:
        raise ValueError(
            f"{options.checkpoint} does not say which data it was trained on: name a recipe and "
            "its data, such as data.path=latents/ --recipe sit-xl2-256"
        )
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "config.yaml"
        file.write_text(metadata.config)  # JSON is YAML
        return load_config(str(file), options.overrides)


def _check_source(path: Path) -> None:
    from mixflow_fast.cli.compared_networks import NO_SLOW_FLOW
    from mixflow_fast.models.weights.sources import load_source

    if load_source(path) is not None:
        raise ValueError(
            f"slow flow of {path} cannot be measured: {NO_SLOW_FLOW}. `mixflow-fast curvature` "
            "measures how straight its paths are, and `compare` its samples"
        )


def _check_fit(path: Path, model: Network, data: Examples) -> None:
    shape = tuple(data.x.shape[1:])
    side = model.input_size
    own = (model.in_channels, *((side, side) if isinstance(side, int) else side))
    if own != shape:
        raise ValueError(f"{path} takes {own}, the data give {shape}: name its own data")
    known = model.num_classes
    if data.y is not None and known is not None and int(data.y.max()) >= known:
        raise ValueError(
            f"{path} knows {known} classes, the data have {int(data.y.max()) + 1}: "
            "name its own data"
        )


def _check_same_network(before: Path, first: Network, after: Path, second: Network) -> None:
    """Refuse a network that is not the first one trained further: another one has another flow.

    REPA's projectors may be in one file alone: they take no part in sampling.
    """
    shapes = [
        {
            name: tuple(value.shape)
            for name, value in model.state_dict().items()
            if not name.startswith("projectors.")
        }
        for model in (first, second)
    ]
    kinds = [type(model).__name__ for model in (first, second)]
    paths = [model.path for model in (first, second)]
    odd = sorted(n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n))
    if kinds[0] != kinds[1]:
        what = f"{kinds[0]} against {kinds[1]}"
    elif first.num_classes != second.num_classes:
        what = f"{first.num_classes} classes against {second.num_classes}"
    elif odd:
        what = f"{odd[0]} {shapes[0].get(odd[0])} against {shapes[1].get(odd[0])}"
    elif None not in paths and paths[0] != paths[1]:
        what = f"the path {paths[0]} against {paths[1]}"
    else:
        return
    raise ValueError(
        f"--after {after} is another network than {before} ({what}), and not the same one trained "
        "further: measure them one by one"
    )


def _measured(
    name: str,
    model: Network,
    data: RunData,
    settings: Settings,
    grid: int,
) -> Measured:
    from mixflow_fast.evaluation.loss_surface import loss_surface
    from mixflow_fast.evaluation.slow_flow import slow_flow
    from mixflow_fast.reports.slow_flow_report import Measured

    _log(f"{name}: {settings.states:,} states, {settings.evaluations} velocities each")
    slow = slow_flow(model, data.examples, settings, progress=True)
    return Measured(name, slow, loss_surface(data.losses, model, grid) if grid else None)


def _lines(report: SlowFlowReport) -> list[str]:
    """What the page says in the main, for the terminal."""
    from mixflow_fast.reports.slow_flow_report import caution, gammas_of, overshoot_warnings

    lines = []
    for network in report.networks:
        lines += [
            f"{network.name}, {g.steps} steps: gamma by the rule {g.value:.2f} "
            f"({g.low:.2f} to {g.high:.2f}): {g.why}"
            for g in gammas_of(report, network)
        ]
    for network in report.networks:
        lines += [f"warning: {text}" for text in overshoot_warnings(network)]
    if report.pilot is not None:
        lines.append(f"pilot at {report.pilot.steps} steps: {report.pilot.verdict}")
    return [*lines, caution(report)]


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
