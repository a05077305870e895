"""`mixflow-fast data import`: what is said of what is, and what is not, imported."""

import numpy as np
import pytest

from tests.support.command_line import run
from tests.support.image_folders import write_folder


@pytest.fixture
def arrays(tmp_path):
    """Six latents with labels."""
    values = np.random.default_rng(0).standard_normal((6, 4, 2, 2)).astype(np.float32)
    np.savez(tmp_path / "some.npz", x=values, y=np.arange(6) % 3)
    return tmp_path / "some.npz"


def test_arrays_become_a_set(arrays, tmp_path, capsys):
    out = tmp_path / "set"
    code, said, _ = run("data", "import", arrays, "--out", out, capsys=capsys)
    assert code == 0
    assert said.endswith(
        f"{out}: complete, 6 latents of (4, 2, 2)\n"
        f"  train on it with data.kind=latents data.path={out}\n"
    )
    code, said, _ = run("data", "verify", out, capsys=capsys)
    assert code == 0 and "whole" in said


def test_options_of_images_are_refused_for_latents(arrays, tmp_path, capsys):
    command = ("data", "import", arrays, "--out", tmp_path / "set", "--size", 32)
    code, _, error = run(*command, capsys=capsys)
    assert code == 2 and "--size has no meaning for" in error and "which holds latents" in error


def test_a_folder_of_images_is_not_called_latents(tmp_path, capsys):
    images = write_folder(tmp_path / "images")
    command = ("data", "import", images, "--out", tmp_path / "set", "--size", 32)
    code, _, error = run(*command, capsys=capsys)
    assert code == 2 and "holds nothing that is imported" in error
    assert "which holds latents" not in error and not (tmp_path / "set").exists()


def test_files_that_are_mapped_and_gone_are_not_to_be_deleted(tmp_path, capsys):
    values = np.random.default_rng(0).standard_normal((6, 4, 2, 2)).astype(np.float32)
    np.save(tmp_path / "some.npy", values)
    np.save(tmp_path / "some_labels.npy", np.arange(6) % 3)
    command = ("data", "import", tmp_path / "some.npy", "--out", tmp_path / "set", "--in-place")
    assert run(*command, capsys=capsys)[0] == 0
    (tmp_path / "some.npy").rename(tmp_path / "elsewhere.npy")
    code, said, _ = run("data", "verify", tmp_path / "set", capsys=capsys)
    assert code == 1 and f"it is a link to {tmp_path / 'some.npy'}" in said
    assert "put those back as they were" in said and "Delete them" not in said
