"""From kept features to the numbers of a set: which metric needs what, and what to be warned of.

| metric | features | reference |
|---|---|---|
| fid, sfid, fd_dinov2 | inception.pool, inception.spatial, dinov2.cls | moments |
| fd_effnet_lite0, fd_effnet_lite0_p128, fd_pooled_pixels, fd_random_conv | of that name | moments |
| is | inception.logits | - |
| kid, precision, recall | inception.pool | kept features, or those of an ADM file's images |
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mixflow_fast.evaluation.features.extractor import (
    Extractor,
    ExtractorId,
    Features,
    exact_float32,
)
from mixflow_fast.evaluation.features.inception import KNOWN_SHA256_PREFIX
from mixflow_fast.evaluation.metrics import (
    SPLIT,
    frechet,
    frechet_infinity,
    inception_score,
    kid,
)
from mixflow_fast.evaluation.precision_recall import NEIGHBOURS, precision_recall
from mixflow_fast.evaluation.protocol import Protocol
from mixflow_fast.evaluation.reference import CLASS_TOKEN, POOL, SPATIAL, Reference
from mixflow_fast.evaluation.uncertainty import Estimate
from mixflow_fast.messages import did_you_mean, shorten
from mixflow_fast.metrics.rows import EvaluationRow

LOGITS = "inception.logits"
FRECHET = {
    "fid": POOL,
    "sfid": SPATIAL,
    "fd_dinov2": CLASS_TOKEN,
    "fd_effnet_lite0": "effnet_lite0.mean",
    "fd_effnet_lite0_p128": "effnet_lite0_p128.mean",
    "fd_pooled_pixels": "pooled_pixels.features",
    "fd_random_conv": "random_conv.features",
}
# In the order of print.
METRICS = ("fid", "sfid", "is", "precision", "recall", "kid", *list(FRECHET)[2:])
_FEW = 10_000
_SAME = 1e-3


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one set.

    Attributes:
        n: samples.
        estimates: by metric, with the influence of each sample.
        warnings: what makes a number doubtful, in sentences.
        extractors: what made the features.
        reference: what the set was measured against.
        seconds: that the numbers took, without the features.
        reconstructions: the set is of an autoencoder's reconstructions: rFID, not gFID.
    """

    n: int
    estimates: Mapping[str, Estimate]
    warnings: Sequence[str]
    extractors: Sequence[Mapping[str, str | None]]
    reference: Reference
    seconds: float
    reconstructions: bool = False

    def protocol(self, of_set: Protocol, metric: str | None = None) -> Protocol:
        """How a number came about: how the set did, with that number's own extractor.

        So the hash that stands beside a number does not depend on which others were asked for.

        Args:
            of_set: how the set did.
            metric: the number; None: all of them, with all extractors.

        Raises:
            ValueError: a metric that was not computed.
        """
        if metric not in (None, *self.estimates):
            raise ValueError(f"metric must be of {', '.join(self.estimates)}, got {metric!r}")
        own = [r for r in self.extractors if metric is None or r["id"] == _extractor_of(metric)]
        # By content: what its file is called is no part of what it is.
        reference = {"sha256": self.reference.sha256, "n": self.reference.n}
        sections = {"extractors": own, "reference": reference}
        metrics = {"ddof": 1, "splits": SPLIT, "k": NEIGHBOURS, "pr_fp16": False}
        if self.reconstructions:
            metrics["reconstructions"] = True
        return of_set.with_sections({**sections, "metrics": metrics})

    def to_row(
        self,
        set_name: str,
        of_set: Protocol,
        weights: Mapping[str, object] | None = None,
        features: str | None = None,
    ) -> EvaluationRow:
        """A row of `metrics.jsonl`.

        Args:
            set_name: path of the samples.
            of_set: how the set was made.
            weights: what was sampled from, where it is recorded; its "step" is the row's.
            features: folder of the kept features.
        """
        step = (weights or {}).get("step")
        return {
            "step": step if isinstance(step, int) else 0,
            "kind": "evaluation",
            "time": time.time(),
            "protocol": of_set.sha256,
            "pictures": of_set.record,
            "weights": None if weights is None else dict(weights),
            "set": set_name,
            "n": self.n,
            "metrics": {
                name: {**each.to_record(), "protocol": self.protocol(of_set, name).sha256}
                for name, each in self.estimates.items()
            },
            "extractors": [dict(record) for record in self.extractors],
            "reference": self.reference.to_record(),
            "warnings": list(self.warnings),
            "features": features,
            "seconds": self.seconds,
        }


