"""What is compared with what, and whether it may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixflow_fast.comparison.real_data import RealImages, SlowFlowPlan
from mixflow_fast.evaluation.features.extractor import Extractor
from mixflow_fast.evaluation.protocol import Difference, Protocol, check_comparable
from mixflow_fast.evaluation.reference import Reference
from mixflow_fast.evaluation.sample_sets import Maker, SetPlan
from mixflow_fast.reports.comparison_result import ArmRecord, Pair

Log = Callable[[str], None]

SHARD = 500  # ids of a shard of a set: what a kill loses


@dataclass(frozen=True, kw_only=True)
class ToSample:
    """A set that is to be made.

    Attributes:
        plan: of the set.
        make: pictures of ids.
        batch_size: ids in one call.
    """

    plan: SetPlan
    make: Maker
    batch_size: int

    @property
    def protocol(self) -> Protocol:
        return self.plan.protocol


@dataclass(frozen=True)
class Finished:
    """A set that was given.

    Attributes:
        path: its folder or .npz.
        protocol: that it records.
    """

    path: Path
    protocol: Protocol


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of what is compared.

    Attributes:
        record: what is said of it.
        sets: by number of steps.
    """

    record: ArmRecord
    sets: Mapping[int, ToSample | Finished]

    @property
    def remedied(self) -> bool:
        """Whether it is another arm's network, sampled with a remedy."""
        return self.record.key.endswith("_remedy")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared, and how.

    Attributes:
        arms: by key: before, control, after, after_2, ..., and KEY_remedy.
        extractors: feature networks.
        reference: a file that was read, or images.
        aside: metrics that decide only where no other is there.
        allow: fields of protocols that may differ.
        slow: None leaves it out; `slow_note` says why.
        device: of sums over pairs.
        sampler, notes, command: for the page, as `Comparison` has them.
    """

    arms: Mapping[str, Arm]
    extractors: Sequence[Extractor]
    reference: Reference | RealImages
    aside: Sequence[str] = ()
    allow: Sequence[str] = ()
    slow: SlowFlowPlan | None = None
    slow_note: str = ""
    device: str = "cpu"
    sampler: Sequence[str] = ()
    notes: Sequence[str] = ()
    command: str = ""

    @property
    def steps(self) -> list[int]:
        """Numbers of steps that every arm has."""
        return list(self.arms["after"].sets)


def pairs_of(keys: Sequence[str]) -> list[Pair]:
    """Who is compared with whom: what came after with what was before and with the control.

    With a remedy also what came after, without it and with it, with the control that has it: the
    rival without training.
    """
    afters = [key for key in keys if key.startswith("after") and not key.endswith("_remedy")]
    found = []
    for key in afters:
        found.append(Pair(key, "before", True))
        found += [Pair(key, "control", True)] if "control" in keys else []
        found += [Pair(key, "control_remedy", True)] if "control_remedy" in keys else []
    found += [Pair("control", "before", False)] if "control" in keys else []
    for key in (key for key in keys if key.endswith("_remedy")):
        found.append(Pair(key, key.removesuffix("_remedy"), False))
        if key != "control_remedy" and "control_remedy" in keys:
            found.append(Pair(key, "control_remedy", False))
    return found


def check_plan(plan: Plan) -> list[Difference]:
    """Refuse to compare what came about in different ways, before anything is made.

    Returns:
        the differences that are allowed, once each.

    Raises:
        ValueError: differences that are not, or sets of different sizes.
    """
    found: dict[str, Difference] = {}
    for steps in plan.steps:
        protocols = {arm.record.label: without_remedy(arm, steps) for arm in plan.arms.values()}
        found |= {each.field: each for each in check_comparable(protocols, plan.allow)}
    if (sizes := found.get("set.n")) is not None:
        raise ValueError(
            f"the sets have different sizes, {', '.join(map(str, sizes.values))}, and a Fréchet "
            "distance depends on the number of images: make them of one size"
        )
    return list(found.values())


def without_remedy(arm: Arm, steps: int) -> Protocol:
    """An arm's protocol; a remedy that is the arm's own is no difference."""
    protocol = arm.sets[steps].protocol
    if not arm.remedied:
        return protocol
    return protocol.with_sections({"sampler": {**protocol.record["sampler"], "remedy": None}})
