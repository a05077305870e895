"""`mixflow-fast reference` and `mixflow-fast evaluate`, from images to a row."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mixflow_fast.evaluation.frechet import frechet_distance, moments, pooled_pixels
from mixflow_fast.evaluation.protocol import Protocol, differences
from mixflow_fast.evaluation.sample_sets import Made, SetPlan, write_set
from tests.support.command_line import run

CROPS = 260  # more than the 192 dimensions of pooled_pixels


def write_noise(path: Path, seed: int, shift: int) -> np.ndarray:
    """Noise as arr_0, (CROPS, 8, 8, 3) uint8, brighter by `shift`."""
    g = np.random.default_rng(seed)
    x = g.integers(0, 200, (CROPS, 8, 8, 3), np.uint8) + np.uint8(shift)
    np.savez(path, arr_0=x)
    return x


def pooled(x: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1
    return moments(pooled_pixels(pixels).float())


def test_from_images_to_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real, fake = write_noise(tmp_path / "real.npz", 0, 0), write_noise(tmp_path / "a.npz", 1, 9)
    code, out, err = run("reference", tmp_path / "real.npz", "--pixels", "--out",
                         tmp_path / "ref.npz", capsys=capsys)  # fmt: skip
    assert code == 0 and "260 images, pooled_pixels.features, random_conv.features" in out, err
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "real.npz", tmp_path / "moved" / "real.npz")
    again = ["reference", tmp_path / "moved" / "real.npz", "--pixels", "--out"]
    assert run(*again, tmp_path / "moved" / "other.npz", capsys=capsys)[0] == 0
    assert (tmp_path / "moved" / "other.npz").read_bytes() == (tmp_path / "ref.npz").read_bytes()
    line = ["evaluate", tmp_path / "a.npz", "--reference", tmp_path / "ref.npz", "--pixels"]
    code, out, err = run(*line, "--out", tmp_path / "rows.jsonl", capsys=capsys)
    assert code == 0 and err == "" and "fd_pooled_pixels" in out and "se " in out, err
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    expected = frechet_distance(*pooled(fake), *pooled(real))
    assert row["metrics"]["fd_pooled_pixels"]["value"] == pytest.approx(expected, rel=1e-6)
    assert row["kind"] == "evaluation" and row["n"] == CROPS
    # Where the samples come from is not known, so their content is in their protocol.
    assert row["pictures"]["sampler"] == {"method": "unknown"}
    assert row["pictures"]["image"] == {"size": 8, "quantisation": "unknown"}
    number = row["metrics"]["fd_pooled_pixels"]["protocol"]
    assert re.search(rf"fd_pooled_pixels .*protocol {number[:12]}\n", out)
    assert f"of protocol {row['protocol'][:12]}" in out

    # The features are kept and used again, until the set is another.
    kept = tmp_path / "a.features" / "pooled_pixels.features.npy"
    stamp = kept.stat().st_mtime_ns
    code, again, err = run(*line, "--metrics", "fd_pooled_pixels", capsys=capsys)
    assert (
        code == 0
        and err == ""
        and "fd_random_conv" not in again
        and kept.stat().st_mtime_ns == stamp
    )
    write_noise(tmp_path / "a.npz", 2, 30)
    code, other, _ = run(*line, "--out", tmp_path / "rows.jsonl", capsys=capsys)
    assert code == 0 and kept.stat().st_mtime_ns != stamp
    first, second = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    changed = differences([Protocol(r["pictures"]) for r in (first, second)])
    assert [each.field for each in changed] == ["set.sha256"]
    values = [r["metrics"]["fd_pooled_pixels"]["value"] for r in (first, second)]
    # What 192 means are apart, in units of 127.5 grey levels.
    assert values[1] - values[0] == pytest.approx(192 * (30**2 - 9**2) / 127.5**2, abs=1.5)


def test_refusals_come_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_noise(tmp_path / "a.npz", 0, 0)
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    a, adm, bad = tmp_path / "a.npz", tmp_path / "adm.npz", tmp_path / "bad.npz"
    bad.write_bytes(b"text")
    cases = [
        (["evaluate", a, "--reference", adm], "no features were chosen"),
        (["evaluate", a, "--reference", adm, "--pixels"], "nothing in common"),
        (["evaluate", a, "--reference", adm, "--inception", tmp_path / "w.pth"], "not there"),
        (["evaluate", tmp_path / "b.npz", "--reference", adm, "--pixels"], "does not exist"),
        (["reference", a, "--pixels", "--out", tmp_path / "x.pkl"], "must end in .npz"),
        (["reference", a, "--pixels", "--out", adm], "exists"),
        (["evaluate", a, "--reference", bad, "--pixels"], "reference .*bad.npz is no ZIP file"),
        (["evaluate", bad, "--reference", adm, "--pixels"], "no whole .npy or .npz"),
        (["evaluate", a, "--reference", adm, "--pixels", "--device", "tpu"], "--device must be"),
        (["evaluate", a, "--reference", adm, "--pixels", "--out", tmp_path], "is a folder"),
        (["reference", a, "--pixels", "--size", "0", "--out", tmp_path / "x.npz"], "--size must"),
        (["reference", a, "--pixels", "--keep", "-1", "--out", tmp_path / "x.npz"], "--keep"),
    ]
    for line, message in cases:
        code, out, err = run(*line, capsys=capsys)
        assert code == 2 and re.search(message, err) and err.count("\n") == 1, (line, err)
    assert not (tmp_path / "x.npz").exists()


def test_images_of_an_adm_file_give_precision_and_recall(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a network of mean colours in Inception's place, whose numbers can be seen."""
    from mixflow_fast.evaluation.features import inception
    from mixflow_fast.evaluation.features.extractor import ExtractorId

    class Colours:
        outputs = ("pool",)
        device = torch.device("cpu")

        def __init__(self, path: Path, device: str, allow_unknown: bool) -> None:
            self.id = ExtractorId("inception", "ab", "none")

        def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"pool": images.float().mean(dim=(2, 3))}

    monkeypatch.setattr(inception, "Inception", Colours)
    x = write_noise(tmp_path / "a.npz", 0, 0)
    np.savez(tmp_path / "adm.npz", mu=np.full(3, 99.5), sigma=np.eye(3), arr_0=x[:100])
    line = ["evaluate", tmp_path / "a.npz", "--reference", tmp_path / "adm.npz", "--inception"]
    code, out, err = run(*line, "w.pth", "--out", tmp_path / "r.jsonl", capsys=capsys)
    assert code == 0, err
    found = json.loads((tmp_path / "r.jsonl").read_text())["metrics"]
    assert list(found) == ["fid", "precision", "recall", "kid"]
    # A third of the samples is the reference, which all of its own points are within reach of.
    assert found["recall"]["value"] == 1.0 and found["precision"]["value"] > 100 / CROPS
    assert (tmp_path / "adm.features" / "inception.json").exists()
    # Where it cannot be written to, the numbers are the same; with --features, kept apart.
    shutil.rmtree(tmp_path / "adm.features")
    (tmp_path / "adm.features").write_text("mine")
    code, again, err = run(*line, "w.pth", capsys=capsys)
    assert code == 0 and again == out and "features of adm.npz are not kept" in err
    code, again, err = run(*line, "w.pth", "--features", tmp_path / "kept", capsys=capsys)
    assert code == 0 and again == out and err == ""
    assert len(list((tmp_path / "kept").glob("reference-*/inception.json"))) == 1


