"""Sets of latents made of other programs' files, read back and compared with those files."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mixflow_fast.data.imports.foreign_latents import copy_latents, like_edm2, map_latents
from mixflow_fast.data.imports.recognise import (
    EDM2_RANGE,
    SIGNED_RANGE,
    ImportOptions,
    open_foreign_latents,
    warnings_about,
)
from mixflow_fast.data.latents_store import LatentsStore
from mixflow_fast.data.set_files import verify

GENERATOR = np.random.default_rng(0)
COUNT = 11


def moments(count: int = COUNT) -> np.ndarray:
    """(n, 8, 4, 4) float32, mean | std."""
    x = GENERATOR.normal(size=(count, 8, 4, 4)).astype(np.float32)
    x[:, 4:] = np.abs(x[:, 4:])
    return x


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def write_repa(path: Path, rows: np.ndarray, labels: list[int] | None, zipped: bool) -> None:
    """REPA's layout; members of the zip out of order, with extra fields in their local headers."""
    # Every other number is missing, as where images were skipped.
    names = [f"{2 * n:08d}"[:5] + f"/img-mean-std-{2 * n:08d}.npy" for n in range(len(rows))]
    pairs = None if labels is None else [list(p) for p in zip(names, labels, strict=True)]
    # The list is not in the order of the numbers.
    index = json.dumps({"labels": pairs and pairs[::-1]}).encode()
    if not zipped:
        for name, row in zip(names, rows, strict=True):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(npy(row))
        (path / "dataset.json").write_bytes(index)
        return
    order = GENERATOR.permutation(len(rows))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for n in order.tolist():
            info = zipfile.ZipInfo(names[n])
            # Of odd lengths, so that rows lie at odd bytes: a field of an unknown kind.
            info.extra = struct.pack("<HH", 0x7777, n) + bytes(n)
            archive.writestr(info, npy(rows[n]))
        archive.writestr("dataset.json", index)


def copied(path: Path, out: Path, shard_samples: int = 4, **options: object) -> LatentsStore:
    latents = open_foreign_latents(path, ImportOptions(**options))
    assert copy_latents(latents, out, lambda n: None, shard_samples=shard_samples)
    assert verify(out) == []
    return LatentsStore(out)


def mapped(path: Path, out: Path, **options: object) -> LatentsStore:
    latents = open_foreign_latents(path, ImportOptions(**options))
    map_latents(latents, latents.places(), out, lambda n: None)
    assert verify(out) == []
    return LatentsStore(out)


def everything(store: LatentsStore) -> torch.Tensor:
    return store.take(torch.arange(store.info.count * store.info.mirrors))


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_repa(tmp_path: Path, zipped: bool) -> None:
    rows, labels = moments(), GENERATOR.integers(0, 5, COUNT).tolist()
    path = tmp_path / ("vae-sd.zip" if zipped else "vae-sd")
    write_repa(path, rows, labels, zipped)
    store = copied(path, tmp_path / "out", input_range=SIGNED_RANGE)
    assert torch.equal(everything(store), torch.from_numpy(rows).half())
    assert store.labels.tolist() == labels
    assert store.source.tolist() == list(range(0, 2 * COUNT, 2))
    assert (store.info.scale, store.info.mirrors, store.info.size) == (0.18215, 1, 32)
    if not zipped:
        with pytest.raises(ValueError, match="cannot map a file for each sample"):
            mapped(path, tmp_path / "mapped", input_range=SIGNED_RANGE)
        return
    # In place the values are the file's own, in float32.
    store = mapped(path, tmp_path / "mapped", input_range=SIGNED_RANGE)
    assert torch.equal(everything(store), torch.from_numpy(rows))
    assert (tmp_path / "mapped" / "files" / path.name).resolve() == path
    assert not (tmp_path / "mapped" / "moments").exists()


def test_range_of_the_pixels_is_asked_for(tmp_path: Path) -> None:
    write_repa(tmp_path / "a", moments(3), [0, 1, 2], zipped=False)
    with pytest.raises(ValueError, match="--vae-input-range=-1,1 or --vae-input-range=0,1"):
        open_foreign_latents(tmp_path / "a", ImportOptions())


