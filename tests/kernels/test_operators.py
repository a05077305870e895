"""The kernels as operators: opcheck, compilation, checkpointing, host reads, launches."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mixflow_fast import MixFlow, mixflow_loss
from mixflow_fast.flow import DATA_AT_1, NOISE_AT_1
from mixflow_fast.flow.schedule import Schedule
from mixflow_fast.kernels import philox, runtime
from mixflow_fast.kernels.interpolate import triton_kernels as interpolate_kernels
from mixflow_fast.kernels.layout import one_wave
from mixflow_fast.kernels.velocity_loss import triton_kernels as loss_kernels
from mixflow_fast.objective import draws
from tests.support.kernels import DEVICE

OPS = torch.ops.mixflow_fast
IDS = torch.tensor([5, 2**40 + 3, 11], device=DEVICE)
SEED = philox.seed_tensor(3, DEVICE)
IMPLS = ("triton", "reference")


def data(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(dtype).to(DEVICE)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_opcheck_interpolate(impl: str, drawn: bool, dtype: torch.dtype | None) -> None:
    schedule = Schedule.of(NOISE_AT_1, "logit-normal", 0.8, 2.0, "raw", (0.0, 1.0))
    x1, t = data(3, 4, 6, 6), torch.full((3,), 0.5, device=DEVICE)
    given = (None, None, None) if drawn else (data(3, 4, 6, 6, seed=1), t, t)
    std = data(3, 4, 6, 6, seed=2).abs() if drawn else None
    rest = NOISE_AT_1, schedule.distribution.name, "raw", schedule.numbers(), "gvp", 2 * drawn, impl
    torch.library.opcheck(OPS.interpolate, (x1, std, 0.5, SEED, IDS, *given, *rest, dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck_velocity_loss(impl: str, dtype: torch.dtype) -> None:
    """float32 writes the gradient in the forward pass, float16 in the backward pass."""
    fused = dtype == torch.float32
    pred = data(3, 9, 32, dtype=dtype).requires_grad_()
    x1, times = data(3, 4, 6, 6, seed=1), torch.full((3,), 0.4, device=DEVICE)
    weight = torch.rand(3, 1, 6, 6).to(DEVICE)
    names = DATA_AT_1, "gvp", "score", "likelihood", "none" if fused else "mean"
    inputs = x1, None, 1.0, SEED, IDS, None, times, weight
    torch.library.opcheck(OPS.velocity_loss, (pred, *inputs, None, *names, True, 2, fused, impl))
    upstream = torch.ones(3 if fused else (), device=DEVICE)
    arguments = (pred.detach(), *inputs, upstream, *names, True, 2, True, impl)
    torch.library.opcheck(OPS.velocity_loss, arguments)


def test_opcheck_the_others() -> None:
    torch.library.opcheck(OPS.normal, (SEED, IDS, 6, 33))
    for upstream in (torch.rand(3, device=DEVICE), torch.rand((), device=DEVICE)):
        torch.library.opcheck(OPS.scale_gradient_, (data(3, 7), upstream))


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(data(4, 6, 6, seed=5))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.7 * x) * self.weight + 0.3 * t.view(-1, 1, 1, 1)


def gradient_of(step: Callable, net: Network, *arguments: torch.Tensor) -> tuple:
    net.zero_grad(set_to_none=True)
    loss = step(*arguments)
    (loss * torch.linspace(0.5, 2, loss.numel(), device=DEVICE).view(loss.shape)).sum().backward()
    return loss.detach(), net.weight.grad


# The reference once: its Philox makes graphs that take half a minute to trace.
@pytest.mark.parametrize(
    ("impl", "reduction"), [("triton", "mean"), ("triton", "none"), ("reference", "mean")]
)
@pytest.mark.parametrize(
    "how", [{}, {"fullgraph": True}, {"fullgraph": True, "dynamic": True}], ids=str
)
def test_compiled_steps_give_eagers_values_and_gradients(
    impl: str, reduction: str, how: dict
) -> None:
    """A dynamic batch is compiled once for two sizes."""
    torch._dynamo.reset()
    net, mix = Network(), MixFlow(clock=DATA_AT_1, impl=impl, seed=7)

    def step(x1: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        it = mix.prepare(x1, ids)
        return mix.loss(net(it.x, it.t), it, reduction=reduction)

    compiled = torch.compile(step, backend="aot_eager", **how)
    for batch in (3, 2) if how.get("dynamic") else (3,):
        x1, ids = data(batch, 4, 6, 6), IDS[:batch]
        expected = gradient_of(step, net, x1, ids)
        for a, b in zip(gradient_of(compiled, net, x1, ids), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_token_losses_trace_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    mix = MixFlow(clock=DATA_AT_1, impl="triton", seed=7)

    def step(x1: torch.Tensor, ids: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
        it = mix.prepare(x1, ids, patch_size=2)
        return mix.loss(torch.cat([it.x * pred, pred + it.x], -1), it, learn_sigma=True)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, side in ((3, 6), (2, 8)):
        x1, ids = data(batch, 4, side, side), IDS[:batch]
        found = []
        for call in (step, compiled):
            pred = data(batch, side * side // 4, 16, seed=1).requires_grad_()
            loss = call(x1, ids, pred)
            loss.backward()
            found.append((loss.detach(), pred.grad))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_inductor_gives_eagers_values_and_gradients() -> None:
    torch._dynamo.reset()
    net, mix = Network(), MixFlow(clock=DATA_AT_1, impl="triton", seed=7)

    def step(x1: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        it = mix.prepare(x1, ids)
        return mix.loss(net(it.x, it.t), it)

    expected = gradient_of(step, net, data(3, 4, 6, 6), IDS)
    compiled = torch.compile(step, fullgraph=True)
    for a, b in zip(gradient_of(compiled, net, data(3, 4, 6, 6), IDS), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_compiled_steps_without_ids_draw_afresh() -> None:
    torch._dynamo.reset()
    mix = MixFlow(clock=DATA_AT_1, impl="triton", seed=7)
    x1 = data(3, 4, 6, 6)
    compiled = torch.compile(lambda: mix.prepare(x1).t, fullgraph=True, backend="aot_eager")
    assert len(torch.cat([compiled() for _ in range(3)]).unique()) == 9


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_checkpointing_the_network_and_the_loss(use_reentrant: bool, dtype: torch.dtype) -> None:
    """The second forward pass makes the same noise, whatever else has been drawn."""
    net, mix = Network().to(dtype), MixFlow(clock=DATA_AT_1, impl="triton")
    x1 = data(3, 4, 6, 6, dtype=dtype)
    it = mix.prepare(x1, IDS)

    def tail(x: torch.Tensor) -> torch.Tensor:
        return mix.loss(net(x, it.t.to(dtype)), it)

    x = it.x.clone().requires_grad_()
    tail(x).backward()
    expected = x.grad, net.weight.grad
    net.weight.grad = None
    recomputed = it.x.clone().requires_grad_()
    loss = checkpoint(tail, recomputed, use_reentrant=use_reentrant)
    mix.prepare(x1)
    loss.backward()
    assert torch.equal(recomputed.grad, expected[0]) and torch.equal(net.weight.grad, expected[1])


class Calls(TorchDispatchMode):
    """Names of all operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