def evaluate(
    features: Sequence[Features],
    reference: Reference,
    metrics: Sequence[str] | None = None,
    *,
    fid_inf: bool = False,
    device: str | torch.device = "cpu",
    reconstructions: bool = False,
) -> Evaluation:
    """Numbers of a set from its features.

    Args:
        features: of one set, by one or several extractors.
        reference: what to measure against. Features of an ADM file's images, if they are wanted,
            have to be in `reference.features`.
        metrics: names of METRICS; None: all for which features and reference are there.
        fid_inf: also extrapolate the Frechet distances to infinitely many samples; some minutes.
        device: of the sums over pairs.
        reconstructions: the set is of reconstructions of validation images (rFID), and not of
            generated samples (gFID).

    Raises:
        ValueError: unknown metrics, or some whose features or reference are missing; features of
            different sets, or of other weights than the reference's; reconstructions against
            anything but validation images, or samples against them.
    """
    started = time.monotonic()
    arrays = {f"{f.extractor.name}.{name}": a for f in features for name, a in f.arrays.items()}
    _check_one_set(features)
    _check_split(reference, reconstructions)
    _check_extractors([each.extractor for each in features], reference)
    chosen = _choose(metrics, set(arrays), reference)
    estimates: dict[str, Estimate] = {}
    for name in chosen:
        if name in FRECHET:
            estimates[name] = _frechet(np.asarray(arrays[FRECHET[name]]), reference, name, fid_inf)
    if "is" in chosen:
        estimates["is"] = inception_score(np.asarray(arrays[LOGITS]))
    # Products of float32 with no TF32 in them.
    with exact_float32():
        if {"precision", "recall"} & set(chosen):
            pair = precision_recall(
                np.asarray(arrays[POOL]), np.asarray(reference.features[POOL]), device=device
            )
            estimates |= pair._asdict()
        if "kid" in chosen:
            pool, theirs = np.asarray(arrays[POOL]), np.asarray(reference.features[POOL])
            estimates["kid"] = kid(pool, theirs, device)
    n = len(features[0])
    return Evaluation(
        n=n,
        estimates={name: estimates[name] for name in METRICS if name in chosen},
        warnings=_unused(features, chosen, reference, metrics) + _warnings(features, estimates, n),
        extractors=[each.extractor.to_record() for each in features],
        reference=reference,
        seconds=time.monotonic() - started,
        reconstructions=reconstructions,
    )


def check_measurable(
    extractors: Sequence[Extractor],
    reference: Reference,
    metrics: Sequence[str] | None = None,
    reconstructions: bool = False,
) -> None:
    """Refuse before any work what `evaluate` would refuse after it.

    Args:
        extractors: of the features that are to be made.
        reference, metrics, reconstructions: as `evaluate`; features of an ADM file's images are
            taken to be made by then.
    """
    _check_split(reference, reconstructions)
    _check_extractors([each.id for each in extractors], reference)
    arrays = {f"{each.id.name}.{output}" for each in extractors for output in each.outputs}
    if reference.has_images and POOL in arrays:
        reference = replace(reference, features={**reference.features, POOL: np.empty((0, 0))})
    _choose(metrics, arrays, reference)


