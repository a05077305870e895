"""What a block moves and launches besides its matrix products: `python -m benchmarks.census`.

One forward and backward pass on meta tensors, which have shapes and no memory, so no GPU is
needed. A block is the difference of networks of three and of two blocks: their ends cancel. In
units of A = B N D itemsize, one pass over the residual stream:

* Operators of PyTorch read every input once (expanded ones: their distinct elements) and write
  every output; views are free.
* The fused operators move what the `*_bytes` function beside each of them says, with the partial
  sums, and launch what their launchers launch; inputs that a launcher would copy count as copied.
* Matrix products, convolutions and softmax(q k^T) v are launches of their own, and no bytes.
* Kept is what autograd holds between the passes, weights aside.

It counts traffic by design, in uncompiled modes. Caches, achieved bandwidth and the kernels that
cuBLAS and attention libraries launch inside a call are not in it.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.flops import on_meta
from mixflow_fast.kernels.activations.gelu import gelu_bytes
from mixflow_fast.kernels.activations.swiglu import swiglu_bytes
from mixflow_fast.kernels.attention.backends import REGISTRY
from mixflow_fast.kernels.attention.op import attention_bytes
from mixflow_fast.kernels.residual_norm.launch import Needs, residual_norm_bytes, scratch_shapes
from mixflow_fast.models import Transformer

aten = torch.ops.aten
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
ATTENTION = {"_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"}
FREE = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "promote_types"}
# Zeros first, then a part of them.
TWO_LAUNCHES = {"constant_pad_nd", "slice_backward", "select_backward"}
WRITES_FIRST = {"copy_", "fill_", "zero_"}
PRODUCT, CORE, REST = "product", "attention", "rest"


@dataclass
class Cost:
    """Launches and the bytes that they move; `kind` is one of the three above."""

    kind: str
    launches: int = 0
    bytes: int = 0

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.kind, self.launches - other.launches, self.bytes - other.bytes)

    def __bool__(self) -> bool:
        return bool(self.launches or self.bytes)


# (pass, operator) -> cost
Table = dict[tuple[str, str], Cost]


def tensors_in(values: Any) -> Iterator[Tensor]:
    for value in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)


def _size(x: Tensor) -> int:
    """Bytes of the distinct elements."""
    sizes = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or not n)
    return torch.Size(sizes).numel() * x.element_size()


# What the fused operators cost: arguments by name -> (launches, bytes), without attention itself.


def _copies(*tensors: Tensor | None, rows: bool = False) -> tuple[int, int]:
    """Of inputs that a launcher wants contiguous (`rows`: in the last dimension only)."""
    given = [x for x in tensors if x is not None]
    copied = [x for x in given if not (x.stride(-1) == 1 if rows else x.is_contiguous())]
    return len(copied), sum(_size(x) + x.nbytes for x in copied)


def _residual_norm(a: dict[str, Any]) -> tuple[int, int]:
    scale, h = a["scale"], a.get("h")
    copies, copied = _copies(a["x"], h, scale, a.get("gate"), a["shift"], rows=True)
    moved = residual_norm_bytes(
        a["x"],
        per_token=scale.dim() == 3,
        backward=False,
        has_h=h is not None,
        has_shift=a["shift"] is not None,
        has_h_bias=a.get("h_bias") is not None,
        has_weight=a["weight"] is not None,
        norm=a["norm"],
        dtype=scale.dtype,
    )
    return 1 + copies, moved + copied


def _residual_norm_backward(a: dict[str, Any]) -> tuple[int, int]:
    x, scale, needs = a["x_new"], a["scale"], Needs(*a["needs"])
    if not needs.dx or needs.dh != needs.dgate or not needs.dscale:
        raise ValueError(f"residual_norm_bytes knows passes with every gradient only, got {needs}")
    per_token = scale.dim() == 3
    copies, copied = _copies(
        a["dy"], x, scale, a["dx_new"], a["h"], a["gate"], a["shift"], rows=True
    )
    partial, sums = scratch_shapes(*x.shape, needs, per_token)
    moved = residual_norm_bytes(
        x,
        per_token=per_token,
        backward=True,
        has_h=needs.dh,
        has_shift=needs.dshift,
        has_h_bias=needs.dh_bias,
        has_weight=needs.dweight,
        has_dx_new=a["dx_new"] is not None,
        with_y=needs.y,
        norm=a["norm"],
        dtype=scale.dtype,
    )
    return 1 + (partial[2] > 0) + (sums[1] > 0) + copies, moved + copied


def _activation(count: Callable[..., int], backward: bool) -> Callable[..., tuple[int, int]]:
    def cost(a: dict[str, Any]) -> tuple[int, int]:
        copies, copied = _copies(a["x"], a.get("dy"))
        launches = 1 + bool(a.get("with_dbias")) + copies
        again = {"with_y": True} if a.get("with_y") else {}
        return launches, count(a["x"], a["bias"], backward, **again) + copied

    return cost


def _attention(a: dict[str, Any]) -> tuple[int, int]:
    B, N, _, H, K = a["qkv"].shape
    backward, rope = "dout" in a, a["cos"] is not None
    norm = None if a["norm"] == "none" else a["norm"]
    moved = attention_bytes(
        *(B, N, H, K, a["qkv"].dtype),
        backend=a["backend"],
        norm=norm,
        rope=rope,
        backward=backward,
    )
    copies, copied = _copies(a["dout"], a["out"]) if backward else (0, 0)
    weights = (a["q_weight"], a["q_bias"]) if backward else ()
    sums = sum(w is not None for w in weights)
    return bool(moved) + sums + copies, moved + copied


FUSED: dict[str, Callable[[dict[str, Any]], tuple[int, int]]] = {
    "residual_norm": _residual_norm,
    "modulated_norm": _residual_norm,
    "residual_norm_backward": _residual_norm_backward,
    "gelu": _activation(gelu_bytes, backward=False),
    "gelu_backward": _activation(gelu_bytes, backward=True),
    "swiglu": _activation(swiglu_bytes, backward=False),
    "swiglu_backward": _activation(swiglu_bytes, backward=True),
    "attention": _attention,
    "attention_backward": _attention,
}


class Census(TorchDispatchMode):
    """Counts every operator below autograd.

    Attributes:
        phase: the pass that operators are counted under.
        table: what was counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.table: Table = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if func.namespace == "mixflow_fast":
            arguments = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            if name not in FUSED:
                raise ValueError(f"no formula for the operator mixflow_fast::{name}: add it")
            if name.startswith("attention"):
                self._add(name, CORE, 1, 0)
                name += " around it"
                launches, moved = _attention(arguments | (kwargs or {}))
            else:
                launches, moved = FUSED[name](arguments | (kwargs or {}))
                # Or the formula forgot a tensor.
                assert moved >= sum(_size(x) for x in [*tensors_in(args), *tensors_in(out)]), name
            self._add(name, REST, launches, moved)
        elif name in PRODUCTS:
            self._add(name, PRODUCT, 1, 0)
        elif name in ATTENTION:
            self._add(name, CORE, 1, 0)
        elif not func.is_view and name not in FREE:
            inputs = args[1:] if name in WRITES_FIRST else args
            read = {id(x): _size(x) for x in tensors_in(inputs)}
            written = sum(_size(x) for x in tensors_in(out))
            launches = 2 if name in TWO_LAUNCHES else 1
            self._add(name, REST, launches, sum(read.values()) + written)
        return out

    def _add(self, name: str, kind: str, launches: int, moved: int) -> None:
        cost = self.table.setdefault((self.phase, name), Cost(kind))
        cost.launches += launches
        cost.bytes += moved


