"""Mixed sources against tensors of the official code (NazirNayal8/MixFlow), draws as recorded."""

import pytest
import torch
from torch import Tensor

from mixflow_fast import MixFlow
from mixflow_fast.flow.source import MixedSource
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.models.source_predictor import SourceUNet
from mixflow_fast.objective import Interpolation
from tests.support.golden import load
from tests.support.kernels import relative_rms
from tests.support.recorded_draws import use_recorded, words_of

MODES = {"D": "moments", "S": "samples"}
KAPPAS = {
    "sample_only": "data",
    "noise_only": "noise",
    "sample_and_noise": "data+noise",
    "class": "class",
}
LIMITS = {torch.float32: 2e-6, torch.float64: 1e-14}


def net(x: Tensor, t: Tensor) -> Tensor:
    """The files' toy velocity."""
    return torch.tanh(0.7 * x) + 0.3 * t.view(-1, 1, 1, 1)


def run(
    golden: dict[str, Tensor],
    source: MixedSource,
    t: Tensor,
    dtype: torch.dtype,
    clock: str = "data_at_1",
) -> tuple[Interpolation, Tensor, Tensor]:
    """(it, losses, velocity) of prepare, toy network and loss at the recorded times."""
    mix = MixFlow(gamma=0, timesteps="uniform", clock=clock, source=source, impl="reference")
    t = t.to(dtype)
    own = t if clock == "data_at_1" else 1 - t
    y = golden.get("label")
    it = mix.prepare(golden["x1"].to(dtype), torch.arange(len(t)), t=own, slowed_t=own, y=y)
    v = net(it.x, t)
    return it, mix.loss(v if clock == "data_at_1" else -v, it, reduction="none"), v


