"""The page on learned sources: parsed as HTML, every number in it, nothing loaded, text escaped."""

import copy
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

from mixflow_fast.reports.demo_markdown import evidence_markdown
from mixflow_fast.reports.demo_verdicts import verdicts
from mixflow_fast.reports.images import save_grid
from mixflow_fast.reports.mixed_report import render_mixed_report
from mixflow_fast.reports.mixed_tables import HEALTH
from tests.support.pages import Page, assert_loads_nothing

NASTY = 'a<b> & "c" <script>alert(1)</script> | $x_1$'


def make_result(folder: Path, spread: bool) -> dict[str, Any]:
    def cell(mean: float, std: float) -> Any:
        values = [mean - std / 2**0.5, mean + std / 2**0.5]
        return {"mean": mean, "std": std, "values": values} if spread else mean

    def arm(label: str, first: float, curvature: float, learned: bool) -> dict[str, Any]:
        health = {key: cell(index + 0.25, 0.01) for index, key in enumerate(HEALTH)}
        return {
            "label": label,
            "facts": [f"facts of {label}", "sampled from N(0, I)"],
            "distances": {"frechet": {"2": cell(first, 0.5), "4": cell(first / 2, 0.25)}},
            "pictures": {"2": {"grid": picture, "strip": picture}},
            "source": {
                "curvature": cell(curvature, 0.0125),
                "curvature_se": 0.0031,
                "solvers": {"frechet": {"Heun, 2 steps": cell(first - 1, 0.5)}},
                "rk45_nfe": cell(62.0, 4.0),
                "health": health if learned else {},
            },
        }

    picture = str(folder / "picture.png")
    save_grid(picture, torch.zeros(2, 3, 4, 4), columns=2)
    paths = [[[math.cos(k) * (1 + i / 9), math.sin(k)] for i in range(10)] for k in range(5)]
    toy_arm = {"curvature": 0.652, "sliced": {"2": 0.424, "128": 0.11}, "aggregate": 0.371}
    return {
        "title": "Mixed",
        "method": "both",
        "seeds": [3, 5] if spread else [3],
        "seconds": 431.2,
        "steps": [2, 4],
        "metrics": ["frechet"],
        "arms": {
            "rf": arm("rectified flow", 12.5, 0.5, False),
            "mix": arm("MixFlow, lambda 0.3", 8.5, 0.125, True),
            "fc": arm("kappa-FC, lambda 0.3", 9.5, 0.03, True),
        },
        "solver_nfe": {"Heun, 2 steps": 3},
        "toy": {
            "seeds": [3],
            "steps": [2, 128],
            "arms": {
                "rf": {"label": "toy rectified flow", "paths": paths, **toy_arm},
                "mix": {"label": "toy MixFlow", "paths": paths, **toy_arm},
            },
            "floor": 0.08,
            "points": [[2.0, 0.0], [0.0, 2.0]],
        },
        "floor": {"frechet": 1.1875},
        "references": {"no network": {"frechet": 1.5}},
        "losses": {"rf": [[64, 1.5], [128, 1.25]]},
        "real": {"grid": picture, "strip": picture},
        "config": {"seed": 3},
        "environment": {"cpu": "A & B"},
        "notes": ["A note."],
        "about": "About it.",
    }


def render(result: dict[str, Any], folder: Path) -> str:
    path = folder / "new" / "report.html"
    render_mixed_report(result, path)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("spread", [False, True])
def test_every_number_is_on_the_page(tmp_path: Path, spread: bool) -> None:
    pytest.importorskip("matplotlib")
    page = assert_loads_nothing(render(make_result(tmp_path, spread), tmp_path))
    rows = page.rows
    head = ["arm", "curvature", "SW, 2", "SW, 128", "SW, source"]
    assert head in rows and ["toy MixFlow", "0.6520", "0.4240", "0.1100", "0.3710"] in rows
    if spread:
        assert ["MixFlow, lambda 0.3", "8.50 ± 0.50", "4.25 ± 0.25"] in rows
        assert ["MixFlow, lambda 0.3", "7.50 ± 0.50"] in rows  # Heun
        assert ["MixFlow, lambda 0.3", "0.125 ± 0.013", "0.0031", "62.0 ± 4.0"] in rows
    else:
        assert ["MixFlow, lambda 0.3", "8.500", "4.250"] in rows
        assert ["MixFlow, lambda 0.3", "7.500"] in rows
        assert ["MixFlow, lambda 0.3", "0.1250", "0.0031", "62.00"] in rows
    assert ["arm", "Heun, 2 steps (3 NFE)"] in rows
    assert ["no network", "1.500", "1.500"] in rows
    health = [row for row in rows if len(row) == 1 + len(HEALTH)]
    # N(0, I) has no health to show.
    assert [row[0] for row in health] == ["arm", "MixFlow, lambda 0.3", "kappa-FC, lambda 0.3"]
    assert health[1][1].startswith("0.25") and health[1][-1].startswith("6.25")
    for words in ("facts of rectified flow; sampled from N(0, I)", "About it.", "A note."):
        assert words in page.text
    assert "every trained arm is sampled from N(0, I)" in page.words
    assert "the label t is where the sampler believes to be" in page.words


