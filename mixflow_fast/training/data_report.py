"""What a run says about its data before the first step."""

from __future__ import annotations

from dataclasses import dataclass

from mixflow_fast.config.data_sections import DataConfig
from mixflow_fast.config.schema import ModelConfig
from mixflow_fast.data import Dataset, DataSummary, Latents
from mixflow_fast.data.captioned import CaptionedLatents
from mixflow_fast.data.summary import count_classes
from mixflow_fast.distributed.host_group import HostGroup


@dataclass(frozen=True)
class DataReport:
    """What the data are, and lines on it for people.

    Attributes:
        summary: of the dataset.
        what: "1,281,167 images, 1000 classes, 3 x 256 x 256 (folder /data/imagenet/train)".
        notes: more that is good to know.
        warnings: what is probably a mistake.
    """

    summary: DataSummary
    what: str
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """All of it, a line each, as a run and `--dry-run` print it."""
        plain = [f"data: {line}" for line in (self.what, *self.notes)]
        return plain + [f"data: warning: {line}" for line in self.warnings]


def describe_data(
    dataset: Dataset,
    section: DataConfig,
    model: ModelConfig | None = None,
    summary: DataSummary | None = None,
) -> DataReport:
    """What a dataset holds; of latents also mean and std, over a fixed sample of 256 examples.

    Args:
        dataset: as `build_data` made it.
        section: the section `data` of the configuration.
        model: the section `model`, where the data are for one.
        summary: the dataset's, where it was made before.

    Raises:
        ValueError: moments whose std is negative, examples that cannot be read.
    """
    summary = summary or dataset.summary()
    where = f"{section.kind} {section.path}" if section.path is not None else section.kind
    notes, warnings = list(summary.notes), list(summary.warnings)
    if isinstance(dataset, CaptionedLatents):
        notes.append(f"latents have {dataset.statistics().describe()}")
    if isinstance(dataset, Latents):
        statistics = dataset.statistics()
        notes.append(f"latents have {statistics.describe()}")
        warnings += [statistics.warning()] if statistics.warning() else []
        warnings += _about_mirrors(dataset, model)
    if model is not None and model.has_classes and summary.classes < model.num_classes:
        warnings.append(
            f"{count_classes(summary.classes)}, the model has {model.num_classes}: the labels are "
            "those of its first classes, whatever those meant in earlier training"
        )
    what = f"{summary.describe()} ({where})"
    return DataReport(summary, what, tuple(notes), tuple(warnings))


def _about_mirrors(dataset: Latents, model: ModelConfig | None) -> list[str]:
    """What a set's mirrors mean for a network whose published training had others."""
    if dataset.info is None or model is None or not model.name.startswith("SiT"):
        return []
    if model.z_dims and dataset.mirrors == 2:
        return ["half of the examples are mirrored, REPA mirrors none: data.mirrors=1 is its way"]
    if not model.z_dims and dataset.mirrors == 1:
        way = "leave data.mirrors out" if dataset.info.mirrors == 2 else "encode with --mirrors 2"
        return [f"no example is mirrored, SiT mirrors half of them: {way} to train as it does"]
    return []


def agree_on_data(
    dataset: Dataset, section: DataConfig, model: ModelConfig, host_group: HostGroup
) -> DataReport:
    """Rank 0's report, and the summary on all ranks. Every rank must call it.

    Raises:
        ValueError: on all ranks, where one has other data (copies on the disks of several
            machines), or as `describe_data`.
    """
    with host_group.raise_together():
        summary = dataset.summary()
        report = DataReport(summary, summary.describe())
        if host_group.rank == 0:
            report = describe_data(dataset, section, model, summary)
    summaries = host_group.all_gather(summary)
    for rank, other in enumerate(summaries):
        if changes := other.changes(summaries[0].to_record()):
            raise ValueError(
                f"rank {rank} has other data than rank 0 ({changes}): every machine must see the "
                "same files"
            )
    return report
