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

`benchmarks/README.md` says what is not in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.flops import on_meta
from mixflow_fast.cli.errors import quiet_without_reader
from mixflow_fast.kernels.activations.gelu import gelu_bytes
from mixflow_fast.kernels.activations.swiglu import swiglu_bytes
from mixflow_fast.kernels.attention.backends import REGISTRY
from mixflow_fast.kernels.attention.op import attention_bytes
from mixflow_fast.kernels.residual_norm.launch import Needs, residual_norm_bytes, scratch_shapes
from mixflow_fast.models import Transformer
from mixflow_fast.models.execution import Execution

FLASH = torch.ops.aten._scaled_dot_product_flash_attention
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
ATTENTION = {"_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"}
FREE = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "promote_types"}
# Zeros first, then a part of them.
TWO_LAUNCHES = {"constant_pad_nd", "slice_backward", "select_backward"}
WRITES_FIRST = {"copy_", "fill_", "zero_"}
PRODUCT, CORE, REST = "product", "attention", "rest"
PHASES = ("forward", "backward")


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


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors of nested tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


def _size(x: Tensor) -> int:
    """Bytes of the distinct elements."""
    sizes = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or not n)
    return torch.Size(sizes).numel() * x.element_size()


# Arguments of a fused operator by name, and (launches, bytes) besides attention itself.
Arguments = dict[str, Any]
Moved = tuple[int, int]


def _copies(*tensors: Tensor | None, rows: bool = False) -> Moved:
    """Copies of inputs that a launcher wants contiguous (`rows`: in the last dimension only)."""
    given = [x for x in tensors if x is not None]
    copied = [x for x in given if not (x.stride(-1) == 1 if rows else x.is_contiguous())]
    return len(copied), sum(_size(x) + x.nbytes for x in copied)


def _residual_norm(a: Arguments) -> Moved:
    """Both directions of `residual_norm`, and of `modulated_norm`, which has no h."""
    backward, scale = "needs" in a, a["scale"]
    x, per_token = a["x_new" if backward else "x"], scale.dim() == 3
    given = {name: a.get(name) is not None for name in ("h", "shift", "h_bias", "weight", "dx_new")}
    h, shift, h_bias, weight = (given[name] for name in ("h", "shift", "h_bias", "weight"))
    needs = Needs(*a["needs"]) if backward else Needs(True, h, h, shift, True, h_bias, weight)
    if not needs.dx or needs.dh != needs.dgate or not needs.dscale:
        raise ValueError(f"residual_norm_bytes knows passes with every gradient only, got {needs}")
    others = (a.get(name) for name in ("dy", "dx_new", "h", "gate", "shift"))
    copies, copied = _copies(x, scale, *others, rows=True)
    launches = 1
    if backward:  # kernels that add up partial sums
        partial, sums = scratch_shapes(*x.shape, needs, per_token)
        launches += (partial[2] > 0) + (sums[1] > 0)
    moved = residual_norm_bytes(
        x,
        per_token=per_token,
        backward=backward,
        has_h=needs.dh,
        has_shift=needs.dshift,
        has_h_bias=needs.dh_bias,
        has_weight=needs.dweight,
        has_dx_new=given["dx_new"],
        with_y=needs.y,
        norm=a["norm"],
        dtype=scale.dtype,
    )
    return launches + copies, moved + copied


def _activation(count: Callable[..., int]) -> Callable[[Arguments], Moved]:
    def cost(a: Arguments) -> Moved:
        copies, copied = _copies(a["x"], a.get("dy"))
        moved = count(a["x"], a["bias"], "dy" in a, a.get("with_y", False))
        return 1 + a.get("with_dbias", False) + copies, moved + copied

    return cost


