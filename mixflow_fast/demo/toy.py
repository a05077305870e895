"""Mixed sources in the plane, where paths can be seen: 8 Gaussians or two moons from N(0, I).

A velocity of three layers, unconditional, is trained by `MixFlow` alone (rectified flow) or with a
source whose predictor is trained along (arXiv 2604.09181), and its exponential average is sampled
by Euler steps. Two numbers: how curved the paths are, and the sliced 2-Wasserstein distance of the
samples from fresh data. An arm takes some ten seconds of one core at 2,000 steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mixflow_fast.evaluation.curvature import path_curvature
from mixflow_fast.flow.source import MixedSource, mixed_moments
from mixflow_fast.objective import MixFlow
from mixflow_fast.sampling import time_grid
from mixflow_fast.sampling.solvers import Counted, states

ToyData = Literal["gaussians", "moons"]
TOY_DATA = get_args(ToyData)
MODES = 8
RADIUS = 2.0
SPREAD = 0.15
STEP_COUNTS = (1, 2, 4, 8, 128)


@dataclass(frozen=True)
class ToyArm:
    """How one network of the toy is trained.

    Attributes:
        name: as reports print it.
        kappa: what the source is conditioned on, "data" or "class"; None is rectified flow.
        w: weight of the source, "uniform" or a number; 1 is pure forward coupling.
        lam: weight of the KL per dimension.
        mode: "moments" or "samples".
        detach: no gradient of the velocity loss to the source.
    """

    name: str
    kappa: Literal["data", "class"] | None = None
    w: str | float = "uniform"
    lam: float = 0.3
    mode: Literal["moments", "samples"] = "moments"
    detach: bool = False


RECTIFIED_FLOW = ToyArm("rectified flow")
FORWARD_COUPLING = ToyArm("forward coupling", kappa="data", w=1.0)
MIXED = ToyArm("mixed", kappa="data")
DETACHED = ToyArm("mixed, detached", kappa="data", detach=True)


@dataclass(frozen=True)
class ToySettings:
    """Training and measurement, equal for all arms.

    Attributes:
        data: "gaussians" (8 on a circle) or "moons".
        steps, batch_size, lr, warmup: of the training, Adam with a cosine to zero.
        samples: drawn for every number.
        projections: of the sliced distance.
    """

    data: ToyData = "gaussians"
    steps: int = 2000
    batch_size: int = 384
    lr: float = 2e-3
    warmup: int = 100
    samples: int = 4000
    projections: int = 256


@dataclass(frozen=True)
class ToyModel:
    """A trained arm.

    Attributes:
        arm, settings, seed: what it was trained with.
        net: the exponential average of the velocity.
        source: as it was at the end, or None.
        mse: velocity loss, mean of the last tenth of the steps.
    """

    arm: ToyArm
    settings: ToySettings
    seed: int
    net: ToyVelocity
    source: MixedSource | None
    mse: float


@dataclass(frozen=True)
class ToyResult:
    """Numbers of a trained arm.

    Attributes:
        curvature: mean over paths of 128 Euler steps; 0 is straight at constant speed.
        sw: sliced 2-Wasserstein distance of samples from fresh data, by the number of Euler steps.
        mse: velocity loss at the end of training.
        sigma: mean standard deviation of the unmixed source; 1 without one.
        aggregate: sliced 2-Wasserstein distance of the noise ends of training from N(0, I).
    """

    curvature: float
    sw: dict[int, float]
    mse: float
    sigma: float
    aggregate: float


class ToyVelocity(nn.Module):
    """v(x, t) of the plane: three hidden layers on x, t and the sines and cosines of k pi t."""

    clock = "data_at_1"

    def __init__(self, width: int = 96, waves: int = 6) -> None:
        super().__init__()
        self.register_buffer("waves", math.pi * torch.arange(1, waves + 1))
        sizes = [3 + 2 * waves, width, width, width]
        self.layers = _layers(sizes, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, 2) velocities at the states x (B, 2) and times t (B,)."""
        angle = t[:, None] * self.waves
        return self.layers(torch.cat([x, t[:, None], angle.cos(), angle.sin()], dim=1))


class ToyPredictor(nn.Module):
    """Mean and log-variance (B, 4) of a point (B, 2) or of a class (B,) of `MODES`."""

    def __init__(self, kappa: Literal["data", "class"], width: int = 64) -> None:
        super().__init__()
        self.kappa = kappa
        self.layers = _layers([2 if kappa == "data" else MODES, width, width], 4)

    def forward(self, kappa: Tensor) -> Tensor:
        if self.kappa == "class":
            kappa = nn.functional.one_hot(kappa, MODES).to(self.layers[0].weight.dtype)
        return self.layers(kappa)


def _layers(sizes: list[int], out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], out))