def test_a_step_reads_nothing_on_the_host_and_launches_three_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With ids: one kernel for the input, two for loss and gradient, one empty pass over it."""
    launches: list[str] = []
    kernels = [philox._normal_kernel, interpolate_kernels._interpolate_kernel]
    kernels += [
        getattr(loss_kernels, f"_{name}_kernel")
        for name in ("velocity_loss", "reduce", "scale_gradient")
    ]
    for kernel in kernels:
        run = kernel.run

        def spy(*args, run=run, name=kernel.fn.__name__, **kwargs):
            launches.append(name)
            return run(*args, **kwargs)

        monkeypatch.setattr(kernel, "run", spy)
    mix = MixFlow(clock=DATA_AT_1, impl="triton")
    x1, pred = data(3, 4, 6, 6), data(3, 4, 6, 6, seed=1).requires_grad_()
    mix.prepare(x1, IDS)  # seed and counters are made once
    launches.clear()
    with Calls() as calls:
        it = mix.prepare(x1, IDS)
        loss = mix.loss(pred, it, weight=0.5)
        assert launches == ["_interpolate_kernel", "_velocity_loss_kernel", "_reduce_kernel"]
        loss.backward()
    assert launches[3:] == ["_scale_gradient_kernel"]
    assert "mixflow_fast.interpolate.default" in calls.names
    syncs = ("_local_scalar_dense", "item", "nonzero", "equal", "_to_copy", "is_nonzero")
    assert not [name for name in calls.names if name.split(".")[1] in syncs], calls.names

    # A dispatch mode does not see inside of an operator.
    def read(*_: object) -> None:
        raise AssertionError("a value was read on the host")

    for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, read)
    mix.loss(pred, mix.prepare(x1, IDS), weight=0.5).backward()
    with pytest.raises(AssertionError, match="on the host"):
        float(loss)


def test_a_capture_needs_a_call_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that are kept must be made before a capture; the capture may read them."""
    x1 = data(3, 4, 6, 6)
    mix = MixFlow(clock=DATA_AT_1, seed=4242)
    refused = []

    def refuse(device: torch.device, what: str) -> None:
        refused.append(what)

    monkeypatch.setattr(draws, "_refuse_in_capture", refuse)
    mix.prepare(x1, IDS)
    assert refused == ["the seed"]
    mix.prepare(x1)
    assert refused[1:] == ["the counter of calls without ids"]
    mix.prepare(x1)
    mixflow_loss(lambda x, t: x, x1, clock=DATA_AT_1, seed=4242)
    mixflow_loss(lambda x, t: x, x1, clock=DATA_AT_1, seed=4242)
    assert len(refused) == 3  # mixflow_loss has a counter of its own
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="the seed must be on the device before"):
        draws._refuse_in_capture(torch.device("cuda"), "the seed")
    draws._refuse_in_capture(torch.device("cpu"), "the seed")


