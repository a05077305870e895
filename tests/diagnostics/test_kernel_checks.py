"""The checks of the kernels: red on what is wrong, whatever the cause."""

import dataclasses
import math

import pytest
import torch

from mixflow_fast.diagnostics import block_cases, kernel_cases, kernel_checks
from mixflow_fast.diagnostics.block_cases import BLOCK_OPS, BlockCase
from mixflow_fast.diagnostics.kernel_cases import ObjectiveCase, Setting
from mixflow_fast.diagnostics.kernel_checks import Finding, against_eager, guarded, relative_rms
from mixflow_fast.kernels import philox
from mixflow_fast.objective.mixflow import MixFlow
from tests.support.kernels import DEVICE

CPU = torch.device("cpu")
OBJECTIVE = ObjectiveCase(shape=(4, 4, 4, 4), dtype=torch.float32)
GELU = BlockCase(op="gelu", variant="bias", shape=(4, 8, 64))


class WrongObjective(MixFlow):
    """The reference, with an error put into it. `error` is set by the tests."""

    error = ""

    def __init__(self, *args, impl: str = "triton", **options) -> None:
        super().__init__(*args, impl="reference", **options)
        self.wrong = impl == "triton"
        self.calls = 0

    def prepare(self, x1, ids=None, **given):
        if not self.wrong:
            return super().prepare(x1, ids=ids, **given)
        self.calls += 1
        if self.error == "place in the batch":
            ids = torch.arange(len(x1), device=x1.device)
        it = super().prepare(x1, ids=ids, **given)
        x = it.x.clone()
        if self.error == "x":
            x[0].view(-1)[-1] *= 1.02
        if self.error == "another run" and self.calls == 2:
            x[-1].view(-1)[0] += 1
        if self.error == "unwritten":
            x[0].view(-1)[0] = torch.empty(1, dtype=x.dtype).nan_to_num()
            x[-1].view(-1)[-1] = torch.empty(1, dtype=x.dtype)[0]
        return dataclasses.replace(it, x=x)

    def loss(self, pred, it, **options):
        if not self.wrong:
            return super().loss(pred, it, **options)
        if self.error == "loss near data":
            off = 1 + 1e-5 * (it.t > 0.75).float()
            losses = super().loss(pred, it, **options)
            return losses * off if options["reduction"] == "none" else losses
        if self.error == "gradient":
            pred = pred * 1.01 - pred.detach() * 0.01
        if self.error == "sigma half":
            channels = it.data.shape[1]
            return super().loss(pred, it, **options) + 1e-6 * pred[:, channels:].sum()
        return super().loss(pred, it, **options)


class WrongGelu:
    """The reference with an error in its second call, or in all."""

    def __init__(self, error: str) -> None:
        self._error, self._calls = error, 0

    def __call__(self, x, bias, impl):
        self._calls += 1
        y = BLOCK_OPS["gelu"].reference(x, bias)
        if self._error == "value":
            y = y * 1.02
        if self._error == "another run" and self._calls == 2:
            y = y + 1
        if self._error == "unwritten":
            y = y + torch.empty((), dtype=y.dtype) * 0
        if self._error == "place in the batch":
            y = y * len(x)
        if self._error == "dtype":
            y = y.double()
        return y


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch):
    """Puts an error into what the checks call; the references stay right."""

    def put(error: str) -> None:
        monkeypatch.setattr(WrongObjective, "error", error)
        monkeypatch.setattr(kernel_cases, "MixFlow", WrongObjective)
        wrong = dataclasses.replace(BLOCK_OPS["gelu"], ours=WrongGelu(error))
        monkeypatch.setitem(block_cases.BLOCK_OPS, "gelu", wrong)

    return put


def failed(findings) -> list[Finding]:
    return [finding for finding in findings if not finding.passed]


