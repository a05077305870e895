"""Mode graph: both passes recorded and replayed, on a stand-in for CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixflow_fast.config.validate import validate
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.models import SiT
from mixflow_fast.training import build, ddp_engine
from mixflow_fast.training.capture import CapturedNetwork, check_device
from mixflow_fast.training.trainer import Trainer, train
from tests.support.compiling import compiler
from tests.support.csrc_library import require_library
from tests.support.launches import Launches, Operators
from tests.support.recording import RecorderStandIn
from tests.support.runs import assert_same_bits, tiny

SIZE = dict(input_size=4, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=10)
REPA = SIZE | dict(z_dims=[8], encoder_depth=1, projector_dim=16)
DDP = ["train.engine=ddp", "train.zero_stage=0"]


def network(size: dict) -> SiT:
    """Every parameter takes part: as it is built, SiT's last layer and gates are zero."""
    torch.manual_seed(0)
    net = SiT(**size)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    return net


def batch(number: int, images: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(number)
    x, t = torch.randn(images, 4, 4, 4, generator=g), torch.rand(images, generator=g)
    return x, t, torch.randint(0, 10, (images,), generator=g)


def loss_of(output: Tensor | tuple[Tensor, list[Tensor]]) -> Tensor:
    pred, zs = output if isinstance(output, tuple) else (output, [])
    return pred.square().mean() + sum(z.square().mean() for z in zs)


@pytest.mark.parametrize("size", [SIZE, REPA], ids=["SiT", "REPA"])
@pytest.mark.parametrize("accumulated", [1, 2, 3])
def test_replays_give_the_bits_of_the_network(size: dict, accumulated: int) -> None:
    """Step by step with a plain copy, while both change in place; sums of several micro-batches."""
    plain, recorder = network(size), RecorderStandIn()
    net = copy.deepcopy(plain)
    captured = CapturedNetwork(net, recorder)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.5) for n in (plain, net)]
    for step in range(3):
        for part in range(accumulated):
            inputs = batch(10 * step + part)
            expected, found = loss_of(plain(*inputs)), loss_of(captured(*inputs))
            assert torch.equal(expected, found)
            expected.backward()
            found.backward()
            for tensor in inputs:  # nobody reads them any more
                tensor.zero_()
        for (name, p), q in zip(plain.named_parameters(), net.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or torch.equal(p.grad, q.grad), name
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert recorder.recordings == 2 and recorder.replays == 2 * 3 * accumulated


def test_gradients_take_no_memory_of_their_own() -> None:
    """Where nothing is added up, a parameter's gradient is the memory that the replay writes."""
    net = network(SIZE)
    captured, places = CapturedNetwork(net, RecorderStandIn()), []
    for number in range(2):
        loss_of(captured(*batch(number))).backward()
        places.append([p.grad.data_ptr() for p in net.parameters() if p.requires_grad])
        net.zero_grad(set_to_none=True)
    assert places[0] == places[1]


def test_what_is_not_recorded() -> None:
    """Passes without gradients or with a gradient of the input; other shapes have their own."""
    net, recorder = network(SIZE), RecorderStandIn()
    captured = CapturedNetwork(net, recorder)
    x, t, y = batch(0)
    with torch.no_grad():
        assert torch.equal(captured(x, t, y), net(x, t, y))
    x.requires_grad_()
    loss_of(captured(x, t, y)).backward()
    assert x.grad is not None and recorder.recordings == 0
    for images in (3, 2, 3, 2):
        inputs = batch(1, images)
        assert torch.equal(captured(*inputs), net(*inputs))
    assert recorder.recordings == 4 and recorder.rehearsals == 6


@pytest.mark.parametrize("images", [3, 2], ids=["same shape", "another shape"])
def test_a_pass_between_forward_and_backward_is_refused(images: int) -> None:
    """It has overwritten what the backward pass needs: an error, not another gradient.

    One of another shape too, since all recordings lie in one pool of memory.
    """
    captured = CapturedNetwork(network(SIZE), RecorderStandIn())
    first = loss_of(captured(*batch(0)))
    second = loss_of(captured(*batch(1, images)))
    with pytest.raises(RuntimeError, match="a captured network ran again before the backward pass"):
        first.backward()
    second.backward()


def test_a_second_backward_pass_is_refused() -> None:
    """The first one has taken the memory of what it went through for its own results."""
    captured = CapturedNetwork(network(SIZE), RecorderStandIn())
    loss = loss_of(captured(*batch(0)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="and can be made once"):
        loss.backward()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[RecorderStandIn]:
    """Runs on the CPU take the stand-in; those that were made."""
    made: list[RecorderStandIn] = []

    def recorder(device: torch.device) -> RecorderStandIn:
        made.append(RecorderStandIn())
        return made[-1]

    monkeypatch.setattr(torch, "compile", compiler("aot_eager"))
    monkeypatch.setattr(build, "check_device", lambda device: None)
    monkeypatch.setattr(ddp_engine, "CudaRecorder", recorder)
    return made


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.long), "bf16"])
def test_a_run_has_the_bits_of_mode_compile(
    tmp_path: Path, precision: str, stand_in: list[RecorderStandIn]
) -> None:
    """Two micro-batches a step, an interruption, and a preview's pass without gradients."""
    own = [*DDP, f"train.precision={precision}", "train.microbatch_size=4", "train.keep_last=1"]
    own += ["train.validate_every=2", "train.validate_examples=4"]
    train(tiny(tmp_path / "compile", *own, "model.mode=compile", "train.images=32"), quiet=True)
    for images in (16, 32):
        more = ["model.mode=graph", f"train.images={images}"]
        train(tiny(tmp_path / "graph", *own, *more), quiet=True)
    # Of 2 steps, 2 micro-batches, 2 passes; and of the second step.
    assert [(one.replays, one.steps) for one in stand_in] == [(9, 1), (9, 1)]
    assert_same_bits(tmp_path / "compile", tmp_path / "graph")
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("compile", "graph")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_what_the_host_does_besides_the_replays(
    tmp_path: Path, stand_in: list[RecorderStandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a network of any depth two replays; three copies of inputs, and one of a gradient."""
    # Operators are not seen inside of compiled code.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    found = {}
    for mode, depth in (("eager", 4), ("graph", 4), ("graph", 1)):
        more = [f"model.mode={mode}", f"model.depth={depth}", "train.precision=bf16"]
        trainer = Trainer(tiny(tmp_path / f"{mode}{depth}", *DDP, *more), quiet=True)
        x, t, y = torch.randn(8, 3, 16, 16).bfloat16(), torch.rand(8), torch.zeros(8).long()
        engine = trainer.engine
        engine.backward(engine(x, t, y).square().mean())  # what is made once
        launches, seed = Launches(), torch.randn(8, 3, 16, 16).bfloat16()
        if mode == "graph":
            stand_in[-1].replaying = launches.paused
            replays = stand_in[-1].replays
        with launches:
            pred = engine(x, t, y)
            with launches.paused():
                loss = (pred * seed).sum()
            engine.backward(loss)
        if mode == "graph":
            assert stand_in[-1].replays == replays + 2
        found[mode, depth] = launches.counts
        trainer.close()
    print({key: counts.total() for key, counts in found.items()}, found["graph", 1])
    assert found["graph", 4] == found["graph", 1]
    assert found["eager", 4].total() > 20 * found["graph", 4].total()
    assert found["graph", 4]["copy_"] == 4


def test_where_it_is_refused() -> None:
    with pytest.raises(ValueError, match="model.mode=graph records CUDA graphs, got a run on cpu"):
        check_device(torch.device("cpu"))
    with pytest.raises(ValueError, match="set train.engine=ddp and train.zero_stage=0"):
        validate(tiny(Path("x"), "model.mode=graph"))
    with pytest.raises(ValueError, match="got a run on cpu: set model.mode=eager or compile"):
        Trainer(tiny(Path("x"), *DDP, "model.mode=graph", "train.device=cpu"), quiet=True)


# A rate that changes, clipping, decay, averages of every kind, steps that may be passed over.
OPTIM = ["optim.grad_clip=0.5", "optim.weight_decay=0.1", "train.on_nonfinite=skip"]
OPTIM += ["optim.ema_decays=[0.9,0.99]", "optim.ema_sigma_rel=[0.1]", "train.keep_last=20"]


class Steps:
    """An engine's steps on random batches."""

    def __init__(self, out: Path, mode: str, parts: int, *more: str) -> None:
        own = [*DDP, *OPTIM, f"model.mode={mode}", f"train.microbatch_size={8 // parts}"]
        own += ["train.images=400"]
        self.trainer = Trainer(tiny(out, *own, *more), quiet=True)
        self.engine, self._parts = self.trainer.engine, parts
        self._dtype = next(self.engine.module.parameters()).dtype
        self.norms: list[Tensor] = []

    def run(self, first: int, last: int, bad: int = 0) -> None:
        """Steps with these numbers; in step `bad` the loss is not a number."""
        for step in range(first, last + 1):
            self.engine.set_lr(1e-3 * min(step / 5, 1.0))
            for part in range(self._parts):
                g = torch.Generator().manual_seed(100 * step + part)
                x = torch.randn(8 // self._parts, 3, 16, 16, generator=g).to(self._dtype)
                t = torch.rand(len(x), generator=g)
                pred = self.engine(x, t, torch.arange(len(x)) % 3)
                self.engine.backward(pred.square().mean() * (torch.nan if step == bad else 1.0))
                self.engine.step()
            self.norms.append(self.engine.grad_norm().clone())

    def save(self, step: int) -> Path:
        self.trainer.step = step
        return self.trainer.save()

    def state(self) -> list[Tensor]:
        keys = ["model", "exp_avg", "exp_avg_sq", "ema", "ema_1", "ema_power_0"]
        found = [v.clone() for k in keys for _, v in self.engine.gathered(k, stepped=True)]
        return [*found, *(p.detach().clone() for p in self.engine.module.parameters())]


def assert_same(a: Steps, b: Steps) -> None:
    for x, y in zip(a.state(), b.state(), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(a.norms, b.norms, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("parts", "impl"), [(1, "csrc"), (2, "csrc"), (1, "foreach")])
def test_recorded_steps_have_the_bits_of_steps(
    tmp_path: Path,
    precision: str,
    parts: int,
    impl: str,
    stand_in: list[RecorderStandIn],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """20 steps with a warm-up, one passed over, two ways back, one of them to before any step."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    require_library()
    made = {}
    for mode in ("eager", "graph"):
        more = [f"train.precision={precision}", f"optim.impl={impl}"]
        made[mode] = steps = Steps(tmp_path / mode, mode, parts, *more)
        beginning = steps.save(0)
        steps.run(1, 20, bad=9)
        middle = steps.save(20)
        if mode == "graph":  # the first step runs as it is
            assert stand_in[0].steps == 19
        steps.run(21, 24)
        assert steps.engine.load(middle)
        steps.run(21, 24)
        if mode == "graph":  # memory has stayed where it was
            assert stand_in[0].steps == 27
        after = steps.state()
        assert steps.engine.load(beginning)
        steps.run(1, 3)
        if mode == "graph":  # the state has begun anew, elsewhere
            assert stand_in[0].steps == 29
        assert not all(torch.equal(x, y) for x, y in zip(after, steps.state(), strict=True))
    assert_same(made["eager"], made["graph"])
    assert made["graph"].norms[8].isnan() and made["graph"].norms[9].isfinite()
    # A new process goes on from the checkpoint, in either mode.
    resumed = {}
    for mode in ("eager", "graph"):
        made[mode].trainer.close()
        more = [f"train.precision={precision}", f"optim.impl={impl}"]
        resumed[mode] = Steps(tmp_path / mode, mode, parts, *more)
        assert resumed[mode].trainer.step == 20
        resumed[mode].run(21, 24)
    assert_same(*resumed.values())
    for first, second in zip(made["graph"].norms[20:24], resumed["graph"].norms, strict=True):
        assert torch.equal(first, second)
    for steps in resumed.values():
        steps.trainer.close()


@pytest.mark.parametrize("impl", ["csrc", "foreach"])
def test_what_the_host_does_for_a_step(
    tmp_path: Path,
    impl: str,
    stand_in: list[RecorderStandIn],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Constants to the device and one replay, where it is a series of operators otherwise."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    require_library()
    found = {}
    for mode in ("eager", "graph"):
        steps = Steps(tmp_path / mode, mode, 1, f"optim.impl={impl}")
        steps.run(1, 3)
        step, launched = steps.engine.step, Operators()
        if mode == "graph":
            stand_in[0].replaying = launched.paused

        def counted(step: Callable[[], None] = step, launched: Operators = launched) -> None:
            with launched:
                step()

        monkeypatch.setattr(steps.engine, "step", counted)
        steps.run(4, 4)
        steps.trainer.close()
        found[mode] = launched.names
    assert found["graph"] == {"csrc": ["adamw_constants_"], "foreach": ["fill_"] * 4}[impl]
    # 22 tensors of a network with one block, which foreach calls cannot pass over by themselves.
    assert len(found["eager"]) == {"csrc": 10, "foreach": 277}[impl]
