"""Makes what is missing of a comparison, in the folder where all of it is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from mixflow_fast.comparison.outcome import put_together
from mixflow_fast.comparison.plan import Arm, Finished, Log, Plan, check_plan
from mixflow_fast.comparison.real_data import slow_flows
from mixflow_fast.evaluation.evaluate import evaluate
from mixflow_fast.evaluation.features.extractor import Features, kept_or_extracted
from mixflow_fast.evaluation.pictures import open_pictures
from mixflow_fast.evaluation.reference import KEPT, POOL, Reference, read_reference, write_reference
from mixflow_fast.evaluation.sample_sets import write_set
from mixflow_fast.files import remove_partial, write_json
from mixflow_fast.folder_lock import FolderLock, is_held
from mixflow_fast.messages import shorten
from mixflow_fast.metrics.progress import Progress
from mixflow_fast.reports.comparison_result import Cell, Comparison

_SETTINGS, _FORMAT = "settings.json", "mixflow-comparison/1"
# Of a sampler's record, what follows from the number of steps.
_OF_STEPS = ("intervals", "nfe", "network_calls")


def compare(plan: Plan, folder: Path, log: Log, fresh: bool = False) -> Comparison:
    """Make what is missing and compare.

    Args:
        plan: what is compared.
        folder: where all that is made is kept; it is made.
        log: gets a line on each part of the work.
        fresh: delete what an earlier comparison left there.

    Raises:
        ValueError: protocols that differ, a folder of another comparison, and what sampling,
            features and numbers refuse.
    """
    allowed = check_plan(plan)
    claim(folder, plan, fresh)
    lock = FolderLock(folder, way_out="choose another --out")
    try:
        paths = {
            (key, steps): _made(arm, key, steps, folder, log)
            for key, arm in plan.arms.items()
            for steps in plan.steps
        }
        reference, words = _reference(plan, folder, log)
        cells = {place: _cell(plan, place, path, folder, reference, log)
                 for place, path in paths.items()}  # fmt: skip
        slow = [] if plan.slow is None else slow_flows(plan.slow, log)
        log("pictures and page")
        return put_together(plan, folder, cells, paths, allowed, slow, reference, words)
    finally:
        lock.close()


def claim(folder: Path, plan: Plan, fresh: bool) -> None:
    """Take a folder for this comparison; arms and steps may be added to what is there.

    Raises:
        ValueError: it holds another comparison, or something else.
    """
    mark, arms = folder / _SETTINGS, _settings(plan)
    remove_partial(folder)
    if mark.exists():
        if fresh:
            _refuse_foreign(mark)
            if is_held(folder):
                raise ValueError(
                    f"{folder} is in use by another run, and --fresh would delete what it makes: "
                    "wait for it or choose another --out"
                )
            _empty(folder)
        else:
            arms = _with_those_there(folder, arms)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no comparison: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(mark, {"format": _FORMAT, "arms": arms})


def _empty(folder: Path) -> None:
    """Delete all but the settings, by which a folder that a kill left half empty is known."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _SETTINGS:
            path.unlink()


def _refuse_foreign(mark: Path) -> None:
    """Nothing is deleted beside a file of this name that something else wrote."""
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return  # damaged: its own way out is --fresh
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ValueError(
            f"{mark} was not written by a comparison, and --fresh would delete {mark.parent}: "
            "choose another --out"
        )


def _with_those_there(
    folder: Path, arms: dict[str, dict[str, object]]
) -> dict[str, dict[str, object]]:
    """These arms and those that a folder has samples of; refuses other weights and settings."""
    try:
        there = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))["arms"]
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(
            f"{folder / _SETTINGS} is damaged: make all of it again with --fresh"
        ) from None
    changed = [
        f"{what} of {key}"
        for key, own in arms.items()
        for what, value in own.items()
        if key in there and there[key].get(what) != value
    ]
    if changed:
        raise ValueError(
            f"{folder} holds the samples of another comparison (other {shorten(changed)}): choose "
            "another --out, or make all of it again with --fresh"
        )
    return {**there, **arms}


def _settings(plan: Plan) -> dict[str, dict[str, object]]:
    """What the sets of each arm are made of, whatever the steps: plain values."""
    found = {}
    for key, arm in plan.arms.items():
        record = dict(arm.sets[plan.steps[0]].protocol.part("sampling").record)
        sampler = {k: v for k, v in record.pop("sampler").items() if k not in _OF_STEPS}
        size = record.pop("set")
        found[key] = {"weights": arm.record.sha256, "number, seed and labels": size}
        found[key] |= {"sampler": sampler, "pictures": record}
    return json.loads(json.dumps(found))


def _made(arm: Arm, key: str, steps: int, folder: Path, log: Log) -> Path:
    """The path of a set, which is made where it is not there."""
    source = arm.sets[steps]
    if isinstance(source, Finished):
        return source.path
    place = folder / f"{key}_{steps}"
    log(f"{arm.record.label}, {steps} steps: {source.plan.n:,} samples")
    write_set(source.make, source.plan, place, batch_size=source.batch_size, quiet=False)
    return place


def _features(
    plan: Plan,
    place: Path,
    count: int,
    batches: Callable[[], Iterator[Tensor]],
    source: str,
    words: str,
) -> list[Features]:
    """Of all extractors, kept at a place."""
    found = []
    for extractor in plan.extractors:

        def counted(name: str = extractor.id.name) -> Iterator[Tensor]:
            with Progress(count, f"{name}, {words}", "images") as progress:
                for batch in batches():
                    yield batch
                    progress.advance(len(batch))

        found.append(kept_or_extracted(place, extractor, counted, source))
    return found


def _reference(plan: Plan, folder: Path, log: Log) -> tuple[Reference, str]:
    """What to measure against, and what it is in words."""
    given = plan.reference
    if isinstance(given, Reference):
        return _with_images(plan, given, folder), _reference_words(given)
    log(f"reference: {given.description}")
    features = _features(
        plan, folder / "reference.features", given.count, given.batches, given.source, "reference"
    )
    path = folder / "reference.npz"
    kept = KEPT if any(f"{each.extractor.name}.pool" == POOL for each in features) else 0
    write_reference(path, features, given.description, kept)
    return read_reference(path), given.description


def _reference_words(reference: Reference) -> str:
    count = "" if reference.n is None else f", {reference.n:,} images"
    return f"{reference.path.name}{count}"


def _with_images(plan: Plan, reference: Reference, folder: Path) -> Reference:
    """A file of ADM's with the features of its images, where their network is there."""
    network = next((e for e in plan.extractors if f"{e.id.name}.pool" == POOL), None)
    if network is None or not reference.has_images:
        return reference
    images = open_pictures(reference.path)
    found = kept_or_extracted(folder / "reference.features", network, images.batches, images.source)
    return replace(reference, features={POOL: found.arrays["pool"]})


def _cell(
    plan: Plan,
    place: tuple[str, int],
    path: Path,
    folder: Path,
    reference: Reference,
    log: Log,
) -> Cell:
    """Numbers of one set."""
    key, steps = place
    arm = plan.arms[key]
    log(f"{arm.record.label}, {steps} steps: features and numbers")
    pictures = open_pictures(path)
    kept = folder / f"{key}_{steps}.features"
    words = f"{key}, {steps} steps"
    features = _features(plan, kept, pictures.count, pictures.batches, pictures.source, words)
    found = evaluate(features, reference, device=plan.device)
    own = arm.sets[steps].protocol
    protocol = found.protocol(own)
    assert protocol is not None
    return Cell(int(own.record["sampler"]["nfe"]), protocol, found)
