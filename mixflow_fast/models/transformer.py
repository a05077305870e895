"""What SiT and DiT-DH have in common: execution by blocks, attention backends, patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mixflow_fast.kernels.attention.choice import AttentionChoice, choose_backend
from mixflow_fast.models.blocks import Block, FinalLayer, SwiGLU
from mixflow_fast.models.execution import BACKENDS, Execution, runner
from mixflow_fast.models.fused.block import ResidualStream, fused_block, fused_final, resolve
from mixflow_fast.models.network import Network, check


# Flat arguments: selective checkpointing under torch.compile takes no tuples of tensors. `pending`
# is left out and not None where nothing is pending: each way of calling has its own compilation.
def _plain_block(
    block: Block, c: Tensor, cos: Tensor | None, sin: Tensor | None, x: Tensor
) -> Tensor:
    return block(x, c, None if cos is None else (cos, sin))


def _fused_block(
    block: Block,
    impl: str,
    recompute: bool,
    c_silu: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    x: Tensor,
    *pending: Tensor,
) -> ResidualStream:
    rope = None if cos is None else (cos, sin)
    return fused_block(block, (x, pending or None), c_silu, rope, impl, recompute)


def _over_plain_blocks(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """All blocks in one function, of a function that runs one."""

    def plain_blocks(
        blocks: Sequence[Block], c: Tensor, cos: Tensor | None, sin: Tensor | None, x: Tensor
    ) -> Tensor:
        for block in blocks:
            x = run(block, c, cos, sin, x)
        return x

    return plain_blocks


def _over_fused_blocks(run: Callable[..., ResidualStream]) -> Callable[..., ResidualStream]:
    """All blocks in one function, of a function that runs one."""

    def fused_blocks(
        blocks: Sequence[Block],
        impl: str,
        recompute: bool,
        c_silu: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        x: Tensor,
        *pending: Tensor,
    ) -> ResidualStream:
        for block in blocks:
            x, left = run(block, impl, recompute, c_silu, cos, sin, x, *pending)
            pending = left or ()
        return x, pending or None

    return fused_blocks


class Chain:
    """A run of blocks of one width, in one of the modes of `Execution`."""

    def __init__(self, blocks: Sequence[Block], execution: Execution) -> None:
        self._blocks, self._execution = list(blocks), execution
        self._fused = execution.mode == "fused"
        mlp = self._blocks[0].mlp
        first = mlp.w12 if isinstance(mlp, SwiGLU) else mlp.fc1
        # The column counts by which "selective" recognises the MLP's first product.
        widths = (first.out_features,)
        if isinstance(mlp, SwiGLU):
            widths += (mlp.weights()[0].shape[0],)  # padded, where a mode pads
        block = _fused_block if self._fused else _plain_block
        self._run = runner(block, execution, widths)
        self._at_once = execution.compiles and execution.compile_unit == "all_blocks"
        over = _over_fused_blocks if self._fused else _over_plain_blocks
        # A part of the blocks, as REPA's projectors divide them, has a compilation of its own.
        self._make_all = partial(runner, block, execution, widths, over)
        self._all: dict[range, Callable[..., Tensor | ResidualStream]] = {}

    def __call__(
        self,
        residual: ResidualStream,
        c: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        numbers: range,
    ) -> ResidualStream:
        """The residual stream after the blocks `numbers` (from 0) of the chain."""
        cos, sin = rope or (None, None)
        blocks = tuple(self._blocks[number] for number in numbers)
        at_once = self._at_once and len(blocks) > 0
        if at_once and numbers not in self._all:
            self._all[numbers] = self._make_all()
        if self._fused:
            # SiLU of the condition is the same in all blocks, which the plain blocks repeat.
            c, impl = nn.functional.silu(c), self._execution.impl
            recompute = self._execution.checkpointing == "elementwise"
            if at_once:
                x, pending = residual
                all_blocks = self._all[numbers]
                return all_blocks(blocks, impl, recompute, c, cos, sin, x, *(pending or ()))
            for block in blocks:
                x, pending = residual
                residual = self._run(block, impl, recompute, c, cos, sin, x, *(pending or ()))
            return residual
        x = resolve(residual)
        if at_once:
            return self._all[numbers](blocks, c, cos, sin, x), None
        for block in blocks:
            x = self._run(block, c, cos, sin, x)
        return x, None

    def finish(self, layer: FinalLayer, residual: ResidualStream, c: Tensor) -> Tensor:
        """The final layer's output for a residual stream."""
        if self._fused:
            return fused_final(layer, residual, nn.functional.silu(c), self._execution.impl)
        return layer(resolve(residual), c)


