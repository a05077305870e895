"""The report: parsed as HTML, every number in it, nothing loaded from outside, all text escaped."""

import base64
import copy
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

from mixflow_fast.reports.demo_markdown import evidence_markdown
from mixflow_fast.reports.demo_report import render_demo_report
from mixflow_fast.reports.demo_verdicts import Verdict, verdicts
from mixflow_fast.reports.images import save_grid
from tests.support.pages import Page, assert_loads_nothing

NASTY = 'a<b> & "c" <script>alert(1)</script> | $x_1$'


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = {}
    for index, name in enumerate(("real", "plain", "slowed")):
        paths[name] = str(folder / f"{name}.png")
        save_grid(paths[name], torch.full((2, 3, 4, 4), index / 2 - 0.5), columns=2)
        # Another file of other bytes.
        save_grid(folder / f"{name}_strip.png", torch.full((1, 3, 4, 4), index / 2), columns=1)
        paths[f"{name}_strip"] = str(folder / f"{name}_strip.png")
    return paths


def of(pictures: dict[str, str], name: str) -> dict[str, str]:
    return {"grid": pictures[name], "strip": pictures[f"{name}_strip"]}


def make_result(pictures: dict[str, str], spread: bool) -> dict[str, Any]:
    def cell(mean: float, std: float) -> Any:
        values = [mean - std / 2**0.5, mean + std / 2**0.5]
        return {"mean": mean, "std": std, "values": values} if spread else mean

    return {
        "title": "Demo",
        "seeds": [3, 5] if spread else [3],
        "seconds": 431.2,
        "steps": [5, 10],
        "metrics": ["frechet", "frechet_random_conv"],
        "arms": {
            "plain": {
                "label": "plain flow matching",
                "gamma": 0.0,
                "timesteps": "uniform",
                "distances": {
                    "frechet": {"5": cell(12.3456, 0.345), "10": cell(7.25, 0.12)},
                    "frechet_random_conv": {"5": cell(0.0456789, 0.0012), "10": cell(0.031, 0.002)},
                },
                "pictures": {"5": of(pictures, "plain")},
            },
            "slowed": {
                "label": "MixFlow",
                "gamma": 0.8,
                "timesteps": "beta21",
                "distances": {
                    "frechet": {"5": cell(8.5, 0.51), "10": cell(7.75, 0.034)},
                    "frechet_random_conv": {"5": cell(0.05, 0.001), "10": cell(0.03, 0.003)},
                },
                "pictures": {"5": of(pictures, "slowed")},
            },
        },
        "floor": {"frechet": 1.1875, "frechet_random_conv": 0.00725},
        "losses": {
            "plain": [[i * 64, 1 / (i + 1)] for i in range(1000)],
            "slowed": [[i * 64, 1 / (i + 2)] for i in range(5)],
        },
        "real": of(pictures, "real"),
        "config": {"model": {"depth": 4}, "seed": 3},
        "environment": {"python": "3.11.2", "torch": "2.13.0", "cpu": "A & B", "threads": 2},
        "notes": ["A note."],
    }


EXPECTED = {
    False: {
        "plain": [["12.35", "7.250"], ["0.04568", "0.03100"]],
        "slowed": [["8.500", "7.750"], ["0.05000", "0.03000"]],
    },
    True: {
        "plain": [["12.35 ± 0.34", "7.25 ± 0.12"], ["0.0457 ± 0.0012", "0.0310 ± 0.0020"]],
        "slowed": [["8.50 ± 0.51", "7.750 ± 0.034"], ["0.0500 ± 0.0010", "0.0300 ± 0.0030"]],
    },
}


def render(result: dict[str, Any], folder: Path) -> str:
    path = folder / "new" / "report.html"
    render_demo_report(result, path)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("spread", [False, True])
def test_page(tmp_path: Path, pictures: dict[str, str], spread: bool) -> None:
    pytest.importorskip("matplotlib")
    result = make_result(pictures, spread)
    text = render(result, tmp_path)
    page = Page(text)
    plain, slowed = EXPECTED[spread]["plain"], EXPECTED[spread]["slowed"]
    for metric, floor in ((0, "1.188"), (1, "0.007250")):
        table = page.rows[metric * 4 : metric * 4 + 4]
        assert table[0] == ["arm", "5 steps", "10 steps"]
        assert table[1] == ["plain flow matching", *plain[metric]]
        assert table[2] == ["MixFlow", *slowed[metric]]
        assert table[3][1:] == [floor, floor]
    # The lowest of every column, and nothing else.
    assert page.bold == [plain[0][1], slowed[0][0], plain[1][0], slowed[1][1]]
    for words in ("lower is better", "not ImageNet", "7.2 min", "γ = 0.8", "beta21", "A note."):
        assert words in page.text
    assert ("one seed" in page.text) != spread
    assert ("2 seeds" in page.text) == spread
    for key, value in result["environment"].items():
        assert [key, str(value)] in page.rows
    assert json.dumps(result["config"], indent=2) in page.text