def test_a_set_brings_its_protocol_and_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(ids: torch.Tensor) -> Made:
        g = np.random.default_rng(int(ids[0]))
        x = g.integers(0, 256, (len(ids), 3, 8, 8), np.uint8)
        return Made(torch.from_numpy(x), None)

    protocol = Protocol({"set": {"n": 40}, "image": {"size": 8, "quantisation": "floor"}})
    origin = {"weights_sha256": "aa", "average": "ema"}
    write_set(make, SetPlan(protocol=protocol, shape=(3, 8, 8), origin=origin), tmp_path / "set")
    line = ["reference", tmp_path / "set.npz", "--pixels", "--out", tmp_path / "r.npz"]
    code, _, err = run(*line, capsys=capsys)
    assert code == 0, err
    rows = tmp_path / "rows.jsonl"
    for path in ("set", "set.npz"):
        line = ["evaluate", tmp_path / path, "--reference", tmp_path / "r.npz", "--pixels"]
        code, out, err = run(*line, "--out", rows, capsys=capsys)
        assert code == 0, err
    first, second = map(json.loads, rows.read_text().splitlines())
    assert first["protocol"] == second["protocol"] == protocol.sha256
    assert first["weights"] == origin and f"of protocol {protocol.short}" in out
    numbers = first["metrics"]["fd_pooled_pixels"]["protocol"]
    assert numbers == second["metrics"]["fd_pooled_pixels"]["protocol"] != protocol.sha256


def test_a_reference_of_validation_images_is_for_reconstructions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_noise(tmp_path / "val.npz", 0, 0)
    write_noise(tmp_path / "a.npz", 1, 9)
    made = ["reference", tmp_path / "val.npz", "--pixels", "--split", "val"]
    assert run(*made, "--out", tmp_path / "r.npz", capsys=capsys)[0] == 0
    line = ["evaluate", tmp_path / "a.npz", "--reference", tmp_path / "r.npz", "--pixels"]
    code, _, err = run(*line, capsys=capsys)
    assert code == 2 and "r.npz is of validation images" in err
    code, out, err = run(*line, "--reconstructions", capsys=capsys)
    assert code == 0 and "260 reconstructions of protocol" in out, err


def test_a_set_against_itself_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_noise(tmp_path / "a.npz", 0, 0)
    write_noise(tmp_path / "b.npz", 1, 0)
    for name in "ab":
        made = [
            "reference",
            tmp_path / f"{name}.npz",
            "--pixels",
            "--out",
            tmp_path / f"{name}.r.npz",
        ]
        assert run(*made, capsys=capsys)[0] == 0
    for name in "ab":
        line = ["evaluate", tmp_path / "a.npz", "--reference", tmp_path / f"{name}.r.npz"]
        _, out, _ = run(*line, "--pixels", capsys=capsys)
        # Another draw of the same law is no reason for it.
        assert ("has the mean and covariance of the reference" in out) == (name == "a")


def test_a_place_that_cannot_be_written_to_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file lies where features would be kept: the numbers are made, and --features keeps them."""
    write_noise(tmp_path / "a.npz", 0, 9)
    write_noise(tmp_path / "real.npz", 1, 0)
    made = ["reference", tmp_path / "real.npz", "--pixels", "--out", tmp_path / "r.npz"]
    assert run(*made, capsys=capsys)[0] == 0
    (tmp_path / "a.features").write_text("mine")
    line = ["evaluate", tmp_path / "a.npz", "--reference", tmp_path / "r.npz", "--pixels"]
    code, out, err = run(*line, "--out", tmp_path / "rows.jsonl", capsys=capsys)
    assert code == 0 and "fd_pooled_pixels" in out
    assert "a.features cannot be written to: features of a.npz are not kept" in err
    assert json.loads((tmp_path / "rows.jsonl").read_text())["features"] is None
    code, again, err = run(*line, "--features", tmp_path / "kept", capsys=capsys)
    assert code == 0 and err == "" and again == out
    assert (tmp_path / "kept" / "pooled_pixels.json").exists()
