"""The record of a process's environment, and which optional packages are there."""

import json
import sys

import pytest
import torch

from mixflow_fast import environment


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder first on the path, where only these packages are."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("apex", "flash_attn", "flash_attn_interface", "flash_attn_3"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def package(folder, name: str, *files: str) -> None:
    for file in ("__init__.py", *files):
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        # Importing any of it would be seen.
        path.write_text("raise AssertionError('imported')")


def distribution(folder, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_no_apex(site) -> None:
    assert environment.detect_apex() == "absent"
    (site / "apex").mkdir()  # a folder that is no package
    assert environment.detect_apex() == "absent"
    assert "optional" in environment.apex_message()


def test_the_unrelated_apex_of_pypi(site) -> None:
    package(site, "apex", "lib/libapex.py", "models.py")
    assert environment.detect_apex() == "unrelated"
    message = environment.apex_message()
    assert "Pyramid" in message and "pip uninstall apex" in message
    assert "apex" not in sys.modules


def test_nvidias_apex(site) -> None:
    package(site, "apex", "optimizers/__init__.py", "optimizers/fused_adam.py")
    assert environment.detect_apex() == "nvidia"
    assert "apex" not in sys.modules


def test_flash_attn_versions(site) -> None:
    assert environment.flash_attn_version() is None is environment.flash_attn_3_version()
    package(site, "flash_attn")
    assert environment.flash_attn_version() == "unknown"
    distribution(site, "flash-attn", "2.8.3")
    assert environment.flash_attn_version() == "2.8.3"
    (site / "flash_attn_interface.py").write_text("raise AssertionError('imported')")
    assert environment.flash_attn_3_version() == "unknown"
    distribution(site, "flash-attn-3", "3.0.0")
    assert environment.flash_attn_3_version() == "3.0.0"


def test_modules_without_a_spec(monkeypatch) -> None:
    """Stand-ins that other libraries put into `sys.modules`."""
    stand_in = type(sys)("apex")
    monkeypatch.setitem(sys.modules, "apex", stand_in)
    assert stand_in.__spec__ is None and environment.detect_apex() == "absent"


def test_the_record_of_this_process() -> None:
    found = environment.current_environment(torch.device("cpu"))
    assert found.torch == torch.__version__ and found.cuda is None
    assert found.device == environment.cpu_name() != ""
    # Keys of metrics.jsonl's row "start", which files of finished runs have too.
    assert list(json.loads(json.dumps(found.to_dict()))) == [
        *("mixflow_fast", "torch", "cuda", "deepspeed", "triton", "numpy"),
        *("python", "platform", "host", "device", "threads", "cudnn", "deterministic"),
    ]
    assert found.cudnn is None and found.deterministic is False


def test_versions_of_distributions(site) -> None:
    assert environment.package_version("nothing-here") is None
    distribution(site, "nothing-here", "1.2")
    assert environment.package_version("nothing-here") == "1.2"