def _frechet(features: np.ndarray, reference: Reference, name: str, fid_inf: bool) -> Estimate:
    gaussian = reference.gaussians[FRECHET[name]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said among the evaluation's own
        found = frechet(features, gaussian)
        if fid_inf:
            found = replace(found, infinity=frechet_infinity(features, gaussian))
    return found


def _check_split(reference: Reference, reconstructions: bool) -> None:
    """rFID is against the validation images that were reconstructed, gFID against training ones."""
    name = reference.path.name
    if reconstructions and reference.split != "val":
        said = f"is of {reference.split} images" if reference.split else "does not say which it has"
        raise ValueError(
            f"reconstructions are measured against the validation images, and the reference {name} "
            f"{said}: make one of them by `mixflow-fast reference VAL --split val`"
        )
    if not reconstructions and reference.split == "val":
        raise ValueError(
            f"the reference {name} is of validation images, against which reconstructions are "
            "measured (--reconstructions); generated samples are against the training images: "
            "make a reference of those by `mixflow-fast reference TRAIN --split train`"
        )


def _check_one_set(features: Sequence[Features]) -> None:
    if not features:
        raise ValueError("features must be of at least one extractor, got none")
    first = features[0]
    for other in features[1:]:
        if not np.array_equal(first.ids, other.ids) or first.source != other.source:
            raise ValueError(
                f"the features of {first.extractor.name} and {other.extractor.name} are of "
                "different sets: compute both from one"
            )


def _check_extractors(extractors: Sequence[ExtractorId], reference: Reference) -> None:
    """Refuse features of other weights than the reference's, where it says which those were."""
    theirs = {record["id"]: record for record in reference.extractors}
    for each in extractors:
        mine = each.to_record()
        other = theirs.get(mine["id"])
        if other is not None and other != mine:
            unlike = shorten(f"{k} {mine[k]!r} against {other[k]!r}" for k in mine
                             if mine[k] != other.get(k))  # fmt: skip
            raise ValueError(
                f"the features of {mine['id']} and those of the reference {reference.path.name} "
                f"were made in different ways ({unlike}): use the same weights for both"
            )


def _extractor_of(metric: str) -> str:
    """The name of the network whose features a metric is made of."""
    return FRECHET.get(metric, LOGITS if metric == "is" else POOL).partition(".")[0]


def _missing(name: str, arrays: set[str], reference: Reference) -> str | None:
    """What a metric lacks, in words; None: nothing."""
    key = FRECHET.get(name, LOGITS if name == "is" else POOL)
    if key not in arrays:
        return f"features {key}"
    if name in FRECHET and key not in reference.gaussians:
        return f"moments of {key} in the reference"
    if name in ("kid", "precision", "recall") and key not in reference.features:
        return f"features {key} in the reference"
    return None


def _choose(
    metrics: Sequence[str] | None, arrays: set[str], reference: Reference
) -> tuple[str, ...]:
    for name in metrics or ():
        if name not in METRICS:
            raise ValueError(
                f"unknown metric {name!r}{did_you_mean(name, METRICS)}: there are "
                f"{', '.join(METRICS)}"
            )
        if lacking := _missing(name, arrays, reference):
            raise ValueError(
                f"{name} needs {lacking}: `mixflow-fast evaluate --help` says which option gives "
                "features, and `mixflow-fast reference` makes a reference with all of them"
            )
    if metrics is not None:
        return tuple(metrics)
    found = tuple(name for name in METRICS if _missing(name, arrays, reference) is None)
    if not found:
        raise ValueError(
            f"the features {', '.join(sorted(arrays))} and the reference {reference.path.name} "
            f"({', '.join(sorted(reference.gaussians))}) have nothing in common: take the "
            "extractor that the reference was made with"
        )
    return found


def _unused(
    features: Sequence[Features],
    chosen: Sequence[str],
    reference: Reference,
    metrics: Sequence[str] | None,
) -> list[str]:
    """Extractors that were asked for and gave no number, as the reference lacks them."""
    if metrics is not None:
        return []
    used = {_extractor_of(name) for name in chosen}
    return [
        f"{name}: no number, as the reference {reference.path.name} was made without it"
        for name in (each.extractor.name for each in features)
        if name not in used
    ]


def _warnings(features: Sequence[Features], estimates: Mapping[str, Estimate], n: int) -> list[str]:
    found = []
    if constant := features[0].constant:
        names = shorten(str(place) for place in constant)
        found.append(f"{len(constant):,} images have a single colour, ids {names}")
    for each in features:
        known = (each.extractor.sha256 or "").startswith(KNOWN_SHA256_PREFIX)
        if each.extractor.name == "inception" and not known:
            found.append(
                "the Inception weights are not FID's: no number compares with published ones"
            )
    for name, each in estimates.items():
        # Two draws of one law are apart by about the bias, never by a thousandth of it.
        if name in FRECHET and each.bias and each.value < _SAME * each.bias:
            found.append(
                f"{name}: the set has the mean and covariance of the reference, as the same images "
                "have: a set measured against itself says nothing of its quality"
            )
    dims = {name: int(each.to_record().get("dim", 0)) for name, each in estimates.items()}
    for name, dim in dims.items():
        if n <= dim:
            found.append(
                f"{name}: {n:,} samples in {dim:,} dimensions, the covariance has no full rank: "
                "bias and standard error are not to be relied on"
            )
    if n < _FEW and any(dims.values()):
        other = "; kid does not depend on their number" if "kid" in estimates else ""
        found.append(
            f"a Frechet distance of {n:,} samples compares only with those of as many{other}: "
            "published ones are of 50,000"
        )
    if "is" in estimates and n < SPLIT:
        found.append(f"is: one split of {n:,} images, published ones have splits of {SPLIT:,}")
    elif "is" in estimates and (rest := n % SPLIT):
        found.append(
            f"is: the last of {-(-n // SPLIT)} splits has {rest:,} images, whose score is lower "
            f"and counts as much as the others': take a multiple of {SPLIT:,}"
        )
    return found
