"""glibc's malloc keeps what a step frees, unless the environment says how it behaves."""

import ctypes
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mixflow_fast.training.host_memory import keep_freed_memory
from tests.support.launchers import environment

SCRIPT = """
import torch
from mixflow_fast.training.host_memory import keep_freed_memory
from tests.support.start_memory import private_bytes

torch.set_num_threads(1)
START
def step():
    return [torch.ones(1 << 20) for _ in range(40)]  # 160 MiB in pieces of 4
before = private_bytes()
for _ in range(3):
    step()
print(private_bytes() - before)
"""

ENGINE = """
from mixflow_fast.config.schema import OptimConfig, TrainConfig
from mixflow_fast.models import SiT
from mixflow_fast.training.build import build_engine

section = TrainConfig(engine="ddp", zero_stage=0, precision="fp32", global_batch_size=1)
net = SiT(input_size=4, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=10)
build_engine(section, OptimConfig(), 1, net).start(None)
"""


def kept(start: str, **given: str) -> float:
    """The share of 160 MiB that a process still has after steps that freed them."""
    command = [sys.executable, "-c", SCRIPT.replace("START", start)]
    result = subprocess.run(command, env=environment() | given, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout) / (160 << 20)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_stays_for_the_next_step() -> None:
    """Without it nothing of it stays in four processes of five: more than one is looked at."""
    assert min(kept("keep_freed_memory()") for _ in range(2)) > 0.9


def test_what_the_environment_says_of_malloc_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    library = SimpleNamespace(mallopt=lambda *setting: calls.append(setting))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    keep_freed_memory()
    assert len(calls) == 2
    for name in ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1000000")
            keep_freed_memory()
    assert len(calls) == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_the_engine_without_zero_keeps_it_too() -> None:
    assert kept(ENGINE) > 0.9
