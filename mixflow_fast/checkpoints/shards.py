"""The shards of a checkpoint by parameter name: for one file, or for another number of ranks.

DeepSpeed's shards hold flat stretches of numbers. Beside each, its rank leaves a layout: which
elements of which parameter stand where. With it the shards are read without DeepSpeed and without
a process group, one after the other and mapped from the disk.

    CHECKPOINT/layout_R.pt      rank R's `ShardLayout`
    CHECKPOINT/frozen.pt        what is not trained, float32
    CHECKPOINT/*_states.pt      DeepSpeed's
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

COPY_AGAIN = "copy the whole checkpoint again, or take an older one"


class Fragment(NamedTuple):
    """`numel` elements of a parameter, from its element `start` on, in a flat partition."""

    name: str
    partition: int  # which of the tensors that the optimizer updates, in its state_dict's order
    offset: int  # where in it
    start: int
    numel: int


@dataclass(frozen=True)
class ShardLayout:
    """What one rank's shard holds.

    Attributes:
        stage: of ZeRO.
        ranks: how many there were.
        shapes: official name -> shape of the whole tensor, trained or not, in official order.
        fragments: of the trained parameters, on this rank.
    """

    stage: int
    ranks: int
    shapes: dict[str, tuple[int, ...]]
    fragments: tuple[Fragment, ...]

    @property
    def shards(self) -> int:
        """How many there are of them: without ZeRO every rank has all."""
        return self.ranks if self.stage else 1

    def to_dict(self) -> dict[str, Any]:
        """Of plain values."""
        fragments = [tuple(fragment) for fragment in self.fragments]
        return dataclasses.asdict(self) | {"fragments": fragments}

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> ShardLayout:
        """What `to_dict` made."""
        fragments = tuple(Fragment(*fragment) for fragment in tree["fragments"])
        return cls(tree["stage"], tree["ranks"], tree["shapes"], fragments)


class Piece(NamedTuple):
    """One fragment's numbers.

    Attributes:
        name: of the parameter.
        start: its first element here.
        values: "weight" (the float32 master) and the optimizer's state of these elements, such as
            "step", "exp_avg", "exp_avg_sq", "ema": flat tensors, or numbers.
    """

    name: str
    start: int
    values: dict[str, Any]


def layout_file(folder: Path, rank: int) -> Path:
    """Where a rank's `ShardLayout.to_dict()` stands."""
    return folder / f"layout_{rank:05d}.pt"


def frozen_file(folder: Path) -> Path:
    """Where the tensors that are not trained stand, by name; written by rank 0."""
    return folder / "frozen.pt"


def read_layout(folder: Path, rank: int = 0) -> ShardLayout:
    """A rank's layout.

    Raises:
        ValueError: it cannot be read.
    """
    return ShardLayout.from_dict(read_file(layout_file(folder, rank)))


def iter_shards(folder: Path) -> Iterator[Piece]:
    """Everything that is trained, shard by shard; tensors are mapped from the files.

    Raises:
        ValueError: a shard is missing, damaged, or not as its layout says; elements are missing.
    """
    first = read_layout(folder)
    missing = {name: _numel(shape) for name, shape in first.shapes.items()}
    for name in _frozen(folder):
        missing.pop(name, None)
    for rank in range(first.shards):
        layout = read_layout(folder, rank)
        if (layout.stage, layout.ranks) != (first.stage, first.ranks):
            raise ValueError(f"{folder} is mixed from two checkpoints (rank {rank}): {COPY_AGAIN}")
        masters, states = _read_shard(folder, rank, layout)
        for fragment in layout.fragments:
            values = _cut(fragment, masters[fragment.partition], states.get(fragment.partition, {}))
            for key, value in values.items():
                if is_flat(value) and value.numel() != fragment.numel:
                    raise ValueError(f"{folder}: {key} of {fragment.name} is cut off: {COPY_AGAIN}")
            missing[fragment.name] -= fragment.numel
            yield Piece(fragment.name, fragment.start, values)
    odd = [name for name, count in missing.items() if count]
    if odd:
        raise ValueError(f"{folder} does not hold all of {', '.join(odd[:5])}: {COPY_AGAIN}")