def leaves(golden: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The recorded mean and log-variance, which take the gradients."""
    suffix = ".f64" if dtype == torch.float64 and "mean.f64" in golden else ""
    mean, log_var = (golden[name + suffix].to(dtype) for name in ("mean", "log_var"))
    return mean.requires_grad_(), log_var.requires_grad_()


def assert_close(ours: Tensor, golden: dict[str, Tensor], name: str) -> None:
    dtype = ours.dtype
    expected = golden[name + (".f64" if dtype == torch.float64 else "")]
    error = relative_rms(ours.detach(), expected.to(dtype))
    assert error < LIMITS[dtype], (name, error)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("clock", ["data_at_1", "noise_at_1"])
@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_mixing(monkeypatch, mode: str, block: bool, clock: str, dtype: torch.dtype) -> None:
    golden, config = load(f"mixed_mix_{mode}")
    use_recorded(
        monkeypatch,
        {
            Stream.SOURCE_WEIGHT: golden["w"],
            Stream.NOISE: golden["eps2"],
            **({Stream.SOURCE_NOISE: golden["eps1"]} if mode == "S" else {}),
        },
    )
    mean, log_var = leaves(golden, dtype)
    source = MixedSource(
        lambda x1: (mean, log_var), mode=MODES[mode], beta=config["beta"], detach=block
    )
    it, losses, v = run(golden, source, golden["t"], dtype, clock)
    losses.mean().backward()
    for name, ours in (("x0", it.x0()), ("x_t", it.x), ("v", v), ("kl", it.source.kl)):
        assert_close(ours, golden, name)
    assert_close(it.x1 - it.x0(), golden, "target")
    kl_part = config["beta"] * it.source.kl
    assert_close((losses - kl_part).mean(), golden, "mse")
    assert_close(it.source.kl.mean(), golden, "kl_mean")
    assert_close(losses.mean(), golden, "loss")
    prefix = "block." if block else ""
    assert_close(mean.grad, golden, f"{prefix}grad_mean")
    assert_close(log_var.grad, golden, f"{prefix}grad_log_var")


# The other cases are recorded in float32 only.
TRAIN = [
    (kappa, case, dtype)
    for kappa in KAPPAS
    for dtype in LIMITS
    for case in ("D", "S", "FC", "FC as S")
]
TRAIN += [(kappa, "D_block", torch.float32) for kappa in KAPPAS]
TRAIN += [
    ("sample_only", case, torch.float32)
    for case in ("S_block", "D_discrete", "S_discrete", "D_teps")
]


def recorded_draws(
    golden: dict[str, Tensor], case: str, values: int
) -> tuple[dict[Stream, Tensor], str, str | float]:
    """(draws by stream, mode, w) of a case; `values` is n of discrete weights."""
    # Without mixing the official code keeps the predictor's own draw; w = 1 is that.
    fc = case.startswith("FC")
    mode = "samples" if case[0] == "S" or case == "FC as S" else "moments"
    draws = {Stream.NOISE: golden["eps1" if fc else "eps2"]}
    if mode == "samples":
        draws[Stream.SOURCE_NOISE] = golden["eps1"]
    if "z" in golden:
        draws[Stream.SOURCE_SIGNAL] = golden["z"]
    if fc:
        return draws, mode, 1
    if "discrete" in case:
        draws[Stream.SOURCE_WEIGHT] = words_of(golden["k"], values)
        return draws, mode, f"discrete({values})"
    draws[Stream.SOURCE_WEIGHT] = golden["w"]
    return draws, mode, "uniform"


@pytest.mark.parametrize(("kappa", "case", "dtype"), TRAIN)
def test_training_step(monkeypatch, kappa: str, case: str, dtype: torch.dtype) -> None:
    golden, config = load(f"mixed_train_{kappa}")
    official = case.removesuffix(" as S")
    draws, mode, w = recorded_draws(golden, case, config["num_w_values"])
    drawn = use_recorded(monkeypatch, draws)
    mean, log_var = leaves(golden, dtype)
    seen = []

    def predictor(kappa: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(kappa)
        return mean, log_var

    source = MixedSource(
        predictor,
        kappa=KAPPAS[kappa],
        mode=mode,
        w=w,
        beta=config["beta"],
        detach=case.endswith("_block"),
    )
    t = golden["D_teps.t_used"] if case == "D_teps" else golden["t"]
    it, losses, _ = run(golden, source, t, dtype)
    losses.mean().backward()

    x1, z = golden["x1"], golden.get("z")
    shown = {"sample_only": [x1], "noise_only": [z], "sample_and_noise": [x1, z]}
    expected = torch.cat(shown[kappa], dim=1).to(dtype) if kappa in shown else golden["label"]
    assert torch.equal(seen[0], expected) and len(seen) == 1
    assert sorted(drawn) == sorted(draws), "a draw that is not used, or is made twice"

    assert_close(it.source.kl, golden, "kl")
    assert_close(it.x0(), golden, f"{official}.x0")
    assert_close(it.x, golden, f"{official}.x_t")
    assert_close((losses - config["beta"] * it.source.kl).mean(), golden, f"{official}.mse")
    assert_close(it.source.kl.mean(), golden, f"{official}.kl_mean")
    assert_close(losses.mean(), golden, f"{official}.loss")
    assert_close(mean.grad, golden, f"{official}.grad_mean")
    assert_close(log_var.grad, golden, f"{official}.grad_log_var")


@pytest.mark.parametrize("case", ["D", "S", "D_block", "FC"])
@pytest.mark.parametrize("kappa", KAPPAS)
def test_training_step_with_the_official_predictor(monkeypatch, kappa: str, case: str) -> None:
    """From kappa to the gradients of the predictor's own parameters, and back to nothing else."""
    golden, config = load(f"mixed_train_{kappa}")
    predictor = config["predictor"]
    classes = {"num_classes": 5, "size": 8} if kappa == "class" else {}
    unet = SourceUNet(
        3,
        in_channels=predictor["in_channels"],
        widths=predictor["block_out_channels"],
        layers=predictor["layers_per_block"],
        **classes,
    )
    prefix = "state.network."
    unet.load_state_dict({k.removeprefix(prefix): v for k, v in golden.items() if prefix in k})
    draws, mode, w = recorded_draws(golden, case, config["num_w_values"])
    use_recorded(monkeypatch, draws)
    source = MixedSource(
        unet,
        kappa=KAPPAS[kappa],
        mode=mode,
        w=w,
        beta=config["beta"],
        detach=case == "D_block",
    )
    it, losses, _ = run(golden, source, golden["t"], torch.float32)
    losses.mean().backward()
    assert relative_rms(it.x.detach(), golden[f"{case}.x_t"]) < 1e-5
    assert relative_rms(losses.mean().detach(), golden[f"{case}.loss"]) < 1e-5
    # Some vanish analytically: each against the largest of all.
    truth = {k: v for k, v in golden.items() if k.startswith(f"{case}.grad.network.")}
    top = max(float(gradient.abs().max()) for gradient in truth.values())
    ours = {f"{case}.grad.network.{name}": p.grad for name, p in unet.named_parameters()}
    compared = [name for name in truth if name in ours]
    assert len(compared) == len(truth) > 40
    for name in compared:
        assert float((ours[name] - truth[name]).abs().max()) < 1e-5 * top, name
    for name, norm in config["grad_norms"][case].items():
        gradient = ours[f"{case}.grad.{name}"]
        assert abs(float(gradient.norm()) - norm) < 1e-5 * max(config["grad_norms"][case].values())
