"""stand-in until the toy is there."""

from pathlib import Path


def toy_of(path: Path, seed: int, steps: int):
    return None
