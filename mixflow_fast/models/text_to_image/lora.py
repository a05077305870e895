"""LoRA (arXiv 2106.09685): small trained matrices beside the frozen linear layers, by peft.

    y = W x + b + (alpha / rank) B A x        A (rank, in), B (out, rank); B = 0 at the start

Files of adapters are diffusers': `transformer.LAYER.lora_A.weight` and `lora_B.weight`, with the
factor alpha / rank folded into B, because programs differ in where they look for an alpha.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from mixflow_fast.files import existing_path
from mixflow_fast.messages import did_you_mean, shorten

_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj",
              "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")  # fmt: skip
_DUAL_ATTENTION = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
_MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
# As diffusers' training scripts have them, and for SD3 also the second attention of 3.5 medium,
# which `attn.to_q` does not match.
TARGETS: dict[str, tuple[str, ...]] = {
    "SD3Transformer2DModel": (*_ATTENTION, *_DUAL_ATTENTION),
    "FluxTransformer2DModel": (*_ATTENTION, *_MLP),
    "ZImageTransformer2DModel": ("to_q", "to_k", "to_v", "to_out.0"),
}
# In a file, before the names of the network's layers.
PREFIX = "transformer."
# peft's name of the only adapter.
_ADAPTER = "default"


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Adapters beside a network.

    Attributes:
        rank: columns of A's output.
        alpha: the adapter's output is multiplied by alpha / rank.
        targets: ends of the names of the linear layers that have one.
        base: `spec.base_digest` of the frozen weights; None where it is not known.

    Raises:
        ValueError: a rank or an alpha that is not positive.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    base: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("alpha", self.alpha)):
            if not value > 0 or not math.isfinite(value):
                raise ValueError(f"{name} of LoRA must be a positive number, got {value!r}")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def to_config(self) -> dict[str, object]:
        """What JSON can hold."""
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "targets": list(self.targets),
            "base": self.base,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> LoraSpec:
        """The inverse of `to_config`.

        Raises:
            ValueError: entries that are missing or of another kind.
        """
        rank, alpha, targets = (config.get(name) for name in ("rank", "alpha", "targets"))
        numbers = isinstance(rank, int) and isinstance(alpha, int | float)
        if not numbers or not isinstance(targets, list):
            raise ValueError(
                "the record of LoRA must hold rank, alpha and targets, got "
                f"{', '.join(config) or 'nothing'}"
            )
        base = config.get("base")
        base = base if isinstance(base, str) else None
        return cls(rank=rank, alpha=float(alpha), targets=tuple(targets), base=base)


def lora_spec(
    network: nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: tuple[str, ...] | None = None,
) -> LoraSpec:
    """The adapters that a network gets.

    Args:
        network: without adapters, on any device.
        rank: of each adapter.
        alpha: None: as rank.
        targets: ends of the names of linear layers, as "attn.to_q"; None: those of its class.

    Raises:
        ValueError: a class without targets of its own; targets that match no linear layer.
    """
    alpha = float(rank if alpha is None else alpha)
    return LoraSpec(rank=rank, alpha=alpha, targets=_matching(network, targets))


def _matching(network: nn.Module, targets: tuple[str, ...] | None) -> tuple[str, ...]:
    names = {name: isinstance(module, nn.Linear) for name, module in network.named_modules()}
    linear = [name for name, is_linear in names.items() if is_linear]
    class_name = type(network).__name__
    if targets is None:
        if class_name not in TARGETS:
            ends = shorten(dict.fromkeys(_end(name) for name in linear), 12)
            raise ValueError(
                f"LoRA has no targets of its own for {class_name}: set lora.targets to ends of the "
                f"names of its linear layers; there are {ends}"
            )
        # A network of the class may have no second attention.
        found = (t for t in TARGETS[class_name] if any(_matches(t, name) for name in linear))
        return tuple(found)
    for target in targets:
        if any(_matches(target, name) for name in linear):
            continue
        if any(_matches(target, name) for name in names):
            below = [_end(name) for name in linear if f".{target}." in f".{name}"]
            raise ValueError(
                f"lora.targets: {target!r} is no linear layer of {class_name}"
                f"{did_you_mean(target, below) if below else ''}: name linear layers"
            )
        ends = [end for name in linear for end in _ends(name)]
        raise ValueError(
            f"lora.targets: {target!r} matches no linear layer of {class_name}"
            f"{did_you_mean(target, dict.fromkeys(ends))}"
        )
    if not targets:
        raise ValueError("lora.targets must name at least one layer, got []; null: the usual ones")
    return tuple(targets)


def _matches(target: str, name: str) -> bool:
    """As peft matches names of modules with its `target_modules`."""
    return name == target or name.endswith(f".{target}")


def _ends(name: str) -> Iterator[str]:
    """`a.0.b.c` -> `c`, `b.c`, `0.b.c`, `a.0.b.c`."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[-count:])


