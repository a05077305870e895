"""Ranks that watch each other while they train: when one dies, all end within 30 s.

Each has a small process beside it, its watcher (`watcher.py`), because the thread that would hear
of a dead rank may be blocked for ever, with Python's lock: a GPU stands still in a collective with
that rank, and the queue of its kernels is full.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from mixflow_fast.distributed.process_group import rank, store, world_size
from mixflow_fast.messages import error_line

# How long a rank waits for its own watcher to start and to find rank 0's.
_START_S = 20.0
_count = itertools.count()


@dataclass(frozen=True)
class Verdict:
    """What the watchers found: a sentence, and whether this rank is to say it for its machine."""

    found: str
    speaks: bool


class _Watch:
    """This rank's watcher, as the rank sees it."""

    def __init__(self, number: int, settings: dict[str, object]) -> None:
        self._rank = number
        # In a session of its own: a Ctrl-C at the terminal is for the ranks.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("watcher.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.verdict: Verdict | None = None
        self.came = threading.Event()
        self.answer = ""
        self._answered = threading.Event()
        self.tell(json.dumps(settings))
        threading.Thread(target=self._listen, daemon=True).start()

    def tell(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            os.write(self._process.stdin.fileno(), (line + "\n").encode())

    def first_answer(self) -> str:
        """The words "port N", "connected" or "unreachable"; "" without one."""
        self._answered.wait(_START_S)
        return self.answer

    def _listen(self) -> None:
        for line in self._process.stdout:
            kind, _, rest = line.decode().strip().partition(" ")
            if kind == "verdict":
                verdict = json.loads(rest)
                speaks = self._rank in verdict["speakers"]
                self.verdict = Verdict(verdict["found"], speaks)
                self.came.set()
            elif kind == "end":
                os._exit(1)
            else:
                self.answer = f"{kind} {rest}".strip()
                self._answered.set()
        self._answered.set()
        self._process.wait()
        self._process.stdin.close()


_watch: _Watch | None = None


def verdict(wait_s: float = 0.0) -> Verdict | None:
    """What the watchers found, waiting for it so long; None without watchers or without trouble."""
    if _watch is None:
        return None
    _watch.came.wait(wait_s)
    return _watch.verdict


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """While inside, this rank ends when another one dies or leaves by an error. All must enter it.

    A rank whose process lives is never called dead, whatever it does; but one whose watcher is
    killed is, because nothing can be known of it any more. Where the watchers cannot
    reach rank 0's, a warning says so, and a dead rank is noticed as late as communication fails; so
    it is in a process group that the caller made, which has no store here.
    """
    global _watch
    common = store()
    if world_size() == 1 or common is None:
        yield
        return
    _watch = watch = _start(common)
    word = "left"
    try:
        yield
    except BaseException as error:
        # Of a lost rank the sentence is there already.
        found = getattr(error, "found", f"rank {rank()} ended with {error_line(error)}")
        word = f"ended {json.dumps(found)}"
        raise
    finally:
        if watch is not None:
            watch.tell(word)
        _watch = None


def _start(common: dist.Store) -> _Watch | None:
    """This rank's watcher, once it is connected to rank 0's; None, with a warning, without that."""
    key = f"mixflow_fast/watchers/{next(_count)}"
    me = rank()
    if me == 0:
        token = secrets.token_hex(16)
        watch, answer = _launch(token, [])
        port = answer.removeprefix("port ")
        addresses = [[host, int(port)] for host in _own_addresses()] if port else []
        common.set(key, json.dumps([token, addresses]))
        return watch
    token, addresses = json.loads(common.get(key))
    watch, answer = _launch(token, addresses)
    if answer == "connected":
        return watch
    if watch is not None:
        watch.tell("left")  # where it only was slow, it must not take this rank's end for a death
    if common.add(f"{key}/unreachable", 1) == 1:
        tried = ", ".join(f"{host}:{port}" for host, port in addresses)
        warnings.warn(
            f"rank {me} cannot watch rank 0, which it does not reach at {tried or 'any address'}: "
            "where a rank dies, the others may wait for train.timeout_minutes. Let the machines "
            "reach each other's ports",
            stacklevel=4,
        )
    return None


def _launch(token: str, addresses: list[list[str | int]]) -> tuple[_Watch | None, str]:
    """A watcher and its first answer."""
    settings: dict[str, object] = {
        "rank": rank(),
        "ranks": world_size(),
        "host": socket.gethostname(),
        "parent": os.getpid(),
        "token": token,
        "addresses": addresses,
    }
    try:
        watch = _Watch(rank(), settings)
    except OSError:  # no process to be had
        return None, ""
    return watch, watch.first_answer()


def _own_addresses() -> list[str]:
    """Names and addresses under which other machines may reach this one, best first."""
    meeting = os.environ.get("MASTER_ADDR", "127.0.0.1")
    found = [meeting, socket.gethostname()]
    with contextlib.suppress(OSError, ValueError):
        port = int(os.environ.get("MASTER_PORT", ""))
        with socket.create_connection((meeting, port), timeout=5.0) as probe:
            found.append(probe.getsockname()[0])
    return list(dict.fromkeys(found))
