"""How slow a network's flow is: the states of an N-step sampler against the true path.

The states of `Settings.states` samples are taken along coarse solves and along one fine solve from
the same noise, and the four estimators of `slowed_times.py` say which time of the true path they
are like. What an estimator says of true states is measured beside it (its null), and taken out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from mixflow_fast.data import sample_index
from mixflow_fast.evaluation.examples import Examples
from mixflow_fast.evaluation.frechet import moments
from mixflow_fast.evaluation.slowed_times import (
    STEP,
    LinearFeatures,
    Marginal,
    MarginalTime,
    NoiseLevel,
    coefficients,
    dct,
    effective_time,
    pair_time,
    projection,
)
from mixflow_fast.flow.path import get_path
from mixflow_fast.kernels.philox import Stream, normal
from mixflow_fast.metrics.progress import Progress
from mixflow_fast.sampling import integrate, time_grid
from mixflow_fast.sampling.guidance import Network, model_velocity
from mixflow_fast.sampling.solvers import Velocity

METHODS = ("euler", "heun")
# Where the marginal estimator and the noise level are taken: the sampler's nearest times.
TIMES = (0.4, 0.6, 0.8, 1.0)
STATES_PER_FEATURE = 5
_KEPT = 50  # points of the fine trajectory that are kept, about
NULLS = 4  # draws of true states
# True times at which the noise level is calibrated, and states of each at most.
_CALIBRATED = tuple(place / 10 for place in range(1, 11))
_CALIBRATION_STATES = 500
LAG_FROM = 0.2  # before it, next to nothing is divided by next to nothing


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        steps: numbers of intervals of the coarse solves.
        states: samples, each with its own noise and its own pair (data, label).
        method: "euler" or "heun", of the coarse solves.
        shift: of the grids, as `time_grid`.
        seed: of the noise.
        fine: intervals of the fine solve (Heun); None: max(50, 4 max(steps)).
        path: the path that the network was trained on.
        batch_size: states in one forward pass.
    """

    steps: tuple[int, ...] = (5, 10, 20, 50)
    states: int = 2000
    method: str = "euler"
    shift: float = 1.0
    seed: int = 0
    fine: int | None = None
    path: str = "linear"
    batch_size: int = 250

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1 or len(set(self.steps)) != len(self.steps):
            raise ValueError(f"steps must be different integers >= 1, got {list(self.steps)}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.states < 100:
            raise ValueError(f"states must be >= 100 for distributions, got {self.states}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")
        if self.fine is not None and self.fine < max(self.steps):
            raise ValueError(
                f"fine must be at least the most steps, {max(self.steps)}, got {self.fine}"
            )
        get_path(self.path)

    @property
    def fine_steps(self) -> int:
        """Intervals of the fine solve."""
        return max(50, 4 * max(self.steps)) if self.fine is None else self.fine

    @property
    def evaluations(self) -> int:
        """Velocities that one state takes."""
        return 2 * self.fine_steps + sum(self.steps) * METHODS.index(self.method) + sum(self.steps)


@dataclass(frozen=True)
class Band:
    """5%, 50% and 95% of the states at each time."""

    t: list[float]
    low: list[float]
    median: list[float]
    high: list[float]


@dataclass(frozen=True)
class MarginalPoint:
    """E3 at one time.

    Attributes:
        t: the time of the sampler.
        estimate: of its states.
        null: what the same estimator says of as many true states at m, divided by m.
        null_se: standard error of that.
    """

    t: float
    estimate: Marginal
    null: float
    null_se: float

    @property
    def ratio(self) -> float:
        """m / t over its null: 1 where the states are as true ones."""
        return self.estimate.m / (self.t * self.null)

    @property
    def influence(self) -> Tensor:
        """(n,) of the ratio, the null taken as given."""
        return self.estimate.influence / (self.t * self.null)

    @property
    def se(self) -> float:
        """Standard error of the ratio, the null's included."""
        own = self.estimate.se / (self.t * self.null)
        return math.hypot(own, self.ratio * self.null_se / self.null)

    @property
    def overshoots(self) -> bool:
        """Whether the states have clearly more signal than true ones: beyond 2 SE and half a %."""
        return self.ratio - 1 > max(2 * self.se, 0.005)

    def to_record(self) -> dict[str, float | bool | None]:
        """Plain numbers for a JSON file; an error that is not known is None."""
        return {
            "t": self.t,
            "m": self.estimate.m,
            "null": self.null,
            "ratio": self.ratio,
            "se": self.se if math.isfinite(self.se) else None,
            "overshoots": self.overshoots,
        }


@dataclass(frozen=True)
class StepFlow:
    """What was found of one number of steps.

    Attributes:
        steps: intervals.
        pair: E1 at every time of the grid.
        endpoint: E2, the effective time, at every time of the grid.
        lag: E2 per state, 1 - effective time / t at its worst t >= LAG_FROM: median and 95%.
        marginal: E3 at the times near TIMES.
        fine: the same of the fine solve, at its times nearest to those.
        noise: E4 at those times, calibrated on true states.
    """

    steps: int
    pair: Band
    endpoint: Band
    lag: tuple[float, float]
    marginal: tuple[MarginalPoint, ...]
    fine: tuple[MarginalPoint, ...]
    noise: Band

    @property
    def overshoot(self) -> list[MarginalPoint]:
        """Where the states have more signal than true ones."""
        return [point for point in self.marginal if point.overshoots]

    def to_record(self) -> dict[str, object]:
        """Plain numbers for a JSON file."""
        return {
            "steps": self.steps,
            "pair": asdict(self.pair),
            "endpoint": asdict(self.endpoint),
            "lag": {"median": self.lag[0], "high": self.lag[1]},
            "marginal": [point.to_record() for point in self.marginal],
            "fine": [point.to_record() for point in self.fine],
            "noise": asdict(self.noise),
            "deficit": deficit(self.marginal)[0],
            "fine_deficit": deficit(self.fine)[0],
        }


@dataclass(frozen=True)
class SlowFlow:
    """The slow flow of one network.

    Attributes:
        settings: how it was measured.
        by_steps: what was found, by number of steps.
        features: of the marginal estimator.
        description: of the examples.
        examples: how many of them gave mean and covariance.
    """

    settings: Settings
    by_steps: Mapping[int, StepFlow]
    features: int
    description: str
    examples: int

    def to_record(self) -> dict[str, object]:
        """Plain numbers for a JSON file."""
        return {
            "settings": asdict(self.settings) | {"fine": self.settings.fine_steps},
            "features": self.features,
            "examples": self.examples,
            "data": self.description,
            "steps": [flow.to_record() for flow in self.by_steps.values()],
        }


def deficit(points: Sequence[MarginalPoint]) -> tuple[float, Tensor]:
    """delta, the mean of 1 - m/t over the points, and its influences (n,)."""
    value = 1 - sum(point.ratio for point in points) / len(points)
    return value, -torch.stack([point.influence for point in points]).mean(dim=0)


def slow_flow(
    model: Network, data: Examples, settings: Settings | None = None, progress: bool = False
) -> SlowFlow:
    """Measure the slow flow of a network, without guidance.

    Args:
        model: as in `model_velocity`, in evaluation mode.
        data: real examples: partners of the pairs, and what the path's true states are made of.
        settings: what is measured; None: `Settings()`.
        progress: say on stderr how far it is.

    Raises:
        ValueError: a network in training mode, states that are not finite, and what the functions
            behind it refuse.
    """
    settings = settings or Settings()
    if isinstance(model, nn.Module) and model.training:
        raise ValueError("model must be in evaluation mode: call model.eval() first")
    run = _Measurement(data, settings)
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    device = torch.device("cpu") if first is None else first.device
    total = settings.states * settings.evaluations
    with (
        torch.inference_mode(),
        Progress(total, "slow flow", "velocities", quiet=not progress) as counted,
    ):
        for places in torch.arange(settings.states).split(settings.batch_size):
            run.add(model, places, device)
            counted.advance(len(places) * settings.evaluations)
    return run.result()


def _states(
    velocity: Velocity, x: Tensor, grid: Tensor, method: str
) -> Iterator[tuple[float, Tensor]]:
    """(time, state) after every interval of a one-step method."""
    for place in range(len(grid) - 1):
        x, _ = integrate(velocity, x, grid[place : place + 2], method)
        yield float(grid[place + 1]), x


def _nearest(grid: Tensor, times: Sequence[float]) -> list[int]:
    """Places of the grid that are nearest to the times, each once, without the noise end."""
    return sorted({1 + int((grid[1:] - time).abs().argmin()) for time in times})


class _Measurement:
    """Collects the states batch by batch; images are not kept."""

    def __init__(self, data: Examples, settings: Settings) -> None:
        self._data, self._s = data, settings
        self._features = LinearFeatures(data.x.shape[1:], settings.states // STATES_PER_FEATURE)
        features = self._features(data.x)
        mean, cov = moments(features)
        self._marginal = MarginalTime(mean, cov, self._features.noise_variance, settings.path)
        self._noise = NoiseLevel(*_dct_moments(data.x), settings.path)
        self._pairs = data.spread(settings.states)
        self._coarse = {n: time_grid(n, settings.shift) for n in settings.steps}
        self._fine = time_grid(settings.fine_steps, settings.shift)
        self._wanted = {n: _nearest(grid, TIMES) for n, grid in self._coarse.items()}
        times = sorted({float(self._coarse[n][p]) for n, ps in self._wanted.items() for p in ps})
        self._fine_place = {time: _nearest(self._fine, [time])[0] for time in times}
        self._nulls: list[tuple[Tensor, Tensor]] = []
        self._calibration: Tensor | None = None
        # By (number of steps, place of the grid); the fine solve under 0.
        self._found: dict[str, dict[tuple[int, int], list[Tensor]]] = {
            name: {} for name in ("pair", "endpoint", "features", "noise")
        }
        self._lag: dict[int, list[Tensor]] = {n: [] for n in settings.steps}

    def _keep(self, name: str, key: tuple[int, int], value: Tensor) -> None:
        self._found[name].setdefault(key, []).append(value.cpu())

    def _all(self, name: str, key: tuple[int, int]) -> Tensor:
        return torch.cat(self._found[name][key])

    def add(self, model: Network, places: Tensor, device: torch.device) -> None:
        """Solve for the states with these numbers."""
        pairs = self._pairs[places]
        x1 = self._data.x[pairs].to(device)
        y = None if self._data.y is None else self._data.y[pairs].to(device)
        noise = normal(self._s.seed, Stream.SAMPLE_NOISE, places.to(device), x1[0].numel())
        x0 = noise.view(x1.shape)
        velocity = model_velocity(model, y)
        every = max(1, len(self._fine) // _KEPT)
        wanted = set(self._fine_place.values())
        kept, kept_times, end = [x0], [0.0], x0
        for place, (time, x) in enumerate(_states(velocity, x0, self._fine, "heun"), 1):
            end = x
            if place % every == 0 or place == len(self._fine) - 1:
                kept.append(x)
                kept_times.append(time)
            if place in wanted:
                self._keep("features", (0, place), self._features(x))
        if not torch.isfinite(end).all():
            raise ValueError(
                "the fine solve gave values that are not finite: check the clock and the weights"
            )
        reached = torch.stack([projection(x, x0, end) for x in kept], dim=1)
        for steps, grid in self._coarse.items():
            worst = torch.zeros(len(places), dtype=torch.float64, device=device)
            for place, (time, x) in enumerate(_states(velocity, x0, grid, self._s.method), 1):
                self._keep("pair", (steps, place), pair_time(x, x1, x0, self._s.path))
                far = projection(x, x0, end)
                when = effective_time(reached, torch.tensor(kept_times), far, time)
                self._keep("endpoint", (steps, place), when)
                if time >= LAG_FROM:
                    worst = torch.maximum(worst, 1 - when / time)
                if place in self._wanted[steps]:
                    self._keep("features", (steps, place), self._features(x))
                    self._keep("noise", (steps, place), self._noise(x))
            self._lag[steps].append(worst.cpu())

    def _true_pairs(self, draw: int, count: int) -> tuple[Tensor, Tensor]:
        """Random examples, and other noise than any sampler's."""
        number = torch.arange(count)
        x1 = self._data.x[sample_index(number, len(self._data.x), seed=draw)]
        ids = draw * self._s.states + number
        x0 = normal(self._s.seed, Stream.VALIDATION_NOISE, ids, x1[0].numel())
        return x1, x0.view(x1.shape)

    def _null(self, m: float) -> tuple[float, float]:
        """E3 of true states at m, divided by m; standard error of that."""
        if not self._nulls:
            # Features are linear: those of the ends are enough for every time.
            for draw in range(NULLS):
                ends = self._true_pairs(draw, self._s.states)
                self._nulls.append((self._features(ends[0]), self._features(ends[1])))
        alpha, sigma = self._mix(m)
        ratios = [
            self._marginal(alpha * data + sigma * noise, m).m / m for data, noise in self._nulls
        ]
        found = torch.tensor(ratios, dtype=torch.float64)
        return float(found.mean()), float(found.std()) / math.sqrt(NULLS)

    def _mix(self, m: float) -> tuple[float, float]:
        alpha, sigma = coefficients(get_path(self._s.path), torch.tensor(m, dtype=torch.float64))
        return float(alpha), float(sigma)

    def _calibrate(self, levels: Tensor) -> Tensor:
        """The true times at which E4 says `levels` in the median, linear between _CALIBRATED."""
        if self._calibration is None:
            count = min(self._s.states, _CALIBRATION_STATES)
            x1, x0 = self._true_pairs(0, count)
            mixed = (a * x1 + s * x0 for a, s in map(self._mix, _CALIBRATED))
            said = [self._noise(states).median() for states in mixed]
            self._calibration = torch.stack([torch.zeros_like(said[0]), *said]).cummax(0)[0]
        said, true = self._calibration, torch.tensor([0.0, *_CALIBRATED], dtype=torch.float64)
        after = torch.searchsorted(said, levels).clamp(1, len(true) - 1)
        low, high = said[after - 1], said[after]
        share = ((levels - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)
        return true[after - 1] + share * (true[after] - true[after - 1])

    def _point(self, steps: int, place: int, t: float) -> MarginalPoint:
        estimate = self._marginal(self._all("features", (steps, place)), t)
        null, null_se = self._null(max(estimate.m, STEP))
        return MarginalPoint(t, estimate, null, null_se)

    def result(self) -> SlowFlow:
        """All estimators on what was collected."""
        by_steps = {}
        for steps, grid in self._coarse.items():
            places = range(1, len(grid))
            times = {place: float(grid[place]) for place in places}
            wanted = self._wanted[steps]
            bands = {}
            for name, of in (("pair", places), ("endpoint", places), ("noise", wanted)):
                values = [self._all(name, (steps, place)) for place in of]
                if name == "noise":
                    values = [self._calibrate(value) for value in values]
                bands[name] = _band([times[place] for place in of], values)
            lag = torch.cat(self._lag[steps]).quantile(_quantiles(0.5, 0.95)).tolist()
            fine = [self._fine_place[times[place]] for place in wanted]
            by_steps[steps] = StepFlow(
                steps=steps,
                pair=bands["pair"],
                endpoint=bands["endpoint"],
                lag=(lag[0], lag[1]),
                marginal=tuple(self._point(steps, place, times[place]) for place in wanted),
                fine=tuple(self._point(0, place, float(self._fine[place])) for place in fine),
                noise=bands["noise"],
            )
        return SlowFlow(
            self._s, by_steps, self._features.dim, self._data.description, len(self._data.x)
        )


def _quantiles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _band(times: list[float], values: Sequence[Tensor]) -> Band:
    found = torch.stack([v.double().quantile(_quantiles(0.05, 0.5, 0.95)) for v in values])
    low, median, high = found.T.tolist()
    return Band(times, low, median, high)


def _dct_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each DCT coefficient, (C H W,) float64; in parts, for memory."""
    total = torch.zeros(x[0].numel(), dtype=torch.float64)
    square = torch.zeros_like(total)
    for part in x.split(1000):
        z = dct(part)
        total += z.sum(dim=0)
        square += z.square().sum(dim=0)
    mean = total / len(x)
    return mean, (square / len(x) - mean**2).clamp_min(0)
