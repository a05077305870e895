"""Sets of pictures from .npz files and folders."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixflow_fast.evaluation.pictures import Pictures, open_pictures, protocol_of
from mixflow_fast.evaluation.protocol import Protocol, check_comparable
from mixflow_fast.evaluation.sample_sets import write_set
from tests.support.sample_sets import make, pictures, plan


def pixels(count: int = 5, side: int = 8) -> np.ndarray:
    """(count, side, side, 3) uint8."""
    return np.random.default_rng(count).integers(0, 256, (count, side, side, 3), np.uint8)


def all_of(pictures: Pictures) -> torch.Tensor:
    return torch.cat(list(pictures.batches()))


def test_npz_as_adm_s_evaluator_takes_it(tmp_path: Path) -> None:
    x = pixels(150)
    np.savez(tmp_path / "a.npz", arr_0=x, arr_1=np.arange(150))
    found = open_pictures(tmp_path / "a.npz")
    assert found.count == 150 and np.array_equal(found.labels, np.arange(150))
    assert [len(batch) for batch in found.batches()] == [64, 64, 22]
    assert np.array_equal(all_of(found).permute(0, 2, 3, 1), x)
    assert np.array_equal(all_of(found), all_of(found))


def test_labels_may_lie_beside_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=pixels())
    assert open_pictures(tmp_path / "a.npz").labels is None
    np.save(tmp_path / "a.labels.npy", np.arange(5))
    assert np.array_equal(open_pictures(tmp_path / "a.npz").labels, np.arange(5))
    np.save(tmp_path / "a.labels.npy", np.arange(4))
    with pytest.raises(ValueError, match=r"labels of .* must be \(5,\), got \(4,\)"):
        open_pictures(tmp_path / "a.npz")


def test_npz_of_sample_is_rounded_half_up(tmp_path: Path) -> None:
    """255 (x + 1) / 2, rounded: every grey level comes back; beyond the ends is the end."""
    levels = np.arange(256, dtype=np.float32).reshape(1, 1, 16, 16)
    np.savez(tmp_path / "a.npz", x=levels / 127.5 - 1, y=np.zeros(1, int))
    found = all_of(open_pictures(tmp_path / "a.npz"))
    assert found.shape == (1, 3, 16, 16) and found.dtype == torch.uint8
    assert np.array_equal(found[0, 2], levels[0, 0])
    np.savez(tmp_path / "a.npz", x=np.array([-3, 0, 3], np.float32).reshape(1, 3, 1, 1))
    assert all_of(open_pictures(tmp_path / "a.npz")).flatten().tolist() == [0, 128, 255]


def test_folder_of_images_in_the_order_of_paths(tmp_path: Path) -> None:
    x = pixels(3, 12)
    for name, image in zip(("b/2.png", "a/9.PNG", "c.png"), x, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "a" / "notes.txt").write_text("")
    found = open_pictures(tmp_path)
    assert found.count == 3 and found.labels is None
    assert np.array_equal(all_of(found).permute(0, 2, 3, 1), x[[1, 0, 2]])
    cropped = open_pictures(tmp_path, size=6)
    assert all_of(cropped).shape == (3, 3, 6, 6) and cropped.source != found.source
    # Halved by a box filter, as ADM's crop is: means of 2 x 2, rounded after each axis.
    means = x[[1, 0, 2]].reshape(3, 6, 2, 6, 2, 3).mean((2, 4))
    assert np.abs(all_of(cropped).permute(0, 2, 3, 1).numpy() - means).max() <= 1


def test_other_files_are_another_source(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=pixels())
    first = open_pictures(tmp_path / "a.npz").source
    assert open_pictures(tmp_path / "a.npz").source == first
    np.savez(tmp_path / "a.npz", arr_0=pixels(6))
    assert open_pictures(tmp_path / "a.npz").source != first


def test_refusals(tmp_path: Path) -> None:
    cases = [
        ({"z": pixels()}, "must hold arr_0"),
        ({"x": np.zeros((2, 4, 8, 8), np.float32)}, "latents have to be decoded"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, "uint8"),
        ({"x": np.zeros((2, 3, 8, 8), np.int64)}, "int64"),
    ]
    for arrays, message in cases:
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            open_pictures(tmp_path / "a.npz")
    latents = np.random.default_rng(0).normal(size=(20, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=latents)
    with pytest.raises(ValueError, match=r"1[234]% of its values are beyond 1.5: latents have to"):
        open_pictures(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", x=latents.clip(-1.4, 1.4))
    assert open_pictures(tmp_path / "a.npz").count == 20
    np.savez(tmp_path / "a.npz", x=np.full((1, 3, 2, 2), np.nan))
    with pytest.raises(ValueError, match="finite"):
        all_of(open_pictures(tmp_path / "a.npz"))
    with pytest.raises(ValueError, match="leave --size out"):
        open_pictures(tmp_path / "a.npz", size=4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image files"):
        open_pictures(tmp_path / "empty")
    (tmp_path / "empty" / "work.json").write_text("{}")
    with pytest.raises(ValueError, match="no finished set"):
        open_pictures(tmp_path / "empty")


def test_sets_that_were_made_here_bring_their_protocol(tmp_path: Path) -> None:
    made = plan()
    write_set(make, made, tmp_path / "a")
    for path in (tmp_path / "a", tmp_path / "a.npz"):
        found = open_pictures(path)
        assert torch.equal(all_of(found), pictures(torch.arange(11)))
        assert found.protocol == made.protocol and found.origin == {"weights": "aa"}
        assert np.array_equal(found.labels, np.arange(11) % 3)


def test_pictures_of_unknown_origin_compare_with_themselves_alone(tmp_path: Path) -> None:
    """By content: a copy elsewhere is the same, other pictures are others, also in a folder."""
    x = pixels(4)
    np.savez(tmp_path / "a.npz", arr_0=x)
    (tmp_path / "copies").mkdir()
    np.savez_compressed(tmp_path / "copies" / "b.npz", arr_0=x)
    np.savez(tmp_path / "c.npz", arr_0=x[::-1])
    np.savez(tmp_path / "d.npz", x=x.transpose(0, 3, 1, 2) / np.float32(127.5) - 1)
    a, b, c, d = (protocol_of(open_pictures(tmp_path / n))
                  for n in ("a.npz", "copies/b.npz", "c.npz", "d.npz"))  # fmt: skip
    assert a == b and a.record["sampler"] == {"method": "unknown"}
    assert a.record["image"] == {"size": 8, "quantisation": "unknown"}
    assert d.record["image"] == {"size": 8, "quantisation": "round"}
    with pytest.raises(ValueError, match="different protocols.*set.sha256"):
        check_comparable({"a": a, "c": c})
    ours = plan(n=4).protocol
    with pytest.raises(ValueError, match="different protocols"):
        check_comparable({"a": a, "ours": ours})
    found = check_comparable({"a": a, "ours": ours}, ["sampler", "set", "image"])
    assert "sampler.method" in [each.field for each in found]


def test_folder_of_unknown_origin_is_known_by_its_files(tmp_path: Path) -> None:
    for folder, names in (("a", "12"), ("b", "34"), ("c", "21")):
        (tmp_path / folder).mkdir()
        for name, image in zip(names, pixels(2, 12), strict=True):
            Image.fromarray(image[:, :9]).save(tmp_path / folder / f"{name}.png")
    a, b, c = (protocol_of(open_pictures(tmp_path / name)) for name in "abc")
    assert a == b != c and a.record["image"]["size"] == [12, 9]
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "0.png")
    assert protocol_of(open_pictures(tmp_path / "a")).record["image"]["size"] is None


def test_content_is_read_once(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=pixels(4))
    found = open_pictures(tmp_path / "a.npz")
    first = protocol_of(found, tmp_path / "kept")
    stamp = (tmp_path / "kept" / "pictures.json").stat().st_mtime_ns
    assert protocol_of(open_pictures(tmp_path / "a.npz"), tmp_path / "kept") == first
    assert (tmp_path / "kept" / "pictures.json").stat().st_mtime_ns == stamp
    np.savez(tmp_path / "a.npz", arr_0=pixels(5))
    other = protocol_of(open_pictures(tmp_path / "a.npz"), tmp_path / "kept")
    assert other != first and other.record["set"]["n"] == 5
    (tmp_path / "kept" / "pictures.json").write_text("{")
    assert protocol_of(open_pictures(tmp_path / "a.npz"), tmp_path / "kept") == other
    assert isinstance(first, Protocol)
