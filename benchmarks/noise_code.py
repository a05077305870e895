"""By which instructions a kernel makes a normal number: `compile_report`'s part.

Every kernel of the objective must make the same noise, and a compiler is free to fuse a product
with the sum after it in one and not in the other. The machine code is executed with formulas for
values: what integers are made of is left out ("word"), what floats are made of is kept.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence

from benchmarks.machine_code import Instruction

_FLOAT = ("FFMA", "FMUL", "FADD", "MUFU", "I2FP", "I2F")
_MOVES = ("MOV", "UMOV", "IMAD.MOV.U32", "IMAD.U32")


def normal_formulas(instructions: Sequence[Instruction]) -> list[str]:
    """The distinct formulas of products of a radius and a sine or cosine, as the code has them.

    In the order of addresses, which is that of execution where nothing jumps over what it needs.
    """
    values: dict[str, str] = {}
    found = set()
    for one in instructions:
        if len(one.operands) < 2:
            continue
        target, *operands = one.operands
        if one.opcode in _FLOAT:
            formula = _formula(one, [_value(operand, values) for operand in operands])
            if re.match(r"F(?:FMA|MUL)\S*\(", formula) and _is_normal(formula):
                found.add(formula)
            values[_register(target)] = formula
        elif one.name in _MOVES:
            values[_register(target)] = _value(operands[-1], values, bits=True)
        elif one.opcode == "HFMA2" and operands[:2] == ["-RZ", "RZ"]:
            halves = [float(operand) for operand in operands[2:4]]
            values[_register(target)] = _number(struct.unpack("<f", _halves(*halves))[0])
        else:
            for register in _written(one):
                values[register] = "word"
    return sorted(found)


def _is_normal(formula: str) -> bool:
    """Whether a product has a radius for one factor and a sine or cosine for the other."""
    factors = formula[formula.index("(") + 1 :].split(" * ")[:2]
    kinds = {part for x in factors for part in ("SQRT", "RSQ", "SIN", "COS") if f"MUFU.{part}" in x}
    outer = [re.match(r"-?MUFU\.(SIN|COS)", factor) for factor in factors]
    return any(outer) and bool(kinds & {"SQRT", "RSQ"})


def _formula(one: Instruction, values: list[str]) -> str:
    name = one.name.replace(".reuse", "")
    if one.opcode in ("FFMA", "FMUL"):
        negative = sum(value.startswith("-") for value in values[:2]) % 2
        # A product has no order and one sign.
        factors = sorted(value.removeprefix("-") for value in values[:2])
        product = ("-" if negative else "") + " * ".join(factors)
        return f"{name}({product}{' + ' + values[2] if one.opcode == 'FFMA' else ''})"
    if one.opcode == "FADD":
        return f"{name}({' + '.join(sorted(values[:2]))})"
    return f"{name}({values[0]})"


def _register(operand: str) -> str:
    return operand.replace(".reuse", "").strip("-|")


def _value(operand: str, values: dict[str, str], bits: bool = False) -> str:
    """The formula of an operand; `bits`: a number is the bits of a float."""
    text = operand.replace(".reuse", "")
    sign, text = ("-", text[1:]) if text.startswith("-") else ("", text)
    size = text.startswith("|")
    text = text.strip("|")
    if text in ("RZ", "URZ"):
        return "0"
    if re.fullmatch(r"U?R\d+", text):
        value = values.get(text, "word")
    elif bits and re.fullmatch(r"0x[0-9a-f]+", text):
        value = _number(struct.unpack("<f", struct.pack("<I", int(text, 16)))[0])
    else:
        try:
            value = _number(float(text))
        except ValueError:
            value = "word"
    value = f"|{value}|" if size else value
    if sign and value.startswith("-"):
        return value[1:]
    return sign + value


def _number(value: float) -> str:
    return f"{value:.9g}"


def _halves(high: float, low: float) -> bytes:
    return struct.pack("<ee", low, high)


def _written(one: Instruction) -> list[str]:
    """The registers that an instruction writes, where it writes several in a row."""
    match = re.fullmatch(r"(U?R)(\d+)", _register(one.operands[0]))
    if not match:
        return []
    count = 4 if ".128" in one.name else 2 if re.search(r"\.(?:WIDE|64)\b", one.name) else 1
    return [f"{match[1]}{int(match[2]) + i}" for i in range(count)]
