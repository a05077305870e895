"""The shards of a checkpoint by parameter name: for one file, or for another number of ranks.

DeepSpeed's shards hold flat stretches of numbers. Beside each of them its rank writes a layout:
which elements of which parameter stand where. With the layouts the shards are read without
DeepSpeed and without a process group, one after the other and mapped from the disk. An engine that
shares nothing out (`train.engine=ddp`) has one shard with whole tensors.

    CHECKPOINT/layout_R.pt      `ShardLayout` of rank R
    CHECKPOINT/frozen.pt        tensors that are not trained, float32
    CHECKPOINT/*_states.pt      shards: DeepSpeed's, or the one of ddp
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, TypeGuard

import torch
from torch import Tensor

from mixflow_fast.config.schema import EngineName
from mixflow_fast.models.network import Network
from mixflow_fast.models.weights.foreign import unsafe_name

COPY_AGAIN = (
    "copy the whole checkpoint again, or take an older one (a run does if this one is moved away)"
)
# What the optimizer keeps for a parameter, by name: tensors of its shape, or one number for all of
# its elements, such as "step". "weight" is the float32 master.
ParameterState = dict[str, Tensor | int | float]


class Fragment(NamedTuple):
    """`numel` elements of a parameter, from its element `start` on, in a flat partition.

    Attributes:
        partition: number of the tensor that the optimizer updates, in the order of its state_dict.
        offset: first of the elements in the partition.
    """

    name: str
    partition: int
    offset: int
    start: int
    numel: int


def alignment(stage: int, precision: str) -> int:
    """Bytes to a multiple of which the parameters begin in ZeRO's flat partitions; 1 = any.

    Kernels of 128-bit loads, cuBLAS' among them, need 16, and one parameter of an odd size (the
    biases of a SwiGLU) would shift all behind it. DeepSpeed's optimizer for bf16 at ZeRO 1 packs
    them. ZeRO 0 has no flat partitions, and ZeRO 3 gathers from them into other memory.
    """
    return 16 if stage == 2 or (stage == 1 and precision == "fp32") else 1


class StoredLayout(TypedDict):
    """A `ShardLayout` in plain values, which a file holds without naming a class."""

    stage: int
    ranks: int
    shapes: dict[str, tuple[int, ...]]
    fragments: list[tuple[str, int, int, int, int]]
    alignment: NotRequired[int]
    engine: NotRequired[EngineName]


@dataclass(frozen=True)
class ShardLayout:
    """Content of the shard of one rank.

    Attributes:
        stage: ZeRO stage that cut the shards.
        ranks: number of ranks that wrote them.
        shapes: official name -> shape of the whole tensor, trained or not, in official order.
        fragments: parts of the trained parameters in this shard.
        alignment: see `alignment`; checkpoints that do not say it have 1.
        engine: who wrote them; checkpoints that do not say it are DeepSpeed's.
    """

    stage: int
    ranks: int
    shapes: dict[str, tuple[int, ...]]
    fragments: tuple[Fragment, ...]
    alignment: int
    engine: EngineName = "deepspeed"

    @property
    def shards(self) -> int:
        """Number of different shards: without ZeRO every rank holds the same."""
        return self.ranks if self.stage else 1

    def is_cut_like(self, engine: EngineName, stage: int, ranks: int, precision: str) -> bool:
        """Whether so many ranks of this engine at this stage cut their shards just so."""
        same_ranks = stage == 0 or self.ranks == ranks
        same_engine = self.engine == engine and self.stage == stage
        return same_engine and same_ranks and self.alignment == alignment(stage, precision)

    def to_dict(self) -> StoredLayout:
        """The layout in plain values, as `from_dict` takes them."""
        fragments = [tuple(fragment) for fragment in self.fragments]
        return dataclasses.asdict(self) | {"fragments": fragments}

    @classmethod
    def from_dict(cls, stored: StoredLayout) -> ShardLayout:
        """The layout that `to_dict` stored."""
        fragments = tuple(Fragment(*fragment) for fragment in stored["fragments"])
        packed, engine = stored.get("alignment", 1), stored.get("engine", "deepspeed")
        return cls(stored["stage"], stored["ranks"], stored["shapes"], fragments, packed, engine)


class Piece(NamedTuple):
    """Numbers of one fragment.

    Attributes:
        name: official name of the parameter.
        start: the first of its elements that stand here.
        values: "weight" and the optimizer's state of these elements, such as "step", "exp_avg",
            "exp_avg_sq", "ema": flat tensors, or numbers.
    """

    name: str
    start: int
    values: ParameterState


def layout_file(folder: Path, rank: int) -> Path:
    """File of the `ShardLayout.to_dict()` of a rank."""
    return folder / f"layout_{rank:05d}.pt"


def frozen_file(folder: Path) -> Path:
    """File of the tensors that are not trained, by name; rank 0 writes it."""
    return folder / "frozen.pt"


def ddp_file(folder: Path) -> Path:
    """File of the float32 masters and the optimizer's state of an engine that shares nothing out.

    {"masters": {name: tensor}, "optimizer": {"state": {number: state}}}; rank 0 writes it.
    """
    return folder / "ddp_states.pt"


def read_layout(folder: Path, rank: int = 0) -> ShardLayout:
    """Shard layout of one rank.

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
    # Elements not yet found: zero at the end if each one stood in exactly one shard.
    missing = {name: _numel(shape) for name, shape in first.shapes.items()}
    for name in _frozen(folder):
        missing.pop(name, None)
    for rank in range(first.shards):
        layout = read_layout(folder, rank)
        if (layout.stage, layout.ranks) != (first.stage, first.ranks):
            raise ValueError(f"{folder} is mixed from two checkpoints (rank {rank}): {COPY_AGAIN}")
        shard = _read_shard(folder, rank, layout)
        for fragment in layout.fragments:
            number = fragment.partition
            values = _cut(fragment, shard.masters[number], shard.states.get(number, {}))
            for key, value in values.items():
                if is_flat(value) and value.numel() != fragment.numel:
                    raise ValueError(f"{folder}: {key} of {fragment.name} is cut off: {COPY_AGAIN}")
            missing[fragment.name] -= fragment.numel
            yield Piece(fragment.name, fragment.start, values)
    odd = [name for name, count in missing.items() if count]
    if odd:
        raise ValueError(f"{folder} does not hold all of {', '.join(odd[:5])}: {COPY_AGAIN}")


