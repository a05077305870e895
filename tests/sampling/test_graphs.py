"""Steps that are recorded once and replayed, against the loop in Python: the same bits."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixflow_fast.flow.path import per_sample
from mixflow_fast.models import SiT
from mixflow_fast.sampling.graphs import GraphLoop
from mixflow_fast.sampling.guidance import Guidance, guided_velocity
from mixflow_fast.sampling.prepared import PreparedSampling
from mixflow_fast.sampling.remedies import parse_remedy
from mixflow_fast.sampling.sampler import ALL_METHODS, Sampler
from mixflow_fast.sampling.solvers import SOLVERS
from tests.support.networks import Mirrored, Net
from tests.support.recorded_graph import record

PLANNED = [name for name in ALL_METHODS if name not in ("dopri5", "rk45", "unipc")]
GUIDANCE = {
    "none": Guidance(),
    "cfg": Guidance(1.5, 3),
    "interval": Guidance(2.0, interval=(0.25, 0.6)),
    "interval by step": Guidance(2.0, interval=(0.25, 0.6), by_step=True),
    "autoguidance": Guidance(1.4, interval=(0.0, 0.7), kind="autoguidance"),
}


class Pointwise(Net):
    """Without a convolution, whose first call of a process is slow."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.rows.append(x.shape[0])
        return torch.tanh(x + 0.3 * x.flip(1)) + self.embed(y)[:, :, None, None] * per_sample(t, x)


def _both(sampler: Sampler, guidance: Guidance, remedy: str | None = None) -> PreparedSampling:
    """Hold replays to the loop in Python, over two draws of several batches of other seeds."""
    guide = Mirrored(Pointwise(classes=7)) if guidance.kind == "autoguidance" else None
    made = {
        capture: PreparedSampling(
            Pointwise(),
            sampler,
            guidance,
            guide=guide,
            remedy=None if remedy is None else parse_remedy(remedy),
            batch_size=2,
            mode="eager" if capture is None else "graph",
            capture=capture,
        )
        for capture in (None, record)
    }
    for seed, ids in ((0, torch.arange(5)), (7, torch.tensor([3, 1 << 40]))):
        eager, replayed = (each.draw(ids, seed=seed) for each in made.values())
        assert torch.equal(eager.x, replayed.x) and eager.nfe == replayed.nfe
        assert torch.equal(eager.labels, replayed.labels) and eager.x.isfinite().all()
    return made[record]


@pytest.mark.parametrize("method", PLANNED)
def test_replays_have_the_bits_of_the_loop(method: str) -> None:
    for guidance in GUIDANCE.values():
        _both(Sampler(method, 6, shift=2.0), guidance)


@pytest.mark.parametrize(
    "remedy", ["ssc=0.1,1", "label_scale=0.9", "time_shift=0.03,0.5,1", "epsilon"]
)
def test_remedies(remedy: str) -> None:
    for method, guidance in (("euler", "interval"), ("sde_heun", "cfg")):
        _both(Sampler(method, 5), GUIDANCE[guidance], remedy)


def test_other_forms_and_whole_times() -> None:
    for last in ("euler", "tweedie", "none"):
        _both(Sampler("sde_euler", 5, last=last, form="increasing-decreasing"), GUIDANCE["cfg"])
    _both(Sampler("dpmpp2m", 5, start=1e-3, integer_times=True), GUIDANCE["interval"])


def test_a_table_names_every_method_once() -> None:
    """A new method with a plan is in the tests above; one without goes its own way."""
    own_way = {name for name, solver in SOLVERS.items() if solver.plan is None}
    assert own_way == set(ALL_METHODS) - set(PLANNED)


@pytest.mark.parametrize(
    ("method", "guidance", "graphs", "rows"),
    [
        ("euler", "cfg", 1, {4}),
        ("euler", "interval", 2, {2, 4}),  # B and 2B rows
        ("heun", "interval by step", 2, {2, 4}),
        ("heun_last_euler", "none", 1, {2}),  # the last step occurs once and is no graph
        ("dpmpp2m", "none", 2, {2}),  # one for the first and the last step
        ("sde_euler", "none", 1, {2}),
    ],
)
def test_graphs_for_each_kind_of_step(
    method: str, guidance: str, graphs: int, rows: set[int]
) -> None:
    prepared = _both(Sampler(method, 12), GUIDANCE[guidance])
    assert prepared._loop.captured == graphs
    assert set(prepared._model.rows) == rows


def test_replays_call_no_python() -> None:
    """The network is entered by first steps, by recordings and by the one check of each graph."""
    prepared = PreparedSampling(
        Pointwise(),
        Sampler("sde_euler", 20),
        Guidance(),
        batch_size=2,
        mode="graph",
        capture=record,
    )
    prepared.draw(torch.arange(8))
    first, recording, check, last_step = 1, 1, 1, 4
    assert len(prepared._model.rows) == first + recording + check + last_step


def test_what_is_frozen_at_the_capture_is_found() -> None:
    class Counting(Pointwise):
        """Reads a number that Python changes."""

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return super().forward(x, t, y) * (1 + 0.1 * len(self.rows))

    class Reading(Pointwise):
        """Asks the device."""

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return super().forward(x, t, y) * float(t[0])

    def draw(net: Pointwise) -> None:
        options = dict(batch_size=2, mode="graph", capture=record)
        PreparedSampling(net, Sampler("euler", 5), Guidance(), **options).draw(torch.arange(2))

    with pytest.raises(RuntimeError, match="does not lie in fixed memory; use mode=.compile"):
        draw(Counting())
    with pytest.raises(AssertionError, match="host wait"):
        draw(Reading())


class _Places(TorchDispatchMode):
    """Operators whose result is not on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.device.type != "meta":
            self.found.append(f"{func} on {out.device}")
        return out


@pytest.mark.parametrize("method", ["heun", "dpmpp2m", "sde_euler"])
def test_all_that_a_step_touches_is_on_the_device(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device without data nothing can be read by the host, and no other device has a part."""
    replays: list[int] = []

    def capture(step) -> object:
        with places:
            step()
        return lambda: replays.append(1)

    monkeypatch.setattr(GraphLoop, "_check", lambda self, graph, kind: graph.replay())
    places, sampler = _Places(), Sampler(method, 6)
    guidance = Guidance(1.5, 3, (0.2, 0.7))
    sizes = dict(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    with torch.device("meta"):
        model, x, ids = SiT(**sizes), torch.zeros(2, 4, 4, 4), torch.arange(2)
    remedies = (None, parse_remedy("time_shift"))
    for remedy in remedies:
        loop = GraphLoop(
            sampler.plan(),
            sampler.memory,
            lambda y, remedy=remedy: guided_velocity(model, y, guidance, remedy=remedy),
            (2, 4, 4, 4),
            True,
            guidance.scale,
            torch.device("meta"),
            capture,
        )
        out = loop.run(x, ids, ids, torch.arange(len(sampler.plan())))
        assert out.device.type == "meta" and out.dtype == torch.float32
    assert places.found == [] and len(replays) >= len(remedies)


def test_plans_are_of_the_grid() -> None:
    """The last time of a plan and its evaluations are the sampler's own."""
    for method, steps in itertools.product(PLANNED, (2, 7)):
        sampler = Sampler(method, steps)
        plan, grid = sampler.plan(), sampler.grid().tolist()
        assert [step.times[0] for step in plan] == grid[:-1]
        assert sum(len(step.times) for step in plan) == sampler.nfe
        finer = dataclasses.replace(sampler, steps=steps + 1).plan()
        assert {step.formula for step in plan} <= {step.formula for step in finer}
