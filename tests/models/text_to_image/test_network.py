"""The network of another library as the engine trains it: names, copies, ways of running it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mixflow_fast.models.execution import Execution
from mixflow_fast.models.inductor import affected
from mixflow_fast.models.text_to_image import adapter_for
from mixflow_fast.models.text_to_image.network import TextToImage, _kind_of
from tests.support.compiling import compiler
from tests.support.text_to_image import FAMILIES, numbers, sd3, text

pytestmark = pytest.mark.filterwarnings("ignore:.*seems to be distilled")
TIMES = torch.tensor([0.3, 0.81])


def built(family: str = "sd3.5 medium") -> TextToImage:
    return TextToImage(adapter_for(FAMILIES[family].build()))


def gradients(net: TextToImage, x: Tensor, cond: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a loss that no symmetry hides, by parameter."""
    net.zero_grad()
    out = net(x, TIMES[: len(x)], cond)
    (out * numbers(*out.shape, seed=9)).sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def test_the_network_is_the_one_submodule() -> None:
    net, plain = built(), sd3()
    assert list(net.state_dict()) == [f"transformer.{name}" for name in plain.state_dict()]
    assert net.clock == "noise_at_1" and net.in_channels == 16
    assert net.num_classes is net.null_class is net.input_size is net.tokens is None
    x, cond = numbers(2, 16, 8, 6), text(2)
    expected = plain(x, cond["prompt_embeds"], cond["pooled_prompt_embeds"], 1000 * TIMES).sample
    assert torch.equal(net(x, TIMES, cond), expected)
    assert torch.equal(net.velocity(x, TIMES, cond), expected)


def test_a_copy_is_of_its_own() -> None:
    """The adapter of a copy asks the copied network, also where memory of it is given."""
    net = built()
    memo = {id(p): nn.Parameter(torch.full_like(p, 0.5)) for p in net.parameters()}
    twin, given = copy.deepcopy(net), copy.deepcopy(net, memo)
    for made in (twin, given):
        assert made.adapter.network is made.transformer is not net.transformer
    assert all(p.detach().eq(0.5).all() for p in given.parameters())
    with torch.no_grad():
        next(twin.parameters()).zero_()
    x, cond = numbers(2, 16, 8, 6), text(2)
    assert not torch.equal(twin(x, TIMES, cond), net(x, TIMES, cond))


@pytest.mark.parametrize("family", ["sd3.5 medium", "flux", "z-image"])
def test_checkpointing_leaves_the_bits_of_the_gradients(family: str) -> None:
    net, cond = built(family), FAMILIES[family].cond(2)
    x = numbers(2, 16, 8, 6)
    plain = gradients(net, x, cond)
    counted: list[int] = []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda *_: counted.append(1))
    again = gradients(net.set_execution(checkpointing="full"), x, cond)
    assert len(counted) == 2 * len(net.blocks)  # each block ran once more
    assert plain.keys() == again.keys() and len(plain) > 50
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name


def test_blocks_are_those_that_repeat() -> None:
    assert [type(b).__name__ for b in built().blocks] == ["JointTransformerBlock"] * 3
    names = [type(b).__name__ for b in built("flux").blocks]
    assert names == ["FluxTransformerBlock", "FluxSingleTransformerBlock"]


def counting_compiler(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Compiles nothing and notes the options that it was to compile with."""
    seen: list[object] = []

    def fake(fn: Callable, fullgraph: bool, options: object) -> Callable:
        assert fullgraph
        seen.append(options)
        return fn

    monkeypatch.setattr(torch, "compile", fake)
    return seen


def test_blocks_of_a_kind_share_a_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dual attention twice, and the last block, which has none for the text."""
    seen = counting_compiler(monkeypatch)
    net, x, cond = built().set_execution(mode="compile"), numbers(2, 16, 8, 6), text(2)
    compiled = gradients(net, x, cond)
    assert len(seen) == 2
    # pytorch#193061: a wrong gradient of adaLN at a micro-batch of one, without an error.
    if affected(torch.__version__):
        assert all(options["triton.mix_order_reduction"] is False for options in seen)
    plain = gradients(net.set_execution(mode="eager"), x, cond)
    assert len(seen) == 2 and all(torch.equal(plain[n], g) for n, g in compiled.items())
    # A copy for looking at is eager, whatever it is a copy of.
    twin = copy.deepcopy(net.set_execution(mode="compile")).set_execution(mode="eager")
    assert all(block._compiled_call_impl is None for block in twin.blocks)
    assert all(block._compiled_call_impl is not None for block in net.blocks)


@pytest.mark.long
@pytest.mark.parametrize("family", ["sd3.5 medium", "sd3.5 large", "flux"])
@pytest.mark.parametrize("batch", [1])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_compiled_gradients(family: str, batch: int, checkpointing: str) -> None:
    """As exact as eager, by Inductor on the CPU; a GPU's compiler is `doctor`'s to compare."""
    net, cond = built(family), FAMILIES[family].cond(batch)
    x = numbers(batch, 16, 8, 6)
    plain = gradients(net, x, cond)
    compiled = gradients(net.set_execution(mode="compile", checkpointing=checkpointing), x, cond)
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5 * value.abs().max())


@pytest.mark.long
@pytest.mark.parametrize("family", ["sd3.5 medium", "flux", "z-image"])
def test_buckets_take_two_compilations_of_a_kind(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the first shape and one of any; more than eight would end the run."""
    monkeypatch.setattr(torch, "compile", compiler("aot_eager"))
    torch._dynamo.utils.counters.clear()
    plain, cond = built(family), FAMILIES[family].cond(2)
    net = copy.deepcopy(plain).set_execution(mode="compile")
    for height, width in ((8, 6), (6, 8), (8, 8), (4, 12), (10, 4), (12, 12), (10, 8)):
        x = numbers(2, 16, height, width)
        expected, found = gradients(plain, x, cond), gradients(net, x, cond)
        for name, value in expected.items():
            scale = 1e-5 * value.abs().max().item()
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=scale)
    kinds = len({_kind_of(block) for block in net.blocks})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2 * kinds


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "fused"}, "fused blocks and recorded passes do not apply to MMDiT"),
        ({"mode": "graph"}, "mode='graph' is not for SD3Transformer2DModel"),
        ({"checkpointing": "selective"}, "its own library recomputes whole blocks"),
        ({"attention": "flash"}, "its own library chooses"),
        ({"mode": "compile", "compile_unit": "all_blocks"}, "compiled one by one"),
    ],
)
def test_other_ways_are_refused(options: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        built().set_execution(Execution(**options))


def test_a_class_that_cannot_recompute_is_refused() -> None:
    net = built()

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

    net.transformer = net.adapter.network = Plain()
    with pytest.raises(ValueError, match="needs Plain.enable_gradient_checkpointing"):
        net.set_execution(checkpointing="full")
    assert net.set_execution().execution.checkpointing == "none"