class OneAttention(TorchFunctionMode):
    """PyTorch's attention as its flash kernel; meta tensors would take two products apart."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:
            return aten._scaled_dot_product_flash_attention(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


def census(net: Transformer, batch: int) -> tuple[Table, int]:
    """Counts a forward and backward pass of a network on meta, in the dtype of its weights.

    Returns:
        (the costs, bytes that the forward pass keeps).
    """
    kept = {p.untyped_storage()._cdata: p.untyped_storage() for p in net.parameters()}
    weights = sum(storage.nbytes() for storage in kept.values())

    def keep(x: Tensor) -> Tensor:
        # The storage itself is held: a freed one's address could come again.
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    shape = batch, net.in_channels, net.input_size, net.input_size
    with torch.device("meta"):
        x, t, y = torch.zeros(shape), torch.zeros(batch), torch.zeros(batch, dtype=torch.int64)
    with OneAttention(), Census() as mode:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = net(x, t, y)
        total = sum(storage.nbytes() for storage in kept.values()) - weights
        mode.phase = "backward"
        out.backward(torch.empty_like(out))
    return mode.table, total


@dataclass(frozen=True)
class Scenario:
    """A kind of block: its network as in `flops.NETWORKS`, images, and which run of blocks."""

    network: str
    batch: int
    part: int = 0

    def __str__(self) -> str:
        part = ("", "", " head")[self.part + self.network.startswith("DiTDH")]
        part = part or " encoder" * self.network.startswith("DiTDH")
        return f"{self.network}{part}, B={self.batch}"


SCENARIOS = (
    Scenario("SiT-XL/2 256", 256),
    Scenario("SiT-XL/2 256", 32),
    Scenario("SiT-XL/2 512", 64),
    Scenario("DiTDH-XL 256", 256),
    Scenario("DiTDH-XL 256", 256, part=1),
)
# How the blocks are run: (mode, attention backend, checkpointing).
MODES = (
    ("eager", "auto", "none"),
    ("fused", "flash2", "none"),
    ("fused", "flash2", "elementwise"),
    ("fused", "cudnn", "none"),
)


@dataclass(frozen=True)
class Block:
    """One block's costs; `unit` is A and `kept` what autograd holds, in bytes."""

    table: Table
    unit: int
    kept: int

    def launches(self, phase: str | None = None, kind: str = REST) -> int:
        return sum(c.launches for c in self._chosen(phase, kind))

    def passes(self, phase: str | None = None) -> float:
        """Bytes besides products and attention, in A; both passes without `phase`."""
        return sum(c.bytes for c in self._chosen(phase, REST)) / self.unit

    def _chosen(self, phase: str | None, kind: str) -> Iterator[Cost]:
        for (where, _), cost in self.table.items():
            if phase in (None, where) and cost.kind == kind:
                yield cost


