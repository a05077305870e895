"""A text-to-image network of another library as the engine trains it: `TextToImage`.

The engine moves, shards, averages and saves modules, and an adapter is none: so the adapter stands
beside the module, and its network is the submodule `transformer`. Names of weights are those of a
pipeline, `transformer.transformer_blocks.0...`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from mixflow_fast.flow.clock import NOISE_AT_1
from mixflow_fast.models.execution import Execution, runner
from mixflow_fast.models.network import Network, check
from mixflow_fast.models.text_to_image.adapter import Adapter, Condition
from mixflow_fast.models.text_to_image.lora import is_adapter

# Ways of running it, by the fields of `Execution`.
WAYS: dict[str, tuple[str, ...]] = {
    "mode": ("eager", "compile"),
    "attention": ("auto",),
    "checkpointing": ("none", "full"),
    "compile_unit": ("block",),
}
# Why the other ways are none, by the field.
WHY_NOT = {
    "mode": "fused blocks and recorded passes do not apply to MMDiT",
    "attention": "its own library chooses",
    "checkpointing": "its own library recomputes whole blocks",
    "compile_unit": "its blocks are compiled one by one",
}


class TextToImage(Network):
    """A network of another library behind its adapter.

    Args:
        adapter: the network, its conventions and its blocks.
        config: how it is built, `TransformerSpec.to_config`, for weights files; empty outside a
            run.

    Attributes:
        transformer: `adapter.network`; the one submodule.
        adapter: as given. A copy of the network has a copy of it, around the copied submodule.
        input_size: None: latents of any even sides.
        in_channels: channels of the latents, None where a user's adapter does not say them.
    """

    # Networks of classes need more: here a latent may have any sides.
    input_size: int | None
    in_channels: int | None

    def __init__(self, adapter: Adapter, config: Mapping[str, object] | None = None) -> None:
        super().__init__()
        self.adapter = adapter
        self.transformer = adapter.network
        self.clock = NOISE_AT_1
        self.input_size = self.num_classes = self.null_class = self.cfg_channels = None
        self.in_channels = getattr(adapter, "channels", None)
        self.prediction, self.path = "velocity", None
        self.config = dict(config or {})
        self.set_execution()

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """d x / d t, noise - data.

        Args:
            x: (B, C, h, w) latents, h and w even.
            t: (B,) float32 noise levels in [0, 1]; 1 is noise.
            cond: what the adapter takes, B of each.

        Returns:
            (B, C, h, w) in the dtype that the network computes in.

        Raises:
            ValueError: shapes, dtypes or keys that do not fit.
        """
        return self.adapter.velocity(x, t, cond)

    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """As `forward`."""
        return self.adapter.velocity(x, t, cond)

    @property
    def has_adapters(self) -> bool:
        """As `Network.has_adapters`."""
        return self.config.get("lora") is not None

    def saved_state(self) -> dict[str, Tensor]:
        """The whole state; with adapters theirs alone, because the rest is in a folder already."""
        state = self.state_dict()
        if not self.has_adapters:
            return state
        return {name: tensor for name, tensor in state.items() if is_adapter(name)}

    @property
    def product_dtype(self) -> torch.dtype:
        """Dtype of the weights that are multiplied by activations."""
        return next(p.dtype for p in self.transformer.parameters() if p.is_floating_point())

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks, those inside of other ones left out, in the network's order."""
        found: list[nn.Module] = []
        inside: set[int] = set()
        for module in self.transformer.modules():
            if isinstance(module, self.adapter.checkpointable) and id(module) not in inside:
                found.append(module)
                inside |= {id(m) for m in module.modules()}
        return found

    def set_execution(
        self, execution: Execution | None = None, **options: str | bool
    ) -> TextToImage:
        """Choose how the network is run; returns it. Weights and their names do not change.

        Its ways are the modes eager and compile (each block by itself), and checkpointing none or
        full (each block, by the library that the network is of).

        Raises:
            ValueError: unknown values, or ways in which this network does not run.
        """
        execution = Execution(**options) if execution is None else execution
        for name, allowed in WAYS.items():
            value = getattr(execution, name)
            check(
                value in allowed,
                f"{name}={value!r} is not for {type(self.transformer).__name__}: "
                f"{WHY_NOT[name]}; use {' or '.join(f'{name}={one!r}' for one in allowed)}",
            )
        self.execution = execution
        self._set_checkpointing(execution.checkpointing == "full")
        self._compile_blocks()
        return self

    def _set_checkpointing(self, wanted: bool) -> None:
        method = "enable_gradient_checkpointing" if wanted else "disable_gradient_checkpointing"
        change = getattr(self.transformer, method, None)
        check(
            change is not None or not wanted,
            f"checkpointing='full' needs {type(self.transformer).__name__}.{method}(), which it "
            "does not have: use checkpointing='none'",
        )
        if change is not None:
            change()

    def _compile_blocks(self) -> None:
        # Where `nn.Module.compile` puts what it makes: calls go there, and copies leave it behind.
        # Blocks of one kind share a compilation, and no other code's limit of recompilations.
        plain = replace(self.execution, checkpointing="none")
        compiled: dict[object, Callable[..., object]] = {}
        for block in self.blocks:
            call = None
            if plain.compiles:
                kind = _kind_of(block)
                if kind not in compiled:
                    compiled[kind] = runner(_run, plain, ())
                call = partial(compiled[kind], block)
            block._compiled_call_impl = call

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._compile_blocks()


def _kind_of(block: nn.Module) -> object:
    """What blocks that compute the same have in common."""
    shapes = ((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    return type(block), tuple(shapes)


def _run(block: nn.Module, *args: object, **named: object) -> object:
    return block.forward(*args, **named)
