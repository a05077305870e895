"""How a network is run while it is sampled: a copy on the same weights, or in bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mixflow_fast.models import DiTDH, SiT
from mixflow_fast.models.transformer import Transformer
from mixflow_fast.sampling.execution import choose_mode, network_for
from mixflow_fast.sampling.guidance import Guidance
from mixflow_fast.sampling.prepared import PreparedSampling
from mixflow_fast.sampling.sampler import Sampler
from mixflow_fast.sampling.samples import sample
from tests.support.compiling import compiler
from tests.support.networks import Net, relative

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _sit(**changes: object) -> SiT:
    sizes = dict(input_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=3)
    return _trained(SiT(**(sizes | changes)))


def _trained(model: Transformer) -> Transformer:
    """Weights that are not the zeros of the start."""
    generator = torch.Generator().manual_seed(1)
    for value in model.parameters():
        value.data += 0.05 * torch.randn(value.shape, generator=generator)
    return model


def _dit() -> DiTDH:
    sizes = dict(input_size=2, in_channels=8, patch_size=1, num_classes=3)
    return _trained(DiTDH(**sizes, hidden_size=[16, 32], depth=[1, 1], num_heads=[2, 2]))


@pytest.mark.parametrize("build", [_sit, _dit])
def test_bf16_network_with_a_float32_state(build) -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = dict(num=3, steps=4, method="sde_euler", cfg_scale=1.5, batch_size=2)
    exact = sample(model, **arguments)
    half = sample(model, **arguments, precision="bf16")
    assert half.x.dtype == torch.float32
    assert not torch.equal(half.x, half.x.bfloat16().float())  # the state is not rounded to bf16
    assert 1e-5 < relative(half.x, exact.x) < 2e-2
    after = model.state_dict()
    assert all(after[name].dtype == value.dtype for name, value in before.items())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    own = network_for(model, False, "bf16")
    assert own.product_dtype == torch.bfloat16
    kept = {name for name, p in own.named_parameters() if p.dtype == torch.float32}
    assert kept == set(model.float32_names)
    assert all(buffer.dtype == torch.float32 for buffer in own.buffers())


def test_the_network_is_told_exact_times_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Tensor] = []
    velocity = SiT.velocity

    def watched(self: SiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        told.append(t.clone())
        assert x.dtype == torch.float32 and self.product_dtype == torch.bfloat16
        return velocity(self, x, t, y)

    monkeypatch.setattr(SiT, "velocity", watched)
    sampler = Sampler("euler", 7)
    sample(_sit(), num=1, sampler=sampler, batch_size=1, precision="bf16")
    assert torch.equal(torch.cat(told), sampler.grid()[:-1])  # thirds and sevenths, not rounded


def test_compiled_blocks_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", compiler("eager"))
    model = _sit().train()
    prepared = PreparedSampling(
        model, Sampler("heun", 3), Guidance(1.5), batch_size=2, mode="compile"
    )
    drawn = prepared.draw(torch.arange(3))
    assert torch.equal(drawn.x, sample(model, num=3, steps=3, method="heun", cfg_scale=1.5,
                                       batch_size=2).x)  # fmt: skip
    assert model.execution.mode == "eager" and model.training
    own = prepared._model
    assert own is not model and own.execution.mode == "compile"
    # The same weights, wherever they move.
    assert [p.data_ptr() for p in own.parameters()] == [p.data_ptr() for p in model.parameters()]
    with torch.no_grad():
        model.final_layer.linear.bias += 1
    assert relative(prepared.draw(torch.arange(3)).x, drawn.x) > 0.1
    # Another sampler goes on with what is compiled.
    assert prepared.with_sampler(Sampler("euler", 2))._model is own
    assert network_for(own, True, None) is own


def test_auto() -> None:
    sit, net = _sit(), Net()
    assert choose_mode("auto", sit, CPU, 10**6) == "eager"
    assert choose_mode("auto", sit, CUDA, 10**6) == "compile"
    assert choose_mode("auto", sit, CUDA, 50) == choose_mode("auto", sit, CUDA, None) == "eager"
    assert choose_mode("auto", net, CUDA, 10**6) == "eager"
    assert choose_mode("graph", net, CUDA, None) == "graph"


@pytest.mark.parametrize(
    ("network", "change", "message"),
    [
        (Net, {"mode": "fast"}, "mode must be one of auto, eager, compile, graph, got 'fast'"),
        (Net, {"mode": "compile"}, "compiles the blocks of mixflow_fast.models, got Net"),
        (Net, {"mode": "graph"}, "captures CUDA graphs, and the device is cpu"),
        (Net, {"precision": "bf16"}, "precision casts the networks of mixflow_fast.models"),
        (_sit, {"precision": "fp16"}, "precision must be one of fp32, bf16, got 'fp16'"),
    ],
)
def test_bad_arguments(network: type[nn.Module], change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(network(), num=1, steps=1, batch_size=1, **change)


def test_methods_without_a_plan_have_no_graph() -> None:
    for method in ("dopri5", "rk45", "unipc"):
        with pytest.raises(ValueError, match=f"known beforehand, got {method}"):
            PreparedSampling(
                Net(), Sampler(method, 2), Guidance(), mode="graph", capture=lambda step: step
            )


def test_one_call_of_the_network_for_an_sde_step_and_for_guidance() -> None:
    """SiT's own code calls it twice a step; guidance is one call of twice the rows."""
    net = Net()
    out = sample(net, num=2, steps=6, method="sde_euler", cfg_scale=2.0, batch_size=2)
    assert net.rows == [4] * 6 and out.nfe == 6
