"""One attention backend on all ranks, and the same one when a run goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.kernels.attention.choice import AttentionChoice
from mixflow_fast.models import Network


def agree_on_attention(
    model: Network,
    shape: tuple[int, str, torch.device],
    host_group: HostGroup,
    before: list[str] | None,
) -> list[AttentionChoice]:
    """Choose on rank 0 for all: two backends give two last bits. Every rank must call it.

    Args:
        model: the network; it runs with the choice from here on.
        shape: examples in one forward pass, "fp32" or "bf16", device of this rank.
        host_group: exchange between the ranks.
        before: names that the run used up to here; None for a new run.

    Returns:
        one choice for each shape of attention in the network; none where PyTorch chooses.

    Raises:
        ValueError: a named backend that does not serve here, or where bits are to be repeated
            (`train.deterministic`) one that the run used up to here; on all ranks.
    """
    microbatch, precision, device = shape
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    names = before
    with host_group.raise_together():
        if host_group.rank == 0:
            try:
                choices = model.choose_attention(microbatch, dtype, device, names)
            except ValueError:
                if names is None or torch.are_deterministic_algorithms_enabled():
                    raise
                # Another GPU, or a package that is gone: it gives other last bits anyway.
                choices = model.choose_attention(microbatch, dtype, device)
            names = [choice.backend for choice in choices] or None
    return model.choose_attention(microbatch, dtype, device, host_group.all_gather(names)[0])


def describe_network(
    model: Network, choices: Sequence[AttentionChoice], before: list[str] | None
) -> str:
    """How the network is run, for the log and the start row.

    Args:
        model: the network.
        choices: attention backends, as chosen.
        before: names that the run used up to here; None for a new run.
    """
    how = model.execution
    words = [f"mode {how.mode}"]
    if how.compile_unit == "all_blocks":
        words.append("all blocks compiled at once")
    for choice in choices:
        words.append(f"attention {choice.backend} ({choice.tested[choice.backend]})")
    if before and before != [choice.backend for choice in choices]:
        words.append(f"not {', '.join(before)} as before, which does not pass here")
    if not choices:
        words.append("attention by PyTorch's choice")
    if how.checkpointing != "none":
        words.append(f"activation checkpointing: {how.checkpointing}")
    return ", ".join(words)