def test_page_loads_nothing(tmp_path: Path, pictures: dict[str, str]) -> None:
    pytest.importorskip("matplotlib")
    text = render(make_result(pictures, True), tmp_path)
    page = assert_loads_nothing(text)
    shown = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    names = ("plain_strip", "slowed_strip", "real_strip", "plain", "slowed", "real")
    for source, name in zip(shown, names, strict=True):
        head, data = source.split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data, validate=True) == Path(pictures[name]).read_bytes()
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert references and references <= set(ids)
    assert ("viewport" in text) and ("prefers-color-scheme" in text)


def test_arms_of_a_sweep_are_folded(tmp_path: Path, pictures: dict[str, str]) -> None:
    pytest.importorskip("matplotlib")
    result = make_result(pictures, False)
    assert "more ways" not in render(result, tmp_path / "two")
    arm = result["arms"]["slowed"]
    result["arms"]["third"] = arm | {"label": "arm third"}
    result["arms"] |= {n: arm | {"label": f"arm {n}", "folded": True} for n in ("a", "b")}
    text = render(result, tmp_path)
    above, folded = text.split("<details><summary>2 more ways: gammas and ablations</summary>")
    folded = folded.split("</details>")[0]
    # A row and a grid of three arms and of real crops.
    assert "arm third" in above and "arm a" not in above and above.count("<img") == 8
    assert above.index('<div class="strips">') < above.index("<table>")
    assert "arm third" in folded and folded.count("<img") == 2  # tables and plots are of all
    page = Page(text)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and "folded below is lower" not in text
    lower = {"frechet": {"5": 0.1, "10": 99.0}}
    result["arms"]["b"] = result["arms"]["b"] | {"distances": arm["distances"] | lower}
    assert "folded below is lower at 5 steps (averaged pixels)." in render(result, tmp_path / "c")


def test_verdicts_say_where_an_arm_loses(pictures: dict[str, str]) -> None:
    result = make_result(pictures, False)
    arms = result["arms"]
    arms["control"], arms["mixflow"] = arms.pop("plain"), arms.pop("slowed")
    mixflow = Verdict("MixFlow, against plain flow matching", ["lower", "higher"])
    assert verdicts(result, "frechet") == [mixflow]
    # A remedy at 5 steps alone: at 10 the samples are those of the arm itself, which says nothing.
    remedied = {"frechet": {"5": 8.0, "10": 7.25}}
    arms["control_remedy"] = {
        "label": "remedy",
        "weights_of": "control",
        "remedies": {"5": "ssc (a 0.1, b 1)"},
        "distances": arms["control"]["distances"] | remedied,
    }
    assert verdicts(result, "frechet")[1:] == [
        Verdict("remedy, against plain flow matching", ["lower", "–"]),
        Verdict("MixFlow, against remedy", ["higher", "higher"]),
    ]
    assert "| MixFlow, against plain flow matching | lower | higher |" in evidence_markdown(result)
    assert "| remedy | ssc (a 0.1, b 1) | none |" in evidence_markdown(result)
    several = make_result(pictures, True)
    arms = several["arms"]
    arms["control"], arms["mixflow"] = arms.pop("plain"), arms.pop("slowed")
    arms["mixflow"]["distances"]["frechet"]["10"] = {"mean": 7.2, "std": 0.3, "values": [7.0, 7.4]}
    # 7.165 and 7.335 of the control: one of the two seeds is lower, and so is the mean.
    assert verdicts(several, "frechet") == [
        Verdict("MixFlow, against plain flow matching", ["lower, 2 of 2", "lower, 1 of 2"])
    ]


def test_commands_bias_and_standard_errors(tmp_path: Path, pictures: dict[str, str]) -> None:
    pytest.importorskip("matplotlib")
    result = make_result(pictures, False)
    result["command"], result["compare"] = "mixflow-fast demo", "mixflow-fast compare A B"
    for arm in result["arms"].values():
        cells = {"5": {"mean": 3.217, "std": 0.041}, "10": {"mean": 1.5, "std": 0.2}}
        arm["corrected"] = {metric: cells for metric in result["metrics"]}
    text = render(result, tmp_path)
    page = Page(text)
    assert page.rows.count(["MixFlow", "3.217 ± 0.041", "1.50 ± 0.20"]) == 2
    assert evidence_markdown(result).count("| MixFlow | 3.217 ± 0.041 | 1.50 ± 0.20 |") == 2
    last = re.findall(r'<pre class="command">(.*?)</pre>', text)[-2:]
    assert last == ["mixflow-fast demo", "mixflow-fast compare A B"]


