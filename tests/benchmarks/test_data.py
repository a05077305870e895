"""`python -m benchmarks.data`: every part runs, and says what it compared."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import data
from tests.support.autoencoder import write_autoencoder

WAYS = ("threads", "dali")
QUICK = ["--rounds", "1", "--seconds", "0.01", "--images", "4", "--rows", "8", "--threads", "1"]


def rates(capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    """Loader -> rate, of the rows that were printed."""
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert f"medians of {len({row['round'] for row in rows})} rounds" in " ".join(lines)
    assert all(row["per_s"] > 0 and row["cpu_ms"] >= 0 for row in rows)
    return {row["loader"]: row["per_s"] for row in rows}


def test_images_by_every_loader(tmp_path, capsys, monkeypatch) -> None:
    """With the baseline in this process: its workers take seconds to start."""
    monkeypatch.setattr(data, "LOADERS", {"images-256": data.LOADERS["images-256"]})
    monkeypatch.setattr(data, "_dataloader", in_process)
    assert data.main(["images-256", "--folder", str(tmp_path), *QUICK]) == 0
    assert list(rates(capsys)) == [
        "dataloader",
        *(f"{files}, {way}" for files in ("jpeg files", "webp", "jpeg") for way in WAYS),
        "raw, threads",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_the_baselines_own_processes(tmp_path, capsys) -> None:
    """PyTorch's workers, whose CPU time is counted."""
    assert data.main(["images-256", "--folder", str(tmp_path), *QUICK, "--seconds", "1"]) == 0
    assert rates(capsys)["dataloader"] > 1


def in_process(files, size, workers, stack):
    loader = torch.utils.data.DataLoader(data.JpegFiles(files, size), batch_size=2)
    (x, _), *_ = loader
    assert x.shape == (2, 3, size, size) and -1 <= x.min() < 0 < x.max() <= 1
    batches = (data.Batch(x, y, y) for _ in iter(int, 1) for x, y in loader)
    return data.Contestant(batches, 1)


def test_latents_by_every_layout(tmp_path, capsys) -> None:
    assert data.main(["latents", "--folder", str(tmp_path), *QUICK]) == 0
    assert list(rates(capsys)) == ["repa", "repa_npy", "lightningdit", "mixflow_fast"]


def test_encode_against_the_bare_autoencoder(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(data, "write_vae", write_autoencoder)
    assert data.main(["encode", "--folder", str(tmp_path), *QUICK]) == 0
    assert list(rates(capsys)) == ["bare autoencoder", "encode"]


def test_an_unknown_part_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        data.main(["images"])
    assert "images-256, images-512, latents, encode" in capsys.readouterr().err