def test_both_methods_are_told_of_where_both_are_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = make_result(tmp_path, False)
    assert "Slowed interpolation comes after" in render(result, tmp_path / "both")
    result["method"] = "mixed"
    assert "Slowed interpolation" not in render(result, tmp_path / "mixed")


def test_plots_are_drawings_with_their_names(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = render(make_result(tmp_path, True), tmp_path)
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    for drawing in drawings:
        ElementTree.fromstring(drawing.replace("xlink:href", "href"))
    # Paths of two arms, distances, curvature, losses.
    assert len(drawings) == 5
    assert "paths of toy MixFlow" in drawings[1]
    # Every path is one line of ten points.
    lines = re.findall(r'd="(M [^"]*)"', drawings[0])
    assert sum(len(re.findall(r"\bL ", line)) == 9 for line in lines) == 5
    bars = drawings[3]
    assert ">kappa-FC, lambda 0.3</text>" in bars and "0.125" in bars
    ids = [attributes["id"] for _, attributes in Page(text).tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_a_sweep_is_folded_and_counted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = make_result(tmp_path, False)
    more = copy.deepcopy(result["arms"]["mix"]) | {"label": "MixFlow, lambda 3", "folded": True}
    result["arms"]["mix_3"] = more
    above, folded = render(result, tmp_path).split("<details><summary>1 more arms")
    assert "MixFlow, lambda 3<" not in above and "MixFlow, lambda 3<" in folded
    ids = [
        attributes["id"]
        for _, attributes in Page(above + "<details><summary>" + folded).tags
        if "id" in attributes
    ]
    assert len(ids) == len(set(ids))


def test_text_is_escaped(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = make_result(tmp_path, False)
    result["about"] = result["arms"]["mix"]["label"] = NASTY
    result["arms"]["mix"]["facts"] = [NASTY]
    result["toy"]["arms"]["rf"]["label"] = NASTY
    text = render(result, tmp_path)
    page = Page(text)
    assert "<script" not in text and page.text.count(NASTY) >= 8
    assert "<script" not in evidence_markdown(result)


def test_markdown_has_the_tables_of_the_sources(tmp_path: Path) -> None:
    text = evidence_markdown(make_result(tmp_path, True))
    assert "| MixFlow, lambda 0.3 | **8.50 ± 0.50** | **4.25 ± 0.25** |" in text
    assert "| MixFlow, lambda 0.3 | 7.50 ± 0.50 |" in text
    assert "| no network | 1.500 | 1.500 |" in text
    assert "| MixFlow, lambda 0.3 | 0.125 ± 0.013 | 0.0031 | 62.0 ± 4.0 |" in text
    assert "| toy MixFlow | 0.6520 | 0.4240 | 0.1100 | 0.3710 |" in text
    lines = [line for line in text.splitlines() if "largest variance" in line]
    assert len(lines) == 1


def test_verdicts_hold_sources_against_each_other(tmp_path: Path) -> None:
    found = verdicts(make_result(tmp_path, False), "frechet")
    assert [(v.text, v.cells) for v in found] == [
        ("MixFlow, lambda 0.3, against rectified flow", ["lower", "lower"]),
        ("kappa-FC, lambda 0.3, against rectified flow", ["lower", "lower"]),
        ("MixFlow, lambda 0.3, against kappa-FC, lambda 0.3", ["lower", "lower"]),
    ]


def test_a_result_without_toy_or_sources_still_makes_a_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = make_result(tmp_path, False)
    result["toy"] = None
    for arm in result["arms"].values():
        del arm["source"]
    page = Page(render(result, tmp_path))
    assert "In two dimensions" not in page.text and "bend" not in page.text.split("Samples")[1]
    assert "Heun" not in evidence_markdown(result)
