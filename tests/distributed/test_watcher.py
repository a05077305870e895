"""Watcher processes as others on the network, and slow machines, meet them."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from mixflow_fast.distributed import watcher

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the watcher of one of 3 ranks, which is this process: a verdict would end it."""
    started: list[subprocess.Popen] = []

    def start(rank: int, *addresses: tuple[str, int]) -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-I", "-S", watcher.__file__], **pipes)
        started.append(process)
        known = {"rank": rank, "ranks": 3, "host": f"machine_{rank}", "parent": os.getpid()}
        tell(process, json.dumps(known | {"token": "secret", "addresses": addresses}))
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen, line: str) -> None:
    os.write(process.stdin.fileno(), f"{line}\n".encode())


def said(process: subprocess.Popen, within_s: float = 10.0) -> str:
    """The next line; "" where none comes in that time."""
    ready, _, _ = select.select([process.stdout], [], [], within_s)
    return process.stdout.readline().decode().strip() if ready else ""


def address(process: subprocess.Popen) -> tuple[str, int]:
    return "127.0.0.1", int(said(process).removeprefix("port "))


@pytest.mark.parametrize("text", ["hello 5", "hello null", "hello " + "[" * 50_000, 'hello ["x"]'])
def test_what_strangers_say_is_not_looked_at(start: Start, text: str) -> None:
    first = start(0)
    there = address(first)
    with socket.create_connection(there) as stranger:
        stranger.sendall(f"{text}\n".encode())
        assert stranger.recv(1) == b""  # it hangs up
    assert said(start(1, there)) == "connected"


def test_a_watcher_that_gives_up_is_not_taken_for_a_death(start: Start) -> None:
    """Rank 0's machine does not answer in time, and hears of it all later."""
    first = start(0)
    there = address(first)
    first.send_signal(signal.SIGSTOP)
    assert said(start(1, there)) == "unreachable"
    first.send_signal(signal.SIGCONT)
    assert said(first, within_s=2 * watcher.TOGETHER_S) == ""


def test_who_comes_after_a_death_hears_of_it(start: Start) -> None:
    first = start(0)
    there = address(first)

    def join(rank: int) -> socket.socket:
        connection = socket.create_connection(there, timeout=10)
        connection.sendall(f"hello secret {json.dumps([rank, 'machine'])}\n".encode())
        assert connection.recv(3) == b"hi\n"
        return connection

    join(1).close()
    assert "no answer from rank 1 of 3" in said(first)
    with join(2) as late:
        tell(first, "left")  # else it would end this process
        heard = late.makefile().readline()
    assert heard.startswith("verdict") and "no answer from rank 1 of 3" in heard
