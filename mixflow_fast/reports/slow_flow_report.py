"""The slow-flow report: one self-contained page, and the same numbers as a JSON record."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mixflow_fast.evaluation.gamma import Choice, Gamma, recommend_gamma
from mixflow_fast.evaluation.loss_surface import LossSurface
from mixflow_fast.evaluation.slow_flow import SlowFlow, StepFlow, deficit
from mixflow_fast.reports.html import number, page
from mixflow_fast.reports.plots import grid_map, loss_over_times
from mixflow_fast.reports.slow_flow_plots import (
    lag_curves,
    lowest_lag,
    marginal_curves,
    marginal_limits,
    noise_curves,
    pair_band,
)

PANEL_STYLE = """
.plots{grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr))}
.warn{border-left:4px solid #ea7317;background:var(--soft);padding:.6rem .9rem;margin:.8rem 0}
"""
RULE = (
    "The rule gamma = 2 (deficit - fine deficit) was found on one small network and one data set, "
    "and the fine term was added after its numbers had been seen. It is a lead, not a law: the "
    "paper's best gammas on ImageNet are 0.7 to 1 for SiT, 0.4 for RAE."
)
LEAD = (
    f"{RULE} A pilot (option --pilot) trains and compares; being short, it may prefer larger "
    "gammas than the whole training would."
)
# Optimizer steps of an arm below which a pilot says nothing: averages and network have hardly moved
# from where all arms began, and what differs is how they began to move.
FEWEST_UPDATES = 100


@dataclass(frozen=True)
class Measured:
    """One network.

    Attributes:
        name: what it is called on the page.
        slow: its slow flow.
        losses: its loss surface, where it was measured.
    """

    name: str
    slow: SlowFlow
    losses: LossSurface | None = None


@dataclass(frozen=True)
class PilotTable:
    """What a pilot found at one number of steps.

    Attributes:
        steps, method: of the sampler.
        images: training images of each arm. samples: generated images of each.
        choice: by the Frechet distance.
        kid: kernel distance of each arm, by gamma, and its standard error.
        features: what the distances are taken in.
        updates: optimizer steps of each arm; None where nobody says.
    """

    steps: int
    method: str
    images: int
    samples: int
    choice: Choice
    kid: dict[float, tuple[float, float]]
    features: str
    updates: int | None = None

    @property
    def doubt(self) -> str | None:
        """Why no gamma can be recommended, with the way out; None where one can."""
        if self.updates is not None and self.updates < FEWEST_UPDATES:
            return (
                f"each arm took {self.updates:,} optimizer steps, fewer than {FEWEST_UPDATES}, in "
                "which a network hardly moves: give more --pilot-images"
            )
        if not self.choice.conclusive:
            return (
                "no arm is significantly worse than the best one: give more --pilot-images, or "
                "more --states to tell smaller differences"
            )
        return None

    @property
    def verdict(self) -> str:
        """The recommendation in a line."""
        if (doubt := self.doubt) is not None:
            return f"gamma cannot be told: {doubt}"
        return (
            f"gamma {self.choice.gamma:g}, the smallest that is not significantly worse than the "
            f"best ({self.choice.best:g})"
        )


@dataclass(frozen=True)
class SlowFlowReport:
    """Everything that the page shows.

    Attributes:
        networks: the network, and after it the one that was trained further, if any.
        command: what made the page.
        pilot: its result, if one was run.
    """

    networks: Sequence[Measured]
    command: str
    pilot: PilotTable | None = None


def record(report: SlowFlowReport) -> dict[str, object]:
    """Every number of the page, as the content of a JSON file."""
    networks = [
        {
            "name": network.name,
            "slow_flow": network.slow.to_record(),
            "gamma": [gamma.to_record() for gamma in gammas_of(report, network)],
            "losses": None if network.losses is None else network.losses.to_record(),
            "warnings": overshoot_warnings(network),
        }
        for network in report.networks
    ]
    pilot = None
    if report.pilot is not None:
        pilot = asdict(report.pilot)
        pilot["kid"] = {f"{gamma:g}": list(value) for gamma, value in report.pilot.kid.items()}
        pilot["doubt"] = report.pilot.doubt
        pilot["recommended"] = None if report.pilot.doubt else report.pilot.choice.gamma
    note = caution(report)
    return {"networks": networks, "pilot": pilot, "command": report.command, "note": note}


def caution(report: SlowFlowReport) -> str:
    """How far the rule is to be trusted, and what tells more where it was not done."""
    return LEAD if report.pilot is None else RULE


def gammas_of(report: SlowFlowReport, network: Measured) -> list[Gamma]:
    """The rule's gamma for each number of steps; none of a network that was trained further.

    The rule is about the training to come. It is not used up by it: slowing adds signal to coarse
    and fine solves alike, and their difference stays.
    """
    if network is not report.networks[0]:
        return []
    return [recommend_gamma(network.slow, steps) for steps in network.slow.by_steps]


def overshoot_warnings(network: Measured) -> list[str]:
    """A sentence for each number of steps at which the states have too much signal."""
    found = []
    for steps, flow in network.slow.by_steps.items():
        if over := flow.overshoot:
            most = max(over, key=lambda point: point.ratio)
            found.append(
                f"{network.name} overshoots at {steps} steps: its states have more signal than "
                f"true ones (m/t = {most.ratio:.3f} ± {2 * most.se:.3f} at t = {most.t:.2g}). If "
                "it was trained with slowing, gamma is too large for that many steps."
            )
    return found


def render(report: SlowFlowReport) -> str:
    """The page."""
    sections = [
        _verdict(report),
        _marginal(report),
        _pairs(report),
        _lags(report),
        _noise(report),
        _losses(report),
        _pilot(report),
        _conditions(report),
    ]
    return page("Slow flow", "\n".join(sections), PANEL_STYLE)


def panels(report: SlowFlowReport) -> str:
    """The figures alone, E3 first, and the maps of losses; for a page that has `PANEL_STYLE`."""
    parts = [_marginal(report), _pairs(report), _lags(report), _noise(report), _losses(report)]
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _figures(pairs: Sequence[tuple[str, str]]) -> str:
    return '<div class="plots">' + "".join(
        f"<figure><figcaption>{html.escape(words)}</figcaption>{drawing}</figure>"
        for words, drawing in pairs
        if drawing
    ) + "</div>"  # fmt: skip


def _verdict(report: SlowFlowReport) -> str:
    first = report.networks[0]
    settings = first.slow.settings
    parts = [
        f'<p class="meta">{settings.states:,} states, {html.escape(settings.method)}, no guidance; '
        f"{html.escape(first.slow.description)}. t = 0 is noise, t = 1 is data.</p>"
    ]
    for network in report.networks:
        parts += [f'<p class="warn">{html.escape(w)}</p>' for w in overshoot_warnings(network)]
    rows = []
    for network in report.networks:
        gammas = {gamma.steps: gamma for gamma in gammas_of(report, network)}
        for steps, flow in network.slow.by_steps.items():
            gamma, words = gammas.get(steps), "–"
            if gamma is not None:
                words = f"<b>{gamma.value:.2f}</b> ({gamma.low:.2f} to {gamma.high:.2f})"
            rows.append(
                [
                    html.escape(network.name),
                    f"{steps}",
                    f"{100 * deficit(flow.marginal)[0]:.1f}%",
                    f"{100 * deficit(flow.fine)[0]:.1f}%",
                    words,
                    f"{100 * flow.lag[0]:.1f}% / {100 * flow.lag[1]:.1f}%",
                ]
            )
    parts.append(
        _table(
            ["network", "steps", "lacks", "fine solve", "gamma by the rule (95%)", "lag, 50 / 95%"],
            rows,
        )
    )  # fmt: skip
    parts.append(
        '<p class="note">Lacks: the signal that is missing in the states, mean of 1 - m/t by E3 at '
        "t near 0.4, 0.6, 0.8 and 1; beside it the same of the fine solve. Lag: how far a state is "
        "behind its own fine solve at the worst t, by E2. The interval of gamma covers the drawing "
        "of states, not the rule.</p>"
    )
    parts.append(f'<p class="note">{html.escape(caution(report))}</p>')
    return "\n".join(parts)


def _marginal(report: SlowFlowReport) -> str:
    flows = [flow for network in report.networks for flow in network.slow.by_steps.values()]
    limits = marginal_limits(flows)
    figures = [
        (network.name, marginal_curves(f"marginal-{place}", _flows(network), limits))
        for place, network in enumerate(report.networks)
    ]
    return (
        "<h2>As a distribution: which time do the states look like? (E3)</h2>"
        + _figures(figures)
        + '<p class="note">The m whose true states have the nearest mean and covariance, over t '
        "and over what the same estimator says of as many true states; bars are two standard "
        "errors. 1 is an exact flow, below 1 signal is missing, above 1 there is too much. It sees "
        f"mean and covariance of {report.networks[0].slow.features} linear features and nothing "
        "else; what the fine solve lacks as well is the network's error, not the sampler's.</p>"
    )


def _flows(network: Measured) -> list[StepFlow]:
    return list(network.slow.by_steps.values())


def _pairs(report: SlowFlowReport) -> str:
    figures = []
    for steps in report.networks[0].slow.by_steps:
        bands = {n.name: n.slow.by_steps[steps].pair for n in report.networks}
        figures.append((f"{steps} steps", pair_band(f"pair-{steps}", bands, steps)))
    return (
        "<h2>The paper's picture: nearest time of a pair (E1)</h2>"
        + _figures(figures)
        + '<p class="note">Each state against one real image and its noise; line: median, band: 5% '
        "to 95%. An exact flow is below the dotted line as well, because the state is not on the "
        "way to that image: the band says more of the diversity of the data than of the sampler, "
        "and barely depends on the number of steps. It does not choose gamma.</p>"
    )


def _lags(report: SlowFlowReport) -> str:
    bottom = min(lowest_lag(_flows(network)) for network in report.networks) - 0.02
    figures = [
        (network.name, lag_curves(f"lag-{place}", _flows(network), bottom))
        for place, network in enumerate(report.networks)
    ]
    return (
        "<h2>Against its own fine solve: what the coarse grid lost (E2)</h2>"
        + _figures(figures)
        + '<p class="note">When the fine solve from the same noise had come as far along the way '
        "to its end, over t; line: median, shade: down to 5%. It cannot see what the fine solve "
        "gets wrong as well.</p>"
    )


def _noise(report: SlowFlowReport) -> str:
    figures = [
        (network.name, noise_curves(f"noise-{place}", _flows(network)))
        for place, network in enumerate(report.networks)
    ]
    return (
        "<h2>By the noise alone (E4)</h2>"
        + _figures(figures)
        + '<p class="note">The m that the DCT coefficients of each state make likeliest, '
        "calibrated on true states; bars: 5% to 95% of the states. On the dotted line the amount "
        "of noise is right; whether the signal is strong enough, only the estimators above say.</p>"
    )


def _losses(report: SlowFlowReport) -> str:
    found = [(n.name, n.losses) for n in report.networks if n.losses is not None]
    if not found:
        return ""
    first = found[0][1]
    figures = [(f"{found[0][0]}: loss", grid_map("loss-0", first.grid, first.times))]
    for place, (name, surface) in enumerate(found[1:], 1):
        words = f"{name}: change in percent, blue is better"
        drawing = grid_map(f"loss-{place}", surface.grid, surface.times, before=first.grid)
        figures.append((words, drawing))
    for place, (name, surface) in enumerate(found):
        curves = {
            f"m = {c:g} t" if c != 1 else "m = t": (surface.cut_times, losses)
            for c, losses in surface.cuts.items()
        }
        figures.append((f"{name}: loss at m = c t", loss_over_times(f"cuts-{place}", curves)))
    return (
        "<h2>Loss of slowed inputs</h2>"
        + _figures(figures)
        + '<p class="note">Columns: the time t that the network is told. Rows: the time m at which '
        "its input was mixed. Held-out examples where the data have them, the same noise each time."
        "</p>"
    )


def _pilot(report: SlowFlowReport) -> str:
    pilot = report.pilot
    if pilot is None:
        return ""
    choice, doubt = pilot.choice, pilot.doubt
    taken = None if doubt else choice.gamma
    rows = [
        [
            f"{arm.gamma:g}" + (" (recommended)" if arm.gamma == taken else ""),
            number(arm.value),
            "best"
            if arm.gamma == choice.best
            else f"{arm.difference:+.3g} ({arm.low:+.3g} to {arm.high:+.3g})",
            "yes" if arm.worse else "no",
            f"{number(pilot.kid[arm.gamma][0])} ± {number(pilot.kid[arm.gamma][1])}",
        ]
        for arm in choice.arms
    ]
    said = "gamma cannot be told" if doubt else f"gamma {choice.gamma:g}"
    rule = "The smallest gamma that is not significantly worse than the best."
    return (
        f"<h2>Pilot: {said} at {pilot.steps} {html.escape(pilot.method)} steps</h2>"
        + (f'<p class="warn">No recommendation: {html.escape(doubt)}.</p>' if doubt else "")
        + _table(
            ["gamma", "Fréchet distance", "to the best (95%, paired)", "worse", "KID ± SE"], rows
        )
        + f'<p class="note">{"" if doubt else rule} '
        f"{pilot.images:,} training images an arm, {pilot.samples:,} samples of the same noise and "
        f"labels, {html.escape(pilot.features)}. The intervals cover the drawing of samples; each "
        "arm was trained once, and another training would differ by more. Short "
        "training learns a part of the slowing only, and may prefer larger gammas than the whole "
        "training.</p>"
    )


def _conditions(report: SlowFlowReport) -> str:
    slow = report.networks[0].slow
    settings = json.dumps(asdict(slow.settings) | {"fine": slow.settings.fine_steps}, indent=1)
    return (
        f"<p>Run again with</p><pre>{html.escape(report.command)}</pre>"
        f"<details><summary>Settings</summary><pre>{html.escape(settings)}</pre>"
        f"<p>{slow.examples:,} examples for mean and covariance.</p></details>"
    )
