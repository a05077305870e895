"""The page of the demo's second method: sources that are learned, and both methods together.

The page loads nothing: style, plots (inline SVG) and pictures (base64 PNG) are inside it.
"""

from __future__ import annotations

import html
import os

from mixflow_fast.files import write_text
from mixflow_fast.messages import duration
from mixflow_fast.reports.demo_result import (
    METRICS,
    DemoResult,
    check_result,
    folded_arms,
    main_arms,
    number_text,
)
from mixflow_fast.reports.demo_sections import (
    DEMO_STYLE,
    conditions_section,
    corrected_section,
    distances_section,
    losses_section,
    pictures_section,
    table_row,
)
from mixflow_fast.reports.html import page
from mixflow_fast.reports.mixed_plots import bars_of, curvature_bars, path_plot
from mixflow_fast.reports.mixed_tables import (
    Table,
    curvature_table,
    health_table,
    solver_table,
    toy_table,
)

METHOD = """<p>Flow matching draws the noise end x0 of a training pair independently of the image
x1, so the paths cross, the network learns their average, and its own paths bend. A small network
that sees the image may learn where x0 should lie instead: x0 ~ N(&mu;(x1), &sigma;²(x1)), held near
N(0, I) by &lambda; times a KL divergence per dimension (w = 1: &kappa;-FC, Fast-ODE). MixFlow mixes
that source with N(0, I) by a weight w that is drawn anew for each image. The small network is
thrown away after training: <b>every trained arm is sampled from N(0, I)</b>, which is not what the
network was trained on; how far off it is, the table of the sources says. Arms with their <b>own
Gaussian</b> are the same weights, sampled from a Gaussian with the mean and covariance of all noise
ends of their training, which needs the training crops once: ours, not the paper's.</p>"""
BOTH = """<p>Slowed interpolation comes after: the source is frozen, and the network is shown an
input at a time m that lies behind the time t that it is told (the label t is where the sampler
believes to be; the input's noise end is still drawn from the frozen source, and the target is that
of the same pair). The control trains on plainly for as long, with the same frozen source.</p>"""


def render_mixed_report(result: DemoResult, path: str | os.PathLike[str]) -> None:
    """Write the page of `demo --method mixed` or `both`, whole or not at all.

    Args:
        result: what the demo found; its arms have `source`.
        path: the HTML file; folders are made.

    Raises:
        ValueError: a missing key, a picture that cannot be read, matplotlib not installed.
    """
    check_result(result)
    shown: DemoResult = {**result, "arms": main_arms(result)}
    sections = [
        _introduction(shown),
        _toy(result),
        pictures_section(shown),
        distances_section(shown),
        _solvers(shown),
        _curvature(shown),
        _health(shown),
        corrected_section(shown),
        losses_section(shown, "draw the noise end or the times differently"),
        _folded(result),
        conditions_section(result),
    ]
    write_text(path, page(result["title"], "\n".join(sections), DEMO_STYLE))


def _introduction(result: DemoResult) -> str:
    seeds = ", ".join(map(str, result["seeds"]))
    arms = "".join(
        f"<li><b>{html.escape(arm['label'])}</b>: {html.escape('; '.join(arm.get('facts', ())))}"
        "</li>"
        for arm in result["arms"].values()
    )
    return f"""<p class="meta">Seeds {html.escape(seeds)} · {duration(result["seconds"])} in all</p>
<h2>What this is</h2>
{METHOD}
{BOTH if result.get("method") == "both" else ""}
<p>{html.escape(result.get("about", ""))}</p>
<ul>{arms}</ul>
<p>A weight &lambda; that suits one method does not suit the other: MixFlow bears a weaker KL than
&kappa;-FC. Arms at the same &lambda; are therefore not the whole comparison.</p>
<p>The distance compares generated crops with held-out real ones: <b>lower is better</b>, and real
crops themselves reach the floor. This is a small model on small crops, <b>not ImageNet</b>: the
numbers compare with each other only, never with a published FID.</p>"""


def _toy(result: DemoResult) -> str:
    toy = result.get("toy")
    if not toy:
        return ""
    panels = "".join(
        f"<figure><figcaption>{html.escape(arm['label'])}</figcaption>"
        f"{path_plot(f'paths-{name}', toy, arm)}</figure>"
        for name, arm in toy["arms"].items()
        if arm["paths"]
    )
    seeds = ", ".join(map(str, toy["seeds"]))
    return f"""<h2>In two dimensions</h2>
<p class="note">Eight Gaussians on a circle, a small MLP, seed {html.escape(seeds)}. Lines are what
the trained network's ODE does from N(0, I) (dark dots) to samples (orange), over real points.</p>
<div class="grids paths">{panels}</div>
{_html_table(toy_table(toy))}
<p class="note">SW, N: sliced 2-Wasserstein distance of samples by N Euler steps to fresh points,
lower is better; two draws of points are {number_text(toy["floor"])} apart. SW, source: of all noise
ends of training to N(0, I). Where &kappa;-FC's source does not add up to N(0, I), its paths are the
straightest and its samples wrong at any number of steps. With a stronger KL it does as well as
MixFlow: docs/evidence has more lambdas and seeds.</p>"""


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in table.head)
    rows = "".join(table_row(row[0], map(html.escape, row[1:])) for row in table.rows)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        "</div>"
    )


def _solvers(result: DemoResult) -> str:
    """Other solvers than Euler, by what they cost in evaluations of the network."""
    parts = ""
    for metric in result["metrics"]:
        table = solver_table(result, metric)
        if table is not None:
            parts += f"<h3>{html.escape(METRICS[metric])}</h3>{_html_table(table)}"
    if not parts:
        return ""
    return f"""<h2>Other solvers, by evaluations of the network</h2>
<p class="note">Above, N Euler steps cost N evaluations. Heun's method with a last Euler step costs
2N - 1.</p>{parts}"""


def _curvature(result: DemoResult) -> str:
    table = curvature_table(result)
    if table is None:
        return ""
    return f"""<h2>How much the paths bend</h2>
{curvature_bars("curvature", bars_of(result["arms"]))}
{_html_table(table)}
<p class="note">Mean square of the difference between a path's velocity and its mean velocity, per
pixel. Straight paths need few steps; they are no use where they lead to the wrong pictures, so
read this beside the distances. RK45 chooses its steps itself.</p>"""


def _health(result: DemoResult) -> str:
    table = health_table(result)
    if table is None:
        return ""
    return f"""<h2>What training drew the noise end from</h2>
{_html_table(table)}
<p class="note">Of training crops through the averaged predictor; N(0, I) has the value in brackets.
KL, sigma and mu are of the source alone (w = 1). The others are of the aggregate, all noise ends
together, which sampling replaces by N(0, I): the variance of a pixel, W2² of one pixel's
distribution to N(0, 1), and of each class's whole covariance the largest variance in any direction
and W2² to N(0, I). Pixels of a crop move together: one at a time they can look like N(0, 1) while
their sum has many times its variance, and then N(0, I) hardly ever gives what the network was
trained on.</p>"""


def _folded(result: DemoResult) -> str:
    """All arms, where some are of a sweep."""
    more = folded_arms(result)
    if not more:
        return ""
    arms = "".join(
        f"<li><b>{html.escape(arm['label'])}</b>: {html.escape('; '.join(arm.get('facts', ())))}"
        "</li>"
        for arm in more.values()
    )
    bars = curvature_bars("curvature-all", bars_of(result["arms"]))
    return f"""<details><summary>{len(more)} more arms: the sweep over lambda</summary>
<ul>{arms}</ul>
{distances_section(result)}
{_health(result)}
{bars}
</details>"""
