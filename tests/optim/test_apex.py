"""`ApexAdamWEMA` on a stand-in for FusedAdam, and on NVIDIA's where there is apex and a GPU."""

import copy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mixflow_fast.config.loading import load_config
from mixflow_fast.config.validate import validate
from mixflow_fast.environment import detect_apex
from mixflow_fast.optim.adamw_ema import AdamWEMA
from mixflow_fast.optim.apex import OPTIMIZERS, ApexAdamWEMA
from mixflow_fast.training import trainer
from tests.support.optimizers import (
    SETTINGS,
    STATE,
    assert_same_state,
    check_against_torch,
    gradients,
    parameters,
    run_both,
    two_groups,
)
from tests.support.train_ranks import TINY

HAS_APEX = detect_apex() == "nvidia" and torch.cuda.is_available()


def without_apex(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Forgets the modules of any `apex` and puts `folder` first on the path."""
    for name in [m for m in sys.modules if m.partition(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder)


def remove_apex() -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == "apex"]:
        del sys.modules[name]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type]:
    """A package `apex` with the stand-in where NVIDIA's has FusedAdam; yields that class."""
    folder = tmp_path / "site" / "apex" / "optimizers"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").write_text("from apex.optimizers.fused_adam import FusedAdam\n")
    shutil.copy(
        Path(__file__).parents[1] / "support" / "apex_stand_in.py", folder / "fused_adam.py"
    )
    without_apex(monkeypatch, tmp_path / "site")
    assert detect_apex() == "nvidia"
    from apex.optimizers import FusedAdam

    yield FusedAdam
    remove_apex()


@pytest.fixture(
    params=[
        "stand-in",
        pytest.param("nvidia", marks=pytest.mark.skipif(not HAS_APEX, reason="no NVIDIA apex")),
    ]
)
def apex_device(request: pytest.FixtureRequest) -> str:
    """Where `ApexAdamWEMA` runs here: on a stand-in, or on NVIDIA's apex."""
    if request.param == "nvidia":
        return "cuda"
    request.getfixturevalue("stand_in")
    return "cpu"


@SETTINGS
def test_matches_torch_adamw(apex_device: str, weight_decay: float, clip: float) -> None:
    check_against_torch(ApexAdamWEMA, apex_device, weight_decay, clip)


def test_counts_the_steps_of_each_parameter(apex_device: str) -> None:
    """Groups with other settings; parameters miss steps, and one is first used in the third."""
    ours, theirs = parameters(device=apex_device), parameters(device=apex_device)
    a = ApexAdamWEMA(two_groups(ours), lr=0.01, grad_clip=1.0)
    b = AdamWEMA(two_groups(theirs), lr=0.01, grad_clip=1.0)
    run_both(a, b, range(8), lambda step: {0: (1, 2), 1: (1,), 4: (0,), 6: (0, 1, 2)}.get(step, ()))
    assert [a.state[p]["step"] for p in ours] == [6, 5, 6]
    assert_same_state(a, b)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_follows_replaced_parameters(stand_in: type) -> None:
    """As ZeRO does: other tensors than at the start, one of a group after another (ZeRO 3)."""
    ours, theirs, old = parameters(), parameters(), parameters(seed=9)
    a, b = ApexAdamWEMA(old, lr=0.01), AdamWEMA(theirs, lr=0.01)
    before = [p.detach().clone() for p in old]
    stand_in.launches = 0
    for step in range(4):
        for p, q, grad in zip(ours, theirs, gradients(step), strict=True):
            p.grad, q.grad = grad.clone(), grad.clone()
        for p in ours:
            a.param_groups[0]["params"] = [p]
            a.step()
            a.param_groups[0]["params"] = []
        b.step()
    assert stand_in.launches == 12
    a.param_groups[0]["params"] = ours
    assert_same_state(a, b)
    a.step()  # all at once from here on
    b.step()
    assert stand_in.launches == 13
    assert_same_state(a, b)
    assert all(torch.equal(p, q) for p, q in zip(old, before, strict=True))
    a.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in ours)


@pytest.mark.parametrize("apex_first", [True, False])
def test_either_optimizer_goes_on_from_the_other(apex_device: str, apex_first: bool) -> None:
    kinds = (ApexAdamWEMA, AdamWEMA) if apex_first else (AdamWEMA, ApexAdamWEMA)
    ours, theirs = parameters(device=apex_device), parameters(device=apex_device)
    first, reference = (kinds[0](params, lr=0.01) for params in (ours, theirs))
    run_both(first, reference, range(3), lambda step: ())
    second = kinds[1](ours, lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run_both(second, reference, range(3, 6), lambda step: ())
    assert second.state[ours[0]]["step"] == 6
    assert_same_state(second, reference)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_twice_the_same_bits(apex_device: str) -> None:
    ours, theirs = parameters(device=apex_device), parameters(device=apex_device)
    a, b = (ApexAdamWEMA(two_groups(p), lr=0.01, grad_clip=0.5) for p in (ours, theirs))
    run_both(a, b, range(5), lambda step: (step % 3,))
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(a.state[p][key], b.state[q][key]) for key in STATE[1:])


