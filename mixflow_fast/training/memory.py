"""Memory of a run, an estimate: what stays on each GPU, and what a forward pass keeps.

    bytes a parameter    weights 2, gradients 4, optimizer 12, each average 4        (bf16)
    kept by a pass       counted by autograd's own saves, on meta tensors

ZeRO 1 shares the optimizer and the averages out between the ranks, 2 the gradients too, 3 the
weights too. Weights that are not trained are weights alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mixflow_fast.config.schema import OptimConfig, TrainConfig
from mixflow_fast.models import Execution, Network, SongUNet
from mixflow_fast.models.text_to_image.adapter import Condition
from mixflow_fast.models.text_to_image.lora import add_lora, lora_spec
from mixflow_fast.models.text_to_image.network import TextToImage
from mixflow_fast.training.costs import Shapes

# Of a block of SiT with an MLP of four times its width, what stays between the passes, in units of
# batch x tokens x width elements. `python -m benchmarks.census` counts eager, fused, elementwise;
# compile is taken to keep what eager does, and the last two follow from what they save by design:
# the block's input, and for selective the outputs of attention and of the MLP's first product.
_KEPT_PER_BLOCK = {"eager": 20.1, "compile": 20.1, "graph": 20.1, "fused": 18.1}
_KEPT_WITH_CHECKPOINTING = {"elementwise": 12.1, "selective": 6.0, "full": 1.0}
# Numbers of GPUs in the table.
_GPUS = (1, 2, 4, 8)
_LAST_STAGE = 3
# Of the adapters that stand beside the whole network in the table.
_LORA_RANK = 16


def state_bytes(
    model: nn.Module, train: TrainConfig, optim: OptimConfig, ranks: int, stage: int | None = None
) -> float:
    """Bytes that stay on each rank: weights, gradients, optimizer and averages; no buffers.

    Args:
        model: the network, on any device.
        train, optim: sections of the configuration.
        ranks: of the run.
        stage: of ZeRO; None: that of `train`.
    """
    stage = train.zero_stage if stage is None else stage
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    element = _element(train)
    weights = element / (ranks if stage == 3 else 1)
    # ZeRO 1 and ddp add up bf16 gradients in float32; from 2 on the sums are sharded.
    gradients = 4 / ranks if stage >= 2 else 4 if element == 4 else 6
    # Moments, averages, and master weights where they are not the network's own.
    masters = stage > 0 or element == 2
    optimizer = 4 * (2 + len(optim.ema_decays) + len(optim.ema_sigma_rel) + masters)
    return every * weights + trained * (gradients + optimizer / (ranks if stage else 1))


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward pass of one example keeps for its backward pass.

    Attributes:
        whole: of the network without checkpointing.
        inputs: with it: the blocks' inputs and what stands around the blocks.
        block: of the largest block, which checkpointing makes again.
    """

    whole: int
    inputs: int
    block: int

    def most(self, checkpointed: bool) -> int:
        """What is there at once, but for what single operators need beside it."""
        return self.inputs + self.block if checkpointed else self.whole


def kept_bytes(model: TextToImage, shape: tuple[int, ...], cond: Condition) -> Kept | None:
    """What a forward pass of a text-to-image network keeps, by autograd's own saves.

    Args:
        model: on the meta device, of the dtype that it computes in; run in mode eager without
            checkpointing. Its execution is set back.
        shape: (C, h, w) of a latent.
        cond: of one example, on the meta device.

    Returns:
        None for a network that looks at its inputs' values, which are not there.
    """
    execution = model.execution
    try:
        whole, block = _saved(model.set_execution(), shape, cond)
        try:
            inputs, _ = _saved(model.set_execution(checkpointing="full"), shape, cond)
        except ValueError:  # a class of the user's without checkpointing
            inputs = whole
        return Kept(whole=whole, inputs=inputs, block=block)
    except RuntimeError:  # how torch says that a value was asked for
        return None
    finally:
        model.set_execution(execution)


