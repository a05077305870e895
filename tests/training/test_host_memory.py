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
keep_freed_memory()
def step():
    return [torch.ones(1 << 20) for _ in range(40)]  # 160 MiB in pieces of 4
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**given: str) -> int:
    """Page faults of three steps."""
    command = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(command, env=environment() | given, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_later_steps_find_the_memory_of_the_first() -> None:
    kept = faults()
    # As it was where someone chose otherwise: all 160 MiB of each step again.
    chosen = faults(MALLOC_TRIM_THRESHOLD_="1000000", MALLOC_MMAP_THRESHOLD_="33554432")
    assert kept < chosen / 5