def test_edm2_is_noticed(tmp_path: Path) -> None:
    """By its own claim, and by its means where the claim is wrong."""
    rows = moments()
    rows[:, :4] += np.array([5.81, 3.25, 0.12, -2.15], np.float32)[:, None, None]
    write_repa(tmp_path / "edm2", rows, [0] * COUNT, zipped=False)

    def warnings(path: Path, input_range: tuple[float, float]) -> list[str]:
        return warnings_about(open_foreign_latents(path, ImportOptions(input_range=input_range)))

    (line,) = warnings(tmp_path / "edm2", EDM2_RANGE)
    assert "cannot be post-trained" in line
    (line,) = warnings(tmp_path / "edm2", SIGNED_RANGE)
    assert "as EDM2's are" in line
    write_repa(tmp_path / "repa", moments(), [0] * COUNT, zipped=False)
    assert warnings(tmp_path / "repa", SIGNED_RANGE) == []
    assert like_edm2([5.8, 3.2, 0.1, -2.1]) and not like_edm2([5.8, 3.2, 0.1, -2.7])


def test_images_without_classes(tmp_path: Path) -> None:
    write_repa(tmp_path / "a", moments(), None, zipped=False)
    with pytest.raises(ValueError, match="--no-labels"):
        open_foreign_latents(tmp_path / "a", ImportOptions(input_range=SIGNED_RANGE))
    store = copied(tmp_path / "a", tmp_path / "out", input_range=SIGNED_RANGE, no_labels=True)
    assert store.info.num_classes == 1 and store.info.count == COUNT


def write_lightningdit(root: Path, ranks: int = 2, stats: bool = True) -> torch.Tensor:
    """Two shards a rank; returns (N, 2, C, h, w) in the order of the files."""
    root.mkdir()
    parts = []
    for rank in range(ranks):
        for shard, count in enumerate((3, 2)):
            rows = torch.randn(2, count, 6, 2, 2, generator=torch.manual_seed(7 * rank + shard))
            tensors = {"latents": rows[0], "latents_flip": rows[1]}
            tensors = {name: rows.contiguous() for name, rows in tensors.items()}
            tensors["labels"] = torch.arange(count) + rank
            metadata = {"total_size": str(count), "dtype": "torch.float32", "device": "cpu"}
            file = root / f"latents_rank{rank:02d}_shard{shard:03d}.safetensors"
            save_file(tensors, file, metadata)
            parts.append(rows.transpose(0, 1))
    if stats:
        mean, std = torch.arange(6.0)[None, :, None, None], torch.full((1, 6, 1, 1), 2.0)
        torch.save({"mean": mean, "std": std}, root / "latents_stats.pt")
    return torch.cat(parts)


def test_lightningdit(tmp_path: Path) -> None:
    rows = write_lightningdit(tmp_path / "va")
    labels = [0, 1, 2, 0, 1, 1, 2, 3, 1, 2]
    for store, dtype in (
        (copied(tmp_path / "va", tmp_path / "out", multiplier=0.5), torch.float16),
        (mapped(tmp_path / "va", tmp_path / "mapped", multiplier=0.5), torch.float32),
    ):
        assert torch.equal(everything(store), rows.flatten(0, 1).to(dtype))
        assert store.labels.tolist() == labels
        assert set(store.source.tolist()) == {-1}  # no file says which image a row is of
        assert (store.info.kind, store.info.mirrors, store.info.count) == ("sample", 2, 10)
        norm = store.info.normalisation
        assert (norm.mean, norm.std, norm.multiplier) == (tuple(range(6)), (2.0,) * 6, 0.5)
    pairing, twice = open_foreign_latents(tmp_path / "va", ImportOptions()).notes
    assert "cannot be paired with images" in pairing
    assert twice == "2 ranks extracted: up to 1 images may occur twice"


def test_another_normalisation_is_another_set(tmp_path: Path) -> None:
    """It stands in the manifest alone, which is not written again."""
    write_lightningdit(tmp_path / "va")
    copied(tmp_path / "va", tmp_path / "out", multiplier=0.5)
    with pytest.raises(ValueError, match="was begun with normalisation = .*0.5"):
        copied(tmp_path / "va", tmp_path / "out", multiplier=1.0)


def test_lightningdit_without_statistics(tmp_path: Path) -> None:
    write_lightningdit(tmp_path / "va", stats=False)
    with pytest.raises(ValueError, match="latents_stats.pt.*--scale X"):
        open_foreign_latents(tmp_path / "va", ImportOptions())
    store = copied(tmp_path / "va", tmp_path / "out", scale=0.18215)
    assert store.info.normalisation is None and store.info.scale == 0.18215


