"""Checksums and values of weights files: what is not whole is refused by every reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixflow_fast.checkpoints.export import export
from mixflow_fast.checkpoints.inspect import inspect_file
from mixflow_fast.checkpoints.starting_weights import start_from
from mixflow_fast.models import load_model, load_weights
from mixflow_fast.models.weights.damage import first_damaged, is_finite, not_finite
from mixflow_fast.models.weights.files import WeightsFile
from tests.support.weights import network, run, shifted

READERS: dict[str, Callable[[Path], object]] = {
    "load_weights": load_weights,
    "load_model": load_model,
    "export": lambda path: export(path, "official", path.with_name("out.pt")),
    "train.init": lambda path: start_from(network(), path),
}
NAME = "blocks.0.attn.qkv.weight"


def flip_a_bit(path: Path, tensor: torch.Tensor) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(tensor.numpy().tobytes()[:64]) + 5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("reader", READERS)
def test_values_that_are_not_finite_are_named(reader: str, tmp_path: Path) -> None:
    state = network().state_dict()
    bad = dict(state)
    bad[NAME] = state[NAME].clone()
    bad[NAME][0, :12] = torch.tensor([torch.inf, torch.nan]).repeat(6)
    path = tmp_path / "x.pt"
    torch.save({"ema": bad, "model": state}, path)
    text = rf"x.pt: {NAME} \(under 'ema'\) has 12 values that are not finite: its 'model' weights"
    with pytest.raises(ValueError, match=f"{text} are whole: take them with --weights model"):
        READERS[reader](path)
    save_file(bad, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"{NAME} has 12 values .* choose another checkpoint"):
        READERS[reader](tmp_path / "x.safetensors")
    torch.save({"ema": bad, "model": bad}, path)
    with pytest.raises(ValueError, match="12 values that are not finite: choose another"):
        READERS[reader](path)
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("reader", READERS)
def test_a_flipped_bit_is_named(reader: str, tmp_path: Path) -> None:
    state, path = network().state_dict(), tmp_path / "x.pt"
    torch.save({"ema": state, "model": shifted(state)}, path)
    flip_a_bit(path, state[NAME])
    text = rf"x.pt: {NAME} \(under 'ema'\) is not what was written \(wrong checksum\): its 'model'"
    with pytest.raises(ValueError, match=text):
        READERS[reader](path)
    assert inspect_file(path).damaged is not None
    # Weights that are not used are not read: an optimizer's state would be twice the network.
    load_weights(path, key="model")


def test_what_is_not_a_tensor_is_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"ema": {"weight_a": torch.ones(3)}}, path)
    path.write_bytes(path.read_bytes().replace(b"weight_a", b"weight_b"))
    with pytest.raises(ValueError, match="data.pkl in it has a wrong checksum"):
        load_weights(path)


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    state, before = network().state_dict(), torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("x.pt", "old.pt"):
        assert first_damaged(tmp_path / name) is None
        assert inspect_file(tmp_path / name).fits
        load_weights(tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_values_of_any_type(dtype: torch.dtype) -> None:
    whole = torch.full((70000,), 3.0).to(dtype)  # whose sum is above float16's range
    assert is_finite(whole) and not_finite({"a": whole}) == {}
    if dtype.is_floating_point:
        bad = torch.tensor([1.0, torch.nan]).to(dtype)
        assert not is_finite(bad) and not_finite({"a": bad, "b": whole}) == {"a": 1}


def test_commands_refuse_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, path = network().state_dict(), tmp_path / "x.pt"
    torch.save({"ema": state | {NAME: state[NAME] * torch.nan}, "model": state}, path)
    arguments = ["sample", path, "--out", tmp_path / "x.npz", "--num", 1, "--steps", 1]
    code, _, err = run(capsys, *arguments)
    assert code == 2 and f"{NAME} (under 'ema') has" in err and "--weights model" in err
    assert run(capsys, *arguments, "--weights", "model")[0] == 0
    assert run(capsys, "inspect", path)[0] == 1
    assert WeightsFile.open(path).state()[NAME].isnan().all()  # for who wants to look