def _end(name: str) -> str:
    """The end of a layer's name behind the last number of a block."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else name


def add_lora(network: nn.Module, spec: LoraSpec, seed: int = 0) -> None:
    """Put adapters into a network, in place, and freeze the rest of it.

    Of a network on the meta device they are there too; see `set_initial`.

    Args:
        network: of diffusers or any other, without adapters.
        spec: of `lora_spec`.
        seed: of their initial values.

    Raises:
        ValueError: peft is not installed, the network has adapters already, or none of its layers
            is a target.
    """
    peft = _peft()
    if any(True for _ in _layers(network)):
        raise ValueError("the network has LoRA adapters already: merge them first (merge_lora)")
    _matching(network, spec.targets)
    network.requires_grad_(False)
    config = peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.targets),
        # A dropout would draw from the state of the process, which positions do not determine.
        lora_dropout=0.0,
        bias="none",
    )
    device = next(network.parameters()).device
    # peft draws initial values, which `set_initial` replaces.
    with torch.random.fork_rng(devices=[]), torch.device(device):
        peft.inject_adapter_in_model(config, network, adapter_name=_ADAPTER)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    if device.type != "meta":
        set_initial(network, seed)


@torch.no_grad()
def set_initial(network: nn.Module, seed: int) -> None:
    """Initial values: A uniform in +-1 / sqrt(in), as peft's; B zero. A function of the seed.

    Args:
        network: with adapters, not on the meta device.
        seed: any integer of 64 bits.
    """
    generator = torch.Generator().manual_seed(seed)
    for _, layer in _layers(network):
        down, up = _pair(layer)
        bound = 1 / math.sqrt(down.shape[1])
        down.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=generator))
        up.zero_()


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def base_name(name: str) -> str:
    """The name that a tensor of the frozen network had before there were adapters."""
    return name.replace(".base_layer.", ".")


def file_name(name: str) -> str:
    """The name of an adapter's tensor in a file, of its name in the network."""
    return name.replace(f".{_ADAPTER}.", ".")


def lora_state(network: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors by the names that files have, without a prefix."""
    return {file_name(n): p.detach() for n, p in network.named_parameters() if is_adapter(n)}


def fold_alpha(state: Mapping[str, Tensor], spec: LoraSpec) -> dict[str, Tensor]:
    """The same adapters at alpha = rank: B multiplied by alpha / rank.

    Exact where that is a power of two, else to float32's rounding.

    Args:
        state: tensors by names as `lora_state` has them.
        spec: what they were trained with.
    """
    return {n: t * spec.scale if ".lora_B." in n else t for n, t in state.items()}


def read_lora(file: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Adapters of a file in diffusers' layout, and what its header says.

    Returns:
        tensors by the names of the network's layers, LAYER.lora_A.weight and LAYER.lora_B.weight;
        strings of the header.

    Raises:
        ValueError: it cannot be read, is of another layout, or its adapters have an alpha of their
            own, several ranks, or numbers that are not finite.
    """
    from safetensors import SafetensorError, safe_open

    path = existing_path(file, "lora")
    try:
        with safe_open(path, framework="pt") as opened:
            content = {name: opened.get_tensor(name) for name in opened.keys()}
            header = dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}): give a .safetensors of LoRA") from None
    state: dict[str, Tensor] = {}
    for name, tensor in content.items():
        layer, _, part = name.removeprefix(PREFIX).partition(".lora_")
        if not name.startswith(PREFIX) or part not in ("A.weight", "B.weight"):
            raise ValueError(
                f"{path} must hold {PREFIX}LAYER.lora_A.weight and lora_B.weight alone, as "
                f"diffusers writes them, got {name}: convert it with diffusers' save_lora_weights"
            )
        state[f"{layer}.lora_{part}"] = tensor
    _check_pairs(path, state)
    record = json.loads(header.get("lora_adapter_metadata") or "{}")
    odd = {k: v for k, v in record.items() if k.endswith(("lora_alpha", "rank_pattern")) and v}
    rank = _rank(state)
    if any(value != rank for value in odd.values()):
        raise ValueError(
            f"{path} must have alpha = rank = {rank}, and one rank, got {odd}: multiply lora_B by "
            "alpha / rank and write it without that record"
        )
    return state, header