def test_a_gradient_of_one_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass over the gradient ends at once for 1; the interpreter can count its stores."""
    gradient = data(3, 70)
    before = gradient.clone()
    stores = []
    if runtime.interpreting():
        from triton.runtime.interpreter import InterpreterBuilder

        store = InterpreterBuilder.create_masked_store
        monkeypatch.setattr(
            InterpreterBuilder, "create_masked_store", lambda *a: (stores.append(1), store(*a))[1]
        )
    OPS.scale_gradient_(gradient, torch.ones((), device=DEVICE))
    assert torch.equal(gradient, before) and not stores
    OPS.scale_gradient_(gradient, torch.full((), 2.0, device=DEVICE))
    assert torch.equal(gradient, 2 * before) and len(stores) == 3 * runtime.interpreting()


def test_without_triton_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "triton", None)
    x1 = data(3, 4, 6, 6)
    MixFlow(clock=DATA_AT_1).prepare(x1, IDS)
    with pytest.raises(ValueError, match="Triton is not installed"):
        MixFlow(clock=DATA_AT_1, impl="triton").prepare(x1, IDS)


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_INTERPRETING", False)
    x1 = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        MixFlow(clock=DATA_AT_1, impl="triton").prepare(x1)
    assert MixFlow(clock=DATA_AT_1).prepare(x1).x.shape == (3, 4)


def test_a_first_launch_in_a_capture_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's error, which Triton passes on, as on a GPU that has not loaded the kernel."""

    class OnGpu:
        is_cuda, device = True, torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    error = "Triton Error [CUDA]: operation not permitted when stream is capturing"
    with pytest.raises(RuntimeError, match="once before the capture") as raised:
        with runtime.on_device(OnGpu()):
            raise RuntimeError(error)
    assert error in str(raised.value.__cause__)
    for other in (RuntimeError("an illegal memory access"), ValueError("capture")):
        with pytest.raises(type(other)) as raised, runtime.on_device(OnGpu()):
            raise other
        assert raised.value is other


def test_views_that_no_kernel_reads_well_are_copied() -> None:
    """Only where a copy of the sample would lie better, and as it is otherwise."""
    rows = data(4, 4, 6, 6, dtype=torch.bfloat16)
    flat = data(4 * 144 + 8, dtype=torch.bfloat16)
    for same in (rows, rows[1:], rows[2:3], rows[:1].expand(3, 4, 6, 6), flat[8:].view(4, 144)):
        assert runtime.with_unit_rows(same) is same
    apart = data(4, 145, dtype=torch.bfloat16)
    for bad in (flat[1:577].view(4, 144), apart[:, :144], apart[:, 1:], rows.transpose(1, 2)):
        copy = runtime.with_unit_rows(bad)
        assert torch.equal(copy, bad) and copy.is_contiguous() and copy.data_ptr() % 16 == 0
    odd = data(4, 145)[1:]
    assert runtime.with_unit_rows(odd) is odd
    # The stride of a batch of one may be anything.
    one = data(4, 6, 6, 1).permute(3, 0, 1, 2)
    assert one.stride(0) == 1 and runtime.row_stride(one) == 144
    assert runtime.with_unit_rows(one) is one


def test_programs_fill_a_device_once() -> None:
    """RAE's batch of 256 in one wave, all programs alike; one tile each where there are few."""
    assert one_wave(768 * 256, 256) == 24 and one_wave(4 * 1024, 256) == 1
    assert one_wave(768 * 256, 32) == 3 and one_wave(3 * 256 * 256, 64) == 6
    assert one_wave(768 * 256, 10_000) == 24 and one_wave(5, 1) == 1
    assert one_wave(1024 * 97, 400) == 19  # a prime: no even division
