"""Optional packages, looked at without importing them: what is installed, and which `apex` it is.

Two distributions answer to `import apex`: NVIDIA's (FusedAdam and others, installed from source)
and PyPI's, a toolkit for the Pyramid web framework that has nothing to do with it.
"""

from __future__ import annotations

import importlib.util
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from mixflow_fast import __version__

APEX_MESSAGES = {
    "nvidia": "NVIDIA apex is installed",
    "absent": "apex is not installed: it is optional, see https://github.com/NVIDIA/apex",
    "unrelated": (
        "the installed `apex` is not NVIDIA's: PyPI's package of this name is a toolkit for the "
        "Pyramid web framework; pip uninstall apex, then install NVIDIA's from source "
        "(https://github.com/NVIDIA/apex), or go without: it is optional"
    ),
}
# The packages that can follow a run; each has the module's name.
LoggerName = Literal["tensorboard", "wandb"]
# Modules that FlashAttention 3 has been installed as.
_FLASH_ATTN_3 = ("flash_attn_interface", "flash_attn_3")


def _find_spec(name: str) -> object | None:
    try:
        return importlib.util.find_spec(name)
    # A module that was put in `sys.modules` without a spec.
    except ValueError:
        return None


def is_installed(module: str) -> bool:
    """Whether a top-level module could be imported."""
    try:
        spec = importlib.util.find_spec(module)
    # A module that was put in `sys.modules` without a spec is there all the same.
    except ValueError:
        return True
    # A folder of that name, as wandb itself makes in the working directory, is no package.
    return spec is not None and spec.origin is not None


def detect_apex() -> str:
    """Returns "nvidia", "unrelated" or "absent", by the package's files: nothing of it is run."""
    spec = _find_spec("apex")
    if spec is None:
        return "absent"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return "nvidia"
    # A folder `apex` without `__init__.py` on the path is no package at all.
    return "absent" if spec.origin is None else "unrelated"


def apex_message() -> str:
    """What `detect_apex` found, in words, with the way out."""
    return APEX_MESSAGES[detect_apex()]


def _version(module: str, *distributions: str) -> str | None:
    if _find_spec(module) is None:
        return None
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return "unknown"


def flash_attn_version() -> str | None:
    """Of the package `flash_attn` (FlashAttention 2), None where there is none."""
    return _version("flash_attn", "flash-attn", "flash_attn")


def flash_attn_3_version() -> str | None:
    """Of FlashAttention 3, which is built from source, None where there is none."""
    found = (_version(m, "flash-attn-3", "flash_attn_3") for m in _FLASH_ATTN_3)
    return next((version for version in found if version is not None), None)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and device of this process, for the record of a run."""
    versions = {}
    for name in ("deepspeed", "triton", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    on_gpu = device.type == "cuda"
    return {
        "mixflow_fast": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
