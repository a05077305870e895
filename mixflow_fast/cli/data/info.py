"""`mixflow-fast data info`: what a set is, as its manifest says."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from mixflow_fast.files import existing_folder, user_path

# Listed elsewhere, or too long for a line.
_LEFT_OUT = {"shards", "files", "class_names", "checksum"}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "info",
        help="say what a set of images or latents is",
        description="Prints what the manifest of a set says: counts, sizes, classes, how it was "
        "made. Of a set that is not complete, how far it is. Reads no images.",
        epilog="example: mixflow-fast data info imagenet-256",
    )
    command.add_argument("set", type=user_path, help="folder that prepare or encode has made")
    command.add_argument("--json", action="store_true", help="the manifest itself")
    command.set_defaults(data_command=run)


def run(options: argparse.Namespace) -> int:
    from mixflow_fast.data.set_files import (
        MANIFEST,
        WORK,
        check_sizes,
        how_far,
        read_manifest,
        set_format,
    )

    root = existing_folder(options.set, "the folder of a set")
    progress = how_far(root)
    if not (root / MANIFEST).is_file() and progress is not None:
        settings = json.loads((root / WORK).read_text(encoding="utf-8"))
        if options.json:
            print(json.dumps({"complete": False, "done": progress[0], **settings}, indent=2))
            return 0
        print(f"{root}: not complete, {progress[0]} of {progress[1]} shards are done")
        print("\n".join(_lines(settings)))
        return 0
    manifest = read_manifest(root, set_format(root) or "")
    if options.json:
        print(json.dumps(manifest, indent=2, ensure_ascii=False))
        return 0
    print(_headline(root, manifest))
    print("\n".join(_lines(manifest)))
    try:
        check_sizes(root, manifest)
    except ValueError as error:
        print(f"warning: {error}")
    return 0


def _headline(root: Path, manifest: Mapping[str, object]) -> str:
    from mixflow_fast.data.set_files import all_files, bytes_of
    from mixflow_fast.messages import size_text

    count, buckets = manifest.get("count"), manifest.get("buckets")
    kind = manifest.get("kind", "examples")
    if isinstance(buckets, list):
        count, kind = sum(bucket["count"] for bucket in buckets), "captioned latents"
    examples = f"{count:,} {kind}" if isinstance(count, int) else "?"
    records = all_files(root, manifest)
    return f"{root}: {examples}, {len(records):,} files, {size_text(bytes_of(records))}"


def _lines(values: Mapping[str, object], indent: int = 2) -> list[str]:
    """A line a value, nested ones indented."""
    from mixflow_fast.messages import shorten

    lines = []
    for name, value in values.items():
        if value is None or value == "" or value == {}:  # not known, or there is none
            continue
        if name in _LEFT_OUT and not isinstance(value, int):
            if name == "class_names" and isinstance(value, list):
                lines.append(f"{'':{indent}}classes: {shorten(map(str, value))}")
            continue
        if isinstance(value, Mapping):
            lines += [f"{'':{indent}}{name}:", *_lines(value, indent + 2)]
        else:
            lines.append(f"{'':{indent}}{name}: {_text(value)}")
    return lines


def _text(value: object) -> str:
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return "; ".join(" ".join(_text(part) for part in item.values()) for item in value)
    if isinstance(value, list) and all(isinstance(item, float) for item in value):
        return ", ".join(f"{item:.6g}" for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
