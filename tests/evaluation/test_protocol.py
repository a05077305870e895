"""Protocols: what is hashed, in which form, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json

import pytest

from mixflow_fast.evaluation.protocol import (
    PARTS,
    SECTIONS,
    Protocol,
    check_comparable,
    differences,
)

RECORD: dict[str, object] = {
    "sampler": {
        "method": "sde_euler", "intervals": 250, "nfe": 250, "network_calls": 250, "remedy": None,
        "grid": {"shift": 1.0, "ends": [0.0, 0.96]},
        "sde": {"form": "sigma", "norm": 1.0, "last": "mean", "size": 0.04},
    },
    "guidance": {"kind": "cfg", "scale": 1.5, "channels": 3, "interval": [0.0, 1.0],
                 "guide_sha256": None},
    "source": {"kind": "mixed", "kappa": "class", "mode": "moments", "w": 0.5},
    "precision": {"network": "bf16", "state": "fp32", "decode": "fp32", "tf32": False},
    "set": {"n": 50000, "seed": 0, "ids": "0..n-1", "labels": "balanced", "K": 1000},
    "decoder": {"kind": "sdvae", "sha256": "ab" * 32, "scale": 0.18215},
    "image": {"size": 256, "quantisation": "round"},
    "extractors": [{"id": "inception", "sha256": "cd" * 32, "dtype": "fp32", "resize": "tf1"}],
    "reference": {"name": "VIRTUAL", "sha256": "ef" * 32, "n": 50000},
    "metrics": {"ddof": 1, "splits": 10, "k": 3, "pr_fp16": False},
}  # fmt: skip


def paths(value: object, where: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Of every field of RECORD."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, below in inner:
        deeper = isinstance(below, dict | list)
        found += paths(below, (*where, key)) if deeper else [(*where, key)]
    return found


def changed(path: tuple[object, ...]) -> dict[str, object]:
    record = copy.deepcopy(RECORD)
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    old = inner[path[-1]]
    inner[path[-1]] = "other" if old is None or isinstance(old, str) else float(old) + 0.5
    return record


def test_all_sections_are_tried() -> None:
    assert tuple(RECORD) == SECTIONS and len(paths(RECORD)) == 47
    assert set(SECTIONS) == {name for part in PARTS.values() for name in part}


@pytest.mark.parametrize("path", paths(RECORD), ids=lambda path: ".".join(map(str, path)))
def test_each_field_alone_changes_the_hash_and_is_named(path: tuple[object, ...]) -> None:
    mine, other = Protocol(RECORD), Protocol(changed(path))
    assert mine.sha256 != other.sha256 and mine.short != other.short and mine != other
    name = ".".join(map(str, path))
    assert [d.field for d in differences([mine, other])] == [name]
    for part, sections in PARTS.items():
        same = mine.part(part).sha256 == other.part(part).sha256
        assert same == (path[0] not in sections)
    with pytest.raises(ValueError, match=f"different protocols.*{name} = .* against .*--allow"):
        check_comparable({"before": mine, "after": other})
    (allowed,) = check_comparable({"before": mine, "after": other}, [name])
    assert str(allowed).startswith(f"{name} = ")
    assert check_comparable({"before": mine, "after": other}, [str(path[0])]) == [allowed]


def test_the_text_is_json_in_one_form() -> None:
    def backwards(value: object) -> object:
        if isinstance(value, dict):
            return {key: backwards(value[key]) for key in reversed(value)}
        return [*map(backwards, value)] if isinstance(value, list) else value

    mine, other = Protocol(RECORD), Protocol(backwards(RECORD))
    assert mine == other and mine.sha256 == other.sha256 and hash(mine) == hash(other)
    assert json.loads(mine.text) == mine.record and " " not in mine.text
    assert mine.text.startswith('{"decoder":{"kind":"sdvae","scale":0.18215,"sha256":"abab')
    assert mine.sha256 == hashlib.sha256(mine.text.encode()).hexdigest()
    assert mine.short == mine.sha256[:12] and repr(mine) == f"Protocol({mine.short})"
    # What a file gives back, tuples for lists, and a scale of 1 for one of 1.0.
    assert Protocol(json.loads(mine.text)) == mine
    grid = {"shift": 1, "ends": (0, 0.96)}
    assert mine.with_sections({"sampler": RECORD["sampler"] | {"grid": grid}}) == mine
    assert Protocol({"metrics": {"k": True}}) != Protocol({"metrics": {"k": 1}})
    # The hash is part of files: it may not change by itself.
    assert Protocol({"set": {"n": 2, "seed": 0}}).short == "757fc483d8bb"


def test_equal_protocols_are_compared_and_unknown_things_refused() -> None:
    mine = Protocol(RECORD)
    assert check_comparable({"a": mine, "b": Protocol(RECORD), "c": mine}) == []
    assert check_comparable({"a": mine}, ["sampler"]) == []
    with pytest.raises(ValueError, match="no such field; did you mean 'sampler.method'"):
        check_comparable({"a": mine}, ["sampler.methods"])
    both = changed(("set", "seed")) | {"image": {"size": 512, "quantisation": "floor"}}
    with pytest.raises(ValueError, match="image.quantisation = 'round' against 'floor'; image.siz"):
        check_comparable({"a": mine, "b": Protocol(both)}, ["set"])
    # A section that one of them lacks is a difference, not a reason to look away.
    less = {key: value for key, value in RECORD.items() if key != "image"}
    found = differences([mine, Protocol(less)])
    assert [(d.field, d.values[1]) for d in found] == [
        ("image.quantisation", None),
        ("image.size", None),
    ]
    # A field that is null is another record than none, and has another hash.
    none = {"sampler": {"method": "euler", "remedy": None}}
    pair = [Protocol(none), Protocol({"sampler": {"method": "euler"}})]
    assert pair[0] != pair[1] and [d.field for d in differences(pair)] == ["sampler.remedy"]
    with pytest.raises(ValueError, match="sampler.remedy = None against absent"):
        check_comparable(dict(zip("ab", pair, strict=True)))
    with pytest.raises(ValueError, match="no section 'samplers'; did you mean 'sampler'"):
        Protocol({"samplers": {}})
    with pytest.raises(ValueError, match="guidance.scale of a protocol must be finite, got nan"):
        Protocol({"guidance": {"scale": float("nan")}})
    with pytest.raises(ValueError, match="set.ids of a protocol must be a plain value .* got set"):
        Protocol({"set": {"ids": {1}}})
    with pytest.raises(ValueError, match="schema 'mixflow-protocol/2', expected 'mixflow-prot"):
        Protocol({"schema": "mixflow-protocol/2"})
    with pytest.raises(ValueError, match="the parts sampling, features, reference, got 'images'"):
        mine.part("images")
