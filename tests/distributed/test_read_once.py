"""What all ranks need is read by one of a machine, whose error is everybody's."""

from tests.support.launchers import ranks_of

READS = """
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.distributed.read_once import read_once_a_machine
group = HostGroup()
mine = [torch.full((3, 2), -1.0), torch.zeros((), dtype=torch.int64), torch.zeros(0)]
def read():
    print("READ", group.rank, flush=True)
    mine[0].copy_(torch.arange(6.0).view(3, 2) / 7), mine[1].fill_(5)
groups = len(dist.distributed_c10d._world.pg_map)
read_once_a_machine(group, read, mine)
assert torch.equal(mine[0], torch.arange(6.0).view(3, 2) / 7) and mine[1] == 5
assert len(dist.distributed_c10d._world.pg_map) == groups
def fail():
    raise ValueError("weights.pt is damaged")
try:
    read_once_a_machine(group, fail, mine)
except ValueError as error:
    print("REFUSED", error, flush=True)
dist.barrier()
"""


def test_one_rank_reads_and_all_have_it() -> None:
    outputs = ranks_of(READS, timeout_s=60)
    assert [code for code, _ in outputs] == [0, 0], outputs
    assert ["READ" in output for _, output in outputs] == [True, False]
    assert all("REFUSED weights.pt is damaged" in output for _, output in outputs)


def test_every_machine_has_its_reader() -> None:
    """Two names on one machine stand for two machines."""
    name = "import socket\nsocket.gethostname = lambda: f\"node{os.environ['RANK']}\"\n"
    outputs = ranks_of(name + READS, timeout_s=60)
    assert [code for code, _ in outputs] == [0, 0], outputs
    assert all("READ" in output and "REFUSED" in output for _, output in outputs)
