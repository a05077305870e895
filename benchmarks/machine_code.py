"""What a compiler has made of a kernel, read from its texts: PTX, ptxas's log, disassembly.

A kernel that streams has one main loop, and what runs once around it. How many instructions each
has says how long a device needs at least to issue them, which no count of bytes does.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
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


def ptxas_usage(log: str) -> dict[str, int]:
    """Registers of a kernel, and bytes of its spills and stack frame, from `ptxas -v`."""
    registers = re.findall(r"Used (\d+) registers", log)
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    if len(registers) != 1 or not frames:
        raise RuntimeError(f"ptxas -v did not report one kernel's registers and spills:\n{log}")
    stack, stores, loads = (sum(map(int, column)) for column in zip(*frames, strict=True))
    return {
        "registers": int(registers[0]),
        "spill_store_bytes": stores,
        "spill_load_bytes": loads,
        "stack_bytes": stack,
    }


def _code(ptx: str) -> str:
    """The instructions of PTX text, one a line: no comments, labels, directives or debug data."""
    lines = (line.partition("//")[0].strip() for line in ptx.splitlines())
    return "\n".join(line for line in lines if line.endswith(";") and line[0] not in ".;")


def global_access(ptx: str) -> dict[str, int]:
    """How often each global load and store occurs in the PTX: {"load 128": 2, "store 16": 1}."""
    found: Counter[str] = Counter()
    for op, modifiers in re.findall(r"\b(ld|st)((?:\.[\w:]+)+)\s", _code(ptx)):
        parts = modifiers.split(".")
        if "global" in parts:
            lanes = next((int(p[1:]) for p in parts if re.fullmatch(r"v\d", p)), 1)
            bits = int(re.search(r"\d+$", parts[-1])[0])
            found[f"{'load' if op == 'ld' else 'store'} {lanes * bits}"] += 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\S*\.global\S* .*?\], (\w+)", _code(ptx)):
        found[f"load {8 * int(size, 0)}"] += 1
    return dict(sorted(found.items()))


def atomics(ptx: str) -> int:
    return len(re.findall(r"\b(?:atom|red|cp\.reduce)\.", _code(ptx)))


def instructions(ptx: str) -> int:
    return len(_code(ptx).splitlines())


def narrow_accesses(access: dict[str, int]) -> int:
    return sum(count for name, count in access.items() if int(name.split()[1]) < 128)


def scalar_accesses(ttgir: str) -> int:
    """Loads and stores of a single value (seed, position, times): they cannot be wide."""
    lines = re.findall(r"^.*\btt\.(?:load|store)\b.*$", ttgir, re.MULTILINE)
    return sum("tensor<" not in line for line in lines)