def full_states(folder: Path) -> dict[str, ParameterState]:
    """Whole tensors by official name: {name: {"weight", "step", "exp_avg", "ema", ...}}, float32.

    Trained parameters have all of it (only "weight" before the first step), the rest "weight".

    Args:
        folder: checkpoint.

    Raises:
        ValueError: as `iter_shards`.
    """
    return gather(folder, None)


def gather(folder: Path, keys: tuple[str, ...] | None) -> dict[str, ParameterState]:
    """`full_states` of some keys alone, such as ("weight", "ema"); None gives all."""
    shapes = read_layout(folder).shapes
    found: dict[str, ParameterState] = {name: {} for name in shapes}
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
                # No element stays unwritten: `iter_shards` refuses a checkpoint that lacks some.
                whole[key] = torch.empty(shapes[piece.name], dtype=value.dtype)
            whole[key].view(-1)[piece.start : piece.start + value.numel()] = value
    return found


def is_flat(value: object) -> TypeGuard[Tensor]:
    """Whether a value of a `Piece` has an entry for each element (a step count has one for all)."""
    return isinstance(value, Tensor) and value.dim() > 0


def fill_network(model: Network, folder: Path, trained: bool) -> None:
    """Set a network on the CPU to a checkpoint's master weights.

    Args:
        model: network with the official names.
        folder: checkpoint.
        trained: False sets only what is not trained, because the engine loads the rest.

    Raises:
        ValueError: names or shapes differ; as `iter_shards`.
    """
    own = model.saved_state()
    shapes = read_layout(folder).shapes
    # Copying in place would stretch a tensor of one element over any shape.
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


def check_shards(folder: Path, rank: int) -> None:
    """Refuse files that the engine would read on a rank and cannot; their tensors are not read.

    Raises:
        ValueError: as `read_file`.
    """
    own = f"*zero_pp_rank_{rank}_mp_rank_00_*_states.pt"
    for pattern in ("mp_rank_00_*_states.pt", own, ddp_file(folder).name):
        for file in folder.glob(pattern):
            read_file(file)


def _frozen(folder: Path) -> dict[str, Tensor]:
    return read_file(frozen_file(folder))


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _cut(fragment: Fragment, master: Tensor, state: ParameterState) -> ParameterState:
    def part(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1)[fragment.offset : fragment.offset + fragment.numel]

    cut = {key: part(value) if is_flat(value) else value for key, value in state.items()}
    return {"weight": part(master).float(), **cut}


class _Shard(NamedTuple):
    """Float32 master weights and state of the optimizer, by number of the partition."""

    masters: dict[int, Tensor]
    states: dict[int, ParameterState]


def _read_shard(folder: Path, rank: int, layout: ShardLayout) -> _Shard:
    if layout.engine == "ddp":
        content = read_file(ddp_file(folder))
        masters = {f.partition: content["masters"][f.name] for f in layout.fragments}
        return _Shard(masters, content["optimizer"]["state"])
    if layout.stage == 0:
        content = read_file(folder / "mp_rank_00_model_states.pt")
        masters = {f.partition: content["module"][f.name] for f in layout.fragments}
        return _Shard(masters, content["optimizer"]["state"])
    files = sorted(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
    if len(files) != 1:
        raise ValueError(f"{folder} has no shard of rank {rank} of {layout.ranks}: {COPY_AGAIN}")
    content = read_file(files[0])["optimizer_state_dict"]
    if layout.stage == 3:
        flat, state = content["fp32_flat_groups"], content["optimizer_state_dict"]["state"]
    else:
        flat = content["single_partition_of_fp32_groups"]
        state = content["base_optimizer_state"]["state"]
    return _Shard(dict(enumerate(flat)), state)


class _Unused:
    """Stands in for DeepSpeed's own objects in a shard, where nobody needs them."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# All that DeepSpeed writes into a checkpoint besides tensors and plain values.
DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def read_file(file: Path, classes: Mapping[str, type] | None = None, mapped: bool = True) -> Any:
    """A .pt file of a checkpoint, on the CPU, without executing anything in it.

    Args:
        file: one of ours or DeepSpeed's.
        classes: what the names of `DEEPSPEED_CLASSES` become; None leaves such objects out.
        mapped: tensors are mapped from the disk, and read where they are looked at.

    Raises:
        ValueError: missing, damaged, or with anything in it that would have to be executed.
    """
    names = [((classes or {}).get(name, _Unused), name) for name in DEEPSPEED_CLASSES]
    try:
        with torch.serialization.safe_globals(names):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist: {COPY_AGAIN}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = "".join(str(error).strip().splitlines()[:1])
        if name := unsafe_name(str(error)):
            reason = f"it holds {name}, which could run programs"
        raise ValueError(f"{file} cannot be read ({reason}): {COPY_AGAIN}") from None