def test_lightningdit_statistics_execute_nothing(tmp_path: Path) -> None:
    write_lightningdit(tmp_path / "va", stats=False)

    class Planted:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "was_run",))

    torch.save({"mean": Planted(), "std": 1}, tmp_path / "va" / "latents_stats.pt")
    with pytest.raises(ValueError, match="latents_stats.pt"):
        open_foreign_latents(tmp_path / "va", ImportOptions())
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("name", ["set.npz", "set.npy"])
def test_arrays(tmp_path: Path, name: str) -> None:
    rows, labels = moments(), GENERATOR.integers(0, 5, COUNT)
    if name == "set.npz":
        np.savez(tmp_path / name, moments=rows, labels=labels)
    else:
        np.save(tmp_path / name, rows)
        np.save(tmp_path / "labels.npy", labels)
    store = copied(tmp_path / name, tmp_path / "out", moments=True)
    assert torch.equal(everything(store), torch.from_numpy(rows).half())
    assert store.labels.tolist() == labels.tolist() and store.info.scale == 0.18215
    if name == "set.npz":
        with pytest.raises(ValueError, match="needs a .npy in C order"):
            mapped(tmp_path / name, tmp_path / "mapped", moments=True)
        return
    assert torch.equal(
        everything(mapped(tmp_path / name, tmp_path / "mapped", moments=True)),
        torch.from_numpy(rows),
    )


def test_bytes_do_not_depend_on_ranks_and_interruptions(tmp_path: Path) -> None:
    rows = moments()
    write_repa(tmp_path / "a", rows, [0] * COUNT, zipped=False)
    options = ImportOptions(input_range=SIGNED_RANGE)

    def written(out: Path) -> dict[str, bytes]:
        return {
            path.relative_to(out).as_posix(): path.read_bytes()
            for path in sorted(out.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }

    copied(tmp_path / "a", tmp_path / "one", input_range=SIGNED_RANGE)
    three = tmp_path / "three"
    for rank in range(3):
        latents = open_foreign_latents(tmp_path / "a", options)
        assert copy_latents(latents, three, lambda n: None, rank, 3, 4) == (rank == 2)

    def stop_in_the_second_shard(done: int) -> None:
        counted.append(done)
        if len(counted) == 2:
            raise KeyboardInterrupt

    counted: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        copy_latents(
            open_foreign_latents(tmp_path / "a", options),
            tmp_path / "stopped",
            stop_in_the_second_shard,
            shard_samples=4,
        )
    copied(tmp_path / "a", tmp_path / "stopped", input_range=SIGNED_RANGE)
    assert written(tmp_path / "one") == written(three) == written(tmp_path / "stopped")


def test_values_that_cannot_be_stored_are_named(tmp_path: Path) -> None:
    rows = moments()
    rows[6, 1, 2, 2] = np.nan
    write_repa(tmp_path / "a", rows, [0] * COUNT, zipped=False)
    with pytest.raises(ValueError, match="img-mean-std-00000012.npy"):
        copied(tmp_path / "a", tmp_path / "out", input_range=SIGNED_RANGE)
    rows[6, 1, 2, 2] = 0
    rows[3, 5] = -1
    np.save(tmp_path / "set.npy", rows)
    np.save(tmp_path / "labels.npy", np.zeros(COUNT, np.int64))
    with pytest.raises(ValueError, match="row 3 of .*negative std"):
        mapped(tmp_path / "set.npy", tmp_path / "out2", moments=True)
    assert not (tmp_path / "out2").exists()


def test_refused(tmp_path: Path) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/latents_rank00_shard000.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="must be a safetensors file .*a header of 18,446"):
        open_foreign_latents(tmp_path / "damaged", ImportOptions())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds nothing that is imported"):
        open_foreign_latents(tmp_path / "empty", ImportOptions())
    with zipfile.ZipFile(tmp_path / "packed.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dataset.json", "{}")
    with pytest.raises(ValueError, match="stored without compression"):
        open_foreign_latents(tmp_path / "packed.zip", ImportOptions(input_range=SIGNED_RANGE))
    write_repa(tmp_path / "a", moments(3), [0, 1, 2], zipped=False)
    (tmp_path / "a" / "00000" / "img-mean-std-00000002.npy").unlink()
    with pytest.raises(ValueError, match="1 are not there, such as '00000/img-mean-std-00000002"):
        open_foreign_latents(tmp_path / "a", ImportOptions(input_range=SIGNED_RANGE))