class Transformer(Network):
    """Base of the networks of blocks; a subclass builds the layers and defines `velocity`.

    Attributes:
        patch_size: side of a token in latent places or pixels.
        out_channels: channels of the head; the first `in_channels` are the velocity.
        blocks: all of them, in order.
    """

    patch_size: int
    out_channels: int
    blocks: nn.ModuleList

    def set_execution(
        self, execution: Execution | None = None, **options: str | bool
    ) -> Transformer:
        """Choose how the network is run; returns it. Weights and their names do not change.

        Args:
            execution, options: an `Execution`, or its fields by name.

        Raises:
            ValueError: unknown values.
        """
        self.execution = Execution(**options) if execution is None else execution
        for module in self.blocks.modules():
            if isinstance(module, SwiGLU):
                # Eager is the definition and the oracle of the tests: it runs the weights as is.
                module.padded = self.execution.mode != "eager"
            elif hasattr(module, "backend"):
                module.backend = self.execution.attention
        self._build_chains()
        return self

    def choose_attention(
        self,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        names: Sequence[str] | None = None,
    ) -> list[AttentionChoice]:
        """Tests attention backends for a training shape now, and keeps to the ones that win.

        Without this call the operator chooses at its first use, and may choose otherwise in the
        next process. In the modes eager and compile, "auto" is PyTorch's own choice: nothing is
        tested.

        Args:
            batch: B.
            dtype, device: dtype and device of the activations.
            names: one backend for each group of blocks of one width, to take instead of the
                fastest (what an earlier process chose).

        Returns:
            one choice for each group; empty where PyTorch chooses.

        Raises:
            ValueError: a backend that fails its test.
        """
        execution, choices = self.execution, []
        if execution.mode != "fused" and execution.attention == "auto":
            return choices
        for number, blocks in enumerate(self._block_groups()):
            layer = blocks[0].attn
            wanted = names[number] if names else execution.attention
            candidates = BACKENDS if wanted == "auto" else (wanted,)
            head_dim = layer.proj.in_features // layer.num_heads
            choice = choose_backend(
                batch, self.tokens, layer.num_heads, head_dim, dtype, device, candidates=candidates
            )
            choices.append(choice)
            for block in blocks:
                block.attn.backend = choice.backend
        return choices

    @property
    def product_dtype(self) -> torch.dtype:
        """Dtype of the weights that are multiplied by activations."""
        return self.blocks[0].attn.qkv.weight.dtype

    @property
    def tokens(self) -> int:
        """Tokens that an input is cut into."""
        return (self.input_size // self.patch_size) ** 2

    def _block_groups(self) -> Iterable[Sequence[Block]]:
        """The blocks, apart by width."""
        raise NotImplementedError

    def _build_chains(self) -> None:
        # Beside the module's own registries: the blocks have their official names already.
        chains = [Chain(blocks, self.execution) for blocks in self._block_groups()]
        self.__dict__["_chains"] = chains

    def __getstate__(self) -> dict[str, object]:
        # Copies make their own: chains hold the blocks, and compiled functions cannot be pickled.
        return {key: value for key, value in self.__dict__.items() if key != "_chains"}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._build_chains()

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(B, N, p * p * out_channels), channel fastest -> (B, in_channels, side, side)."""
        p, side = self.patch_size, self.input_size // self.patch_size
        grid = patches.unflatten(2, (p, p, self.out_channels)).unflatten(1, (side, side))
        velocity = grid[..., : self.in_channels]
        return velocity.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def check_width(width: int, heads: int) -> None:
    """ValueError unless heads and sine-cosine positions fit the width."""
    check(width % heads == 0, f"hidden_size must be a multiple of num_heads={heads}, got {width}")
    check(width % 4 == 0, f"hidden_size must be a multiple of 4 (sin-cos positions), got {width}")
