"""How the threads of OpenMP wait for each other, chosen before torch loads them.

A thread that waits spins, in libgomp for milliseconds. Alone on the machine that is the fastest
way; beside other work it keeps the very threads that it waits for off the cores, and a small run
on a CPU becomes many times slower. `benchmarks/cpu_sharing.py` measures it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

# What people set who choose for themselves, of any OpenMP.
_CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Passes of libgomp's loop: some microseconds, where its own number is milliseconds. Alone it costs
# a little; work that comes later finds the cores free.
_SHORT_SPIN = "1000"
_LOOKS, _BETWEEN_S = 5, 0.005


def choose_waiting(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads sleep while they wait if the cores are busy now, or else spin for a short while.

    Nothing is done where the user has chosen, with one thread, or once torch is there.

    Args:
        environment: of this process; its children inherit the choice.
    """
    threads = environment.get("OMP_NUM_THREADS", "").partition(",")[0]
    if threads == "1" or "torch" in sys.modules or any(name in environment for name in _CHOSEN):
        return
    cores = os.cpu_count() or 1
    own = int(threads) if threads.isdigit() else _own_cores(cores)
    if running_elsewhere() + own > cores:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        environment["GOMP_SPINCOUNT"] = _SHORT_SPIN


def _own_cores(cores: int) -> int:
    """How many cores this process may use: on a shared machine Slurm gives a job some of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores


def running_elsewhere() -> int:
    """Threads of other processes that want a core now: the fewest of a few looks."""
    counts = []
    for look in range(_LOOKS):
        time.sleep(_BETWEEN_S if look else 0)
        try:
            # "0.20 0.18 0.12 1/80 11206": the fourth counts what runs, and this process does.
            running = Path("/proc/loadavg").read_text().split()[3].partition("/")[0]
        except (OSError, IndexError):
            return 0
        counts.append(int(running) - 1)
    return max(0, min(counts))
