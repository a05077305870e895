"""`mixflow-fast inspect`: what is in a checkpoint, and whether its weights fit; as text or JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from mixflow_fast.cli.inspect_lines import first, line
from mixflow_fast.files import user_path
from mixflow_fast.messages import size_text

if TYPE_CHECKING:
    from mixflow_fast.checkpoints.inspect import Inspection

# Settings that our own files record and that other lines of the text already show.
_SHOWN_ABOVE = ("format", "class", "model", "name", "clock", "prediction", "steps")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "inspect",
        help="what is in a checkpoint, and whether its weights fit",
        description="Says whose checkpoint it is, which network, clock and settings, and whether "
        "names, shapes and values are right; of text-to-image networks, pipelines and LoRA files "
        "which they are, by names and shapes alone. Nothing in the file is executed. Exit code: 0 "
        "it fits, 1 it does not, 2 it cannot be read.",
        epilog="example: mixflow-fast inspect SiT-XL-2-256x256.pt --against SiT-XL/2",
    )
    command.add_argument(
        "checkpoint", type=user_path, help="run folder, or a weights file of any kind"
    )
    command.add_argument(
        "--against",
        metavar="NAME",
        help="hold it against SiT-{S,B,L,XL}/{2,4,8}, DiTDH-{S,B,L,XL} or "
        "SongUNet-{CIFAR10,64}; default: what the shapes tell",
    )
    command.add_argument("--weights", choices=("ema", "model"), default="ema")
    command.add_argument("--json", action="store_true", help="all findings as JSON")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from mixflow_fast.checkpoints.inspect import as_json, inspect_file

    if options.against is None and (code := _run_text_to_image(options)) is not None:
        return code
    found = inspect_file(options.checkpoint, options.weights, options.against)
    print(json.dumps(as_json(found), indent=1) if options.json else as_text(found))
    return 0 if found.fits else 1


def _run_text_to_image(options: argparse.Namespace) -> int | None:
    """Say what a text-to-image file is; None where it is of another kind."""
    from mixflow_fast.checkpoints.inspect_text_to_image import as_json, inspect_text_to_image
    from mixflow_fast.cli.inspect_text_to_image import as_text

    found = inspect_text_to_image(options.checkpoint, options.weights)
    if found is None:
        return None
    print(json.dumps(as_json(found), indent=1) if options.json else as_text(found))
    return 0 if found.fits else 1


def as_text(found: Inspection) -> str:
    """The findings for a terminal of 80 to 100 columns."""
    out = [
        line("checkpoint", f"{found.path}, {size_text(found.size_bytes)}, {found.format}"),
        line("layout", found.layout),
        line("model", found.model if found.kind != "unknown" else "unknown"),
        *_network(found),
    ]
    trains = "" if found.trainable is None else f"; the network trains {found.trainable:,}"
    values = f"{found.parameters:,} in the file, {', '.join(found.dtypes)}{trains}"
    out.append(line("parameters", values))
    progress = [f"{n} {v:,}" for n in ("steps", "epoch") if (v := getattr(found, n))]
    out += [line("progress", ", ".join(progress))] if progress else []
    # A network's description as JSON is long, and the lines above say what is in it.
    known = _SHOWN_ABOVE if found.layout.startswith("mixflow-fast") else ()
    shown = {n: v for n, v in found.args.items() if n not in known and not str(v).startswith('{"')}
    if shown:
        out.append(line("recorded", ", ".join(f"{name}={value}" for name, value in shown.items())))
    out += ["", "contents", *_table(found)]
    if found.non_finite or found.damaged:
        out += ["", "values that are wrong"]
        out += [f"  ! not finite    {name}" for name in first(found.non_finite)]
        out += [f"  ! bad checksum  {found.damaged}"] if found.damaged else []
    if diff := _diff(found):
        out += ["", f"against {found.against}", *diff]
    if found.notes:
        out += ["", "notes", *(line("  -", note, indent=4) for note in found.notes)]
    verdict = f"fits {found.against}: every name and shape, all values finite"
    if not found.fits:
        verdict = "does not fit" + (f" {found.against}" if found.against else " any known network")
    return "\n".join([*out, "", verdict])


def _network(found: Inspection) -> list[str]:
    """What the shapes tell of the network; nothing where it is not known."""
    if found.class_name is None:
        return []
    own = found.kwargs
    both = [line("clock", f"{found.clock}, {found.clock_from}")]
    both += [line("prediction", found.prediction or "")]
    both += [line("source", found.source)] if found.source else []
    if found.class_name == "SongUNet":
        side, attends = own["img_resolution"], own["attn_resolutions"]
        widths = [own["model_channels"] * multiplier for multiplier in own["channel_mult"]]
        levels = ", ".join(f"{width} at {side >> k}" for k, width in enumerate(widths))
        return [
            line("", f"images {own['in_channels']}x{side}x{side}, no classes"),
            line(
                "levels",
                f"channels {levels}; {own['num_blocks']} blocks a level, "
                f"attention at {', '.join(map(str, attends)) or 'the deepest alone'}",
            ),
            *both,
        ]
    side, channels = own["input_size"], own["in_channels"]
    null = " and the null class" if own.get("class_dropout_prob", 0.1) > 0 else ""
    sigma = own.get("learn_sigma")
    return [
        line(
            "",
            f"latents {channels}x{side}x{side}, patch {own['patch_size']}, "
            f"{found.tokens} tokens, {own['num_classes']} classes{null}",
        ),
        line(
            "head",
            "velocity and sigma channels (learn_sigma)" if sigma else "velocity channels",
        ),
        *both,
    ]


def _table(found: Inspection) -> list[str]:
    lines = []
    for row in found.contents:
        if row.kind == "state dict":
            text = f"{row.tensors:>6} tensors {row.values:>15,} values  {', '.join(row.dtypes)}"
            text += "  <- read" if row.name == found.weights.partition(".")[0] else ""
        elif row.kind == "optimizer":
            text = f"{row.parameters:>6} parameters with state, not read"
        elif row.kind == "settings":
            text = f"{row.entries:>6} " + ("entry" if row.entries == 1 else "entries")
        else:
            text = " " * 7 + str(row.value)[:50]
        lines.append(f"  {row.name or '(bare)':<14} {row.kind:<11} {text}")
    return lines


def _diff(found: Inspection) -> list[str]:
    """Missing, unexpected and mis-shaped names, runs of whole blocks on one line."""
    lines = [f"  - missing     {text}" for text in _grouped(found.missing)]
    lines += [f"  + unexpected  {text}" for text in _grouped(found.unexpected)]
    return lines + [f"  ~ shape       {text}" for text in first(_changed(found.misshaped))]


def _changed(misshaped: Mapping[str, Sequence[tuple[int, ...]]]) -> list[str]:
    """One line for a tensor that differs in the same way in several blocks."""
    places: dict[tuple[str, str], list[str]] = {}
    for name, (have, want) in misshaped.items():
        head, _, rest = name.partition(".")
        number, _, below = rest.partition(".")
        block = head == "blocks" and number.isdigit()
        key = (below if block else name, f"{list(have)}, expected {list(want)}")
        places.setdefault(key, []).append(number if block else "")
    return [
        (f"blocks.{'-'.join(dict.fromkeys((n[0], n[-1])))}.{name}" if n[0] else name) + f": {text}"
        for (name, text), n in places.items()
    ]


def _grouped(names: list[str]) -> list[str]:
    """["pos_embed", "blocks.12 to 27: 10 tensors each"]: blocks that lack the same are one line."""
    blocks: dict[int, list[str]] = {}
    lines = []
    for name in names:
        head, _, rest = name.partition(".")
        number, _, rest = rest.partition(".")
        if head == "blocks" and number.isdigit():
            blocks.setdefault(int(number), []).append(rest)
        else:
            lines.append(name)
    runs = groupby(sorted(blocks), key=lambda number: sorted(blocks[number]))
    for rests, run_of_blocks in runs:
        numbers = list(run_of_blocks)
        which = f"blocks.{numbers[0]}" + (f" to {numbers[-1]}" if len(numbers) > 1 else "")
        what = rests[0] if len(rests) == 1 else f"{len(rests)} tensors ({rests[0]}, ...)"
        lines.append(f"{which}: {what}" + (" each" if len(numbers) > 1 else ""))
    return first(lines)
