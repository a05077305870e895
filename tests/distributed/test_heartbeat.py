"""Ranks that watch each other: real processes that are killed, stopped, busy or blocked in C."""

import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from mixflow_fast.distributed import heartbeat, watcher
from tests.support.launchers import RUN, free_port, run_ranks, watched_ranks

# As a launch into the full queue of a GPU blocks: PyDLL keeps Python's lock, CDLL gives it back.
LOCKED, UNLOCKED = "ctypes.PyDLL(None).sleep(100)", "ctypes.CDLL(None).sleep(100)"
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
TRAINING = f"""
import ctypes, os, signal, sys, time
from mixflow_fast.config.loading import load_config
from mixflow_fast.distributed.process_group import rank
from mixflow_fast.training.trainer import Trainer

overrides = {RUN[2:]!r} + ["train.images=8000000", "out=" + sys.argv[1]]
trainer = Trainer(load_config("photos", overrides), quiet=True)

def block(step, outputs, means):
    if step == 3 and rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 3:
        print("blocked at", time.time(), flush=True)
        ctypes.PyDLL(None).sleep(100)

trainer.on_step = block
trainer.run()
"""
SENTENCE = (
    r"mixflow-fast: error: no answer from rank {} of \d \(killed, .*\): rank {} ends too. "
    r"The same command resumes\n"
)


def assert_the_blocked_one_ends(blocked: str, dead: int) -> None:
    living, started = 1 - dead, time.monotonic()
    found = watched_ranks({dead: KILLED, living: blocked})
    assert time.monotonic() - started < 30
    code, text = found[living]
    assert code == (-9 if blocked == LOCKED else 1)
    assert re.fullmatch(SENTENCE.format(dead, living), text), text
    assert found[dead] == (-9, "")


def test_a_blocked_rank_ends_when_another_dies() -> None:
    """Also with rank 0, which keeps the store and the watcher that the others are connected to."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(assert_the_blocked_one_ends, [LOCKED, UNLOCKED], [0, 1]))


def test_a_rank_that_cannot_reach_the_others_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And trains without; also where another program listens there, or the token is not known."""
    monkeypatch.setattr(heartbeat, "rank", lambda: 1)
    monkeypatch.setattr(heartbeat, "world_size", lambda: 2)
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            other.accept()[0].sendall(b"HTTP/1.1 400")

        threading.Thread(target=answer, daemon=True).start()
        addresses = [["127.0.0.1", free_port()], ["127.0.0.1", other.getsockname()[1]]]
        store = dist.HashStore()
        monkeypatch.setattr(heartbeat, "_count", iter([7]))
        store.set("mixflow_fast/watchers/7", json.dumps(["token", addresses]))
        with pytest.warns(UserWarning, match="rank 1 cannot watch rank 0, .* 127.0.0.1:") as said:
            assert heartbeat._start(store) is None
    assert len([warning for warning in said if warning.category is UserWarning]) == 1


@pytest.mark.long
def test_one_rank_of_a_machine_speaks_for_all_that_are_blocked() -> None:
    codes, said = zip(*watched_ranks({0: LOCKED, 1: KILLED, 2: LOCKED, 3: KILLED}), strict=True)
    assert codes == (-9, -9, -9, -9)
    assert re.fullmatch(SENTENCE.format("1, 3", 0).replace("rank 1", "ranks 1"), said[0]), said
    assert said[1:] == ("", "", "")


@pytest.mark.long
def test_an_error_of_another_rank_ends_a_blocked_one_which_says_it() -> None:
    error = 'raise OSError("no such shard: 7.npy")'
    (code, text), (other, own) = watched_ranks({0: LOCKED, 1: error})
    assert code == -9 and other == 1 and "Traceback" in own
    line = "mixflow-fast: error: rank 1 ended with OSError: no such shard: 7.npy: rank 0 ends too"
    assert text.startswith(line) and text.count("\n") == 1


@pytest.mark.long
def test_a_training_run_that_is_blocked_ends(tmp_path: Path) -> None:
    """Rank 0 blocks after its third step, in which rank 1 is killed."""
    started = time.monotonic()
    (code, text), (other, _) = run_ranks([[TRAINING, str(tmp_path)]] * 2)
    assert (code, other) == (-9, -9) and time.monotonic() - started < 60
    assert re.search(SENTENCE.format(1, 0), text), text
    blocked, ended = (float(n) for n in (text.split("blocked at ")[1].split()[0], time.time()))
    assert ended - blocked < 30


@pytest.mark.parametrize(
    "bodies",
    [
        {0: "pass", 1: "ctypes.PyDLL(None).sleep(8)"},
        pytest.param({0: "time.sleep(6)", 1: "pass", 2: "pass"}, marks=pytest.mark.long),
    ],
)
def test_a_rank_that_lives_is_not_called_dead(bodies: dict[int, str]) -> None:
    """One that keeps Python's lock for long, or one whose fellows go before it."""
    assert watched_ranks(bodies) == [(0, "")] * len(bodies)


@pytest.mark.long
def test_a_stopped_rank_is_not_called_dead() -> None:
    """For longer than a watcher may be silent."""
    stop = (
        "subprocess.Popen(['sh', '-c', f'sleep {seconds}; kill -CONT {os.getpid()}']); "
        "os.kill(os.getpid(), signal.SIGSTOP)"
    ).replace("{seconds}", str(int(watcher.SILENCE_S) + 4))
    assert watched_ranks({0: stop, 1: "pass"}) == [(0, ""), (0, "")]
    assert watched_ranks({0: "pass", 1: stop}) == [(0, ""), (0, "")]


@pytest.mark.long
@pytest.mark.parametrize("gone", [0, 1])
def test_a_machine_that_is_silent_is_gone(gone: int) -> None:
    """Its watcher, which does nothing but beat, is stopped: no connection is closed."""
    silent = (
        "pid = heartbeat._watch._process.pid; os.kill(pid, signal.SIGSTOP); "
        "subprocess.Popen(['sh', '-c', f'sleep 30; kill -9 {pid}']); time.sleep(60)"
    )
    ended: list[float] = []
    found = watched_ranks({gone: silent, 1 - gone: LOCKED}, only=1 - gone, ended=ended)
    assert watcher.SILENCE_S < ended[0] < 30 + 10  # of which some seconds are the start
    code, text = found[1 - gone]
    assert code == -9 and re.fullmatch(SENTENCE.format(gone, 1 - gone), text), text
