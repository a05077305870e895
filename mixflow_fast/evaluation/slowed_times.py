"""At which time of the true path the states of a sampler are: the estimators of slow flow.

A sampler's state at time t should have the distribution of x_t = alpha_t x1 + sigma_t x0. Where
every step falls a little short, it has that of an earlier time m < t: the flow is slow. Each
estimator here gives m for given states. They answer different questions:

    pair (E1)      the nearest x_m of one given pair (x1, x0): the paper's picture. For an exact
                   flow it is below t too, because the state is not on the way to x1.
    endpoint (E2)  where the exact trajectory from the same noise has come as far, per sample: what
                   the coarse grid lost.
    marginal (E3)  the m whose true states have the nearest mean and covariance (Frechet). Equals t
                   for an exact flow, whatever pairs with what. Biased by the number of states: it
                   is divided by what the same estimator says of as many true states.
    noise (E4)     the noise level that a state's DCT coefficients say, per sample.

Times are of the engine's clock: 0 is noise, 1 is data. All is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixflow_fast.flow.path import Path, get_path
from mixflow_fast.kernels.philox import Stream, normal

GRID = 201  # candidates for m where a formula gives none
STEP = 0.02  # between the candidates of the marginal estimator
BEYOND = 1.4  # where its candidates end on the linear path: states may have too much signal
_POOLED = 8  # side of the pooled images, at most
_FLOOR = 1e-6  # of a coefficient's variance, relative to the mean one


def _times(values: Tensor) -> Tensor:
    return values.to(torch.float64)


def coefficients(path: Path, m: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at times m, float64."""
    found = path.coefficients(_times(m))
    return found.alpha, found.sigma


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).flatten(1).sum(1)