def _attention(a: Arguments) -> Moved:
    batch, tokens, _, heads, head_dim = a["qkv"].shape
    backward = "dout" in a
    moved = attention_bytes(
        batch=batch,
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        dtype=a["qkv"].dtype,
        backend=a["backend"],
        norm=None if a["norm"] == "none" else a["norm"],
        rope=a["cos"] is not None,
        backward=backward,
    )
    if not backward:
        return int(moved > 0), moved
    copies, copied = _copies(a["dout"], a["out"])
    # A sum over all tokens for the gradients of the norms' weights and biases.
    sums = (a["q_weight"] is not None) + (a["q_bias"] is not None)
    return (moved > 0) + sums + copies, moved + copied


# Both directions of each operator.
FUSED: dict[str, Callable[[Arguments], Moved]] = {
    "residual_norm": _residual_norm,
    "modulated_norm": _residual_norm,
    "gelu": _activation(gelu_bytes),
    "swiglu": _activation(swiglu_bytes),
    "attention": _attention,
}


class Census(TorchDispatchMode):
    """Counts every operator below autograd, under the pass `phase`."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.table: Table = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if func.namespace == "mixflow_fast":
            given = zip((a.name for a in func._schema.arguments), args, strict=False)
            self._add_fused(name, {**dict(given), **(kwargs or {})}, [*tensors_in([args, out])])
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

    def _add_fused(self, name: str, arguments: Arguments, tensors: list[Tensor]) -> None:
        cost = FUSED.get(name.removesuffix("_backward"))
        if cost is None:
            raise ValueError(f"no formula for the operator mixflow_fast::{name}: add it")
        launches, moved = cost(arguments)
        if name.startswith("attention"):
            self._add(name, CORE, 1, 0)
            name += " around it"
        else:
            # Or the formula forgot a tensor.
            assert moved >= sum(_size(x) for x in tensors), name
        self._add(name, REST, launches, moved)

    def _add(self, name: str, kind: str, launches: int, moved: int) -> None:
        cost = self.table.setdefault((self.phase, name), Cost(kind))
        cost.launches += launches
        cost.bytes += moved


class OneAttention(TorchFunctionMode):
    """PyTorch's attention as its flash kernel; meta tensors would take two products apart."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:
            return FLASH(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


def census(net: Transformer, batch: int) -> tuple[Table, int]:
    """(Costs of both passes of a network on meta, bytes that the forward pass keeps)."""
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
    """A block of a network of `flops.NETWORKS`: of DiT-DH's encoder (part 0) or head (part 1)."""

    network: str
    batch: int
    part: int = 0

    def __str__(self) -> str:
        part = (" encoder", " head")[self.part] if self.network.startswith("DiTDH") else ""
        return f"{self.network}{part}, B={self.batch}"


SCENARIOS = (
    Scenario("SiT-XL/2 256", 256),
    Scenario("SiT-XL/2 256", 32),
    Scenario("SiT-XL/2 512", 64),
    Scenario("DiTDH-XL 256", 256),
    Scenario("DiTDH-XL 256", 256, part=1),
)
EAGER = Execution()
FUSED_FLASH = Execution(mode="fused", attention="flash2", compiled=False)
EXECUTIONS = (
    EAGER,
    FUSED_FLASH,
    replace(FUSED_FLASH, checkpointing="elementwise"),
    replace(FUSED_FLASH, attention="cudnn"),
)


@dataclass(frozen=True)
class Block:
    """One block's costs; `unit` is A and `kept` what autograd holds, in bytes."""

    table: Table
    unit: int
    kept: int

    def launches(self, phase: str | None = None, kind: str = REST) -> int:
        """Launches of a kind; those of both passes without `phase`."""
        return sum(c.launches for c in self._chosen(phase, kind))

    def passes(self, phase: str | None = None) -> float:
        """Bytes besides products and attention, in A; those of both passes without `phase`."""
        return sum(c.bytes for c in self._chosen(phase, REST)) / self.unit

    def _chosen(self, phase: str | None, kind: str) -> Iterator[Cost]:
        for (where, _), cost in self.table.items():
            if phase in (None, where) and cost.kind == kind:
                yield cost


def per_block(
    scenario: Scenario, execution: Execution, dtype: torch.dtype = torch.bfloat16
) -> Block:
    """One block between others, its weights of `dtype`, uncompiled.

    attention="auto" is PyTorch's flash kernel in mode eager, and unknown here in mode fused.
    """
    if execution.compiles:
        raise ValueError(f"the census counts what runs uncompiled, got {execution}")
    if execution.mode == "fused" and execution.attention not in REGISTRY:
        raise ValueError(
            f"attention must be a backend by name in mode fused, got {execution.attention}"
        )
    counted: list[tuple[Table, int]] = []
    for blocks in (2, 3):
        depth: int | tuple[int, int] = blocks
        if scenario.network.startswith("DiTDH"):
            depth = (2, blocks) if scenario.part else (blocks, 2)
        net = on_meta(scenario.network, depth=depth).to(dtype)
        counted.append(census(net.set_execution(execution), scenario.batch))
    (fewer, kept_by_fewer), (more, kept) = counted
    width = net._block_groups()[scenario.part][0].attn.proj.in_features
    tokens = (net.input_size // net.patch_size) ** 2
    difference = {key: cost - fewer.get(key, Cost(cost.kind)) for key, cost in more.items()}
    table = {key: cost for key, cost in difference.items() if cost}
    return Block(table, scenario.batch * tokens * width * dtype.itemsize, kept - kept_by_fewer)


def as_rows(scenario: Scenario, execution: Execution, block: Block) -> Iterator[dict[str, object]]:
    """One dictionary for each operator and pass of a block."""
    about = {"block": str(scenario), "unit": block.unit, "kept": block.kept}
    about |= {key: getattr(execution, key) for key in ("mode", "attention", "checkpointing")}
    for (phase, op), cost in block.table.items():
        yield {**about, "pass": phase, "op": op, **asdict(cost)}


def show(scenario: Scenario, execution: Execution, block: Block) -> None:
    """Print a block's operators, those that move most first, and their sums."""
    how = f"{execution.mode}, attention {execution.attention}"
    if execution.checkpointing != "none":
        how += f", checkpointing {execution.checkpointing}"
    print(f"\n{scenario}, {how}, bf16; A = {block.unit / 1e6:.1f} MB")
    by_op: dict[str, dict[str, Cost]] = defaultdict(dict)
    for (phase, op), cost in block.table.items():
        by_op[op][phase] = cost
    for op in sorted(by_op, key=lambda op: -sum(c.bytes for c in by_op[op].values())):
        text, kind = "", REST
        for phase in PHASES:
            cost = by_op[op].get(phase, Cost(kind))
            kind = cost.kind
            moved = f"{cost.bytes / block.unit:8.2f} A" if cost.bytes else " " * 10
            text += f"{cost.launches or '':>5} {moved}"
        print(f"  {op[:44]:<44}{text}{'' if kind == REST else '   not in the sum'}")
    sums = "".join(f"{block.launches(p):>5} {block.passes(p):8.2f} A" for p in PHASES)
    print(f"  {'sum':<44}{sums}")
    print(
        f"  both passes: {block.launches()} launches, {block.passes():.2f} A, "
        f"{block.passes() * block.unit / 1e9:.2f} GB; besides {block.launches(kind=PRODUCT)} "
        f"products, {block.launches(kind=CORE)} of attention; {block.kept / block.unit:.2f} A kept "
        "between the passes"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the census of every scenario and execution."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(argv)
    for scenario in SCENARIOS:
        for execution in EXECUTIONS:
            block = per_block(scenario, execution)
            if options.json:
                for row in as_rows(scenario, execution, block):
                    print(json.dumps(row))
            else:
                show(scenario, execution, block)
    return 0


if __name__ == "__main__":
    sys.exit(quiet_without_reader(main))
