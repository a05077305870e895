"""glibc's malloc keeps what a step frees, unless the environment says how it behaves."""

import platform
import subprocess
import sys

import pytest

from tests.support.launchers import environment

SCRIPT = """
import resource, torch
from mixflow_fast.training.host_memory import keep_freed_memory

torch.set_num_threads(1)
START
def step():
    return [torch.ones(1 << 20) for _ in range(40)]  # 160 MiB in pieces of 4
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

ENGINE = """
from mixflow_fast.config.schema import OptimConfig, TrainConfig
from mixflow_fast.models import SiT
from mixflow_fast.training.build import build_engine

section = TrainConfig(engine="ddp", zero_stage=0, precision="fp32", global_batch_size=1)
net = SiT(input_size=4, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=10)
build_engine(section, OptimConfig(), 1, net).start(None)
"""


def faults(start: str, **given: str) -> int:
    """Page faults of three steps of 40960 pages."""
    command = [sys.executable, "-c", SCRIPT.replace("START", start)]
    result = subprocess.run(command, env=environment() | given, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_later_steps_find_the_memory_of_the_first() -> None:
    kept = faults("keep_freed_memory()")
    # As it was where someone chose otherwise: all 160 MiB of each step again.
    own = dict(MALLOC_TRIM_THRESHOLD_="1000000", MALLOC_MMAP_THRESHOLD_="33554432")
    assert kept < faults("keep_freed_memory()", **own) / 5


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_the_engine_without_zero_keeps_it_too() -> None:
    """Of what glibc does by itself one of the three steps is left: 42000 faults."""
    assert faults(ENGINE) < 40960 / 4
