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

_FLOAT = ("FFMA", "FFMA2", "FMUL", "FMUL2", "FADD", "FADD2", "MUFU", "I2FP", "I2F")
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
        made = {}
        if one.opcode in _FLOAT:
            for register, name, operands in _lanes(one):
                given = [_read(operand, values) for operand in operands]
                made[register] = value = _computed(name, given)
                if {x.kind for x in given[:2]} == {"radius", "turn"}:
                    found.add(value.formula)
        else:
            made = _moved(one, values)
        values |= made
    return sorted(found)


def _lanes(one: Instruction) -> list[tuple[str, str, list[str]]]:
    """(register written, name, operands) of an instruction: two of one that computes a pair."""
    target, *operands = one.operands
    if not one.opcode.endswith("2"):
        return [(_register(target), one.name, operands)]
    first = int(_register(target).removeprefix("R"))
    name = one.opcode.removesuffix("2") + one.name.removeprefix(one.opcode)
    return [(f"R{first + i}", name, [_lane(x, i) for x in operands]) for i in range(2)]


def _lane(operand: str, i: int) -> str:
    """The register of a lane: of a pair its own, else the same for both."""
    operand = operand.replace(".reuse", "")
    pair = re.fullmatch(r"(-?\|?)R(\d+)(\|?)\.F32x2\.HI_LO", operand)
    return f"{pair[1]}R{int(pair[2]) + i}{pair[3]}" if pair else operand.removesuffix(".F32")


def _moved(one: Instruction, values: dict[str, _Value]) -> dict[str, _Value]:
    """What an instruction that computes no float leaves in registers."""
    target, *operands = one.operands
    if one.name in _MOVES:
        return {_register(target): _read(operands[-1], values, bits=True)}
    if one.opcode == "HFMA2" and operands[:2] == ["-RZ", "RZ"]:
        # Two halves of 16 bits that are the bits of a float.
        high, low = (float(operand) for operand in operands[2:4])
        return {_register(target): _constant(struct.pack("<ee", low, high))}
    if one.name == "LOP3.LUT" and operands[1:4] == ["0x80000000", "RZ", "0x3c"]:
        value = _read(operands[0], values)
        if value is not _WORD:  # an exclusive or with the first bit is the sign
            return {_register(target): replace(value, negative=not value.negative)}
    return dict.fromkeys(_written(one), _WORD)


def _computed(name: str, given: list[_Value]) -> _Value:
    opcode = name.split(".")[0]
    if opcode in ("FFMA", "FMUL"):
        # A product has no order and one sign.
        sign = "-" if given[0].negative != given[1].negative else ""
        text = sign + " * ".join(sorted(value.formula for value in given[:2]))
        text += f" + {given[2]}" if opcode == "FFMA" else ""
        # A root is a product with the reciprocal root on some architectures.
        root = opcode == "FMUL" and any("MUFU.RSQ(" in x.formula[:9] for x in given[:2])
        return _Value(f"{name}({text})", "radius" if root else "")
    if opcode == "FADD":
        return _Value(f"{name}({' + '.join(sorted(map(str, given[:2])))})")
    name = name.replace("I2FP.F32.", "I2F.")  # two units, one result
    kind = {"MUFU.SQRT": "radius", "MUFU.SIN": "turn", "MUFU.COS": "turn"}.get(name, "")
    return _Value(f"{name}({given[0]})", kind)


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
    return replace(value, negative=not value.negative) if negative else value


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
