"""Steps in halves, `advance` and `update`, of which a CUDA graph has the second."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mixflow_fast.optim import apex
from mixflow_fast.optim.adamw_ema import AdamWEMA
from mixflow_fast.optim.lr_schedule import learning_rate
from mixflow_fast.optim.skip_nonfinite import PIECE, skipping
from tests.support import apex_stand_in
from tests.support.csrc_library import require_library
from tests.support.launches import Operators
from tests.support.recorded_graph import record

SHAPES = [(1,), (3,), (33, 31), (0,), (4_001,)]
IMPLS = ("csrc", "foreach")
EVERY = pytest.mark.parametrize("impl", IMPLS)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    require_library()
    monkeypatch.setitem(PIECE, "cpu", 50)  # several pieces a parameter


class Run:
    """An optimizer on fixed gradients: clipping, a warm-up, EMAs of every kind, bf16 copies."""

    def __init__(self, impl: str, kind: type[AdamWEMA] = AdamWEMA, **more: object) -> None:
        g = torch.Generator().manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in SHAPES]
        groups = [
            {"params": self.params[:2], "weight_decay": 0.1},
            {"params": self.params[2:], "betas": (0.5, 0.9), "eps": 1e-4},
        ]
        settings = dict(weight_decay=0.03, grad_clip=5.0, ema_decay=(0.9, 0.99)) | more
        self.optimizer = kind(groups, ema_sigma_rel=(0.05, 0.1), impl=impl, **settings)
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.copies = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in self.params[1:]}
        self.optimizer.set_copies(self.copies)
        self._replay: Callable[[], None] | None = None
        self.captures = 0

    def give(self, step: int, bad: bool = False) -> None:
        """Gradients and learning rate of a step, in the memory of the last one's."""
        g = torch.Generator().manual_seed(100 + step)
        for p in self.params:
            p.grad.copy_(torch.randn(p.shape, generator=g))
        if bad:
            self.params[2].grad[5, 5] = torch.nan
        rate = learning_rate(step, lr=0.02, schedule="cosine", warmup_images=8, decay_images=20)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def step(self) -> None:
        self.optimizer.step()

    def replay(self) -> None:
        """As the documentation of `advance` has it."""
        if self.optimizer.advance():
            self.optimizer.update()
            self._replay = None
            return
        if self._replay is None:
            self._replay = record(self.optimizer.update)
            self.captures += 1
        self._replay()

    def everything(self) -> list[Tensor]:
        states = [self.optimizer.state[p] for p in self.params]
        tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
        return [*self.params, *self.copies.values(), *tensors]


def assert_same(a: Run, b: Run, step: int) -> None:
    assert torch.equal(a.optimizer.grad_norm, b.optimizer.grad_norm) or step < 0
    for number, (x, y) in enumerate(zip(a.everything(), b.everything(), strict=True)):
        assert torch.equal(x, y), (step, number)
    counts = [[run.optimizer.state[p]["step"] for p in run.params] for run in (a, b)]
    assert counts[0] == counts[1]


@EVERY
@pytest.mark.parametrize("kind", [AdamWEMA, skipping(AdamWEMA)])
@pytest.mark.parametrize("clip", [0.0, 5.0])
def test_replays_have_the_bits_of_steps(impl: str, kind: type[AdamWEMA], clip: float) -> None:
    """20 steps of one recording, with a rate that changes; a step in between is passed over."""
    eager, captured = (Run(impl, kind, grad_clip=clip) for _ in range(2))
    norms = set()
    for step in range(1, 21):
        bad = step == 9 and kind is not AdamWEMA
        before = [t.clone() for t in captured.everything()]
        for run in (eager, captured):
            run.give(step, bad)
        eager.step()
        captured.replay()
        norms.add(captured.optimizer.grad_norm.data_ptr())
        assert_same(eager, captured, -1 if bad else step)
        if bad:
            assert not captured.optimizer.grad_norm.isfinite()
            after = captured.everything()
            assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    # The norm is not of a capture's own memory, which later passes may take.
    assert captured.captures == len(norms) == 1


def test_a_frozen_number_would_show() -> None:
    """The recorder does repeat numbers of the host: an ordinary step, recorded, is another one."""
    eager, captured = Run("foreach"), Run("foreach")
    for run in (eager, captured):
        run.give(1)
        run.step()
    replay = record(captured.step)
    for run, step in ((eager, eager.step), (captured, replay)):
        run.give(2)
        step()
    assert not torch.equal(eager.params[2], captured.params[2])


