"""The modes eager, compile and fused: one function, whatever is recomputed or compiled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixflow_fast.models import DiTDH, Execution, SiT, build
from tests.support.compiling import compiler
from tests.support.golden import load
from tests.support.kernels import assert_as_exact_as_eager, relative_rms

CLASSES = {"sit_0": SiT, "repa_0": SiT, "rae_ddt_0": DiTDH}
PARITY = 1e-5


def golden(name: str) -> tuple[SiT | DiTDH, dict[str, Tensor]]:
    tensors, config = load(name)
    config.pop("grad_of", None)
    model = CLASSES[name](**config)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("state.")})
    return model, tensors


@pytest.fixture
def quick_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without its C++ compiler: it traces, differentiates and partitions."""
    monkeypatch.setattr(torch, "compile", compiler("aot_eager"))


def run(model: SiT | DiTDH, g: dict[str, Tensor], execution: dict[str, Any]) -> dict[str, Tensor]:
    """Output and gradients of what the golden files differentiate."""
    model.set_execution(**execution)
    model.zero_grad()
    x = g["x"].clone().requires_grad_()
    out, loss = model(x, g["t"], g["y"]), 0.0
    found = {}
    if isinstance(out, tuple):
        out, zs = out
        found["z0"], loss = zs[0], zs[0].float().mean()
    (loss + (out * g["cotangent"]).sum()).backward()
    found |= {f"grad.{n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"out": out, "grad_x": x.grad} | found


@pytest.mark.parametrize(
    "execution",
    [
        {"mode": "fused", "compiled": False},
        {"mode": "fused", "compiled": False, "attention": "math"},
        {"mode": "eager", "attention": "flash"},
        {"mode": "compile"},
        {"mode": "fused"},
        {"mode": "compile", "checkpointing": "selective"},
        {"mode": "fused", "checkpointing": "selective"},
        {"mode": "fused", "checkpointing": "full"},
        {"mode": "fused", "checkpointing": "elementwise"},
    ],
    ids=lambda e: "-".join(map(str, e.values())),
)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.usefixtures("quick_compile")
def test_golden_in_every_mode(name: str, execution: dict[str, Any]) -> None:
    check_golden(name, execution)


WHOLE = [("repa_0", "compile", "none")]
WHOLE += [
    pytest.param(name, mode, policy, marks=pytest.mark.long)
    for name, mode, policy in (
        ("rae_ddt_0", "fused", "full"),
        ("rae_ddt_0", "compile", "selective"),
        ("repa_0", "fused", "none"),
    )
]


@pytest.mark.parametrize(("name", "mode", "policy"), WHOLE)
def test_all_blocks_at_once(
    name: str, mode: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same function, by one call for each stretch of blocks of a width, where it was a call
    for each block.
    """
    calls, quick = [], compiler("aot_eager")

    def counted(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled = quick(function, **options)

        def call(*args: Any) -> Any:
            calls.append(function.__name__)
            return compiled(*args)

        return call

    monkeypatch.setattr(torch, "compile", counted)
    for unit in ("block", "all_blocks"):
        calls.clear()
        check_golden(name, {"mode": mode, "checkpointing": policy, "compile_unit": unit})
        blocks = len(golden(name)[0].blocks)
        # REPA's projectors stand between two stretches, DiT-DH has two widths.
        assert len(calls) == (blocks if unit == "block" else 2)


def test_all_blocks_at_once_needs_the_compiler() -> None:
    for how in ({"mode": "eager"}, {"mode": "fused", "compiled": False}):
        with pytest.raises(ValueError, match="compile_unit='all_blocks' needs torch.compile, got"):
            Execution(**how, compile_unit="all_blocks")


@pytest.mark.parametrize(("name", "mode"), [("sit_0", "compile"), ("rae_ddt_0", "fused")])
def test_golden_through_inductor(name: str, mode: str) -> None:
    check_golden(name, {"mode": mode})


def check_golden(name: str, execution: dict[str, Any]) -> None:
    model, g = golden(name)
    found = run(model, g, execution)
    checked = [key for key in found if key in g and g[key].any()]
    errors = {key: relative_rms(found[key].detach(), g[key]) for key in checked}
    assert {key: e for key, e in errors.items() if e >= PARITY} == {}
    assert {"out", *(key for key in g if key.startswith("grad."))} - {"grad.pos_embed"} <= set(
        found
    )


def test_the_kernels_themselves_in_the_interpreter() -> None:
    """A whole network, forward and backward, through Triton."""
    _, config = load("rae_ddt_0")
    for cls, options in (
        (SiT, dict(input_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=3)),
        (
            DiTDH,
            config | dict(input_size=2, in_channels=4, hidden_size=[16, 24], depth=1, num_heads=2),
        ),
    ):
        torch.manual_seed(0)
        model = cls(**options)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        side, channels = model.input_size, model.in_channels
        x = torch.randn(2, channels, side, side)
        g = {"x": x, "t": torch.tensor([0.3, 0.7]), "y": torch.tensor([0, 2])}
        g["cotangent"] = torch.randn_like(x)
        truth = run(model, g, {"mode": "eager"})
        execution = {"mode": "fused", "compiled": False, "impl": "triton"}
        for policy in ("none", "elementwise"):
            ours = run(model, g, execution | {"checkpointing": policy})
            errors = {key: relative_rms(ours[key].detach(), truth[key].detach()) for key in truth}
            assert {key: e for key, e in errors.items() if e >= PARITY} == {}


@pytest.mark.parametrize("name", ["sit_0", "rae_ddt_0"])
def test_bfloat16_is_as_exact_as_eager(name: str) -> None:
    model, g = golden(name)
    truth = run(copy.deepcopy(model).double(), {k: _double(v) for k, v in g.items()}, {})
    model.bfloat16()
    eager = run(model, g, {"mode": "eager"})
    ours = run(model, g, {"mode": "fused", "compiled": False})
    for key in truth:
        assert_as_exact_as_eager(ours[key], eager[key], truth[key], key)


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@pytest.mark.parametrize(
    ("mode", "policy"),
    [
        *(("eager", "full"), ("eager", "selective")),
        *(("fused", "full"), ("fused", "selective"), ("fused", "elementwise")),
    ],
)
@pytest.mark.parametrize("name", CLASSES)
def test_checkpointing_gives_the_same_bits(name: str, mode: str, policy: str) -> None:
    model, g = golden(name)
    execution = {"mode": mode, "compiled": False}
    plain = run(model, g, execution)
    again = run(model, g, execution | {"checkpointing": policy})
    assert all(torch.equal(plain[key], again[key]) for key in plain)


@pytest.mark.parametrize("checkpointing", ["none", "elementwise"])
def test_second_derivatives_are_refused(checkpointing: str) -> None:
    model, g = golden("sit_0")
    model.set_execution(mode="fused", compiled=False, checkpointing=checkpointing)
    x = g["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(model(x, g["t"], g["y"]).sum(), x, create_graph=True)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The inputs of every graph that torch.compile hands to its backend, which runs it as it is."""
    seen: list[list[Any]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> object:
        seen.append(inputs)
        return graph.forward

    monkeypatch.setattr(torch, "compile", compiler(backend))
    return seen


SMALL = dict(depth=(3, 2), hidden_size=(16, 32), num_heads=(2, 2), in_channels=4)


def small_batch(model: DiTDH, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(batch, 4, model.input_size, model.input_size)
    return x, torch.rand(batch), torch.zeros(batch, dtype=torch.int64)


@pytest.mark.parametrize("mode", ["fused", "compile"])
def test_one_network_called_in_many_ways(graphs: list[list[Any]], mode: str) -> None:
    """torch.compile gives up on a piece of code after eight compilations."""
    model = build("DiTDH-S", input_size=2, **SMALL).set_execution(mode=mode)
    for mixed in (False, True):
        for batch in (4, 1):
            for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
                with context(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                    model(*small_batch(model, batch))
    assert len(graphs) > 8


@pytest.mark.parametrize("mode", ["fused", "compile"])
def test_a_network_learns_no_shapes_from_another(graphs: list[list[Any]], mode: str) -> None:
    for side, batch in ((2, 4), (4, 3)):
        model = build("DiTDH-S", input_size=side, **SMALL).set_execution(mode=mode)
        model(*small_batch(model, batch))
    assert graphs and not any(isinstance(x, torch.SymInt) for inputs in graphs for x in inputs)


def test_selective_refuses_a_linear_that_is_not_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO 3's adds the bias in place, and would add it twice."""
    zero = pytest.importorskip("deepspeed.runtime.zero.linear")
    model, g = golden("sit_0")
    monkeypatch.setattr(torch.nn.functional, "linear", zero.zero3_linear_wrap)
    with pytest.raises(RuntimeError, match='zero3_linear_wrap: use checkpointing="full"'):
        run(model, g, {"mode": "eager", "checkpointing": "selective"})
    plain = run(model, g, {"mode": "eager"})
    again = run(model, g, {"mode": "eager", "checkpointing": "full"})
    assert all(torch.equal(plain[key], again[key]) for key in plain)


class _Counter(TorchDispatchMode):
    """How often operators run, by the part of their name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.wide = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        out = func(*args, **kwargs or {})
        if "mm" in str(func) and out.shape[-1] == 4 * 96:
            self.wide += 1
        return out

    def count(self, part: str) -> int:
        return sum(part in name for name in self.names)


@pytest.mark.parametrize("mode", ["eager", "fused"])
def test_what_is_made_recompute(mode: str) -> None:
    """Forward passes of attention and of fc1's product in a training step, over three blocks."""
    model, g = golden("sit_0")
    seen = {}
    for policy in ("none", "selective", "full"):
        with _Counter() as counter:
            run(model, g, {"mode": mode, "compiled": False, "checkpointing": policy})
        forward = [n for n in counter.names if "attention" in n and "backward" not in n]
        norms = counter.count("residual_norm.default" if mode == "fused" else "native_layer_norm.")
        seen[policy] = len(forward), counter.wide, norms
    once, kept, again = seen["none"], seen["selective"], seen["full"]
    assert once[0] == 3 and kept[:2] == once[:2]  # made once: the costly two
    assert again[0] == 6 and again[1] > once[1]
    assert kept[2] > once[2]  # and the cheap rest again


def test_blocks_of_a_width_share_one_compilation() -> None:
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled.append("fused" if "residual_norm" in graph.code else "other")
        return graph.forward

    torch._dynamo.reset()
    original = torch.compile
    torch.compile = compiler(backend)
    try:
        model = build("SiT-S/2", input_size=4, depth=5, hidden_size=32, num_heads=2)
        model.set_execution(mode="fused")
        x, t, y = torch.randn(2, 4, 4, 4), torch.rand(2), torch.zeros(2, dtype=torch.int64)
        model(x, t, y)
        # The first block starts the chain, all others continue it.
        assert len(compiled) == 2
        model(x, t, y)
        assert len(compiled) == 2
    finally:
        torch.compile = original


def test_key_bias_has_no_gradient_and_no_effect() -> None:
    """q (k + b) moves all logits of a query alike; eager's gradient of b is rounding noise."""
    model, g = golden("sit_0")
    fused = run(model, g, {"mode": "fused", "compiled": False})
    eager = run(model, g, {"mode": "eager"})
    for i in range(3):
        name, keys = f"grad.blocks.{i}.attn.qkv.bias", slice(96, 192)
        assert not fused[name][keys].any()
        assert eager[name][keys].norm() < 1e-5 * eager[name].norm()
    before = fused["out"]
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.bias[96:192] += 3.0
    assert torch.equal(run(model, g, {"mode": "fused", "compiled": False})["out"], before)
    assert relative_rms(run(model, g, {"mode": "eager"})["out"], before) < PARITY


def test_key_bias_counts_where_keys_are_normed() -> None:
    torch.manual_seed(0)
    model = SiT(input_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=3, qk_norm=True)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x = torch.randn(2, 4, 4, 4)
    g = {"x": x, "t": torch.tensor([0.3, 0.7]), "y": torch.tensor([0, 2])}
    g["cotangent"] = torch.randn_like(x)
    eager, fused = run(model, g, {}), run(model, g, {"mode": "fused", "compiled": False})
    assert eager["grad.blocks.0.attn.qkv.bias"][32:64].any()
    # A constant added to every normed key is invisible again: the gradient of that bias is noise.
    checked = [key for key in eager if not key.endswith("k_norm.bias")]
    errors = {k: relative_rms(fused[k].detach(), eager[k].detach()) for k in checked}
    assert {key: e for key, e in errors.items() if e >= PARITY} == {}


def test_names_copies_and_pickles_survive_every_mode() -> None:
    model, g = golden("rae_ddt_0")
    names = list(model.state_dict())
    model.set_execution(mode="fused", compiled=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(copied.state_dict()) == names
        assert copied.execution == model.execution
        with torch.no_grad():
            copied.blocks[0].attn.qkv.weight.zero_()
            changed = copied(g["x"], g["t"], g["y"])
            assert not torch.equal(changed, model(g["x"], g["t"], g["y"]))


def test_autocast() -> None:
    """float32 weights under bf16 autocast, as benchmarks and many trainers run them."""
    model, g = golden("sit_0")
    found = {}
    for mode, policy in (("eager", "none"), ("fused", "none"), ("fused", "elementwise")):
        with torch.autocast("cpu", torch.bfloat16):
            execution = {"mode": mode, "compiled": False, "checkpointing": policy}
            found[mode, policy] = run(model, g, execution)
        assert relative_rms(found[mode, policy]["out"].detach(), g["out"]) < 0.03
        assert found[mode, policy]["grad.blocks.0.attn.qkv.weight"].dtype == torch.float32
    kept, again = found["fused", "none"], found["fused", "elementwise"]
    assert all(torch.equal(kept[key], again[key]) for key in kept)


@pytest.mark.parametrize("options", [{"wo_shift": True}, {"use_rmsnorm": False}], ids=str)
def test_activation_with_frozen_parameters(options: dict[str, bool]) -> None:
    """Every gradient that is left has the bits that it has without."""
    _, config = load("rae_ddt_0")
    torch.manual_seed(0)
    config |= {"input_size": 2, "in_channels": 4, "hidden_size": [16, 24], "num_heads": 2}
    config.pop("grad_of", None)
    model = DiTDH(**config | {"depth": 2} | options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(2, 4, 2, 2)
    g = {"x": x, "t": torch.tensor([0.3, 0.7]), "y": torch.tensor([0, 2])}
    g["cotangent"] = torch.randn_like(x)
    execution = {"mode": "fused", "compiled": False, "checkpointing": "none"}
    names = [name for name, _ in model.named_parameters()]
    frozen = (
        lambda name: False,
        lambda name: "adaLN" in name or "norm" in name,
        lambda name: "weight" in name,
        lambda name: not name.startswith("blocks.2.attn.qkv"),
    )
    for rule in frozen:
        for name, p in model.named_parameters():
            p.requires_grad_(not rule(name))
        kept, again = (
            run(model, g, execution | {"checkpointing": policy})
            for policy in ("none", "elementwise")
        )
        assert kept.keys() == again.keys() and len(kept) == 2 + sum(not rule(n) for n in names)
        for key, value in kept.items():
            assert value is again[key] is None or torch.equal(value, again[key]), key


def test_attention_is_chosen_once_and_named() -> None:
    model, g = golden("rae_ddt_0")
    cpu = torch.device("cpu")
    assert model.choose_attention(2, torch.float32, cpu) == []  # eager: PyTorch's own
    model.set_execution(mode="fused", compiled=False)
    choices = model.choose_attention(2, torch.float32, cpu)
    assert [choice.backend for choice in choices] == ["flash", "flash"]
    pinned = model.choose_attention(2, torch.float32, cpu, ["math", "flash"])
    assert [choice.backend for choice in pinned] == ["math", "flash"]
    assert [block.attn.backend for block in model.blocks] == ["math"] * 2 + ["flash"] * 2
    with pytest.raises(ValueError, match="cudnn"):
        model.choose_attention(2, torch.float32, cpu, ["cudnn", "flash"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "mode must be one of eager, compile, fused, graph, got 'fast'"),
        ({"attention": "flash4"}, "attention must be one of auto, flash3"),
        ({"checkpointing": "all"}, "checkpointing must be one of none, elementwise, selective"),
        ({"checkpointing": "elementwise"}, 'use mode="fused"'),
        ({"impl": "cuda"}, "impl must be one of"),
    ],
)
def test_refuses(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Execution(**options)
