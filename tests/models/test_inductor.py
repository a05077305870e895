"""Mix-order reductions are off while our blocks are compiled, and nowhere else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._inductor import compile_fx, config

from mixflow_fast.models import build
from mixflow_fast.models.inductor import affected, block_options

WITHOUT = {"triton.mix_order_reduction": False}


@pytest.mark.parametrize(
    ("version", "wrong"),
    [
        ("2.9.1", False),
        ("2.10.0", True),
        ("2.11.0+cu130", True),
        ("2.13.1", True),
        ("2.14.0a0+git1234567", False),
        ("2.14.0", False),
        ("3.0.0", False),
    ],
)
def test_versions(version: str, wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert affected(version) == wrong
    for known, expected in ((WITHOUT, WITHOUT if wrong else None), ({"triton.other": 1}, None)):
        stand_in = SimpleNamespace(get_config_copy=lambda known=known: known)
        monkeypatch.setattr(torch._inductor, "config", stand_in)
        # A version that calls it otherwise compiles as it does by itself.
        assert block_options(version) == expected


@pytest.mark.parametrize("mode", ["compile", "fused"])
def test_off_while_a_block_is_compiled_and_back_after(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Both passes: the backward pass may be compiled when it first runs."""
    if not hasattr(config.triton, "mix_order_reduction"):
        pytest.skip(f"PyTorch {torch.__version__} has no mix-order reductions")
    seen: dict[bool, set[bool]] = {}

    def uncompiled(graph: torch.fx.GraphModule, inputs: object, **options: object) -> object:
        """In Inductor's place, below all that sets its configuration."""
        seen.setdefault(options["is_backward"], set()).add(config.triton.mix_order_reduction)
        return compile_fx.make_boxed_func(graph.forward)

    monkeypatch.setattr(compile_fx, "_compile_fx_inner", uncompiled)
    torch._dynamo.reset()
    uncached = torch._functorch.config.patch(enable_autograd_cache=False)
    with uncached, config.patch({"triton.mix_order_reduction": True}):
        model = build("SiT-S/2", input_size=4, depth=2, hidden_size=32, num_heads=2)
        model.set_execution(mode=mode)
        x, t, y = torch.randn(1, 4, 4, 4), torch.rand(1), torch.zeros(1, dtype=torch.int64)
        model(x, t, y).sum().backward()
        off = affected(torch.__version__)
        assert seen == {False: {not off}, True: {not off}}
        assert config.triton.mix_order_reduction
        # Somebody else's function in the same process.
        seen.clear()
        torch.compile(lambda z: (z.sin() * 2).sum())(x.requires_grad_()).backward()
        assert seen == {False: {True}, True: {True}}
    torch._dynamo.reset()