@EVERY
def test_what_the_host_launches_in_a_step(impl: str) -> None:
    """Besides the replay: a call's constants, in one launch or in one for each."""
    found = {}
    for name in ("step", "replay"):
        run = Run(impl)
        for step in (1, 2, 3):
            run.give(step)
            if step == 3 and name == "replay":
                run._replay = lambda: None
            launched = Operators()
            with launched:
                getattr(run, name)()
        found[name] = launched.names
    calls = 3  # two of the first group, whose first parameter has no copy
    each = ["adamw_constants_"] if impl == "csrc" else ["fill_"] * 5
    assert found["replay"] == calls * each
    assert len(found["step"]) == {"csrc": 12, "foreach": 50}[impl]


@EVERY
@pytest.mark.parametrize("first", ["step", "replay"])
def test_a_state_goes_on_either_way(impl: str, first: str) -> None:
    """Saved by one and taken up by the other: no bit tells which has made which step."""
    second = {"step": "replay", "replay": "step"}[first]
    whole, start, resumed = Run(impl), Run(impl), Run(impl)
    for step in range(1, 5):
        for run in (whole, start):
            run.give(step)
            getattr(run, first)()
    for p, q in zip(resumed.params, start.params, strict=True):
        p.data.copy_(q)
    resumed.optimizer.load_state_dict(copy.deepcopy(start.optimizer.state_dict()))
    for step in range(5, 10):
        for run, how in ((whole, first), (resumed, second)):
            run.give(step)
            getattr(run, how)()
        assert_same(whole, resumed, step)


def _load(run: Run) -> None:
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))


def _move_gradient(run: Run) -> None:
    run.params[2].grad = run.params[2].grad.clone()


def _turn_gradient(run: Run) -> None:
    p = run.params[2]
    p.grad = p.grad.view(-1).as_strided(p.shape, (1, p.shape[0]))


def _other_copies(run: Run) -> None:
    run.copies = {p: copy.clone() for p, copy in run.copies.items()}
    run.optimizer.set_copies(run.copies)


def _forget(run: Run) -> None:
    run.optimizer.state.clear()


def _other_betas(run: Run) -> None:
    run.optimizer.param_groups[1]["betas"] = (0.6, 0.8)


def _other_clip(run: Run) -> None:
    run.optimizer.grad_clip = 0.5


def _no_gradient(run: Run) -> None:
    run.params[0].grad = None


def _other_decay(run: Run) -> None:
    run.optimizer.param_groups[0]["weight_decay"] = 0.2


MOVES = [
    _load,
    _move_gradient,
    _turn_gradient,
    _other_copies,
    _forget,
    _other_betas,
    _other_clip,
    _no_gradient,
]


@EVERY
@pytest.mark.parametrize("change", [*MOVES, _other_decay])
def test_what_a_capture_froze_is_noticed(impl: str, change: Callable[[Run], None]) -> None:
    """Then a step runs as it is, and the next is recorded anew; the bits stay those of steps."""
    eager, captured = Run(impl), Run(impl)
    for step in range(1, 8):
        for run, how in ((eager, eager.step), (captured, captured.replay)):
            if step == 4:
                change(run)
            if step == 6 and run.params[0].grad is None:
                run.params[0].grad = torch.zeros(1)  # counts its own steps from here on
            if run.params[0].grad is None:
                run.params[0].grad = torch.zeros(1)
                run.give(step)
                run.params[0].grad = None
            else:
                run.give(step)
            how()
        assert_same(eager, captured, step)
    assert captured.captures == {_other_decay: 1, _no_gradient: 3}.get(change, 2)


def test_an_update_needs_its_first_half() -> None:
    with pytest.raises(RuntimeError, match=r"call advance\(\) before it"):
        Run("foreach").optimizer.update()


@pytest.mark.parametrize("skips", [False, True])
def test_apex_takes_its_step_from_the_host(monkeypatch: pytest.MonkeyPatch, skips: bool) -> None:
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex_stand_in)
    monkeypatch.setattr(apex, "detect_apex", lambda: "nvidia")
    kind = skipping(apex.ApexAdamWEMA) if skips else apex.ApexAdamWEMA
    optimizer = kind([torch.nn.Parameter(torch.zeros(3))])
    assert not optimizer.capturable and AdamWEMA.capturable and skipping(AdamWEMA).capturable
    with pytest.raises(RuntimeError, match="ApexAdamWEMA cannot be captured in a CUDA graph"):
        optimizer.advance()
