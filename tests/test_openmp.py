"""How threads wait: by what runs when the command starts, unless the user has chosen."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from mixflow_fast import openmp


@pytest.fixture(autouse=True)
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the start of a command; two cores, whatever the machine has."""
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(openmp.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(openmp.os, "sched_getaffinity", lambda process: {0, 1})


@pytest.mark.parametrize(
    ("elsewhere", "given", "chosen"),
    [
        (0, {}, {"GOMP_SPINCOUNT": "1000"}),
        (1, {}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        (8, {"OMP_NUM_THREADS": "2"}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        (8, {"OMP_NUM_THREADS": "1"}, {}),
        (8, {"OMP_WAIT_POLICY": "ACTIVE"}, {}),
        (8, {"GOMP_SPINCOUNT": "5"}, {}),
        (0, {"KMP_BLOCKTIME": "0"}, {}),
    ],
)
def test_the_choice(
    monkeypatch: pytest.MonkeyPatch, elsewhere: int, given: dict[str, str], chosen: dict[str, str]
) -> None:
    monkeypatch.setattr(openmp, "running_elsewhere", lambda: elsewhere)
    environment = dict(given)
    openmp.choose_waiting(environment)
    assert environment == given | chosen


def test_cores_of_other_jobs_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job with 8 of 128 cores, where the others are busy: there is room for its threads."""
    monkeypatch.setattr(openmp.os, "cpu_count", lambda: 128)
    monkeypatch.setattr(openmp.os, "sched_getaffinity", lambda process: set(range(8)))
    for elsewhere, chosen in ((120, "GOMP_SPINCOUNT"), (121, "OMP_WAIT_POLICY")):
        monkeypatch.setattr(openmp, "running_elsewhere", lambda count=elsewhere: count)
        environment: dict[str, str] = {}
        openmp.choose_waiting(environment)
        assert list(environment) == [chosen]


def test_nothing_is_chosen_once_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    environment: dict[str, str] = {}
    openmp.choose_waiting(environment)
    assert environment == {}


@pytest.fixture
def busy() -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    yield
    for loop in loops:
        loop.kill()
        loop.wait()


def test_busy_processes_are_seen(busy: None) -> None:
    assert openmp.running_elsewhere() >= 1


def test_the_command_chooses_before_torch_is_there() -> None:
    """In a process of its own: what torch's OpenMP reads is the environment of its start."""
    code = (
        "import os, sys\n"
        "from mixflow_fast.cli import main\n"
        "main(['recipes'])\n"
        "print(sorted({'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'} & set(os.environ)), file=sys.stderr)"
    )
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {k: v for k, v in openmp.os.environ.items() if k not in names}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stderr.decode().strip() in ("['GOMP_SPINCOUNT']", "['OMP_WAIT_POLICY']")