def _check_pairs(path: Path, state: Mapping[str, Tensor]) -> None:
    layers = dict.fromkeys(name.partition(".lora_")[0] for name in state)
    half = [x for x in layers if not {f"{x}.lora_{p}.weight" for p in "AB"} <= state.keys()]
    ranks = {state[f"{x}.lora_A.weight"].shape[0] for x in layers if x not in half}
    ranks |= {state[f"{x}.lora_B.weight"].shape[1] for x in layers if x not in half}
    if half or len(ranks) != 1:
        what = f"half of {shorten(half)}" if half else f"ranks {sorted(ranks) or 'of nothing'}"
        raise ValueError(f"{path} must hold whole adapters of one rank, got {what}")
    bad = [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise ValueError(f"{path}: {shorten(bad)} holds numbers that are not finite")


def _rank(state: Mapping[str, Tensor]) -> int:
    return next(tensor.shape[0] for name, tensor in state.items() if ".lora_A." in name)


@torch.no_grad()
def load_lora(network: nn.Module, file: str | os.PathLike[str]) -> LoraSpec:
    """Put the adapters of a file into a network, in place.

    Args:
        network: without adapters, not on the meta device.
        file: as `read_lora`; its alpha is its rank.

    Returns:
        what was put in; `base` is that of the file's header.

    Raises:
        ValueError: as `read_lora`; layers that the network has not, or of other widths.
    """
    state, header = read_lora(file)
    layers = dict.fromkeys(name.partition(".lora_")[0] for name in state)
    modules = dict(network.named_modules())
    for layer in layers:
        module = modules.get(layer)
        shape = (state[f"{layer}.lora_B.weight"].shape[0], state[f"{layer}.lora_A.weight"].shape[1])
        if not isinstance(module, nn.Linear) or module.weight.shape != shape:
            have = tuple(module.weight.shape) if isinstance(module, nn.Linear) else "no such layer"
            raise ValueError(
                f"{file} is of another network than {type(network).__name__}: {layer} is {shape}, "
                f"the network has {have}{did_you_mean(layer, modules)}"
            )
    rank = _rank(state)
    spec = LoraSpec(
        rank=rank, alpha=float(rank), targets=tuple(layers), base=header.get("base") or None
    )
    add_lora(network, spec)
    own = lora_state(network)
    if own.keys() != state.keys():  # a layer's name is the end of another's
        raise ValueError(f"{file} does not name its layers alone: {shorten(own.keys() - state)}")
    for name, tensor in state.items():
        own[name].copy_(tensor)
    return spec


@torch.no_grad()
def merge_lora(network: nn.Module) -> None:
    """Add adapters to the weights that they stand beside, and take them out; in place.

        W <- W + (alpha / rank) B A, in W's dtype

    Afterwards the network has the names that it had before.
    """
    modules = dict(network.named_modules())
    for name, layer in list(_layers(network)):
        layer.merge(safe_merge=True, adapter_names=[_ADAPTER])
        parent, _, own = name.rpartition(".")
        setattr(modules[parent], own, layer.get_base_layer())
    if hasattr(network, "peft_config"):
        del network.peft_config


def _layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers with adapters, by name, in the network's order."""
    for name, module in network.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def _pair(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank)."""
    return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            f'LoRA needs peft ({error}): pip install "mixflow_fast[text]", or set lora.rank=0'
        ) from None
    return peft
