"""Reference files of ADM, EDM2 and our own; what a pickle may hold."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from mixflow_fast.evaluation.features.extractor import ExtractorId, Features
from mixflow_fast.evaluation.reference import read_reference, write_reference


def moments(dim: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(dim).normal(size=(4 * dim, dim))
    return x.mean(0), np.cov(x.T)


def features(name: str = "inception", count: int = 30) -> Features:
    g = np.random.default_rng(0)
    arrays = {
        "pool": g.normal(size=(count, 4)).astype(np.float32),
        "logits": g.normal(size=(count, 3)).astype(np.float32),
        "spatial": g.normal(size=(count, 5)).astype(np.float32),
    }
    return Features(arrays, np.arange(count), ExtractorId(name, "ab12", "none"))


def test_adm(tmp_path: Path) -> None:
    (mu, sigma), (mu_s, sigma_s) = moments(4), moments(5)
    path = tmp_path / "VIRTUAL.npz"
    images = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(path, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, arr_0=images)
    found = read_reference(path)
    assert found.has_images and found.n is None and not found.features
    assert set(found.gaussians) == {"inception.pool", "inception.spatial"}
    assert np.array_equal(found.gaussians["inception.pool"].cov, sigma)
    assert np.array_equal(found.gaussians["inception.spatial"].mean, mu_s)
    np.savez(path, mu=mu.astype(np.float32), sigma=sigma)
    found = read_reference(path)
    assert not found.has_images and list(found.gaussians) == ["inception.pool"]
    assert str(found.gaussians["inception.pool"].mean.dtype) == "torch.float64"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_edm2(tmp_path: Path, protocol: int) -> None:
    mu, sigma = moments(4)
    content = {"fid": {"mu": mu, "sigma": sigma}, "other": np.float64(3)}
    path = tmp_path / "img512.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_reference(path)
    assert list(found.gaussians) == ["inception.pool"]
    assert np.array_equal(found.gaussians["inception.pool"].cov, sigma)
    content = {"fd_dinov2": content["fid"]}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    assert list(read_reference(path).gaussians) == ["dinov2.cls"]


def test_names_of_numpy_1_are_read(tmp_path: Path) -> None:
    mu, sigma = moments(4)
    data = pickle.dumps({"fid": {"mu": mu, "sigma": sigma}}, protocol=0)
    assert b"numpy._core" in data
    (tmp_path / "a.pkl").write_bytes(data.replace(b"numpy._core", b"numpy.core"))
    assert list(read_reference(tmp_path / "a.pkl").gaussians) == ["inception.pool"]


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"fid": Harm(tmp_path / "harm")}))
    with pytest.raises(ValueError, match="mkdir, which is no array"):
        read_reference(path)
    assert not (tmp_path / "harm").exists()


def test_ours(tmp_path: Path) -> None:
    path, made = tmp_path / "ref.npz", features()
    write_reference(path, [made], "thirty", keep=10)
    found = read_reference(path)
    assert found.n == 30 and found.extractors == [made.extractor.to_record()]
    # The logits are of the Inception Score, which has no reference.
    assert set(found.gaussians) == {"inception.pool", "inception.spatial"}
    pool = made.arrays["pool"].astype(np.float64)
    np.testing.assert_allclose(found.gaussians["inception.pool"].mean, pool.mean(0), atol=1e-12)
    np.testing.assert_allclose(found.gaussians["inception.pool"].cov, np.cov(pool.T), atol=1e-12)
    # Ten of thirty, evenly; spatial ones are for no such metric.
    assert list(found.features) == ["inception.pool"]
    assert np.array_equal(found.features["inception.pool"], made.arrays["pool"][::3])
    assert isinstance(found.features["inception.pool"], np.memmap)
    assert found.to_record() == {"name": "ref.npz", "sha256": found.sha256, "n": 30}
    write_reference(path, [made], "thirty", keep=0)
    assert not read_reference(path).features


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=np.zeros(3))
    with pytest.raises(ValueError, match="with mu and sigma"):
        read_reference(path)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(ValueError, match=r"inception.pool, got \(3,\) and \(4, 4\)"):
        read_reference(path)
    (tmp_path / "b.pkl").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="EDM2"):
        read_reference(tmp_path / "b.pkl")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"is": 1}))
    with pytest.raises(ValueError, match="none of fid, fd_dinov2"):
        read_reference(tmp_path / "b.pkl")
    with pytest.raises(ValueError, match="does not exist"):
        read_reference(tmp_path / "c.npz")
    with pytest.raises(ValueError, match="sets of one size"):
        write_reference(path, [features(), features("other", 29)], "x")
