"""Small sets of pictures, and processes that make them and are killed."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mixflow_fast.evaluation.protocol import Protocol
from mixflow_fast.evaluation.sample_sets import Made, SetPlan, write_set

SHAPE = (3, 4, 5)


def pictures(ids: Tensor) -> Tensor:
    """(B, 3, 4, 5) uint8, another for every id."""
    values = torch.arange(60).view(1, *SHAPE) * 7 + ids.view(-1, 1, 1, 1) * 13
    return (values % 251).to(torch.uint8)


def make(ids: Tensor) -> Made:
    return Made(pictures(ids), ids % 3)


def plan(n: int = 11, shard: int = 4, **sections: object) -> SetPlan:
    record = {"set": {"n": n, "seed": 0}, "image": {"size": 4, "quantisation": "round"}}
    return SetPlan(
        protocol=Protocol(record | sections), shape=SHAPE, origin={"weights": "aa"}, shard=shard
    )


def content(folder: Path) -> dict[str, bytes]:
    """All that a finished set consists of, beside its folder too; locks of the dead aside."""
    found = sorted(path for path in folder.parent.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder.parent)): path.read_bytes()
        for path in found
        if ".locks" not in path.parts
    }


def in_child(work: Callable[[], object]) -> int:
    """A forked process that does something; returns its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    """Exit code of such a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(folder: Path, moment: int, of: SetPlan) -> int:
    """Make a set in a process that kills itself at its moment-th rename or flush of a file.

    Moments are before and after each `os.replace` and before each `os.fsync`, and each call of the
    maker, so that every state of the files that a kill can leave is met.
    """
    passed = 0

    def step() -> None:
        nonlocal passed
        passed += 1
        if passed == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        replace, fsync = os.replace, os.fsync

        def stepping_replace(source: object, target: object, **options: object) -> None:
            step()
            replace(source, target, **options)
            step()

        def stepping_fsync(descriptor: int) -> None:
            step()
            fsync(descriptor)

        def stepping_make(ids: Tensor) -> Made:
            step()
            return make(ids)

        os.replace, os.fsync = stepping_replace, stepping_fsync
        write_set(stepping_make, of, folder, batch_size=3)

    return ended(in_child(work))
