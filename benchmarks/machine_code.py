"""The machine code of a compiled kernel, read from a disassembly: `benchmarks.compile_report`'s part.

A kernel that streams has one main loop, and what runs once around it. How many instructions each
has says how long a device needs at least to issue them, which no count of bytes does.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixflow_fast.kernels import runtime


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly.

    Attributes:
        name: the opcode with its modifiers: "LDG.E.128".
        operands: what stands after it, as it is printed.
        predicate: "@P0" or "@!P0", or nothing.
        labels: of jumps that arrive here.
    """

    name: str
    operands: tuple[str, ...]
    predicate: str
    labels: tuple[str, ...]

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]


@dataclass(frozen=True)
class Code:
    """The instructions of a kernel: those of its main loop, and those that a thread meets once."""

    loop: tuple[Instruction, ...]
    once: tuple[Instruction, ...]


def disassemble(cubin: bytes) -> str:
    """The text of Triton's own nvdisasm."""
    tool = Path(runtime.triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    return done.stdout


def parse(text: str) -> list[Instruction]:
    """The instructions in the order of their addresses."""
    found, labels = [], []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels.append(label[1])
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;", line):
            operands = tuple(part.strip() for part in match[3].split(",") if part.strip())
            found.append(Instruction(match[2], operands, match[1] or "", tuple(labels)))
            labels = []
    return found


def _loops(instructions: Sequence[Instruction]) -> list[tuple[int, int]]:
    """First and last index of every jump back and what lies between."""
    places = {label: i for i, one in enumerate(instructions) for label in one.labels}
    loops = []
    for i, one in enumerate(instructions):
        target = re.search(r"\.L_x_\d+", " ".join(one.operands)) if one.opcode == "BRA" else None
        # After its end a kernel jumps to itself for ever: padding.
        if target and places.get(target[0], i) < i:
            loops.append((places[target[0]], i))
    return loops


def split(instructions: Sequence[Instruction]) -> Code:
    """The longest loop, and all before it and after it up to the kernel's end.

    Branches count as if both sides were taken. Without a loop everything runs once.
    """
    loops = _loops(instructions)
    first, last = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, -1))
    rest = instructions[last + 1 :]
    # What follows the last unconditional EXIT are subroutines (division's slow ways) and padding.
    end = next((i for i, one in enumerate(rest) if one.name == "EXIT" and not one.predicate), -1)
    return Code(tuple(instructions[first : last + 1]), (*instructions[:first], *rest[: end + 1]))


def access_bits(instructions: Sequence[Instruction]) -> list[int]:
    """Bits that a thread moves at once, for each access to global memory."""
    found = []
    for one in instructions:
        if one.opcode in ("LDG", "STG"):
            width = re.search(r"\.(?:[US])?(8|16|64|128|256)\b", one.name)
            found.append(int(width[1]) if width else 32)
    return found
