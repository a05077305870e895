"""Files that are no weights, damaged, or meant to run code: one clear error, nothing executed."""

import argparse
import json
import os
import pathlib
import pickle
import subprocess
import sys
import types
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mixflow_fast.checkpoints.export import export
from mixflow_fast.checkpoints.inspect import inspect_file
from mixflow_fast.checkpoints.starting_weights import start_from
from mixflow_fast.files import replacing
from mixflow_fast.models import load_model, load_weights, read_model_config, save_weights
from mixflow_fast.models.weights.damage import first_damaged
from mixflow_fast.models.weights.files import WeightsFile, write_safetensors
from tests.support.weights import golden, network


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="absent.pt does not exist"):
        load_weights(tmp_path / "absent.pt")
    state, _, _ = golden()
    torch.save(state, "whole.pt")
    content = Path("whole.pt").read_bytes()
    damaged = {
        "truncated.pt": content[: len(content) // 2],
        "empty.pt": b"",
        "page.pt": b"<html>quota exceeded</html>",
        "broken.safetensors": b"\x00" * 100,
    }
    for name, data in damaged.items():
        Path(name).write_bytes(data)
        with pytest.raises(ValueError, match=f"cannot read weights from {name}"):
            load_weights(name)
    torch.save({"ema": state, "args": Malicious()}, "unsafe.pt")
    with pytest.raises(ValueError, match="cannot read weights from unsafe.pt.*not safe"):
        load_weights("unsafe.pt")
    assert not Path("executed").exists()
    torch.save([1, 2], "list.pt")
    with pytest.raises(ValueError, match="list.pt must hold a dict, got list"):
        load_weights("list.pt")
    torch.save({"lr": 0.1, "step": 3}, "numbers.pt")
    with pytest.raises(ValueError, match="numbers.pt must hold .* not tensors: lr, step"):
        load_weights("numbers.pt")
    torch.save({"ema": {}}, "nothing.pt")
    with pytest.raises(ValueError, match="nothing.pt must hold .* no entries"):
        load_weights("nothing.pt")
    torch.save({"pos_embed": torch.ones(1), "module.pos_embed": torch.ones(1)}, "twice.pt")
    with pytest.raises(ValueError, match="twice.pt holds pos_embed twice"):
        load_weights("twice.pt")


class Runs:
    """Pickled as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize(
    "attack",
    [
        Runs(eval, "__import__('os').mkdir('executed')"),
        Runs(os.system, "mkdir executed"),
        Runs(subprocess.run, ["mkdir", "executed"]),
        Runs(np.load, "object.npy"),
        Runs(getattr, argparse.Namespace, "__init__"),
        Runs(torch.load, "other.pt"),
    ],
    ids=lambda attack: attack.call[0].__name__,
)
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(
    attack: Runs, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"ema": {"a": torch.ones(2)}, "extra": attack}
    torch.save(content, "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="cannot read weights from a.pt.*not safe"):
        load_weights("a.pt")
    Path("bare.pt").write_bytes(pickle.dumps(attack, protocol=2))
    with pytest.raises(ValueError, match="cannot read weights from bare.pt"):
        load_weights("bare.pt")
    assert not Path("executed").exists()


def test_names_of_the_allow_list_build_nothing() -> None:
    """Not numpy's own functions: a dtype may claim that raw bytes are object pointers."""
    import mixflow_fast.models.weights.safe_unpickling as safe

    allowed = set(map(id, safe._HARMLESS.values()))
    scalar, reconstruct = np.float64(0).__reduce__()[0], np.ones(1).__reduce__()[0]
    real = (scalar, reconstruct, np.dtype, np.ndarray, pathlib.PosixPath, dict, defaultdict)
    assert not allowed & set(map(id, real))


def test_bookkeeping_of_others_becomes_plain(tmp_path: Path) -> None:
    state = {"a": torch.ones(2)}
    extra = {
        "path": pathlib.PosixPath("/data/imagenet"),
        "loss": np.float64(0.25),
        "count": np.int64(-3),
        "big": np.array([7], dtype=">i4")[0],
        "flag": np.bool_(True),
        "half": np.float16(1.5),
        "array": np.arange(3),
        "lists": [argparse.Namespace(b=(1, pathlib.PosixPath("x")))],
    }
    args = argparse.Namespace(**extra, resume=None)
    torch.save({"ema": state, "args": args, "empty": defaultdict(dict)}, tmp_path / "a.pt")
    content = WeightsFile.open(tmp_path / "a.pt").entries
    assert content["empty"] == {}
    assert content["args"] == {
        **{"path": "/data/imagenet", "loss": 0.25, "count": -3, "big": 7, "flag": True},
        **{"half": 1.5, "array": "<numpy array>", "lists": [{"b": (1, "x")}], "resume": None},
    }
    assert torch.equal(load_weights(tmp_path / "a.pt")["a"], state["a"])


def test_omegaconf_becomes_plain_without_omegaconf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pickles that OmegaConf 2.3 and 2.4 write, from classes of the same names and state."""

    def fake(module: str, name: str) -> type:
        made = type(name, (), {"__module__": f"omegaconf.{module}"})
        holder = sys.modules.get(f"omegaconf.{module}") or types.ModuleType(f"omegaconf.{module}")
        monkeypatch.setitem(sys.modules, f"omegaconf.{module}", holder)
        setattr(holder, name, made)
        return made

    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    config, items = fake("dictconfig", "DictConfig"), fake("listconfig", "ListConfig")
    node, metadata = fake("nodes", "AnyNode"), fake("base", "ContainerMetadata")

    def build(value: Any, parent: Any) -> Any:
        kind = config if isinstance(value, dict) else items if isinstance(value, list) else node
        made = kind()
        made._metadata, made._parent = metadata(), parent
        made._metadata.__dict__ |= {
            "ref_type": Any,
            "object_type": dict,
            "cache": defaultdict(dict),
        }
        if kind is config:
            made._content = {name: build(item, made) for name, item in value.items()}
        elif kind is items:
            made._content = [build(item, made) for item in value]
        else:
            made._val = value
        return made

    settings = {"lr": 2e-4, "epochs": 80, "betas": [0.9, {"b": True, "none": None}], "to": "${lr}"}
    content = {"ema": {"a": torch.ones(2)}, "training_cfg": build(settings, None)}
    torch.save(content, tmp_path / "a.pt")
    monkeypatch.undo()
    assert WeightsFile.open(tmp_path / "a.pt").entries["training_cfg"] == settings


def test_any_truncation_is_one_clear_error(tmp_path: Path) -> None:
    state = {"a": torch.arange(64.0), "b": torch.ones(3)}
    torch.save(state, tmp_path / "zip.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "s.safetensors")
    for name in ("zip.pt", "old.pt", "s.safetensors"):
        whole = (tmp_path / name).read_bytes()
        cut = tmp_path / f"cut_{name}"
        for length in range(0, len(whole) - 1, max(1, len(whole) // 25)):
            cut.write_bytes(whole[:length])
            with pytest.raises(ValueError, match="cannot read weights from") as caught:
                load_weights(cut)
            assert "\n" not in str(caught.value)


def test_files_of_another_kind(tmp_path: Path) -> None:
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2700000000\n"
    (tmp_path / "pointer.pt").write_bytes(lfs)
    (tmp_path / "pointer.safetensors").write_bytes(lfs)
    (tmp_path / "page.pt").write_bytes(b"\n<!DOCTYPE html><html>quota exceeded</html>")
    (tmp_path / "text.pt").write_text("ImageNet\n" * 100)
    (tmp_path / "header.safetensors").write_bytes((40).to_bytes(8, "little") + b"{" + b"x" * 60)
    (tmp_path / "header.pt").write_bytes((40).to_bytes(8, "little") + b"{" + b"x" * 60)
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("readme.txt", "weights are in part 2")
    for name, what in (
        *(("pointer.pt", "Git LFS pointer"), ("pointer.safetensors", "Git LFS pointer")),
        *(("page.pt", "web page"), ("text.pt", "text file"), ("archive.pt", "zip archive")),
        *(("header.safetensors", "damaged"), ("header.pt", "damaged")),
    ):
        with pytest.raises(ValueError, match=f"cannot read weights from .*{name}: .*{what}"):
            load_weights(tmp_path / name)


def test_a_safetensors_file_needs_no_suffix(tmp_path: Path) -> None:
    state = {"a": torch.ones(2)}
    save_file(state, tmp_path / "weights.bin")
    assert torch.equal(load_weights(tmp_path / "weights.bin")["a"], state["a"])


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    state, _, _ = golden()
    torch.save(state, tmp_path / "a.pt")
    assert first_damaged(tmp_path / "a.pt") is None
    whole = bytearray((tmp_path / "a.pt").read_bytes())
    place = whole.index(state["pos_embed"].numpy().tobytes()[:64])
    whole[place] ^= 1
    (tmp_path / "a.pt").write_bytes(whole)
    assert "data/" in first_damaged(tmp_path / "a.pt")


def test_safetensors_are_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.ones(3)}, {"format": "pt"})
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    old = path.read_bytes()

    def fail(_state: Any, file: Any, metadata: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_safetensors(path, {"a": torch.zeros(3)}, {"format": "pt"})
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_folders_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with replacing(tmp_path / "out") as partial:
            partial.mkdir()
            (partial / text).write_text(text)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]
    with pytest.raises(OSError), replacing(tmp_path / "out") as partial:
        partial.mkdir()
        (partial / "half").write_text("half")
        raise OSError("disk full")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "new"]


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that a reader was opened on, one entry for each time."""
    opened: list[str] = []

    def counted(reader: Callable[..., object]) -> Callable[..., object]:
        def opens_it(path: Any, *args: Any, **kwargs: Any) -> object:
            opened.append(Path(path).name)
            return reader(path, *args, **kwargs)

        return opens_it

    for place in ("torch.load", "safetensors.safe_open", "safetensors.torch.safe_open"):
        module, name = place.rsplit(".", 1)
        monkeypatch.setattr(place, counted(getattr(sys.modules[module], name)))
    return opened


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_is_opened_once(suffix: str, tmp_path: Path, opens: list[str]) -> None:
    model, path = network(), tmp_path / f"a.{suffix}"
    record = {"clock": model.clock, "steps": 3}
    if suffix == "pt":
        state = model.state_dict()
        save_weights(path, state, state, record | {"model": json.dumps(model.config)})
    else:
        header = {"clock": model.clock, "steps": "3", "kwargs": json.dumps(model.config)}
        write_safetensors(path, model.state_dict(), header)
    for read in (
        load_weights,
        load_model,
        read_model_config,
        inspect_file,
        lambda file: export(file, "official", tmp_path / "out.pt"),
        lambda file: export(file, "ema", tmp_path / "out.safetensors"),
        lambda file: start_from(network(), file),
    ):
        opens.clear()
        read(path)
        assert opens == [path.name]
    assert read_model_config(path) == model.config | {"prediction": "velocity"}
    assert inspect_file(path).steps == 3 and inspect_file(path).fits
