"""What a run says of its data: counts, statistics, warnings, and that all ranks see the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mixflow_fast.config.data_sections import DataConfig
from mixflow_fast.config.schema import ModelConfig
from mixflow_fast.data import Latents, Photos
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.training.build import build_data
from mixflow_fast.training.data_report import describe_data
from mixflow_fast.training.trainer import Trainer
from tests.support.datasets import LATENTS, write_classes, write_npz
from tests.support.latents import ROWS, write_store
from tests.support.launchers import ranks_of
from tests.support.runs import tiny


def test_a_run_says_what_its_data_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(tiny(tmp_path / "photos", "train.images=8")).run()
    line = "42,768 images, 2 classes, 3 x 16 x 16 (photos)"
    assert f"data: {line}\n" in capsys.readouterr().err
    (start,) = read_metrics(tmp_path / "photos" / "metrics.jsonl", kind="start")
    assert start["data"] == line

    folder = write_classes(tmp_path / "set", 16, cat=2, dog=1)
    (folder / "cat/more.gif").touch()
    data = f"data={{kind: folder, path: {folder}, size: 16}}"
    Trainer(tiny(tmp_path / "run", "train.images=8", data, "model.num_classes=5")).run()
    lines = capsys.readouterr().err.splitlines()
    assert f"data: 3 images, 2 classes, 3 x 16 x 16 (folder {folder})" in lines
    assert any(li.startswith("data: warning: files passed over: 1 (.gif 1)") for li in lines)
    assert any(li.startswith("data: warning: 2 classes, the model has 5: ") for li in lines)


def test_latents_are_described_with_their_statistics(tmp_path: Path) -> None:
    path = write_npz(tmp_path, LATENTS)
    section = DataConfig(kind="latents", path=str(path), scale=0.2)
    report = describe_data(Latents(path, scale=0.2), section)
    assert report.what == f"6 latents, 5 classes, 4 x 2 x 3 (latents {path})"
    assert report.notes[0].startswith("latents have mean ") and "scale 0.2 (6" in report.notes[0]
    assert len(report.warnings) == 1 and "set data.scale=1" in report.warnings[0]
    assert report.lines == [
        f"data: {report.what}",
        f"data: {report.notes[0]}",
        f"data: warning: {report.warnings[0]}",
    ]
    assert describe_data(Photos(), DataConfig(kind="photos")).lines == [
        "data: 42,768 images, 2 classes, 3 x 16 x 16 (photos)"
    ]


def test_mirrors_are_compared_with_the_networks_own_training(tmp_path: Path) -> None:
    store = write_store(tmp_path / "set")
    sit, repa = ModelConfig(num_classes=3), ModelConfig(num_classes=3, z_dims=(768,))
    section = DataConfig(kind="latents", path=str(store))
    for mirrors, model, message in (
        (2, sit, ""),
        (1, sit, "SiT mirrors half of them: leave data.mirrors out"),
        (2, repa, "REPA mirrors none: data.mirrors=1"),
        (1, repa, ""),
    ):
        warnings = describe_data(Latents(store, mirrors=mirrors), section, model).warnings
        found = [line for line in warnings if "mirror" in line]
        assert len(found) == bool(message) and message in "".join(found)
    one = write_store(tmp_path / "one", ROWS[::2], mirrors=1)
    assert "encode with --mirrors 2" in describe_data(Latents(one), section, sit).warnings[-1]


def test_moments_of_a_set_fit_the_model_or_say_what_they_are(tmp_path: Path) -> None:
    rows = ROWS[:, :, :2].repeat(1, 2, 1, 1)  # 8 channels of 2 x 2
    path = str(write_store(tmp_path / "set", rows))
    model = ModelConfig(input_size=2, in_channels=4)
    build(model, kind="latents", path=path)
    with pytest.raises(ValueError, match=r"\(4, 2, 2\), the model takes \(4, 4, 4\): set"):
        build(ModelConfig(input_size=4, in_channels=4), kind="latents", path=path)
    with pytest.raises(ValueError, match="data.scale=0.18215, but the manifest of .* says 0.5"):
        build(model, kind="latents", path=path, scale=0.18215)
    np.savez(tmp_path / "plain.npz", latents=rows.numpy(), labels=np.zeros(10, int))
    with pytest.raises(ValueError, match=r"\(8, 2, 2\), .* \(4, 2, 2\): they are mean \| std of a"):
        build(model, kind="latents", path=str(tmp_path / "plain.npz"))


def test_log_variances_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    x = np.random.RandomState(0).standard_normal((8, 6, 16, 16)).astype(np.float32)
    data = (
        f"data={{kind: latents, path: {write_npz(tmp_path, x, np.arange(8) % 2)}, moments: true}}"
    )
    with pytest.raises(ValueError, match="log-variance"):
        Trainer(tiny(tmp_path / "run", data), quiet=True)
    assert not (tmp_path / "run").exists()


SAME = """
from mixflow_fast.cli.errors import leave_at_once
from mixflow_fast.config.data_sections import DataConfig
from mixflow_fast.config.schema import ModelConfig
from mixflow_fast.data import ImageFolder
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.training.data_report import agree_on_data

