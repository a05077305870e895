"""The demo's evidence: one self-contained HTML page.

The page loads nothing: style, plots (inline SVG) and pictures (base64 PNG) are inside it.
"""

from __future__ import annotations

import html
import os
from collections.abc import Mapping

from mixflow_fast.files import write_text
from mixflow_fast.messages import duration
from mixflow_fast.reports.demo_result import (
    ArmResult,
    DemoResult,
    best_arms,
    check_result,
    folded_arms,
    main_arms,
)
from mixflow_fast.reports.demo_sections import (
    DEMO_STYLE,
    conditions_section,
    corrected_section,
    distances_section,
    losses_section,
    pictures_section,
)
from mixflow_fast.reports.demo_verdicts import short_name
from mixflow_fast.reports.html import page, picture

_ABOUT = (
    "A small flow-matching transformer was trained on 16×16 crops of photographs in each of the "
    "ways below, with all else equal. Each one then generated crops with few and with many "
    "sampling steps."
)


def render_demo_report(result: DemoResult, path: str | os.PathLike[str]) -> None:
    """Write the report of a demo run as one HTML file that loads nothing, whole or not at all.

    Args:
        result: what the demo found.
        path: the HTML file; folders are made.

    Raises:
        ValueError: a missing key, a picture that cannot be read, matplotlib not installed.
    """
    check_result(result)
    shown, more = _of_arms(result, main_arms(result)), folded_arms(result)
    sections = [
        _introduction(shown),
        pictures_section(shown),
        distances_section(shown, _lower_below(result, shown)),
        corrected_section(shown),
        losses_section(shown),
        _ablations(result, _of_arms(result, more)) if more else "",
        conditions_section(result),
    ]
    write_text(path, page(result["title"], "\n".join(sections), DEMO_STYLE))


def _of_arms(result: DemoResult, arms: Mapping[str, ArmResult]) -> DemoResult:
    """The same result, of some of the arms."""
    return {**result, "arms": arms}


def _introduction(result: DemoResult) -> str:
    seeds = ", ".join(map(str, result["seeds"]))
    arms = "".join(_describe_arm(arm, result) for arm in result["arms"].values())
    return f"""<p class="meta">Seeds {html.escape(seeds)} · {duration(result["seconds"])} in all</p>
<h2>What this is</h2>
<p>{html.escape(result.get("about", _ABOUT))}</p>
<ul>{arms}</ul>
<p>A sampler feeds the network its own output, which lies a little behind the time it is told; plain
training never shows it such inputs. MixFlow's slowing does: the network sees a noisier input than
its time label says. Whether it helps is what the numbers below show. A remedy corrects the sampler
instead and trains nothing: it is the rival to hold MixFlow against.</p>
<p>The distance compares generated crops with held-out real ones: <b>lower is better</b>, and real
crops themselves reach the floor. This is a small model on small crops, <b>not ImageNet</b>: the
numbers compare with each other only, never with a published FID.</p>"""


def _lower_below(result: DemoResult, shown: DemoResult) -> str:
    """A sentence on the columns in which an arm that is folded below is the best."""
    columns = [
        f"{steps} steps ({short_name(metric)})"
        for metric in result["metrics"]
        for steps in result["steps"]
        if not best_arms(result, metric, steps) & shown["arms"].keys()
    ]
    return f" An arm that is folded below is lower at {', '.join(columns)}." if columns else ""


def _ablations(result: DemoResult, more: DemoResult) -> str:
    """All arms, with pictures of those that are not above; folded until someone asks."""
    arms = "".join(_describe_arm(arm, result) for arm in more["arms"].values())
    grids = "".join(
        picture(found["grid"], f"{arm['label']}, {steps} steps")
        for arm in more["arms"].values()
        for steps, found in list(arm.get("pictures", {}).items())[:1]
    )
    return f"""<details><summary>{len(more["arms"])} more ways: gammas and ablations</summary>
<ul>{arms}</ul>
{distances_section(result)}
<h2>Their samples</h2>
<div class="grids">{grids}</div>
</details>"""


def _describe_arm(arm: ArmResult, result: DemoResult) -> str:
    gamma, times, source = arm.get("gamma"), arm.get("timesteps"), arm.get("weights_of")
    facts = [] if times or gamma or source else ["where every other arm starts"]
    if source:
        facts.append(f"the weights of “{result['arms'][source]['label']}”, nothing trained")
        remedies = arm.get("remedies", {}).items()
        facts += [f"{text} with {steps} steps" for steps, text in remedies]
    if arm.get("interval") == "full":
        facts.append("the input's time is anywhere in [0, 1], whatever its label")
    if times is not None:
        facts.append(f"time distribution {times}")
    if gamma is not None:
        facts.append("no slowing (γ = 0)" if gamma == 0 else f"slowing γ = {gamma:g}")
    return f"<li><b>{html.escape(arm['label'])}</b>: {html.escape('; '.join(facts) or '–')}</li>"
