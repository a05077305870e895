"""The page of a folder of results."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import page
from benchmarks.rows import CellRows, Percentiles, Ratio, Writer

ENVIRONMENT = {
    "device": "NVIDIA <X>",
    "torch": "2",
    "triton": "3",
    "cuda": "13",
    "git_sha": "a" * 40,
}


def _write(folder) -> None:
    writer = Writer(folder / "rows.jsonl", ENVIRONMENT)
    out = CellRows(writer, "gelu", "full", "bias", [4, 256, 4608], "bfloat16", "events")
    for provider, ms in (("eager", 0.4), ("compile", 0.2), ("mixflow_fast", 0.1)):
        out.add(provider, "latency_ms", Percentiles(ms, ms, ms), "how")
        out.add(provider, "percent_of_copy", Percentiles(8 / ms, 8 / ms, 8 / ms), "how")
    out.add_ratio("mixflow_fast", "eager", Ratio(3.9, 4.0, 4.1, 3.8, 4.2), "paired")
    out.add_ratio("mixflow_fast", "compile", Ratio(0.9, 0.95, 1.0, 0.9, 0.99), "paired")
    out = CellRows(writer, "sampling", "euler", "SiT, 20 steps", [8, 4, 32, 32], "bfloat16", "wall")
    for provider, ms in (("official", 40.0), ("mixflow_fast", 38.0), ("mixflow_fast_graph", 20.0)):
        out.add(provider, "latency_ms", Percentiles(ms, ms, ms), "how")
        out.add(provider, "samples_per_s", Percentiles(8, 8e3 / ms, 8), "how")
        out.add(provider, "percent_of_matmul", Percentiles(8, 400 / ms, 8), "how")
    out.add_ratio("mixflow_fast_graph", "official", Ratio(1.9, 2.0, 2.1, 1.8, 2.2), "paired")
    CellRows(writer, "gelu", "full", "bias", [2, 3], "bfloat16", "one call").add(
        "mixflow_fast", "first_call_ms", 900.0, "first call; right"
    )
    finding = {"op": "swiglu", "check": "bits", "tensor": "dx", "passed": False}
    good = finding | {"op": "gelu", "passed": True}
    lines = [json.dumps(each) for each in (finding, good)]
    (folder / "correctness_blocks.jsonl").write_text("\n".join(lines) + "\n")
    state = {"kernels": {"before": "clocks.sm 1980 MHz", "after": None}}
    (folder / "environment.json").write_text(json.dumps(state))


def test_everything_is_on_the_page(tmp_path) -> None:
    """Rows where ours loses, the roofline, what failed, the conditions; nothing from elsewhere."""
    pytest.importorskip("matplotlib")
    _write(tmp_path)
    assert page.main([str(tmp_path)]) == 0
    text = (tmp_path / "page.html").read_text()
    plain = re.sub(r"<[^>]+>", "|", text)
    assert "mixflow_fast over compile 0.95 [0.90, 0.99]" in text  # a loss is printed, too
    assert "NVIDIA &lt;X&gt;" in text and "clocks.sm 1980 MHz; after not reached" in text
    # 80% of the copy rate at 0.1 ms: the bytes take 0.08 ms.
    assert "gelu, full, bias, [4, 256, 4608], bfloat16||0.08000||0.4000||0.2000||0.1000" in plain
    assert "|swiglu: bits dx|" in plain and "first_call_ms||900.0||first call|" in plain
    assert "mixflow_fast_graph over official 2.00 [1.80, 2.20]" in text
    assert text.count("data:image/png;base64") == 2 and "http" not in text
    assert 'Training step</h2><p class="note">not measured' in text


def test_an_empty_folder_says_so(tmp_path) -> None:
    assert page.main([str(tmp_path)]) == 0
    assert (tmp_path / "page.html").read_text().count("not measured") == 7
