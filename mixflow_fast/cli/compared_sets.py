"""`mixflow-fast compare` of sets of samples that are there."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mixflow_fast.cli import extractors
from mixflow_fast.cli.compared import chosen_features, labels_of, shown_command

if TYPE_CHECKING:
    from mixflow_fast.comparison.plan import Plan
    from mixflow_fast.evaluation.protocol import Protocol

# They have no meaning for sets, which are there already.
_OF_SAMPLING = (
    *("steps", "num", "seed", "preset", "method", "shift", "grid_start", "grid_end", "last_size"),
    *("sde_form", "sde_norm", "sde_last", "path", "cfg_scale", "cfg_channels", "cfg_interval"),
    *("guide", "remedy", "weights", "clock", "batch_size", "decoder", "decoder_stats"),
    *("decoder_scale", "decoder_precision", "quantise", "states"),
)


def plan_of_sets(options: argparse.Namespace, paths: Mapping[str, Path]) -> Plan:
    """Of sets that are there."""
    from mixflow_fast.comparison.plan import Arm, Finished, Plan
    from mixflow_fast.evaluation.reference import read_reference
    from mixflow_fast.evaluation.sample_sets import read_set
    from mixflow_fast.reports.comparison_result import ArmRecord

    given = [name for name in _OF_SAMPLING if getattr(options, name) is not None]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise ValueError(
            f"{paths['before']} is a set of samples, which was made with its own steps and number: "
            f"{option} has no meaning; leave it out, or give checkpoints"
        )
    if options.reference is None:
        raise ValueError(
            "a set of samples does not say which data its network was trained on: give --reference "
            "FILE (`mixflow-fast reference` makes one of images)"
        )
    labels, arms, protocols = labels_of(paths), {}, {}
    for key, path in paths.items():
        made = read_set(path)
        if made.protocol is None:
            raise ValueError(
                f"{path} does not say how its pictures came about, so they cannot be compared: "
                "make them with `mixflow-fast sample CHECKPOINT --out FOLDER`"
            )
        protocols[key] = made.protocol
        sha256, average = (made.origin.get(name) for name in ("weights_sha256", "average"))
        record = ArmRecord(
            key=key,
            label=labels[key],
            path=str(path),
            sha256=None if sha256 is None else str(sha256),
            average=None if average is None else str(average),
            config=None,
        )
        arms[key] = (record, Finished(path, made.protocol))
    steps = _intervals(paths["after"], protocols["after"])
    size = read_set(paths["after"]).pictures.shape
    reference = read_reference(options.reference)
    features = chosen_features(options, size[1:3], size[0], reference)
    return Plan(
        arms={key: Arm(record=r, sets={steps: made}) for key, (r, made) in arms.items()},
        extractors=features.extractors,
        aside=features.aside,
        reference=reference,
        allow=options.allow_different,
        slow_note="Left out: sets hold samples and no networks.",
        device=extractors.device_of(options),
        sampler=[json.dumps(protocols["after"].record["sampler"], sort_keys=True)],
        command=shown_command(options),
    )


def _intervals(path: Path, protocol: Protocol) -> int:
    sampler = protocol.record.get("sampler")
    steps = sampler.get("intervals") if isinstance(sampler, Mapping) else None
    nfe = sampler.get("nfe") if isinstance(sampler, Mapping) else None
    if not isinstance(steps, int) or not isinstance(nfe, int):
        raise ValueError(
            f"the protocol of {path} does not say sampler.intervals and sampler.nfe, got {steps!r} "
            f"and {nfe!r}: make the set with `mixflow-fast sample` and a method of fixed steps"
        )
    return steps
