"""The loader of a run: which one, what a run makes of it, and what is said of waiting for it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from torch import Tensor

from mixflow_fast.config.data_sections import DataConfig
from mixflow_fast.config.schema import Config
from mixflow_fast.data import Batch, BatchLoader, Digits, ImageFolder, Latents, Photos, dali
from mixflow_fast.data.device_loader import DeviceLoader
from mixflow_fast.data.label_dropout import LabelDropout
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.training import loading
from mixflow_fast.training.loading import LoaderOrder, build_loader, loader_workers, ways_out
from mixflow_fast.training.step_record import StepOutput
from mixflow_fast.training.trainer import Trainer
from tests.support.datasets import write_classes
from tests.support.latents import training_on, write_store
from tests.support.runs import assert_same_bits, tiny

pytest.importorskip("sklearn.datasets")
CPU = torch.device("cpu")
ORDER = LoaderOrder(
    seed=3, global_batch_size=8, microbatch_size=4, rank=0, world_size=1, start_position=16
)


@pytest.mark.parametrize(
    ("given", "cores", "ranks", "expected"),
    [
        (None, 2, 1, 1),
        (None, 16, 2, 7),
        (None, 96, 8, 8),
        (None, 1, 1, 1),
        (0, 96, 8, 0),
        (3, 2, 1, 3),
    ],
)
def test_threads_of_a_rank(
    monkeypatch: pytest.MonkeyPatch, given: int | None, cores: int, ranks: int, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert loader_workers(DataConfig(kind="digits", workers=given)) == expected


def plain(dataset: LabelDropout, count: int) -> list[Batch]:
    options = dict(seed=3, global_batch_size=8, microbatch_size=4, start_position=16)
    with BatchLoader(dataset, **options) as loader:
        return [next(loader) for _ in range(count)]


def assert_gives(section: DataConfig, dataset: LabelDropout, count: int = 12) -> None:
    with build_loader(section, dataset, ORDER, CPU) as loader:
        assert loader.position == 16 and loader.microsteps == 2
        for number, expected in enumerate(plain(dataset, count)):
            assert loader.position == 16 + 8 * (number // 2)
            batch = next(loader)
            pairs = zip(batch.buffers(), expected.buffers(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        assert loader.wait.take().batches == count


def test_threads_where_there_is_no_gpu(tmp_path: Path) -> None:
    write_classes(tmp_path / "images", cat=6, dog=6)
    images = LabelDropout(ImageFolder(tmp_path / "images", 8), 0.2, 2)
    for name in ("auto", "threads"):
        section = DataConfig(kind="folder", path="x", loader=name)
        assert isinstance(build_loader(section, images, ORDER, CPU), DeviceLoader)
        assert_gives(section, images)


def test_dali_that_is_demanded_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classes(tmp_path / "images", cat=6)
    images = LabelDropout(ImageFolder(tmp_path / "images", 8), 0.0, None)
    monkeypatch.setattr(dali, "is_installed", lambda: False)
    section = DataConfig(kind="folder", path="x", loader="dali")
    with pytest.raises(ValueError, match=r'data.loader=dali .*pip install "mixflow_fast\[gpu\]"'):
        build_loader(section, images, ORDER, CPU)


def test_whose_decoder_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classes(tmp_path / "images", cat=6)
    images = ImageFolder(tmp_path / "images", 8)
    monkeypatch.setattr(dali, "is_installed", lambda: True)
    monkeypatch.setattr(loading, "preprocessing_version", lambda device: f"dali/1/{device.type}")
    for name, device, expected in (
        ("auto", "cpu", f"pil/{PIL.__version__}"),
        ("auto", "cuda", "dali/1/cuda"),
        ("threads", "cuda", f"pil/{PIL.__version__}"),
        ("dali", "cpu", "dali/1/cpu"),
    ):
        section = DataConfig(kind="folder", path="x", loader=name)
        assert loading.describe_loader(section, images, torch.device(device)) == expected
    assert not loading.describe_loader(DataConfig(kind="digits"), Digits(), CPU)


@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("resident", ["off", "on", "auto"])
def test_latents_on_the_device_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: str, room: bool
) -> None:
    """auto looks after three steps, once; memory is short or it is not."""
    looked: list[int] = []
    monkeypatch.setattr(loading, "fits", lambda store, device: looked.append(1) or room)
    made: list[object] = []
    own = loading.Resident
    monkeypatch.setattr(loading, "Resident", lambda *given: made.append(1) or own(*given))
    latents = LabelDropout(Latents(write_store(tmp_path / "set")), 0.3, 3)
    assert_gives(DataConfig(kind="latents", path="x", resident=resident), latents)
    assert len(looked) == (resident == "auto")
    assert len(made) == (resident == "on" or (resident == "auto" and room))


def test_latents_that_cannot_lie_on_the_device() -> None:
    digits = LabelDropout(Digits(), 0.0, None)
    with pytest.raises(ValueError, match=r"data.resident=on .* is no set of moments .*: set data"):
        build_loader(DataConfig(kind="latents", resident="on"), digits, ORDER, CPU)
    assert_gives(DataConfig(kind="latents", resident="auto"), digits)


def test_refusals_come_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classes(tmp_path / "images", size=16, cat=6, dog=6)
    images = [f"data={{kind: folder, path: {tmp_path / 'images'}, loader: dali}}"]
    plain_latents = ["data.kind=latents", f"data.path={tmp_path / 'set.npz'}", "data.flip=false"]
    latents = [*plain_latents, "data.size=null", "data.resident=on"]
    np.savez(tmp_path / "set.npz", latents=torch.rand(6, 3, 16, 16), labels=torch.arange(6) % 2)
    monkeypatch.setattr(dali, "is_installed", lambda: False)
    for overrides, message in ((images, "pip install"), (latents, "data.resident=on")):
        with pytest.raises(ValueError, match=message):
            Trainer(tiny(tmp_path / "run", *overrides), quiet=True)
        assert not (tmp_path / "run").exists()


def test_what_helps_against_waiting() -> None:
    def said(**section: object) -> tuple[str, str]:
        found = ways_out(DataConfig(workers=4, depth=3, **section))
        return found.preparing, found.copying

    preparing, copying = said(kind="folder")
    assert preparing.startswith("raise data.workers (now 4), or prepare the images once")
    assert copying == "raise data.depth (now 3)"
    assert "data.loader=dali" in said(kind="images")[0]
    assert all("data.resident=on" in text for text in said(kind="latents"))
    assert "resident" not in " ".join(said(kind="latents", resident="on"))


def on_latents(out: Path, store: Path, *overrides: str) -> Config:
    return tiny(out, *training_on(store, 4, 2), "train.microbatch_size=4", *overrides)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = torch.rand((20, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    labels, source = torch.arange(10) % 3, torch.arange(10)
    root = tmp_path_factory.mktemp("latents") / "set"
    return write_store(root, rows, 4, labels.numpy(), source.numpy())


Make = Callable[[DataConfig, LabelDropout, LoaderOrder, torch.device], object]


def run(
    config: Config, monkeypatch: pytest.MonkeyPatch, make: Make | None = None, hook: bool = False
) -> list[Tensor]:
    """A run with a loader; what each step's micro-batches were made of, where it is hooked."""
    seen: list[Tensor] = []

    def note(step: int, outputs: list[StepOutput], means: Tensor) -> None:
        for made in outputs:
            seen.extend([made.it.data.mean.clone(), made.it.ids.clone(), made.y.clone()])

    with monkeypatch.context() as patch:
        if make is not None:
            patch.setattr("mixflow_fast.training.trainer.build_loader", make)
        trainer = Trainer(config, quiet=True)
        trainer.on_step = note if hook else None
        trainer.run()
    return seen


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_runs_have_the_same_bits_whatever_brings_the_data(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Moments in a ring that is overwritten, against batches that stay: two micro-batches a step.

    A step that looked at a batch after the next one came would train on NaN.
    """

    class Kept(BatchLoader):
        """Batches of their own memory, mean and std apart."""

        wait = None

        def __next__(self) -> Batch:
            batch = super().__next__()
            assert not batch.x.mean.is_contiguous()
            x = batch.x._replace(mean=batch.x.mean.clone(), std=batch.x.std.clone())
            return Batch(x, batch.y, batch.positions)

    def kept(
        section: DataConfig, dataset: LabelDropout, order: LoaderOrder, device: object
    ) -> Kept:
        return Kept(dataset, **vars(order))

    def ring(**options: object) -> Make:
        return lambda section, dataset, order, device: DeviceLoader(
            dataset, device, poison=True, **options, **vars(order)
        )

    stage = {"fp32": 0, "bf16": 2}[precision]
    own = [f"train.precision={precision}", f"train.zero_stage={stage}", "train.images=40"]
    expected = run(on_latents(tmp_path / "kept", store, *own), monkeypatch, kept, hook=True)
    assert len(expected) == 3 * 10 and expected[0].dtype == torch.float16
    for name, make in {
        "deep": ring(depth=3, workers=2),
        "shallow": ring(depth=1, workers=1),
        "alone": ring(workers=0),
        "own": None,
    }.items():
        hook = name in ("deep", "alone")
        seen = run(on_latents(tmp_path / name, store, *own), monkeypatch, make, hook)
        assert_same_bits(tmp_path / "kept", tmp_path / name)
        assert not hook or all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    resident = on_latents(tmp_path / "resident", store, *own, "data.resident=on")
    run(resident, monkeypatch)
    assert_same_bits(tmp_path / "kept", tmp_path / "resident")


def test_a_source_that_is_slow_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each micro-batch takes 150 ms: the rows say so, and after 100 steps (here 4) a sentence."""
    get = Photos.get

    def slow(photos: Photos, indices: Tensor, positions: Tensor, seed: int) -> Batch:
        if len(indices) > 1:
            time.sleep(0.15)
        return get(photos, indices, positions, seed)

    rows = {}
    monkeypatch.setattr("mixflow_fast.metrics.data_wait.STEPS", 4)
    for name in ("quick", "slow"):
        if name == "slow":
            monkeypatch.setattr(Photos, "get", slow)
        config = tiny(tmp_path / name, "train.log_every=2", "train.images=64", "data.workers=1")
        Trainer(config).run()
        rows[name] = read_metrics(tmp_path / name / "metrics.jsonl")
        said = "data: training waited for them for" in capsys.readouterr().err
        if name == "slow":
            assert said
    for row in rows["slow"]:
        assert row["data_stall_s"] == 0  # there are no copies on a CPU
        assert row["data_wait_fraction"] == pytest.approx(row["data_wait_s"] / row["seconds"])
    total, waited, quick = (
        sum(row[key] for row in rows[name])
        for name, key in (
            ("slow", "seconds"),
            ("slow", "data_wait_s"),
            ("quick", "data_wait_s"),
        )
    )
    # Eight batches; a step of this network takes a part of the 150 ms.
    assert total > 8 * 0.14 and waited > 0.3 * total and waited > quick