class _FlashAttention(TorchFunctionMode):
    """PyTorch's attention as its flash kernel; on meta it would keep the products' table."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:
            return _flash(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _flash(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    # A mask is small beside the rest.
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def _saved(model: TextToImage, shape: tuple[int, ...], cond: Condition) -> tuple[int, int]:
    """Bytes saved by a pass, weights and buffers aside, and those of its largest block."""
    held = [*model.parameters(), *model.buffers()]
    # The storage itself is held: a freed one's address could come again.
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in held}
    own = sum(storage.nbytes() for storage in storages.values())
    total, before, blocks = own, 0, [0]

    def save(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = storage
            total += storage.nbytes()
        return tensor

    def enter(*_: object) -> None:
        nonlocal before
        before = total

    def leave(*_: object) -> None:
        blocks.append(total - before)

    hooks = [block.register_forward_pre_hook(enter) for block in model.blocks]
    hooks += [block.register_forward_hook(leave) for block in model.blocks]
    x, t = (torch.empty(1, *sides, device="meta") for sides in (shape, ()))
    try:
        with torch.enable_grad(), _FlashAttention():
            with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
                model(x, t, cond)
    finally:
        for hook in hooks:
            hook.remove()
    return total - own, max(blocks)


def describe_memory(
    train: TrainConfig,
    optim: OptimConfig,
    model: Network,
    execution: Execution,
    split: tuple[int, int],
) -> str:
    """One line about a network of our own.

    Args:
        train, optim: sections of the configuration.
        model: the network.
        execution: how it is run.
        split: number of ranks, and images in a micro-batch.
    """
    ranks, microbatch = split
    state = state_bytes(model, train, optim, ranks)
    activations = _element(train) * microbatch * _kept_elements(model, execution)
    return (
        f"memory per rank, an estimate: {in_units(state)} of weights, gradients, optimizer and "
        f"EMA, {in_units(activations)} of activations for {microbatch} images"
    )


def memory_table(
    train: TrainConfig,
    optim: OptimConfig,
    model: TextToImage,
    examples: tuple[Shapes, Condition],
    split: tuple[int, bool],
) -> Iterator[str]:
    """Lines about a text-to-image network: states by numbers of GPUs, and activations.

    Args:
        train, optim: sections of the configuration.
        model: the network on the meta device.
        examples: shapes of the latents, and what one example tells the network, on meta.
        split: images in a micro-batch, and whether blocks are checkpointed.
    """
    averages = len(optim.ema_decays) + len(optim.ema_sigma_rel)
    numbers = ", ".join(str(ranks) for ranks in _GPUS)
    yield (
        f"memory per GPU, an estimate, in GiB on {numbers} GPUs: weights, gradients, optimizer and "
        f"{averages} average{'s' * (averages > 1)}"
    )
    own = train.zero_stage
    for stage in sorted({own, min(own + 1, _LAST_STAGE)}):
        by_ranks = [state_bytes(model, train, optim, ranks, stage) for ranks in _GPUS]
        yield f"    {_stage_name(train, stage)}: {_row(by_ranks)}"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    yield f"    each average of these: {_row([4 * trained / (n if own else 1) for n in _GPUS])}"
    if trained == sum(p.numel() for p in model.parameters()):
        yield from _describe_lora(train, optim, model)
    tables = _element(train) * sum(buffer.numel() for buffer in model.buffers())
    yield f"    besides, on each: {in_units(tables)} of tables that nothing trains"
    yield f"    activations: {_describe_kept(train, model, examples, split)}"


def _describe_lora(train: TrainConfig, optim: OptimConfig, model: TextToImage) -> Iterator[str]:
    """What adapters in place of the whole network would take; nothing where there can be none."""
    network = copy.deepcopy(model)
    try:
        add_lora(network.transformer, lora_spec(network.transformer, _LORA_RANK))
    except ValueError:  # a class without targets of its own, or no peft
        return
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    by_ranks = [state_bytes(network, train, optim, ranks) for ranks in _GPUS]
    yield f"    lora.rank={_LORA_RANK} instead, {trained:,} parameters: {_row(by_ranks)}"


def _describe_kept(
    train: TrainConfig,
    model: TextToImage,
    examples: tuple[Shapes, Condition],
    split: tuple[int, bool],
) -> str:
    (shapes, cond), (microbatch, checkpointed) = examples, split
    channels, height, width = max(shapes, key=lambda shape: shape[1] * shape[2])
    half = train.precision == "bf16"
    network = copy.deepcopy(model).to(torch.bfloat16 if half else torch.float32)
    kept = kept_bytes(network, (channels, height, width), cond)
    if kept is None:
        return "not estimated, because the network looks at its inputs' values"
    return (
        f"{in_units(microbatch * kept.most(checkpointed))} for {microbatch} latents of "
        f"{width}x{height}; each keeps {in_units(kept.whole)}, with model.checkpointing=full "
        f"{in_units(kept.inputs)} and {in_units(kept.block)} of one block"
    )


def _stage_name(train: TrainConfig, stage: int) -> str:
    return "ddp" if train.engine == "ddp" and stage == train.zero_stage else f"ZeRO {stage}"


def _row(values: list[float]) -> str:
    return ", ".join(f"{v:,.1f}" if v >= 0.1 else f"{v:.1g}" for v in (n / 2**30 for n in values))


def _element(train: TrainConfig) -> int:
    return 2 if train.precision == "bf16" else 4


def _kept_elements(model: Network, execution: Execution) -> float:
    """Elements of an image that a forward pass keeps for its backward pass."""
    if isinstance(model, SongUNet):
        return model.kept_elements()
    kept = _KEPT_WITH_CHECKPOINTING.get(execution.checkpointing, _KEPT_PER_BLOCK[execution.mode])
    return kept * model.tokens * sum(block.attn.proj.in_features for block in model.blocks)


def in_units(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
