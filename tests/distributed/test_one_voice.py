"""Of several ranks, one prints what all have to say; real processes and a real store."""

import subprocess
import sys

import torch.distributed as dist

from tests.support.launchers import ROOT, environment, ranks_of

BODY = """
from mixflow_fast.distributed.one_voice import is_first_to_say
rank = dist.get_rank()
print("shared", is_first_to_say("refused"), "own", is_first_to_say(f"only rank {rank} has this"))
sys.stdout.flush()
os._exit(0)
"""


def test_a_text_of_all_ranks_is_said_by_one() -> None:
    """In a group whose store goes with rank 0."""
    said = [output for _, output in ranks_of(BODY)]
    assert sorted(line for text in said for line in text.splitlines() if "shared" in line) == [
        "shared False own True",
        "shared True own True",
    ]


def refusals(*recipes: str) -> list[tuple[int, str]]:
    """(exit code, stderr) of a `train` on each rank, with torchrun's store, before they meet."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    meeting["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "mixflow_fast.cli", "train", recipe, "--dry-run"],
            cwd=ROOT,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **meeting),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, recipe in enumerate(recipes)
    ]
    said = [process.communicate(timeout=60)[1] for process in processes]
    return [(p.returncode, text) for p, text in zip(processes, said, strict=True)]


def test_a_refusal_of_all_ranks_is_one_line() -> None:
    codes, said = zip(*refusals("no-recipe", "no-recipe"), strict=True)
    assert codes == (2, 2) and sorted(text.count("\n") for text in said) == [0, 1]
    assert "recipe 'no-recipe' is not one of" in "".join(said)


def test_an_error_that_one_rank_has_is_said_by_it() -> None:
    (code, first), (other, second) = refusals("no-recipe", "another-one")
    assert (code, other) == (2, 2) and "'no-recipe'" in first and "'another-one'" in second


def test_a_wrong_command_line_is_said_by_rank_0() -> None:
    (code, first), (other, second) = refusals("--wrong", "--wrong")
    assert (code, other) == (2, 2) and "usage: mixflow-fast" in first and second == ""