def toy_data(data: ToyData, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """(n, 2) points and their (n,) classes: which Gaussian, or which moon."""
    noise = torch.randn(n, 2, generator=g)
    if data == "gaussians":
        y = torch.randint(MODES, (n,), generator=g)
        angle = y * (2 * math.pi / MODES)
        return RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1) + SPREAD * noise, y
    y = torch.randint(2, (n,), generator=g)
    angle = math.pi * torch.rand(n, generator=g)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
    # The lower moon is the upper one turned by half a circle.
    return 1.6 * torch.where(y[:, None] == 0, upper, -upper) + 0.08 * noise, y


def train_toy(arm: ToyArm, settings: ToySettings, seed: int) -> ToyModel:
    """Train one arm on one core; the same seed gives the same data and initial velocity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ToyVelocity()
        predictor = None if arm.kappa is None else ToyPredictor(arm.kappa)
    source = None
    parameters = list(net.parameters())
    if predictor is not None:
        source = MixedSource(predictor, arm.kappa, arm.mode, arm.w, lam=arm.lam, detach=arm.detach)
        parameters += predictor.parameters()
    mix = MixFlow(gamma=0, timesteps="uniform", clock=net.clock, source=source, seed=seed)
    optimizer = torch.optim.Adam(parameters, lr=settings.lr)
    ema = copy.deepcopy(net).requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    last: list[Tensor] = []
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _warm_cosine(step, settings)
        x1, y = toy_data(settings.data, settings.batch_size, g)
        ids = torch.arange(len(x1)) + step * len(x1)
        it = mix.prepare(x1, ids, y=y)
        loss, samples = mix.loss_and_samples(net(it.x, it.t), it)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        if step >= settings.steps - max(settings.steps // 10, 1):
            kl = 0 if it.source is None else it.source.kl_weight * it.source.kl.detach()
            last.append((samples - kl).mean())
    return ToyModel(arm, settings, seed, ema.eval(), source, torch.stack(last).mean().item())


def _warm_cosine(step: int, settings: ToySettings) -> float:
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    share = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * share))


def start_points(model: ToyModel, n: int, seed: int, w: float | None = None) -> Tensor:
    """(n, 2) noise ends to sample from.

    Args:
        model: of which the source is asked where `w` is given.
        seed: of the draws.
        w: None is N(0, I); a number mixes it with q(x0 | class) for classes drawn uniformly, which
            needs kappa="class".
    """
    g = torch.Generator().manual_seed(seed)
    eps = torch.randn(n, 2, generator=g)
    if w is None:
        return eps
    if model.source is None or model.source.needs_data:
        raise ValueError(
            f'w={w} needs a source with kappa="class", which is known when samples are drawn: the '
            f"arm is {model.arm.name!r}. Use w=None, N(0, I)"
        )
    y = torch.randint(MODES, (n,), generator=g)
    with torch.no_grad():
        mean, log_var = model.source.moments(eps.shape, y=y)
    mixed_mean, std = mixed_moments(mean, log_var, w)
    return mixed_mean + std * eps


@torch.no_grad()
def toy_paths(model: ToyModel, x0: Tensor, steps: int) -> Tensor:
    """(steps + 1, n, 2) states of Euler's method from x0 (n, 2)."""
    path = states(Counted(model.net), x0, time_grid(steps), "euler")
    return torch.stack([x0, *path])


def sliced_w2(a: Tensor, b: Tensor, projections: int, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of two point sets (n, d) of one size.

    The root of the mean over random directions of the squared distance in one dimension, which
    pairs sorted points. It is not zero for two draws of one distribution.
    """
    directions = torch.randn(a.shape[1], projections, generator=torch.Generator().manual_seed(seed))
    directions /= directions.norm(dim=0)
    gap = (a @ directions).sort(dim=0).values - (b @ directions).sort(dim=0).values
    return gap.square().mean().sqrt().item()


@torch.no_grad()
def measure_toy(
    model: ToyModel, w: float | None = None, step_counts: Iterable[int] = STEP_COUNTS
) -> ToyResult:
    """The numbers of a trained arm; draws depend on its seed alone, so arms share them.

    Args:
        w: as `start_points`.
        step_counts: of the sampler, for the distances.
    """
    settings, n = model.settings, model.settings.samples
    x0 = start_points(model, n, 10_000 + model.seed, w)
    g = torch.Generator().manual_seed(20_000 + model.seed)
    real, y = toy_data(settings.data, n, g)
    curvature, _ = path_curvature(model.net, x0)
    ends = {steps: toy_paths(model, x0, steps)[-1] for steps in step_counts}
    sigma, aggregate = 1.0, torch.randn(n, 2, generator=g)
    if model.source is not None:
        mix = MixFlow(gamma=0, timesteps="uniform", clock="data_at_1", source=model.source)
        it = mix.prepare(real, torch.arange(n), y=y)
        sigma, aggregate = torch.exp(it.source.log_var / 2).mean().item(), it.x0()
    standard = torch.randn(n, 2, generator=g)
    return ToyResult(
        curvature=curvature.mean().item(),
        sw={steps: sliced_w2(end, real, settings.projections) for steps, end in ends.items()},
        mse=model.mse,
        sigma=sigma,
        aggregate=sliced_w2(aggregate, standard, settings.projections),
    )
