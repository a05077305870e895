"""A text-to-image run as a folder that its library loads: the source's, with another transformer.

    OUT/model_index.json, scheduler/, vae/, text_encoder/, tokenizer/, ...   the source's
    OUT/transformer/config.json                                              of the class
    OUT/transformer/diffusion_pytorch_model.safetensors                      weights in one file

One file whatever its size, because interfaces such as ComfyUI read a single one. The transformer is
read back by its class, and every tensor compared, before the folder is there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mixflow_fast import __version__
from mixflow_fast.files import check_inside, existing_folder, json_text, replacing, user_path
from mixflow_fast.messages import shorten, size_text
from mixflow_fast.models.text_to_image.loading import (
    network_class,
    read_config,
    transformer_folder,
)
from mixflow_fast.models.text_to_image.lora import (
    LoraSpec,
    file_name,
    is_adapter,
    merge_lora,
)
from mixflow_fast.models.text_to_image.spec import TransformerSpec
from mixflow_fast.models.weights.diffusers_dit import RECORD
from mixflow_fast.models.weights.files import WeightsFile
from mixflow_fast.models.weights.loading import load_model
from mixflow_fast.models.weights.naming import TEXT_TO_IMAGE_PREFIX, kind_of
from mixflow_fast.models.weights.tensor_headers import read_headers
from mixflow_fast.models.weights.text_to_image_names import text_to_image_network

Dtype = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[Dtype, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
_INDEX = "model_index.json"
_TRANSFORMER = "transformer"
_TEXT = ("text_encoder", "tokenizer")
_OBJECTIVE = ("gamma", "timesteps", "shift")
_LICENCES = ("LICENSE*", "LICENCE*")


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """The folder that a run began with.

    Attributes:
        folder: a pipeline's, or the transformer's alone.
        class_name, config: of its transformer.
        dtype: of its transformer's weights.
        components: folders beside the transformer that the pipeline's index names.
        absent: those that it wants and that are not there.
        pipeline: class of the pipeline; None for a transformer alone.
    """

    folder: Path
    class_name: str
    config: Mapping[str, object]
    dtype: Dtype
    components: tuple[str, ...]
    absent: tuple[str, ...]
    pipeline: str | None

    @classmethod
    def read(cls, folder: Path) -> ModelFolder:
        """What a folder holds; no weights are read.

        Raises:
            ValueError: it is no folder of diffusers, or its index names other places.
        """
        config = read_config(transformer_folder(folder) / "config.json")
        headers = read_headers(transformer_folder(folder))
        dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES.values()]
        counts = [list(headers.dtypes.values()).count(dtype) for dtype in dtypes]
        index = read_config(folder / _INDEX) if (folder / _INDEX).is_file() else {}
        parts = {n: v for n, v in index.items() if isinstance(v, list) and len(v) == 2}
        check_inside(parts, folder / _INDEX)
        others = [name for name in parts if name != _TRANSFORMER]
        held = [n for n in others if parts[n][1] is not None and (folder / n).is_dir()]
        return cls(
            folder=folder,
            class_name=str(config.get("_class_name")),
            config=config,
            dtype=get_args(Dtype)[counts.index(max(counts))],
            components=tuple(held),
            # A pipeline loads without them only where they are passed as None, even if its index
            # says that there are none.
            absent=tuple(
                name
                for name in others
                if name not in held and (parts[name][1] is not None or name.startswith(_TEXT))
            ),
            pipeline=str(index["_class_name"]) if "_class_name" in index else None,
        )

    def size(self) -> int:
        """Bytes of what stands beside the transformer."""
        return sum(
            file.stat().st_size
            for name in self.components
            for file in (self.folder / name).rglob("*")
            if file.is_file()
        )


def check_place(out: Path, origin: Path) -> None:
    """Refuse to write over, around or into the source's folder.

    Raises:
        ValueError: says which.
    """
    there, own = out.resolve(), origin.resolve()
    if there == own or there in own.parents:
        raise ValueError(
            f"--out {out} is or holds {origin}, which the transformer was trained from and is "
            "read now: choose another --out"
        )
    if own in there.parents:
        raise ValueError(
            f"--out {out} lies in {origin}, which the transformer was trained from: choose a "
            "folder beside it"
        )


@dataclass(frozen=True)
class Written:
    """How many tensors were written, and what a user should know of them."""

    tensors: int
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class TextToImageWeights:
    """Weights of a text-to-image network in a file.

    Attributes:
        file: where they are.
        which: "ema" or "model".
        name: the network in words.
        state: by the class's own names, mapped from the file.
        class_name: diffusers' class.
        folder: what the run says it was trained from; None where it does not.
        steps: optimizer steps.
        objective: how it was trained: gamma, timesteps, shift.
        lora: the adapters that `state` holds, by the names that their files have; None where it is
            the whole network.
    """

    file: Path
    which: str
    name: str
    state: Mapping[str, Tensor]
    class_name: str
    folder: str | None
    steps: int
    objective: Mapping[str, str]
    lora: LoraSpec | None = None

    def write_folder(
        self,
        out: Path,
        model: str | os.PathLike[str] | None = None,
        dtype: Dtype | None = None,
        link: bool = False,
    ) -> Written:
        """Write the folder that it was trained from with these weights, whole or not at all.

        Args:
            out: the folder; what is there is replaced.
            model: what it was trained from, where that is not `folder`.
            dtype: of the transformer's weights; None: that of the folder's.
            link: symbolic links to the other parts in place of copies.

        Raises:
            ValueError: no such folder, or one of another network; weights that the dtype cannot
                hold; too little room; a difference after reading back.
            OSError: it could not be written.
        """
        origin = ModelFolder.read(self._source(model))
        check_place(out, origin.folder)
        chosen: Dtype = dtype or origin.dtype
        network = _on_meta(origin)
        whole = self.state if self.lora is None else self._merged(origin)
        ready = _converted(whole, network.state_dict(), origin, chosen)
        _check_room(out, ready, 0 if link else origin.size())
        inside = transformer_folder(origin.folder) != origin.folder
        with replacing(out) as partial:
            partial.mkdir()
            _add_others(origin, partial, link)
            folder = partial / _TRANSFORMER if inside else partial
            folder.mkdir(exist_ok=True)
            network.save_config(folder)
            _save(ready, folder / WEIGHTS, {"format": "pt"})
            record = {**self._record(chosen), "model": str(origin.folder)}
            (partial / RECORD).write_text(json_text(record, RECORD))
            _compare_read_back(origin, ready, folder, DTYPES[chosen])
        made = out / _TRANSFORMER if inside else out
        notes = list(_notes(origin, made, chosen, link, len(ready)))
        if self.lora is not None:
            notes.append(_of_merging(self.state, self.lora, whole, ready, chosen))
        return Written(len(ready), notes)

    def write_file(self, out: Path, dtype: Dtype | None = None) -> Written:
        """Write the weights alone, by the class's names, as one .safetensors file.

        Args:
            out: the file.
            dtype: of the weights; None: fp32.

        Raises:
            ValueError: numbers that the dtype cannot hold.
            OSError: it could not be written.
        """
        if self.lora is not None:
            raise ValueError(
                f"{self.file} holds adapters (LoRA) and not the network beside them: export --to "
                "lora writes them, --to diffusers adds them to the folder that they were trained on"
            )
        chosen: Dtype = dtype or "fp32"
        ready = _in_dtype(self.state, chosen)
        with replacing(out) as partial:
            _save(ready, partial, {"format": "pt", **self.record(chosen)})
        note = f"{self.class_name}'s weights in {chosen}; a pipeline's folder is --to diffusers"
        return Written(len(ready), [note])

    def _merged(self, origin: ModelFolder) -> dict[str, Tensor]:
        """The folder's network with the adapters added to it, float32, by the class's names."""
        network = load_model(self.file, self.which, base=origin.folder).transformer
        merge_lora(network)
        return network.state_dict()

    def _source(self, model: str | os.PathLike[str] | None) -> Path:
        if model is not None:
            return existing_folder(model, "the folder that the transformer was trained from")
        if self.folder is None or not user_path(self.folder).is_dir():
            where = "does not say" if self.folder is None else f"says {self.folder}, not there now,"
            raise ValueError(
                f"{self.file} {where} as the folder that it was trained from: give it with --model "
                "FOLDER, or write the weights alone with --to ema"
            )
        return user_path(self.folder)

    def record(self, dtype: Dtype) -> dict[str, str]:
        """How they were trained and written, for the header of a file."""
        return {name: str(value) for name, value in self._record(dtype).items()}

    def _record(self, dtype: Dtype) -> dict[str, str | int]:
        return {
            "class": self.class_name,
            "source": str(self.file),
            "weights": self.which,
            "steps": self.steps,
            **self.objective,
            "dtype": dtype,
            "written_by": f"mixflow-fast {__version__}",
        }


def text_to_image_weights(file: WeightsFile, which: str) -> TextToImageWeights | None:
    """The weights of a text-to-image network in a file; None where it holds no such network.

    Args:
        file: opened.
        which: "ema" or "model".

    Raises:
        ValueError: values that are damaged or not finite.
    """
    state, record = file.state(which), file.metadata
    lora = None if record is None else record.kwargs.get("lora")
    network = text_to_image_network({name: tuple(t.shape) for name, t in state.items()})
    if network is not None:
        name, class_name, prefix = network.name, network.class_name, network.prefix
    elif record is not None and kind_of(state) == "text-to-image":
        # Of a class that a user's adapter has brought, the record alone says which.
        class_name = TransformerSpec.from_config(record.kwargs).class_name
        name, prefix = class_name, TEXT_TO_IMAGE_PREFIX
    else:
        return None
    file.check_values(which, state)
    own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    if isinstance(lora, Mapping):
        own = {file_name(n): tensor for n, tensor in own.items() if is_adapter(n)}
        name = f"{class_name} with LoRA of rank {lora.get('rank')}"
    run = json.loads(record.config or "{}") if record is not None else {}
    objective = run.get("objective", {})
    return TextToImageWeights(
        file=file.path,
        which=which,
        name=name,
        state=own,
        class_name=class_name,
        folder=run.get("model", {}).get("folder"),
        steps=file.steps or 0,
        objective={n: str(objective[n]) for n in _OBJECTIVE if n in objective},
        lora=LoraSpec.from_config(lora) if isinstance(lora, Mapping) else None,
    )


def _of_merging(
    adapters: Mapping[str, Tensor],
    spec: LoraSpec,
    whole: Mapping[str, Tensor],
    ready: Mapping[str, Tensor],
    dtype: Dtype,
) -> str:
    """How large the change is, and how much of it the dtype rounds away; RMS over its layers."""
    size = change = lost = 0.0
    layers = [name.removesuffix(".lora_A.weight") for name in adapters if ".lora_A." in name]
    for layer in layers:
        down, up = (adapters[f"{layer}.lora_{part}.weight"].float() for part in "AB")
        weight = whole[f"{layer}.weight"]
        change += float((spec.scale * (up @ down)).square().sum())
        size += float(weight.square().sum())
        lost += float((ready[f"{layer}.weight"].float() - weight).square().sum())
    words = f"LoRA added to {len(layers)} layers, which changes them by {_ratio(change, size):.1e}"
    if dtype == "fp32":
        return words
    return (
        f"{words}; rounding the sums to {dtype} is {_ratio(lost, change):.2g} of that change "
        "(--dtype fp32 keeps it, --to lora keeps the adapters apart)"
    )


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0


def _on_meta(origin: ModelFolder) -> nn.Module:
    with torch.device("meta"):
        return network_class(origin.class_name).from_config(dict(origin.config))


def _converted(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], origin: ModelFolder, dtype: Dtype
) -> dict[str, Tensor]:
    """The state in the dtype, every tensor of the class there and no other."""
    wrong = [n for n in own if n not in state] + [n for n in state if n not in own]
    wrong += [n for n in own if n in state and own[n].shape != state[n].shape]
    if wrong:
        raise ValueError(
            f"the weights do not fit {origin.class_name} of {origin.folder}: missing, unexpected "
            f"or of another shape: {shorten(wrong)}: give the folder that they were trained from, "
            "with --model FOLDER"
        )
    return _in_dtype(state, dtype)


def _in_dtype(state: Mapping[str, Tensor], dtype: Dtype) -> dict[str, Tensor]:
    out = {}
    for name, value in state.items():
        if value.is_floating_point():
            value = value.to(DTYPES[dtype])
            if not bool(value.isfinite().all()):
                raise ValueError(
                    f"{name} holds numbers that {dtype} cannot hold: choose --dtype fp32 or bf16"
                )
        out[name] = value.contiguous()
    return out


def _save(state: Mapping[str, Tensor], path: Path, header: Mapping[str, str]) -> None:
    from safetensors.torch import save_file

    save_file(dict(state), path, metadata=dict(header))


def _check_room(out: Path, state: Mapping[str, Tensor], others: int) -> None:
    needed = others + sum(tensor.nbytes for tensor in state.values())
    place = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(
            f"{out} needs {size_text(needed)} and {place} has {size_text(free)}: choose another "
            "--out, or link the other parts with --link"
        )


def _add_others(origin: ModelFolder, partial: Path, link: bool) -> None:
    for name in origin.components:
        there = (origin.folder / name).resolve()
        if link:
            os.symlink(there, partial / name, target_is_directory=True)
        else:
            shutil.copytree(there, partial / name)
    files = [origin.folder / _INDEX] if origin.pipeline is not None else []
    for pattern in _LICENCES:
        files += [file for file in origin.folder.glob(pattern) if file.is_file()]
    for file in files:
        shutil.copyfile(file, partial / file.name)


def _compare_read_back(
    origin: ModelFolder, state: Mapping[str, Tensor], folder: Path, dtype: torch.dtype
) -> None:
    """ValueError unless the class reads every tensor as it was written."""
    made = network_class(origin.class_name).from_pretrained(
        folder, torch_dtype=dtype, local_files_only=True
    )
    back = made.state_dict()
    # Where accelerate is not installed, diffusers reads float32 whatever it is asked for.
    different = [
        n for n, v in state.items() if n in back and not torch.equal(back[n].to(v.dtype), v)
    ]
    if different or back.keys() != state.keys():
        raise ValueError(
            f"{origin.class_name} reads {shorten(different or sorted(back.keys() ^ state.keys()))} "
            "otherwise than it was written; nothing was written: please report it with the "
            "versions of torch and diffusers"
        )


def _notes(
    origin: ModelFolder, made: Path, dtype: Dtype, link: bool, tensors: int
) -> Iterator[str]:
    yield f"read back by {origin.class_name}: all {tensors} tensors equal, in {dtype}"
    if origin.components:
        how = "linked to" if link else "copied from"
        size = size_text(origin.size())
        yield f"{', '.join(origin.components)} ({size}) {how} {origin.folder}"
    if origin.pipeline is None:
        yield (
            f"{origin.folder} holds the transformer alone, so this does too. A pipeline takes it "
            f"as transformer={origin.class_name}.from_pretrained({str(made)!r}); one that is made "
            "of it alone needs its text parts passed as None, and embeddings in place of prompts"
        )
    elif origin.absent:
        none = ", ".join(f"{name}=None" for name in origin.absent)
        yield (
            f"{origin.folder} lacks {', '.join(origin.absent)}: {origin.pipeline}.from_pretrained "
            f"loads this folder with {none}, and then wants embeddings in place of prompts"
        )
