"""Versions and devices of a process, and which optional packages are there.

Packages are looked at without importing them. Two distributions answer to `import apex`: NVIDIA's
(FusedAdam and others, installed from source) and PyPI's, a toolkit for the Pyramid web framework
that has nothing to do with it.
"""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Literal

import torch

from mixflow_fast import __version__

Apex = Literal["nvidia", "unrelated", "absent"]
APEX_MESSAGES: dict[Apex, str] = {
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


def _find_spec(name: str) -> ModuleSpec | None:
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


def detect_apex() -> Apex:
    """Which apex is installed, by the package's files: nothing of it is run."""
    # FusedAdam is what NVIDIA's package is asked for here, and the other one has none.
    spec = _find_spec("apex")
    if spec is None:
        return "absent"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return "nvidia"
    # A folder `apex` without `__init__.py` on the path is no package at all.
    return "absent" if spec.origin is None else "unrelated"


def apex_message() -> str:
    """What `detect_apex` found, as a sentence, with the way out."""
    return APEX_MESSAGES[detect_apex()]


def package_version(distribution: str) -> str | None:
    """Version of an installed distribution, None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _version(module: str, *distributions: str) -> str | None:
    """Version of a module that one of the distributions brings, None where there is no module."""
    if _find_spec(module) is None:
        return None
    versions = (package_version(name) for name in distributions)
    return next((version for version in versions if version is not None), "unknown")


def flash_attn_version() -> str | None:
    """Version of the package `flash_attn` (FlashAttention 2), None where there is none."""
    return _version("flash_attn", "flash-attn", "flash_attn")


def flash_attn_3_version() -> str | None:
    """Version of FlashAttention 3, which is built from source, None where there is none."""
    found = (_version(m, "flash-attn-3", "flash_attn_3") for m in _FLASH_ATTN_3)
    return next((version for version in found if version is not None), None)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where a process runs: the record in metrics.jsonl and in reports.

    Attributes:
        mixflow_fast, torch, deepspeed, triton, numpy, python: versions; None: not installed.
        cuda: what PyTorch was built for; None for a process on the CPU.
        platform, host: operating system and host name.
        device: name of the GPU or CPU that computes.
        threads: of PyTorch on the CPU.
        cudnn: version, None for a process on the CPU.
        deterministic: whether PyTorch takes deterministic algorithms alone.
    """

    mixflow_fast: str
    torch: str
    cuda: str | None
    deepspeed: str | None
    triton: str | None
    numpy: str | None
    python: str
    platform: str
    host: str
    device: str
    threads: int
    cudnn: str | None = None
    deterministic: bool = False

    def to_dict(self) -> dict[str, str | int | None]:
        """The fields as plain values, in this order."""
        return asdict(self)


def current_environment(device: torch.device) -> Environment:
    """The record of this process, which computes on `device`."""
    on_gpu = device.type == "cuda"
    return Environment(
        mixflow_fast=__version__,
        torch=torch.__version__,
        cuda=torch.version.cuda if on_gpu else None,
        deepspeed=package_version("deepspeed"),
        triton=package_version("triton"),
        numpy=package_version("numpy"),
        python=platform.python_version(),
        platform=platform.platform(),
        host=platform.node(),
        device=torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        threads=torch.get_num_threads(),
        cudnn=str(torch.backends.cudnn.version()) if on_gpu else None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def cpu_name() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