def full_states(folder: Path) -> dict[str, dict[str, Any]]:
    """Whole tensors by official name: {name: {"weight", "step", "exp_avg", "ema", ...}}, float32.

    Trained parameters have all of it (only "weight" before the first step), the rest "weight".

    Args:
        folder: of a checkpoint.

    Raises:
        ValueError: as `iter_shards`.
    """
    return gather(folder, None)


def gather(folder: Path, keys: tuple[str, ...] | None) -> dict[str, dict[str, Any]]:
    """`full_states` of some keys alone, such as ("weight", "ema"); None gives all."""
    shapes = read_layout(folder).shapes
    found: dict[str, dict[str, Any]] = {name: {} for name in shapes}
    for name, tensor in _frozen(folder).items():
        found[name]["weight"] = tensor
    for piece in iter_shards(folder):
        whole = found[piece.name]
        for key, value in piece.values.items():
            if keys is not None and key not in keys:
                continue
            if not is_flat(value):
                whole[key] = value
                continue
            if key not in whole:
                whole[key] = torch.empty(shapes[piece.name], dtype=value.dtype)
            whole[key].view(-1)[piece.start : piece.start + value.numel()] = value
    return found


def is_flat(value: Any) -> bool:
    """Whether a value of a `Piece` has an entry for each element (a step count has one for all)."""
    return isinstance(value, Tensor) and value.dim() > 0


def fill_network(model: nn.Module, folder: Path, trained: bool) -> None:
    """Set a network on the CPU to a checkpoint's master weights.

    Args:
        model: with the official names.
        folder: of the checkpoint.
        trained: False sets only what is not trained, because DeepSpeed loads the rest.

    Raises:
        ValueError: names or shapes differ; as `iter_shards`.
    """
    own = model.state_dict()
    shapes = read_layout(folder).shapes
    odd = [name for name in own.keys() | shapes if name not in own or name not in shapes]
    odd += [n for n in own.keys() & shapes.keys() if tuple(own[n].shape) != shapes[n]]
    if odd:
        raise ValueError(f"{folder} is of another network: {', '.join(sorted(odd)[:5])}")
    for name, tensor in _frozen(folder).items():
        own[name].copy_(tensor)
    if trained:
        for piece in iter_shards(folder):
            weight = piece.values["weight"]
            own[piece.name].view(-1)[piece.start : piece.start + weight.numel()] = weight


def _frozen(folder: Path) -> dict[str, Tensor]:
    return read_file(frozen_file(folder))


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _cut(fragment: Fragment, master: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    def part(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1)[fragment.offset : fragment.offset + fragment.numel]

    cut = {key: part(value) if is_flat(value) else value for key, value in state.items()}
    return {"weight": part(master).float(), **cut}


def _read_shard(
    folder: Path, rank: int, layout: ShardLayout
) -> tuple[dict[int, Tensor], dict[int, dict[str, Any]]]:
    """By partition: the float32 master weights, and the optimizer's state."""
    if layout.stage == 0:
        content = read_file(folder / "mp_rank_00_model_states.pt")
        masters = {f.partition: content["module"][f.name] for f in layout.fragments}
        return masters, content["optimizer"]["state"]
    files = sorted(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
    if len(files) != 1:
        raise ValueError(f"{folder} has no shard of rank {rank} of {layout.ranks}: {COPY_AGAIN}")
    content = read_file(files[0])["optimizer_state_dict"]
    if layout.stage == 3:
        return dict(enumerate(content["fp32_flat_groups"])), content["optimizer_state_dict"][
            "state"
        ]
    flat = content["single_partition_of_fp32_groups"]
    return dict(enumerate(flat)), content["base_optimizer_state"]["state"]


class _Unused:
    """Stands in for DeepSpeed's own objects in a shard, so that none of its code runs on them."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_UNUSED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def read_file(file: Path) -> Any:
    """A .pt file of a checkpoint, mapped from the disk; DeepSpeed's own objects are left out.

    Raises:
        ValueError: missing, damaged, or with anything in it that would have to be executed.
    """
    names = [(type("_Unused", (_Unused,), {}), name) for name in _UNUSED]
    try:
        with torch.serialization.safe_globals(names):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist: {COPY_AGAIN}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = str(error).strip().splitlines()[:1]
        raise ValueError(f"{file} cannot be read ({''.join(reason)}): {COPY_AGAIN}") from None