def test_relative_rms() -> None:
    truth = torch.tensor([3.0, 4.0])
    assert relative_rms(truth + torch.tensor([0.0, 0.5]), truth) == pytest.approx(0.1)
    assert relative_rms(truth.bfloat16(), truth.double()) == 0
    assert relative_rms(torch.tensor([math.nan, 4.0]), truth) == math.inf
    assert relative_rms(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_rms(truth.expand(2, 2), truth) == math.inf
    assert relative_rms(torch.full((2,), 1e-20), torch.zeros(2)) > 1


def test_the_limit_is_twice_eager_and_a_floor() -> None:
    truth = torch.tensor([1.0, 1.0], dtype=torch.float64)
    eager = torch.tensor([1.25, 1.0])
    error, limit, eager_error = against_eager(torch.tensor([1.0, 1.5]), eager, truth)
    assert (error, eager_error) == pytest.approx((0.5 / 2**0.5, 0.25 / 2**0.5))
    assert limit == 2 * eager_error + 1e-6
    for wrong in (eager.double(), eager.view(1, 2), eager * math.nan):
        assert against_eager(wrong, eager, truth)[0] == math.inf
    assert against_eager(eager, eager * math.nan, truth)[1] == 1e-6
    assert not Finding("gelu", "errors", "out", "float32", math.nan, 1.0).passed


@pytest.mark.parametrize(
    ("error", "op", "tensor"),
    [
        ("x", "interpolate", "x"),
        ("loss near data", "velocity_loss", "losses, t in [0.75, 1)"),
        ("gradient", "velocity_loss", "dpred"),
        ("", "", ""),
    ],
)
def test_errors_are_red_on_a_wrong_objective(plant, error, op, tensor) -> None:
    plant(error)
    found = list(kernel_checks.errors(OBJECTIVE, CPU, "triton"))
    wrong = failed(found)
    assert {f.op for f in wrong} == ({op} if error else set())
    assert not error or tensor in {f.tensor for f in wrong}
    buckets = {f"losses, t in [{low:g}, {high:g})" for low, high in kernel_cases.BUCKETS}
    assert buckets < {finding.tensor for finding in found}


def test_the_sigma_half_has_no_gradient(plant) -> None:
    plant("sigma half")
    case = dataclasses.replace(OBJECTIVE, setting=Setting(sigma=True))
    assert "dpred, sigma half" in {
        f.tensor for f in failed(kernel_checks.errors(case, CPU, "triton"))
    }
    plant("")
    found = list(kernel_checks.errors(case, CPU, "triton"))
    assert not failed(found) and "dpred, sigma half" in {f.tensor for f in found}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_errors_are_red_on_a_wrong_block_kernel(plant, dtype) -> None:
    case = dataclasses.replace(GELU, dtype=dtype)
    assert not failed(kernel_checks.errors(case, DEVICE, "triton"))
    plant("value")
    found = failed(kernel_checks.errors(case, CPU, "triton"))
    assert {(f.op, f.tensor) for f in found} == {("gelu", n) for n in ("out", "dx", "dbias")}
    if dtype is not torch.float32:
        plant("dtype")
        wrong = next(iter(kernel_checks.errors(dataclasses.replace(case, mode="forward"), CPU, "")))
        assert wrong.error == math.inf


@pytest.mark.parametrize(
    ("error", "check"),
    [
        ("place in the batch", "alone and in"),
        ("another run", "two runs"),
        ("unwritten", "buffers full of NaN"),
        ("", ""),
    ],
)
@pytest.mark.parametrize(
    "case", [ObjectiveCase(shape=(3, 2, 2, 2), drawn=True), GELU], ids=["objective", "gelu"]
)
def test_bits_are_red_on_a_wrong_kernel(plant, case, error, check) -> None:
    plant(error)
    wrong = {f.check for f in failed(kernel_checks.same_bits(case, CPU, "triton"))}
    assert any(check in name for name in wrong) if error else not wrong
    # Torch is left as it was.
    assert not torch.are_deterministic_algorithms_enabled()


def test_draws_are_red_on_wrong_numbers(monkeypatch) -> None:
    assert not failed(kernel_checks.normals(CPU, "reference"))
    philox = kernel_checks.philox
    normal, words = philox.normal, philox.random_words
    monkeypatch.setattr(philox, "normal", lambda *args: normal(*args) * (1 + 1e-5))
    wrong = {f.tensor for f in failed(kernel_checks.normals(CPU, "reference"))}
    assert {"RMS error", "largest error"} <= wrong
    monkeypatch.setattr(philox, "normal", normal)
    monkeypatch.setattr(
        kernel_checks, "MixFlow", lambda **options: MixFlow(**(options | {"seed": 1}))
    )
    wrong = {(f.op, f.tensor) for f in failed(kernel_checks.normals(CPU, "reference"))}
    assert wrong == {
        ("interpolate", "x at the noise end"),
        ("normal", "x0()"),
        ("velocity_loss", "gradient of the loss"),
    }
    monkeypatch.setattr(philox, "random_words", lambda *args: words(*args) ^ (1 << 31))
    assert not any(finding.passed for finding in kernel_checks.words(CPU, "triton"))


def test_times_are_red_on_another_schedule(monkeypatch) -> None:
    assert not failed(kernel_checks.times(CPU, "reference"))

    def other(impl: str, **options) -> MixFlow:
        return MixFlow(**options | ({"seed": 1} if impl == "auto" else {}), impl=impl)

    monkeypatch.setattr(kernel_checks, "MixFlow", other)
    assert not any(finding.passed for finding in kernel_checks.times(CPU, "auto"))


def test_what_raises_is_a_failure_of_every_operator_that_it_is_about() -> None:
    def run():
        yield Finding("gelu", "fine", "x", "float32", 0.0, 0.0)
        raise RuntimeError("no such\nkernel")

    fine, *wrong = guarded(("gelu", "swiglu"), "both", "float32", run)
    assert fine.passed and [f.op for f in failed(wrong)] == ["gelu", "swiglu"]
    assert all(f.tensor == "raised RuntimeError: no such kernel" for f in wrong)


def test_draws_are_held_to_their_definition(monkeypatch) -> None:
    assert kernel_checks.check_draws().passed
    normal = philox.normal
    monkeypatch.setattr(philox, "normal", lambda *given: normal(*given) * (1 + 2**-23))
    assert not kernel_checks.check_draws().passed


def test_optimizer_is_held_to_foreach_calls(monkeypatch) -> None:
    whole = kernel_checks.AdamWEMA

    def make(parameters, lr, impl, **options):
        wrong = 1.001 if impl == "csrc" else 1.0
        return whole(parameters, lr=lr * wrong, impl="foreach", **options)

    monkeypatch.setattr(kernel_checks, "AdamWEMA", make)
    assert not kernel_checks.check_optimizer(CPU).passed