def test_plots(tmp_path: Path, pictures: dict[str, str]) -> None:
    pytest.importorskip("matplotlib")
    result = make_result(pictures, True)
    result["losses"]["plain"] = [[i, i % 2] for i in range(1000)]
    text = render(result, tmp_path)
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(svgs) == 3
    for svg in svgs:
        ElementTree.fromstring(svg.replace("xlink:href", "href"))
        for label in ("plain flow matching", "MixFlow"):
            assert f">{label}</text>" in svg
        assert "#010203" not in svg and "var(--ink)" in svg
    for svg in svgs[:2]:
        for label in ("sampling steps (logarithmic)", "real (floor)", ">5<", ">10<"):
            assert label in svg
    assert "images seen" in svgs[2]
    result["losses"] = {"plain": [[64, 1.5]]}  # one row, which a line alone would not show
    single = re.findall(r"<svg.*?</svg>", render(result, tmp_path / "short"), flags=re.DOTALL)[2]
    assert single.count("<use ") > svgs[2].count("<use ")
    # A thousand points of a curve are thinned.
    longest = max(len(re.findall(r"\bL ", path)) for path in re.findall(r' d="([^"]*)"', svgs[2]))
    assert 150 < longest <= 200


def test_escaping(tmp_path: Path, pictures: dict[str, str]) -> None:
    pytest.importorskip("matplotlib")
    result = make_result(pictures, False)
    result["title"] = result["command"] = result["about"] = result["images_caption"] = NASTY
    result["arms"]["plain"]["label"] = result["arms"]["plain"]["timesteps"] = NASTY
    result["notes"], result["environment"]["cpu"] = [NASTY], NASTY
    result["config"] = {NASTY: NASTY}
    text = render(result, tmp_path)
    page = Page(text)
    assert "<script" not in text and "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(NASTY) >= 9
    assert [attrs["alt"] for tag, attrs in page.tags if tag == "img"][0] == NASTY
    markdown = evidence_markdown(result)
    assert "<script" not in markdown
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}


@pytest.mark.parametrize("spread", [False, True])
def test_markdown(pictures: dict[str, str], spread: bool) -> None:
    result = make_result(pictures, spread)
    text = evidence_markdown(result)
    plain, slowed = EXPECTED[spread]["plain"], EXPECTED[spread]["slowed"]
    assert f"| plain flow matching | {plain[0][0]} | **{plain[0][1]}** |" in text
    assert f"| MixFlow | **{slowed[0][0]}** | {slowed[0][1]} |" in text
    assert f"| plain flow matching | **{plain[1][0]}** | {plain[1][1]} |" in text
    assert "| 1.188 | 1.188 |" in text and "| 0.007250 | 0.007250 |" in text
    assert "* A note." in text and "7.2 min" in text and "python 3.11.2" in text
    assert ("one seed" in text) != spread


def test_gaps(tmp_path: Path, pictures: dict[str, str]) -> None:
    """Missing and diverged values, missing pictures, integer keys, no curve, no floor."""
    pytest.importorskip("matplotlib")
    result = make_result(pictures, False)
    plain = result["arms"]["plain"]
    plain["distances"]["frechet"], plain["pictures"] = {5: math.nan}, {}
    result["floor"], result["losses"], result["real"] = {}, {}, None
    page = Page(render(result, tmp_path))
    assert page.rows[1] == ["plain flow matching", "nan", "–"]
    assert page.bold[:2] == ["8.500", "7.750"] and "floor)" not in str(page.rows)
    assert sum(tag == "img" for tag, _ in page.tags) == 2 and "no picture" in page.text
    assert "| plain flow matching | nan | – |" in evidence_markdown(result)


def test_errors(tmp_path: Path, pictures: dict[str, str]) -> None:
    pytest.importorskip("matplotlib")
    good = make_result(pictures, False)

    def broken(change: Any) -> dict[str, Any]:
        result = copy.deepcopy(good)
        change(result)
        return result

    not_png = tmp_path / "x.png"
    not_png.write_bytes(b"GIF89a")
    path = tmp_path / "out" / "report.html"
    for change, message in (
        (lambda r: r.pop("losses"), "lacks losses"),
        (lambda r: r.update(arms={}), "at least one arm"),
        (lambda r: r.update(metrics=[]), "at least one arm, metric"),
        (lambda r: r["arms"]["plain"]["distances"].pop("frechet"), "'plain'.*lacks 'frechet'"),
        (lambda r: r["real"].update(strip=str(tmp_path / "none.png")), "Real crops.*cannot read"),
        (lambda r: r["arms"]["slowed"]["pictures"]["5"].update(grid=str(not_png)), "MixFlow.*PNG"),
    ):
        with pytest.raises(ValueError, match=message):
            render_demo_report(broken(change), path)
        assert not path.exists()