def per_block(
    scenario: Scenario,
    mode: str,
    attention: str,
    checkpointing: str = "none",
    dtype: torch.dtype = torch.bfloat16,
) -> Block:
    """One block between others.

    Args:
        scenario: which.
        mode: "eager" or "fused".
        attention: the backend; "auto" is PyTorch's flash kernel in mode eager, and unknown here in
            mode fused.
        checkpointing: "none" or "elementwise".
    """
    tables, kept = [], []
    for blocks in (2, 3):
        depth: Any = blocks
        if scenario.network.startswith("DiTDH"):
            depth = (2, blocks) if scenario.part else (blocks, 2)
        net = on_meta(scenario.network, depth=depth).to(dtype)
        net.set_execution(
            mode=mode, attention=attention, checkpointing=checkpointing, compiled=False
        )
        if mode == "fused" and attention not in REGISTRY:
            raise ValueError(f"attention must be a backend by name in mode fused, got {attention}")
        for found, seen in zip((tables, kept), census(net, scenario.batch), strict=True):
            found.append(seen)
    fewer, more = tables
    width = net._block_groups()[scenario.part][0].attn.proj.in_features
    tokens = (net.input_size // net.patch_size) ** 2
    difference = {key: cost - fewer.get(key, Cost(cost.kind)) for key, cost in more.items()}
    return Block(
        {key: cost for key, cost in difference.items() if cost},
        scenario.batch * tokens * width * dtype.itemsize,
        kept[1] - kept[0],
    )


def as_rows(
    scenario: Scenario, mode: str, attention: str, checkpointing: str, block: Block
) -> list[dict[str, Any]]:
    about = {"block": str(scenario), "mode": mode, "attention": attention}
    about |= {"checkpointing": checkpointing, "unit": block.unit, "kept": block.kept}
    return [
        {**about, "pass": phase, "op": op, "kind": c.kind, "launches": c.launches, "bytes": c.bytes}
        for (phase, op), c in block.table.items()
    ]


def show(scenario: Scenario, mode: str, attention: str, checkpointing: str, block: Block) -> None:
    again = "" if checkpointing == "none" else f", checkpointing {checkpointing}"
    unit = f"A = {block.unit / 1e6:.1f} MB"
    print(f"\n{scenario}, {mode}, attention {attention}{again}, bf16; {unit}")
    phases = ("forward", "backward")
    by_op: dict[str, dict[str, Cost]] = defaultdict(dict)
    for (phase, op), cost in block.table.items():
        by_op[op][phase] = cost
    for op, costs in sorted(
        by_op.items(), key=lambda item: -sum(c.bytes for c in item[1].values())
    ):
        cells = (costs.get(phase, Cost(REST)) for phase in phases)
        kind = next(iter(costs.values())).kind
        text = "".join(
            f"{c.launches or '':>5} " + (f"{c.bytes / block.unit:8.2f} A" if c.bytes else " " * 10)
            for c in cells
        )
        print(f"  {op[:44]:<44}{text}{'' if kind == REST else '   not in the sum'}")
    sums = "".join(f"{block.launches(p):>5} {block.passes(p):8.2f} A" for p in phases)
    others = block.launches(kind=PRODUCT), block.launches(kind=CORE)
    print(f"  {'sum':<44}{sums}")
    print(
        f"  both passes: {block.launches()} launches, {block.passes():.2f} A, "
        f"{block.passes() * block.unit / 1e9:.2f} GB; besides {others[0]} products, "
        f"{others[1]} of attention; {block.kept / block.unit:.2f} A kept between the passes"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the census of every scenario and mode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(argv)
    for scenario in SCENARIOS:
        for how in MODES:
            block = per_block(scenario, *how)
            if options.json:
                for row in as_rows(scenario, *how, block):
                    print(json.dumps(row))
            else:
                show(scenario, *how, block)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
