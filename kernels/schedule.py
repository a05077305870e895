"""Times and path coefficients on the device: `flow/schedule.py` and `flow/path.py` for kernels.

Scalars of one sample, drawn and computed in registers by every program that works on the sample.
Formulas, names and references stand in `flow/`; only what a device needs besides is explained here.
"""

from __future__ import annotations

from mixflow_fast.flow.clock import NOISE_AT_1
from mixflow_fast.flow.schedule import Schedule
from mixflow_fast.kernels.philox import Stream, first_uniform
from mixflow_fast.kernels.runtime import jit, tl


def schedule_arguments(schedule: Schedule) -> dict[str, object]:
    """Keyword arguments of a kernel that calls `draw_times`."""
    distribution, k = schedule.distribution, schedule.shift
    first, last = distribution.cdf(distribution.low), distribution.cdf(distribution.high)
    return {
        "gamma": schedule.gamma,
        "k": k,
        # Differences are taken here in float64: near k = 1 float32 would lose their digits.
        "k_less_1": k - 1,
        "inverse_k": 1 / k,
        "inverse_k_less_1": 1 / k - 1,
        "low": schedule.low,
        "high": schedule.high,
        "mu": distribution.mu,
        "distribution_sigma": distribution.sigma,
        "distribution_first": first,
        "distribution_span": last - first,
        "distribution_low": distribution.low,
        "distribution_high": distribution.high,
        "SHIFTED": k != 1,
        "DISTRIBUTION": distribution.name,
        "INTERVAL": schedule.interval,
        "NOISE_AT_1": schedule.clock == NOISE_AT_1,
        "TIME": int(Stream.TIME),
        "SLOWING": int(Stream.SLOWING),
    }


@jit
def normal_quantile(p):
    """Inverse of the normal distribution function: Wichura's PPND7 (AS 241).

    For p in [2^-25, 1 - 2^-24], so without its far tails.
    """
    q = p - 0.5
    r = 0.180625 - q * q
    middle = q * tl.div_rn(
        ((59.109374720 * r + 159.29113202) * r + 50.434271938) * r + 3.3871327179,
        ((67.187563600 * r + 78.757757664) * r + 17.895169469) * r + 1.0,
    )
    r = tl.sqrt_rn(-tl.log(tl.minimum(p, 1.0 - p)))
    near = r - 1.6
    tail = tl.div_rn(
        ((0.17023821103 * near + 1.3067284816) * near + 2.7568153900) * near + 1.4234372777,
        (0.12021132975 * near + 0.73700164250) * near + 1.0,
    )
    tail = tl.where(q < 0, -tail, tail)
    return tl.where(tl.abs(q) <= 0.425, middle, tail)


@jit
def shift_time(t, k, k_less_1, SHIFTED: tl.constexpr, NOISE_AT_1: tl.constexpr):
    """`flow.timesteps.shift_time`; k - 1 comes from the host, where it is float64."""
    if SHIFTED:
        if NOISE_AT_1:
            t = tl.div_rn(k * t, 1.0 + k_less_1 * t)
        else:
            t = tl.div_rn(t, k - k_less_1 * t)
    return t


@jit
def slow_time(t, v, gamma, NOISE_AT_1: tl.constexpr):
    """`flow.timesteps.slow_time`."""
    if NOISE_AT_1:
        m = t + gamma * v * (1.0 - t)
    else:
        m = t * (1.0 - gamma * v)
    return m


@jit
def draw_raw_time(
    u,
    mu,
    distribution_sigma,
    distribution_first,
    distribution_span,
    distribution_low,
    distribution_high,
    DISTRIBUTION: tl.constexpr,
    NOISE_AT_1: tl.constexpr,
):
    """`TimeDistribution.quantile`, in the caller's clock."""
    u = distribution_first + distribution_span * u
    if DISTRIBUTION == "uniform":
        t = u
    elif DISTRIBUTION == "beta21":
        t = tl.sqrt_rn(u)
    else:
        t = tl.div_rn(1.0, 1.0 + tl.exp(-(mu + distribution_sigma * normal_quantile(u))))
    # Rounding may leave the bounds, where paths and predictions are singular.
    t = tl.minimum(tl.maximum(t, distribution_low), distribution_high)
    if NOISE_AT_1:
        t = 1.0 - t
    return t