@pytest.mark.parametrize("case", ["bfloat16", "layout of the weight", "layout of the gradient"])
def test_refuses_what_its_kernel_would_misread(stand_in: type, case: str) -> None:
    weight = torch.ones(4, 6, dtype=torch.bfloat16 if case == "bfloat16" else torch.float32)
    p = torch.nn.Parameter(weight.t() if "weight" in case else weight)
    optimizer = ApexAdamWEMA([p], lr=0.01)
    p.grad = torch.ones(6, 4).t() if "gradient" in case else torch.ones_like(p)
    what = "gradients" if "gradient" in case else "parameters"
    with pytest.raises(ValueError, match=f"{what} must be contiguous float32 .*adamw_ema"):
        optimizer.step()


def test_has_to_be_nvidias(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither none nor PyPI's `apex` will do, and the latter is not imported to find out."""
    config = load_config("photos", ["optim.name=apex_fused_adam"])
    (tmp_path / "apex").mkdir()
    without_apex(monkeypatch, tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="apex is not installed: it is optional"):
        ApexAdamWEMA(parameters())
    (tmp_path / "apex" / "__init__.py").write_text("raise AssertionError('imported')")
    with pytest.raises(ValueError, match="Pyramid .* pip uninstall apex"):
        ApexAdamWEMA(parameters())
    with pytest.raises(ValueError, match=r"optim.name=apex_fused_adam needs .* Pyramid"):
        validate(config)
    assert "apex" not in sys.modules


@pytest.mark.parametrize("error", ["RuntimeError", "ImportError"])
def test_without_its_kernels(stand_in: type, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise {"RuntimeError": RuntimeError, "ImportError": ImportError}[error]("no amp_C")

    monkeypatch.setattr(stand_in, "__init__", refuse)
    with pytest.raises(ValueError, match=r"does not start \(no amp_C\): build apex with its CUDA"):
        ApexAdamWEMA(parameters())


def test_configuration_names_every_optimizer(
    stand_in: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["optim.name=apex_fused_adam"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU, got train.device=auto and torch sees none"):
        validate(load_config("photos", given))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="needs a GPU, got train.device=cpu: set optim.name="):
        validate(load_config("photos", [*given, "train.device=cpu"]))
    for name in OPTIMIZERS:
        validate(load_config("photos", [f"optim.name={name}"]))


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 2), ("fp32", 3)])
def test_inside_deepspeed(
    stand_in: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str, stage: int
) -> None:
    """Whole runs: as with `AdamWEMA`, resumed to the same bits, refused under the other name."""
    monkeypatch.setattr(trainer, "validate", lambda config, ranks: None)  # it wants a GPU
    common = [*TINY, f"train.precision={precision}", f"train.zero_stage={stage}"]
    common += [
        "train.device=cpu",
        "optim.lr=0.001",
        "optim.grad_clip=0.5",
        "optim.ema_decays=[0.9]",
    ]

    def weights(out: str, name: str, images: int = 32) -> dict[str, dict[str, torch.Tensor]]:
        given = [*common, f"optim.name={name}", f"train.images={images}", f"out={tmp_path / out}"]
        result = trainer.train(load_config("photos", given), quiet=True)
        return torch.load(result.weights, weights_only=True)

    stand_in.launches = 0
    whole = weights("whole", "apex_fused_adam")
    assert stand_in.launches >= 4
    weights("parts", "apex_fused_adam", images=16)
    parts, plain = weights("parts", "apex_fused_adam"), weights("plain", "adamw_ema")
    for kind in ("model", "ema"):
        assert whole[kind].keys() == plain[kind].keys()
        for name, w in whole[kind].items():
            assert torch.equal(w, parts[kind][name]), name
            torch.testing.assert_close(w, plain[kind][name], rtol=1e-4, atol=2e-5)
    assert any(not torch.equal(w, whole["ema"][name]) for name, w in whole["model"].items())
    with pytest.raises(ValueError, match="optim.name: 'apex_fused_adam' -> 'adamw_ema'"):
        weights("parts", "adamw_ema", images=40)
