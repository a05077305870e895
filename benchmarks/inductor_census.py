"""`benchmarks.census` for compiled blocks, without a GPU: `python -m benchmarks.inductor_census`.

One block is traced forward and backward and partitioned as torch.compile does it, moved to a CUDA
device that is not there, and lowered, scheduled and written out by TorchInductor, with the
properties of an H200 filled in; nothing is compiled by Triton or launched. Kernels and their bytes
are those of Inductor's own schedule. Fused operators count as in `benchmarks.census`.

Blocks are compiled one by one (`models/execution.py`), so the whole of one block is counted. What
autograd adds between blocks is not in it: the sum of the conditions' gradients.

Functions without a stable interface are used throughout: made for torch 2.13, other versions may
need another stub.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import TorchFunctionMode

from benchmarks import census
from benchmarks.census import CORE, FUSED, MODES, PRODUCT, REST, SCENARIOS, Block, Cost, Scenario
from benchmarks.flops import on_meta
from mixflow_fast.models.transformer import _fused_block, _plain_block

CUDA = torch.device("cuda", 0)
H200 = dict(
    warp_size=32,
    multi_processor_count=132,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
)
MADE_FOR = "2.13"
_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default


class _NoCopies(TorchFunctionMode):
    """PyTorch without CUDA has no guard for the device that it would copy on."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.copy_ and args[0].device == CUDA:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """What Inductor asks the device and Triton's driver, answered for an H200."""
    from torch._inductor import config, scheduler
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    hints = DeviceProperties(type="cuda", index=0, cc=90, major=9, **H200)
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, total_memory=140 * 2**30, gcnArchName="", **H200
    )
    active = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    with ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "get_device_properties", lambda *_: properties),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "current_device", lambda: 0),
            (scheduler, "has_triton", lambda *_: True),
            (torch.utils._triton, "triton_hash_with_backend", lambda: ""),
            (DeviceProperties, "create", lambda _: hints),
            (driver, "_active", active),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(config.patch(compile_threads=1))
        stack.enter_context(_NoCopies())
        yield


def _trace(
    fn: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], mode: FakeTensorMode
) -> list[fx.GraphModule]:
    """[forward, backward] graphs."""
    from torch._functorch.aot_autograd import aot_function, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return make_boxed_func(copy.deepcopy(graph).forward)

    traced = aot_function(
        fn,
        fw_compiler=keep,
        bw_compiler=keep,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    with mode, census.OneAttention():
        outs = traced(*inputs)
        torch.autograd.backward(outs, [torch.empty_like(out) for out in outs])
    assert len(graphs) == 2, len(graphs)
    return graphs


def _values(graph: fx.GraphModule) -> list[Any]:
    return [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]


def _move(graph: fx.GraphModule, mode: FakeTensorMode) -> None:
    """The graph as if it had been traced on a GPU."""

    def moved(value: Any) -> Any:
        if not isinstance(value, FakeTensor):
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)

    for node in graph.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = torch.utils._pytree.tree_map(moved, node.meta["val"])
        node.meta.pop("tensor_meta", None)
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": CUDA}
    graph.recompile()


def _lower(graph: fx.GraphModule, mode: FakeTensorMode) -> list[tuple[str, Cost]]:
    """What Inductor makes of a graph."""
    from torch._inductor import compile_fx, ir
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    _move(graph, mode)
    inputs = _values(graph)
    with V.set_fake_mode(mode):
        compile_fx.view_to_reshape(graph)
        compile_fx._recursive_post_grad_passes(graph, is_inference=False)
        found = [cost for node in graph.graph.nodes for cost in _fused_operator(node)]
        lowering = GraphLowering(graph, example_inputs=inputs)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            code, _ = lowering.codegen()
            kernels = 0
            for node in lowering.scheduler.nodes:
                if isinstance(node, NopKernelSchedulerNode):
                    continue
                if isinstance(node, ExternKernelSchedulerNode):
                    if not isinstance(node.node, ir.MultiOutput):
                        found += _extern(node)
                    continue
                kernels += 1
                found.append(("kernels of Inductor", Cost(REST, 1, _moved(node))))
    # Every node is a kernel, or one of those sums that the code leaves to PyTorch.
    launched = code.value.count(".run(") + code.value.count(".sum(dim=")
    assert kernels == launched, (kernels, launched)
    return found


def _moved(node: Any) -> int:
    return node.get_read_write_buffers_sizes()


def _fused_operator(node: fx.Node) -> Iterator[tuple[str, Cost]]:
    if node.op != "call_function" or getattr(node.target, "namespace", "") != "mixflow_fast":
        return
    name = node.target._schema.name.partition("::")[2]
    values = torch.utils._pytree.tree_map(
        lambda x: x.meta["val"] if isinstance(x, fx.Node) else x, (node.args, node.kwargs)
    )
    schema = (argument.name for argument in node.target._schema.arguments)
    launches, moved = FUSED[name](dict(zip(schema, values[0], strict=False)) | values[1])
    if name.startswith("attention"):
        yield name, Cost(CORE, 1)
        name += " around it"
    if launches:
        yield name, Cost(REST, launches, moved)


