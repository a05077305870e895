"""Which dataset a folder on the command line is."""

from __future__ import annotations

import io
import tarfile

import pytest
import torch

from mixflow_fast.cli import main
from mixflow_fast.cli.data.images import open_data, open_device
from mixflow_fast.data import ImageFolder
from mixflow_fast.data.webdataset import WebDataset
from tests.support.encoded_images import lossless, photos, write_prepared


def test_class_folders_and_tars_need_a_size(tmp_path) -> None:
    folder = write_prepared(tmp_path / "folder", 4)
    assert isinstance(open_data(folder, 8), ImageFolder)
    with pytest.raises(ValueError, match="--size is needed"):
        open_data(folder, None)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for name, content in (
            ("0.webp", lossless(photos()[0].crop((0, 0, 9, 9)))),
            ("0.cls", b"3"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert isinstance(open_data(tmp_path / "tars", 8), WebDataset)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    assert open_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert open_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="sees no GPU"):
            open_device("cuda")


@pytest.mark.parametrize("command", ["compare", "bench"])
def test_commands_refuse_what_is_not_there(tmp_path, command, capsys) -> None:
    assert main(["data", command, str(tmp_path / "none"), "--size", "8"]) == 2
    assert "none" in capsys.readouterr().err
