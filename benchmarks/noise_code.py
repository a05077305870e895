"""By which instructions a kernel makes a normal number: `compile_report`'s part.

Every kernel of the objective must make the same noise, and a compiler is free to fuse a product
with the sum after it in one and not in the other. The machine code is executed with formulas for
values: what integers are made of is left out ("word"), what floats are made of is kept.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.machine_code import Instruction

_FLOAT = ("FFMA", "FMUL", "FADD", "MUFU", "I2FP", "I2F")
_MOVES = ("MOV", "UMOV", "IMAD.MOV.U32", "IMAD.U32")


@dataclass(frozen=True)
class _Value:
    """What a register holds: a formula and its sign; kind "radius", "turn" (sine, cosine) or ""."""

    formula: str
    kind: str = ""
    negative: bool = False

    def __str__(self) -> str:
        return ("-" if self.negative else "") + self.formula


_WORD = _Value("word")


def normal_formulas(instructions: Sequence[Instruction]) -> list[str]:
    """The distinct formulas of products of a radius and a sine or cosine, as the code has them.

    In the order of addresses, which is that of execution where nothing jumps over what it needs.
    """
    values: dict[str, _Value] = {}
    found = set()
    for one in instructions:
        if len(one.operands) < 2:
            continue
        target, *operands = one.operands
        if one.opcode in _FLOAT:
            given = [_read(operand, values) for operand in operands]
            value = _computed(one, given)
            if {x.kind for x in given[:2]} == {"radius", "turn"}:
                found.add(value.formula)
            values[_register(target)] = value
        elif one.name in _MOVES:
            values[_register(target)] = _read(operands[-1], values, bits=True)
        elif one.opcode == "HFMA2" and operands[:2] == ["-RZ", "RZ"]:
            # Two halves of 16 bits that are the bits of a float.
            high, low = (float(operand) for operand in operands[2:4])
            values[_register(target)] = _constant(struct.pack("<ee", low, high))
        else:
            for register in _written(one):
                values[register] = _WORD
    return sorted(found)


def _computed(one: Instruction, given: list[_Value]) -> _Value:
    if one.opcode in ("FFMA", "FMUL"):
        # A product has no order and one sign.
        sign = "-" if given[0].negative != given[1].negative else ""
        text = sign + " * ".join(sorted(value.formula for value in given[:2]))
        text += f" + {given[2]}" if one.opcode == "FFMA" else ""
        # A root is a product with the reciprocal root on some architectures.
        root = one.opcode == "FMUL" and any("MUFU.RSQ(" in x.formula[:9] for x in given[:2])
        return _Value(f"{one.name}({text})", "radius" if root else "")
    if one.opcode == "FADD":
        return _Value(f"{one.name}({' + '.join(sorted(map(str, given[:2])))})")
    kind = {"MUFU.SQRT": "radius", "MUFU.SIN": "turn", "MUFU.COS": "turn"}.get(one.name, "")
    return _Value(f"{one.name}({given[0]})", kind)


def _register(operand: str) -> str:
    return operand.replace(".reuse", "").strip("-|")


def _read(operand: str, values: dict[str, _Value], bits: bool = False) -> _Value:
    """The value of an operand; `bits`: a number is the bits of a float."""
    text = operand.replace(".reuse", "")
    negative, text = text.startswith("-"), text.removeprefix("-")
    size, text = text.startswith("|"), text.strip("|")
    if text in ("RZ", "URZ"):
        return _Value("0")
    if re.fullmatch(r"U?R\d+", text):
        value = values.get(text, _WORD)
    elif bits and re.fullmatch(r"0x[0-9a-f]+", text):
        value = _constant(struct.pack("<I", int(text, 16)))
    else:
        try:
            value = _Value(f"{float(text):.9g}")
        except ValueError:
            value = _WORD
    if size:
        value = _Value(f"|{value.formula}|", value.kind)
    return replace(value, negative=value.negative != negative)


def _constant(bits: bytes) -> _Value:
    number = struct.unpack("<f", bits)[0]
    return _Value(f"{abs(number):.9g}", negative=number < 0)


def _written(one: Instruction) -> list[str]:
    """The registers that an instruction writes, where it writes several in a row."""
    match = re.fullmatch(r"(U?R)(\d+)", _register(one.operands[0]))
    if not match:
        return []
    count = 4 if ".128" in one.name else 2 if re.search(r"\.(?:WIDE|64)\b", one.name) else 1
    return [f"{match[1]}{int(match[2]) + i}" for i in range(count)]