def _extern(node: Any) -> Iterator[tuple[str, Cost]]:
    kernel = node.node.python_kernel_name or str(node.node.op_overload)
    name = kernel.removeprefix("torch.ops.").removesuffix(".default").partition(".")[2]
    if "mixflow_fast" in kernel:
        return
    if name in census.PRODUCTS:
        yield name, Cost(PRODUCT, 1)
    elif name in census.ATTENTION:
        yield name, Cost(CORE, 1)
    else:
        yield name, Cost(REST, 1, _moved(node))


def compiled_block(
    scenario: Scenario,
    mode: str,
    attention: str,
    checkpointing: str = "none",
    dtype: torch.dtype = torch.bfloat16,
) -> Block:
    """One block as torch.compile makes it.

    Args:
        scenario: which.
        mode: "compile" or "fused".
        attention: the backend; "auto" is PyTorch's flash kernel, of mode compile only.
        checkpointing: "none" or "elementwise".
    """
    net = on_meta(scenario.network).to(dtype)
    net.set_execution(mode=mode, attention=attention, compiled=False)
    block = net._block_groups()[scenario.part][0]
    B, D = scenario.batch, block.attn.proj.in_features
    N, per_token = (net.input_size // net.patch_size) ** 2, scenario.part == 1
    fake = FakeTensorMode()

    def empty(*shape: int, dtype: torch.dtype = dtype, leaf: bool = True) -> Tensor:
        return torch.empty(shape, dtype=dtype, requires_grad=leaf)

    with fake:
        names = [name for name, _ in block.named_parameters()]
        inputs = [empty(*p.shape) for p in block.parameters()]
        inputs += [empty(B, N, D), empty(*((B, N, D) if per_token else (B, D)))]
        if mode == "fused":  # h, its bias, its gate
            inputs += [empty(B, N, D), empty(D), empty(*inputs[-1].shape)]
        if net.config.get("use_rope"):  # the last two are no leaves
            table = N, D // block.attn.num_heads
            inputs += [empty(*table, dtype=torch.float32, leaf=False) for _ in range(2)]
    fn = _functional(block, names, mode, checkpointing == "elementwise")
    with _as_on_a_gpu():
        graphs = _trace(fn, inputs, fake)
        # The condition is the same for all blocks.
        kept = _kept(*graphs, shared={*range(len(names)), len(names) + 1})
        table: census.Table = {}
        for phase, graph in zip(("forward", "backward"), graphs, strict=True):
            for name, cost in _lower(graph, fake):
                total = table.setdefault((phase, name), Cost(cost.kind))
                total.launches += cost.launches
                total.bytes += cost.bytes
    return Block(table, B * N * D * dtype.itemsize, kept)


def _kept(forward: fx.GraphModule, backward: fx.GraphModule, shared: set[int]) -> int:
    """Bytes that the backward graph takes from the forward graph, its inputs `shared` aside."""

    def memory(node: fx.Node) -> fx.Node:
        while getattr(node.target, "is_view", False) or node.target is _UNSAFE_VIEW:
            node = node.args[0]
        return node

    nodes = {node.name: node for node in forward.graph.nodes}
    inputs = forward.graph.find_nodes(op="placeholder")
    taken = backward.graph.find_nodes(op="placeholder")
    kept = {memory(nodes[node.name]) for node in taken if not node.name.startswith("tangents")}
    values = [node.meta["val"] for node in kept - {inputs[i] for i in shared}]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def _functional(
    block: nn.Module, names: list[str], mode: str, recompute: bool
) -> Callable[..., tuple[Tensor, ...]]:
    def fn(*inputs: Tensor) -> tuple[Tensor, ...]:
        weights, (x, c, *rest) = inputs[: len(names)], inputs[len(names) :]
        pending = rest[:3] if mode == "fused" else []
        cos, sin = rest[len(pending) :] or (None, None)
        with _reparametrize_module(block, dict(zip(names, weights, strict=True))):
            if mode == "compile":
                return (_plain_block(block, c, cos, sin, x),)
            x, (h, _, gate) = _fused_block(block, "auto", recompute, c, cos, sin, x, *pending)
        # The bias that goes with h is a parameter as it came.
        return x, h, gate

    return fn


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the census of every scenario."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(argv)
    for scenario in SCENARIOS:
        for mode, *how in MODES:
            mode = "compile" if mode == "eager" else mode
            block = compiled_block(scenario, mode, *how)
            if options.json:
                for row in census.as_rows(scenario, mode, *how, block):
                    print(json.dumps(row))
            else:
                census.show(scenario, mode, *how, block)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
