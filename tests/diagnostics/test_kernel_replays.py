"""CUDA graphs and torch.compile of the operators: red on wrong numbers."""

import pytest
import torch

from mixflow_fast.diagnostics import kernel_replays
from mixflow_fast.optim import adamw_ema
from tests.support.kernels import DEVICE

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("replays", "count"),
    [(kernel_replays.objective_replays, 9), (kernel_replays.block_replays, 6)],
)
def test_replays_are_red_when_nothing_is_computed_anew(monkeypatch, replays, count) -> None:
    found = list(replays(CPU, "reference"))
    assert len(found) == count and all(finding.passed for finding in found)
    monkeypatch.setattr(kernel_replays, "capture", lambda step, device: (step(), lambda: None))
    assert not any(finding.passed for finding in replays(CPU, "reference"))


@pytest.mark.parametrize("impl", ["auto", "foreach"])
def test_replays_of_the_optimizer_are_red_without_their_constants(monkeypatch, impl) -> None:
    found = list(kernel_replays.optimizer_replays(DEVICE, impl))
    assert len(found) == 5 and all(finding.passed for finding in found)
    monkeypatch.setattr(adamw_ema, "send_constants", lambda call: None)
    found = {f.tensor: f for f in kernel_replays.optimizer_replays(CPU, impl)}
    # The moments' weights are constants of the operator alone.
    moments = {"exp_avg", "exp_avg_sq"} if impl == "foreach" else set()
    assert {name for name, finding in found.items() if finding.passed} == moments


@pytest.mark.parametrize(
    ("compiled", "device", "impl", "count"),
    [
        (kernel_replays.objective_compiled, DEVICE, "triton", 6),
        (kernel_replays.block_compiled, CPU, "reference", 18),
    ],
)
def test_compiled_steps_are_red_on_wrong_numbers(
    monkeypatch, compiled, device, impl, count
) -> None:
    found = list(compiled(device, impl, backend="eager"))
    assert len(found) == count and all(finding.passed for finding in found)
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda *a, **k: 1.01 * f(*a, **k))
    assert not any(finding.passed for finding in compiled(CPU, "reference"))