@jit
def draw_times(
    seed,
    position,
    t,
    m,
    gamma,
    k,
    k_less_1,
    inverse_k,
    inverse_k_less_1,
    low,
    high,
    mu,
    distribution_sigma,
    distribution_first,
    distribution_span,
    distribution_low,
    distribution_high,
    SHIFTED: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    INTERVAL: tl.constexpr,
    NOISE_AT_1: tl.constexpr,
    TIME: tl.constexpr,
    SLOWING: tl.constexpr,
    HAS_T: tl.constexpr,
    HAS_M: tl.constexpr,
):
    """(t, m) of the sample at `position`, in the caller's clock; given ones are passed through."""
    if HAS_T:
        raw = shift_time(t, inverse_k, inverse_k_less_1, SHIFTED, NOISE_AT_1)
    else:
        u = first_uniform(seed, TIME, position)
        raw = draw_raw_time(
            u,
            mu,
            distribution_sigma,
            distribution_first,
            distribution_span,
            distribution_low,
            distribution_high,
            DISTRIBUTION,
            NOISE_AT_1,
        )
        t = shift_time(raw, k, k_less_1, SHIFTED, NOISE_AT_1)
    if not HAS_M:
        v = first_uniform(seed, SLOWING, position)
        if INTERVAL == "full":
            m = tl.minimum(tl.maximum(v, low), high)
            if NOISE_AT_1:
                m = 1.0 - m
        else:
            if INTERVAL == "raw":
                m = slow_time(raw, v, gamma, NOISE_AT_1)
                m = shift_time(m, k, k_less_1, SHIFTED, NOISE_AT_1)
            else:
                m = slow_time(t, v, gamma, NOISE_AT_1)
            if NOISE_AT_1:
                m = tl.maximum(tl.minimum(m, 1.0 - low), t)
            else:
                m = tl.minimum(tl.maximum(m, low), t)
            # Exactly t, which shifting back and forth would round.
            m = tl.where(gamma == 0.0, t, m)
    return t, m


@jit
def _sine(x):
    """sin on [0, pi / 2] by its Taylor polynomial, of odd degree 13: 7e-10 absolute."""
    z = x * x
    p = -1.9841269841e-4 + z * (2.7557319224e-6 + z * (-2.5052108385e-8 + z * 1.6059043837e-10))
    return x + x * z * (-1.6666666667e-1 + z * (8.3333333333e-3 + z * p))


@jit
def _expm1(x):
    """exp(x) - 1 for x <= 0; by its Taylor polynomial where exp would lose the digits."""
    p = 1.0 / 720 + x * (1.0 / 5040 + x * (1.0 / 40320 + x * (1.0 / 362880)))
    p = 0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * p)))
    return tl.where(x > -0.5, x + x * x * p, tl.exp(x) - 1.0)


@jit
def _engine_times(time, NOISE_AT_1: tl.constexpr):
    """`flow.clock.engine_times`: (t, 1 - t), one of them untouched."""
    t = time
    s = 1.0 - time
    if NOISE_AT_1:
        t = 1.0 - time
        s = time
    return t, s


@jit
def path_coefficients(time, PATH: tl.constexpr, NOISE_AT_1: tl.constexpr):
    """alpha and sigma at a time in the caller's clock."""
    t, s = _engine_times(time, NOISE_AT_1)
    if PATH == "linear":
        alpha = t
        sigma = s
    elif PATH == "gvp":
        alpha = _sine(1.5707963267948966 * t)
        sigma = _sine(1.5707963267948966 * s)
    else:
        # SiT's variance preserving path, beta from 0.1 to 20 (flow.path.VPPath).
        log_alpha = -4.975 * (s * s) - 0.05 * s
        alpha = tl.exp(log_alpha)
        sigma = tl.sqrt_rn(-_expm1(2.0 * log_alpha))
    return alpha, sigma


@jit
def path_derivatives(time, alpha, sigma, PATH: tl.constexpr, NOISE_AT_1: tl.constexpr):
    """d alpha / dt and d sigma / dt, t the engine's time."""
    t, s = _engine_times(time, NOISE_AT_1)
    if PATH == "linear":
        # 0 t gives the constant the type and the NaN of the time.
        d_alpha = 1.0 + 0.0 * t
        d_sigma = -1.0 + 0.0 * t
    elif PATH == "gvp":
        d_alpha = 1.5707963267948966 * sigma
        d_sigma = -1.5707963267948966 * alpha
    else:
        d_alpha = alpha * (9.95 * s + 0.05)
        d_sigma = tl.div_rn(-alpha * d_alpha, sigma)
    return d_alpha, d_sigma


@jit
def loss_weight(alpha, sigma, d_alpha, d_sigma, LOSS_WEIGHT: tl.constexpr):
    """`Path.loss_weight`."""
    g = tl.div_rn(d_alpha, alpha) * sigma * sigma - sigma * d_sigma
    if LOSS_WEIGHT == "velocity":
        weight = tl.div_rn(g, sigma)
        weight = weight * weight
    else:
        weight = tl.div_rn(g, sigma * sigma)
    return weight
