"""What a row of `metrics.jsonl` holds, by its "kind".

    (none)        training, one per train.log_every steps: means over the window since the last one
    "start"       a process took up the run: versions, device, how the network is run
    "checkpoint"  a resumable checkpoint is written
    "validation"  losses at fixed times and over the grid, of EMA and live weights
    "evaluation"  numbers of a sample set against a reference

Every row has "step", the optimizer steps done. A number that was not finite is null in the file.
Rows of former releases may lack a key, which is why most are optional.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypedDict

Kind = Literal["training", "start", "checkpoint", "validation", "evaluation"]
TRAINING: Kind = "training"  # the kind of rows that name none


class _Step(TypedDict):
    step: int


class TrainingRow(_Step, total=False):
    """Means over the training steps since the last row.

    Keys:
        loss: mean training loss, REPA's term included; None if every step was skipped.
        alignment: REPA's term in it.
        loss_by_t, count_by_t: mean loss, and samples, in equal parts of the network's time.
        grad_norm: of the last step, before clipping.
        source_kl, source_sigma, source_mean_rms: of a mixed source, at the row's step: KL from N(0,
            I) per dimension, mean deviation, RMS of the mean.
        source_aggregate_mean, source_aggregate_var, source_distance: of all noise ends of its first
            micro-batches by channel: RMS mean, variance, squared Wasserstein distance from N(0, 1).
        source_mse_low_w, source_mse_high_w: losses without the KL where w < 0.1 and w > 0.9.
        skipped, rollbacks: steps of the whole run, where the configuration allows any.
        seconds: length of the window.
        data_wait_s: seconds in it that the host waited for data; data_stall_s: that the device
            waited for their copies; data_wait_fraction: of the window, both.
        slowest_rank, slowest_ratio: the rank that is much slower than the others, and how much;
            None where none is.
        model_tflops, peak_tflops: of a device; None where they are not known.
        time: seconds since 1970.
    """

    images_seen: int
    loss: float | None
    alignment: float | None
    loss_by_t: list[float | None]
    count_by_t: list[int]
    grad_norm: float | None
    source_kl: float | None
    source_sigma: float | None
    source_mean_rms: float | None
    source_aggregate_mean: float | None
    source_aggregate_var: float | None
    source_distance: float | None
    source_mse_low_w: float | None
    source_mse_high_w: float | None
    skipped: int
    rollbacks: int
    lr: float
    images_per_s: float
    seconds: float
    data_wait_s: float
    data_stall_s: float
    data_wait_fraction: float
    slowest_rank: int | None
    slowest_ratio: float | None
    model_tflops: float | None
    peak_tflops: float | None
    peak_memory_mib: float
    time: float


class StartRow(_Step, total=False):
    """How a process runs the network from a step on.

    Keys:
        clock: "data_at_1" or "noise_at_1", the network's.
        environment: the fields of `environment.Environment`.
        objective, source, network, averages, data: sentences; source of a mixed source alone.
        decoder: whose decoder gives the images, where they are decoded: "pil/13.0.0",
            "dali/2.4.0/cuda".
    """

    kind: Literal["start"]
    images_seen: int
    time: float
    ranks: int
    clock: str
    recipe: str | None
    train_gflops_per_image: float | None
    objective: str
    source: str
    network: str
    averages: str
    data: str
    decoder: str
    environment: dict[str, str | int | None]


class CheckpointRow(_Step, total=False):
    """What a checkpoint took; the row comes with a later step's.

    Keys:
        stood_still_s: seconds for which training waited, while its state was copied.
        written_s: seconds until it was written and had its name, beside training.
        bytes: size of all its files.
    """

    kind: Literal["checkpoint"]
    images_seen: int
    time: float
    stood_still_s: float
    written_s: float
    bytes: int


class Losses(TypedDict, total=False):
    """Validation losses of one set of weights.

    Keys:
        loss: mean over the times.
        loss_by_t: at the row's times t.
        grid: rows m, columns t at the row's grid_t; None where m > t is not trained.
    """

    loss: float | None
    loss_by_t: list[float | None]
    grid: list[list[float | None]]


class ValidationRow(_Step, total=False):
    """Losses on fixed examples with fixed noise.

    Keys:
        examples, data: how many, and of what.
        t, grid_t: the times of loss_by_t and of the grid.
    """

    kind: Literal["validation"]
    images_seen: int
    time: float
    examples: int
    data: str
    t: list[float]
    grid_t: list[float]
    ema: Losses
    model: Losses


class EvaluationRow(_Step, total=False):
    """Numbers of a sample set; "step" is that of the weights, 0 where it is not known.

    Keys:
        protocol: hash of how the set was made; pictures: what is hashed.
        weights: what was sampled from, as the set records it; None: not recorded.
        set: path of the samples.
        n: samples.
        metrics: "fid", "is", ... -> value, bias, se, low, high (a 95% interval of value - bias),
            what belongs to each metric, and protocol: hash of how set and number were made.
        extractors, reference: records as in a protocol.
        warnings: sentences.
        features: folder of the features that were kept; None: nowhere.
    """

    kind: Literal["evaluation"]
    time: float
    protocol: str
    pictures: Mapping[str, object]
    weights: dict[str, object] | None
    set: str
    n: int
    metrics: dict[str, dict[str, float | int | str]]
    extractors: list[dict[str, str | None]]
    reference: dict[str, str | int | None]
    warnings: list[str]
    features: str | None
    seconds: float


Row = TrainingRow | StartRow | CheckpointRow | ValidationRow | EvaluationRow
