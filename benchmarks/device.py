"""The device that is measured, what it is, and in what state.

Imported before anything that imports Triton: without a GPU the kernels run in Triton's
interpreter, which has to be chosen before that import.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SMI_FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pick(name: str) -> torch.device:
    """The device called "cuda" or "cpu"; ValueError where it is not there."""
    if name not in ("cuda", "cpu"):
        raise ValueError(f'device must be "cuda" or "cpu", got {name!r}')
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device cuda is not there: speeds need a GPU. Correctness alone runs in Triton's "
            "interpreter: python -m benchmarks.checks --device cpu. The whole path at toy sizes: "
            "python -m benchmarks.run --smoke --device cpu"
        )
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _command(*words: str) -> str | None:
    """Standard output of a command, or None where it is missing or fails."""
    if shutil.which(words[0]) is None:
        return None
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_sha() -> str:
    """The checkout's commit, with "+changes" if files differ; $GIT_SHA where git cannot say."""
    if not (ROOT / ".git").exists():
        return os.environ.get("GIT_SHA") or "unknown"
    sha = _command("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if sha is None:
        return os.environ.get("GIT_SHA") or "unknown"
    return sha + ("+changes" if _command("git", "-C", str(ROOT), "status", "--porcelain") else "")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, str | None]:
    """The fields of every row that say where it was measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"cpu ({platform.processor() or platform.machine()})"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "git_sha": git_sha(),
    }


def conditions(device: torch.device) -> str:
    """Clocks, power and temperature of the GPU at this moment, in nvidia-smi's words."""
    if device.type != "cuda":
        return f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    query = f"--query-gpu={','.join(SMI_FIELDS)}"
    index = f"--id={torch.cuda.current_device()}"
    state = _command("nvidia-smi", query, "--format=csv,noheader", index)
    if state is None:
        return "clocks and power unknown (nvidia-smi gave nothing)"
    values = [value.strip() for value in state.splitlines()[0].split(",")]
    return ", ".join(f"{k} {v}" for k, v in zip(SMI_FIELDS, values, strict=False))


def in_short(error: BaseException) -> str:
    """An exception's type and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