section = DataConfig(kind="folder", path="x")
group = HostGroup()
for number in (0, group.rank, 2 * group.rank):
    try:
        dataset = ImageFolder(f"{folder}/{number}", 8)
        print(number, agree_on_data(dataset, section, ModelConfig(num_classes=2), group).what)
    except ValueError as error:
        print("REFUSED", error)
leave_at_once(0)
"""


def test_ranks_that_see_other_data_refuse_together(tmp_path: Path) -> None:
    """Copies on the disks of two machines; one that is the same in another place is none."""
    for number, images in enumerate((3, 3, 2)):
        write_classes(tmp_path / str(number), cat=1, dog=images)
    outputs = ranks_of(SAME.replace("{folder}", str(tmp_path)), timeout_s=60)
    for rank, (code, output) in enumerate(outputs):
        assert code == 0, output
        assert f"{rank} 4 images, 2 classes, 3 x 8 x 8" in output
        refusal = "rank 1 has other data than rank 0 (4 examples of 2 classes -> 3 examples of 2"
        assert f"REFUSED {refusal}" in output, output


def build(model: ModelConfig | None = None, **section: object) -> None:
    build_data(DataConfig(**section), model or ModelConfig(input_size=8, in_channels=3))


def test_errors_name_the_setting_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for kind in ("folder", "latents"):
        with pytest.raises(ValueError, match="^data.path ~/no does not exist: the last folder"):
            build(kind=kind, path="~/no")
    write_npz(tmp_path, LATENTS)
    for name in ("images", "features"):
        with pytest.raises(ValueError, match=f"^data.{name} ~/no does not exist"):
            build(kind="latents", path="~/set.npz", **{name: "~/no"})
    write_classes(tmp_path / "set/train", cat=1)
    with pytest.raises(ValueError, match=r"are train: parts of .* \(data.path=~/set\)$"):
        build(kind="folder", path="~/set")
    build(kind="folder", path="~/set/train")
    with pytest.raises(ValueError, match=r"images must be .* \(data.path=.*, data.images=~/set\)$"):
        build(kind="latents", path="~/set.npz", images="~/set")


def test_moments_and_samples_are_told_by_their_channels(tmp_path: Path) -> None:
    path = str(write_npz(tmp_path, np.ones((8, 4, 8, 8), np.float32), np.arange(8)))
    model = ModelConfig(input_size=8, in_channels=2)
    with pytest.raises(ValueError, match=r"\(4, 8, 8\), .* takes \(2, 8, 8\): .*data.moments=true"):
        build(model, kind="latents", path=path)
    build(model, kind="latents", path=path, moments=True)
    model = ModelConfig(input_size=8, in_channels=4)
    with pytest.raises(
        ValueError, match=r"\(2, 8, 8\), .* takes \(4, 8, 8\): .*data.moments=false"
    ):
        build(model, kind="latents", path=path, moments=True)


def test_data_of_another_size_say_what_to_set(tmp_path: Path) -> None:
    path = str(write_npz(tmp_path, np.ones((8, 4, 8, 8), np.float32), np.arange(8)))
    folder = str(write_classes(tmp_path / "set", 16, cat=1))
    for channels, kind, way_out in (
        (4, {"kind": "latents", "path": path}, "set model.input_size=8"),
        (16, {"kind": "latents", "path": path}, "set model.input_size=8 model.in_channels=4"),
        (3, {"kind": "folder", "path": folder, "size": 16}, "model.input_size=16, or data.size=32"),
        (4, {"kind": "folder", "path": folder, "size": 16}, "input_size=16 model.in_channels=3"),
    ):
        with pytest.raises(ValueError, match=f"{way_out}$"):
            build(ModelConfig(input_size=32, in_channels=channels), **kind)
