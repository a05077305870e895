"""What `mixflow-fast inspect` says of text-to-image files, for a terminal of 80 to 100 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixflow_fast.cli.inspect_lines import first, line
from mixflow_fast.messages import size_text

if TYPE_CHECKING:
    from mixflow_fast.checkpoints.inspect_text_to_image import TextToImageInspection


def as_text(found: TextToImageInspection) -> str:
    """The findings in lines."""
    size = f"{size_text(found.size_bytes)}, {found.format}"
    model = found.model if found.class_name is None else f"{found.model} ({found.class_name})"
    out = [
        line("checkpoint", f"{found.path}, {size}"),
        line("layout", found.layout + (f", prefix {found.prefix}" if found.prefix else "")),
        line("model", model),
    ]
    if found.config:
        shown = {n: v for n, v in found.config.items() if v is not None and v != ()}
        words = (f"{n} {_range(v) if isinstance(v, tuple) else v}" for n, v in shown.items())
        out.append(line("shapes say", ", ".join(words)))
    table = f", and a table of positions of {found.table:,}" if found.table else ""
    counted = f"{found.parameters:,}{table}; {found.tensors} tensors, {', '.join(found.dtypes)}"
    out.append(line("parameters", counted))
    if found.ranks:
        ranks = ", ".join(map(str, found.ranks))
        out.append(line("rank", f"{ranks}, of {found.modules} linear maps"))
        out.append(line("targets", ", ".join(found.targets)))
    if found.steps:
        out.append(line("progress", f"steps {found.steps:,}"))
    if found.recorded:
        out.append(line("recorded", ", ".join(f"{n}={v}" for n, v in found.recorded.items())))
    if found.pipeline is not None:
        out += ["", f"pipeline {found.pipeline}"]
        out += [f"  {name:<18} {what}" for name, what in found.components.items()]
    differences = [f"  - missing     {name}" for name in first(found.missing)]
    differences += [f"  + unexpected  {name}" for name in first(found.unexpected)]
    shapes = [f"{n}: {list(a)}, expected {list(b)}" for n, (a, b) in found.misshaped.items()]
    differences += [f"  ~ shape       {text}" for text in first(shapes)]
    differences += [f"  ! {found.damaged}"] if found.damaged else []
    if differences:
        out += ["", f"against {found.against or found.class_name}", *differences]
    if found.notes:
        out += ["", "notes", *(line("  -", note, indent=4) for note in found.notes)]
    verdict = f"fits {found.against}: every name and shape; values were not read"
    if found.ranks:
        verdict = "whole: both factors of every map; values were not read"
    if not found.fits:
        against = found.against or "anything: it was not compared"
        verdict = f"does not fit {against}"
    return "\n".join([*out, "", verdict])


def _range(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2) as 0-2; others as they are."""
    if numbers == tuple(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return " ".join(map(str, numbers))