def projection(x: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    """<x - x0, x1 - x0> / |x1 - x0|^2 of (B, ...) tensors: (B,) float64."""
    way = x1 - x0
    return _dot(x - x0, way) / _dot(way, way)


def _peak(values: Tensor, step: float) -> Tensor:
    """Where the parabola through the smallest value of each row and its neighbours is lowest.

    Args:
        values: (B, G), at 0, step, 2 step and so on.

    Returns:
        (B,), within one step of the smallest and inside of the grid.
    """
    place = values.argmin(dim=1)
    inner = place.clamp(1, values.shape[1] - 2)
    left, mid, right = (values.gather(1, (inner + d)[:, None])[:, 0] for d in (-1, 0, 1))
    bend = left - 2 * mid + right
    shift = torch.where(bend > 0, (left - right) / (2 * bend), torch.zeros_like(bend))
    # At an end of the grid the smallest value is not the middle one.
    away = (place - inner).double()
    shift = torch.where(away == 0, shift.clamp(-1, 1), away)
    return ((inner + shift) * step).clamp(0, (values.shape[1] - 1) * step)


def pair_time(x: Tensor, x1: Tensor, x0: Tensor, path: str = "linear") -> Tensor:
    """E1: the m in [0, 1] whose alpha_m x1 + sigma_m x0 is nearest to each state.

    On the linear path clip(<x - x0, x1 - x0> / |x1 - x0|^2, 0, 1); on others the nearest of GRID
    times, refined by a parabola.

    Args:
        x, x1, x0: (B, ...) states, data and noise.

    Returns:
        (B,) float64.
    """
    if path == "linear":
        return projection(x, x0, x1).clamp(0, 1)
    alpha, sigma = coefficients(get_path(path), torch.linspace(0, 1, GRID))
    alpha, sigma = alpha.to(x.device), sigma.to(x.device)
    # |x - alpha x1 - sigma x0|^2 without |x|^2, which no m changes.
    distance = torch.outer(_dot(x1, x1), alpha**2) + torch.outer(_dot(x0, x0), sigma**2)
    distance += 2 * torch.outer(_dot(x1, x0), alpha * sigma)
    distance -= 2 * (torch.outer(_dot(x, x1), alpha) + torch.outer(_dot(x, x0), sigma))
    return _peak(distance, 1 / (GRID - 1))


def effective_time(reached: Tensor, times: Tensor, states: Tensor, near: float) -> Tensor:
    """E2: when an exact trajectory has come as far as a state.

    Args:
        reached: (B, T) projections of the exact trajectory, at `times`.
        times: (T,) increasing.
        states: (B,) projections of the states on the same way.
        near: of several such times, which a trajectory that turns back has, the nearest to this
            one counts.

    Returns:
        (B,) float64 times, linear between those given; the time of the nearest point where the
        trajectory never comes as far.
    """
    times = times.double().to(reached.device)
    ahead = reached.double() - states.double()[:, None]
    low, high = ahead[:, :-1], ahead[:, 1:]
    rise = high - low
    share = (-low / torch.where(rise == 0, torch.ones_like(rise), rise)).clamp(0, 1)
    crossing = times[:-1] + share * (times[1:] - times[:-1])
    away = torch.where(low * high <= 0, (crossing - near).abs(), math.inf)
    best = away.argmin(dim=1, keepdim=True)
    found = crossing.gather(1, best)[:, 0]
    nearest = times[ahead.abs().argmin(dim=1)]
    return torch.where(away.gather(1, best)[:, 0].isfinite(), found, nearest)


class LinearFeatures:
    """A fixed linear map of images or latents to few numbers, under which noise stays white.

    The image is averaged over equal squares, to the most of them that fit; where the channels of
    one square are still too many, they are projected on random orthonormal directions.

    Args:
        shape: (C, H, W).
        most: features, at most.

    Attributes:
        dim: how many they are.
        noise_variance: of each feature of x0 ~ N(0, I).
    """

    def __init__(self, shape: tuple[int, int, int], most: int) -> None:
        channels, height, width = shape
        if most < 1:
            raise ValueError(f"most must be >= 1, got {most}")
        sides = [
            side
            for side in range(1, min(_POOLED, height, width) + 1)
            if height % side == width % side == 0 and channels * side**2 <= most
        ]
        self._side = max(sides, default=1)
        self._turn: Tensor | None = None
        self.dim = channels * self._side**2
        if self.dim > most:
            random = normal(0, Stream.INIT, torch.arange(most), channels).double()
            self._turn, self.dim = torch.linalg.qr(random.T)[0], most
        self.noise_variance = self._side**2 / (height * width)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, dim), float64 on the CPU."""
        height, width = x.shape[2:]
        window = (height // self._side, width // self._side)
        pooled = F.avg_pool2d(x.detach().double(), window).flatten(1).cpu()
        return pooled if self._turn is None else pooled @ self._turn


def _parabola(values: list[float], step: float) -> tuple[float, float]:
    """(bend, slope) of bend x^2 + slope x + c through five values at x = -2 step .. 2 step.

    Least squares by orthogonal polynomials. LAPACK's solver (`torch.linalg.lstsq`) gives other last
    digits from process to process.
    """
    places = (-2, -1, 0, 1, 2)
    slope = math.fsum(k * v for k, v in zip(places, values, strict=True)) / (10 * step)
    bend = math.fsum((k * k - 2) * v for k, v in zip(places, values, strict=True)) / (14 * step**2)
    return bend, slope


@dataclass(frozen=True)
class Marginal:
    """E3 of one set of states.

    Attributes:
        m: the estimate, without calibration.
        influence: (n,) float64, what each state adds to m, times n; its mean is 0.
    """

    m: float
    influence: Tensor

    @property
    def se(self) -> float:
        """Standard error over draws of the states."""
        return float(self.influence.std()) / math.sqrt(len(self.influence))


class MarginalTime:
    """E3: the m whose true states are nearest in Frechet distance, by mean and covariance.

    True states have the mean alpha_m mu and the covariance alpha_m^2 C + sigma_m^2 s I, exactly:
    mu and C are of the data, s is the variance of the noise. The distance is taken on a grid of
    step STEP around its minimum, and a parabola is laid through five points there.

    Args:
        mean, cov: of features of the data, (d,) and (d, d).
        noise_variance: s.
        path: name of the path.
    """

    def __init__(
        self, mean: Tensor, cov: Tensor, noise_variance: float, path: str = "linear"
    ) -> None:
        self._path, self._noise = get_path(path), noise_variance
        values, self._axes = torch.linalg.eigh(cov.double())
        self._values = values.clamp_min(0)
        self._mean = mean.double()
        last = BEYOND if path == "linear" else 1.0
        self._count = round(last / STEP) + 1

    def __call__(self, features: Tensor, near: float) -> Marginal:
        """E3 of features (n, d) of states.

        Args:
            features: float64, n > d.
            near: where to begin the search.

        Raises:
            ValueError: fewer states than features.
        """
        count, dim = features.shape
        if count <= dim:
            raise ValueError(
                f"the marginal estimator needs more states than features, got {count} states of "
                f"{dim} features: take more states"
            )
        mean = features.mean(dim=0)
        z = features - mean
        values, axes = torch.linalg.eigh(z.T @ z / (count - 1))
        values = values.clamp_min(0)
        root = (axes * values.sqrt()) @ axes.T
        turned = root @ self._axes
        trace = values.sum()

        def distance(place: int) -> float:
            target, spread = self._target(place * STEP)
            cross = torch.linalg.svdvals(turned * spread).sum()
            shift = (mean - target).square().sum()
            return float(shift + trace + spread.square().sum() - 2 * cross)

        places, found = self._descend(distance, round(near / STEP))
        bend, slope = _parabola(found, STEP)
        # A parabola that does not open upwards says nothing: the best point of the grid is left.
        best = places[min(range(5), key=found.__getitem__)] * STEP
        if bend <= 0:
            return Marginal(best, torch.full((count,), math.nan, dtype=torch.float64))
        m = min(max(places[2] * STEP - slope / (2 * bend), 0.0), (self._count - 1) * STEP)
        inverse = (axes * torch.where(values > 1e-12 * values[-1], values.rsqrt(), 0)) @ axes.T
        before, after = max(m - STEP, 0.0), min(m + STEP, (self._count - 1) * STEP)
        (low, low_map), (high, high_map) = (
            self._transport(turned, inverse, at) for at in (before, after)
        )
        # d(influence of the distance)/dm, over the second derivative of the distance.
        change = 2 * z @ (high - low) + ((z @ (high_map - low_map)) * z).sum(dim=1)
        influence = change / (after - before) / (2 * bend)
        return Marginal(m, influence - influence.mean())

    def _target(self, m: float) -> tuple[Tensor, Tensor]:
        """Mean of true states at m, and the roots of their covariance along its axes."""
        alpha, sigma = (float(v) for v in coefficients(self._path, torch.tensor(m)))
        spread = alpha**2 * self._values + sigma**2 * self._noise
        return alpha * self._mean, spread.sqrt()

    def _transport(self, turned: Tensor, inverse: Tensor, m: float) -> tuple[Tensor, Tensor]:
        """Mean of true states at m, and the map that carries the states' covariance to theirs."""
        target, spread = self._target(m)
        left, singular, _ = torch.linalg.svd(turned * spread)
        return target, inverse @ (left * singular) @ left.T @ inverse

    def _descend(
        self, distance: Callable[[int], float], start: int
    ) -> tuple[list[int], list[float]]:
        """Five neighbouring places of the grid around the nearest minimum, and their distances."""
        known: dict[int, float] = {}

        def at(place: int) -> float:
            if place not in known:
                known[place] = distance(place)
            return known[place]

        place = min(max(start, 2), self._count - 3)
        while True:
            near = range(max(0, place - 2), min(self._count - 1, place + 2) + 1)
            best = min(near, key=at)
            middle = min(max(best, 2), self._count - 3)
            if middle == place:
                places = list(range(place - 2, place + 3))
                return places, [at(p) for p in places]
            place = middle


def _dct_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II, (size, size) float64."""
    place = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (place + 0.5) * place[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def dct(x: Tensor) -> Tensor:
    """Two-dimensional orthonormal DCT of each channel: (B, C, H, W) to (B, C H W) float64."""
    rows, columns = (_dct_matrix(size).to(x.device) for size in x.shape[2:])
    return (rows @ x.double() @ columns.T).flatten(1)


class NoiseLevel:
    """E4: the maximum likelihood m of each state, from its DCT coefficients.

    z_k ~ N(alpha_m mu_k, alpha_m^2 lambda_k + sigma_m^2), independent; mu and lambda are mean and
    variance of the data's coefficients.

    Args:
        mean, variance: mu and lambda, (C H W,).
        path: name of the path.
    """

    def __init__(self, mean: Tensor, variance: Tensor, path: str = "linear") -> None:
        alpha, sigma = coefficients(get_path(path), torch.linspace(0, 1, GRID))
        variance = variance.double().clamp_min(_FLOOR * float(variance.mean()))
        spread = torch.outer(alpha**2, variance) + (sigma**2)[:, None]
        centre = torch.outer(alpha, mean.double())
        # Of (z - centre)^2 / spread + log spread, what z^2, z and 1 are multiplied by.
        self._square = (1 / spread).T
        self._linear = (-2 * centre / spread).T
        self._constant = (centre**2 / spread + spread.log()).sum(dim=1)

    def __call__(self, x: Tensor) -> Tensor:
        """(B,) float64 on the CPU, of states (B, C, H, W)."""
        z = dct(x).cpu()
        minus = z.square() @ self._square + z @ self._linear + self._constant
        return _peak(minus, 1 / (GRID - 1))
