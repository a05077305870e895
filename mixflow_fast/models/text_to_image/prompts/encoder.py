"""Prompts in, parts out: the text encoders of a local pipeline folder, one in memory at a time.

    tokens = encoder.tokens(["a fox"])                     no weights
    parts = encoder.embed("t5", tokens); encoder.release("t5")        stage by stage
    cond = encoder.layout.assemble(encoder.encode(["a fox"]))         what encode_prompt returns

Nothing is downloaded. What comes out equals the official pipeline's `encode_prompt` at the same
length, dtype and batch to the bit; another batch changes the order of sums and no more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixflow_fast.files import existing_path, sha256
from mixflow_fast.messages import did_you_mean, error_line
from mixflow_fast.models.text_to_image.prompts.layout import (
    Part,
    Parts,
    PromptLayout,
    layout_for,
)
from mixflow_fast.models.text_to_image.prompts.text_encoders import (
    T5,
    ClipPooled,
    ClipWithProjection,
    NoT5,
    Place,
    Qwen,
    TextEncoder,
    clip_length,
)

# Defaults of the pipelines' max_sequence_length, and the most that they take.
LENGTHS = {
    "SD3Transformer2DModel": 256,
    "FluxTransformer2DModel": 512,
    "ZImageTransformer2DModel": 512,
}
_LONGEST = 512


@dataclass(frozen=True)
class Stage:
    """An encoder that is loaded, used and freed as one.

    Attributes:
        name: "clip_l", "clip_g", "t5", "clip" or "qwen".
        parts: what it makes of a prompt.
        tokens: what it takes.
    """

    name: str
    parts: tuple[str, ...]
    tokens: tuple[str, ...]


class PromptEncoder:
    """The text encoders of a pipeline. `prompt_encoder` makes one.

    Attributes:
        class_name: of the transformer.
        layout: how its condition is assembled.
        length: tokens of T5, or of Qwen3.
        stages: in the order in which they run.
        parts: all that a prompt becomes; of one prompt.
        token_parts: all that `tokens` gives; of one prompt.
    """

    def __init__(
        self,
        class_name: str,
        layout: PromptLayout,
        length: int,
        encoders: Sequence[TextEncoder | NoT5],
        files: Sequence[Path] = (),
    ) -> None:
        self.class_name, self.layout, self.length = class_name, layout, length
        self._encoders = {encoder.name: encoder for encoder in encoders}
        self.stages = tuple(Stage(e.name, tuple(e.parts), tuple(e.tokens)) for e in encoders)
        self.parts: dict[str, Part] = {}
        self.token_parts: dict[str, Part] = {}
        for encoder in encoders:
            self.parts |= encoder.parts
            self.token_parts |= encoder.tokens
        self._files = tuple(files)

    def tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids of all stages, as many as `token_parts`; the encoders' weights are not read.

        Returns:
            (B, ...) int32 of each, on the CPU.

        Raises:
            ValueError: no prompts, or something else than strings.
        """
        _check_prompts(prompts)
        tokens: dict[str, Tensor] = {}
        for encoder in self._encoders.values():
            tokens |= encoder.tokenize(prompts)
        return tokens

    def cut(self, prompts: Sequence[str]) -> dict[str, int]:
        """For each stage, how many of the prompts have more tokens than it sees.

        Raises:
            ValueError: as `tokens`.
        """
        _check_prompts(prompts)
        return {name: encoder.count_cut(prompts) for name, encoder in self._encoders.items()}

    def embed(self, stage: str, tokens: Mapping[str, Tensor]) -> Parts:
        """Parts that one stage makes of tokens. Its weights are read first, and stay.

        Args:
            stage: name of one of `stages`.
            tokens: (B, ...) of `tokens`, of this stage at least, on any device.

        Returns:
            (B, ...) of each of the stage's parts, on the encoder's device, without a graph.

        Raises:
            ValueError: no such stage, tokens of another length, weights missing or damaged.
        """
        return self._encoder(stage).embed(dict(tokens))

    def release(self, stage: str) -> None:
        """Free the weights of a stage; nothing happens where they are not in memory."""
        self._encoder(stage).release()

    def encode(self, prompts: Sequence[str]) -> Parts:
        """All parts of prompts. Stages that were not in memory are freed again, one by one.

        Returns:
            (B, ...) of each of `parts`, on the encoders' device.

        Raises:
            ValueError: as `tokens` and `embed`.
        """
        tokens, parts = self.tokens(prompts), {}
        for encoder in self._encoders.values():
            stays = encoder.loaded
            try:
                parts |= encoder.embed(tokens)
            finally:
                if not stays:
                    encoder.release()
        return parts

    def record(self) -> dict[str, str]:
        """SHA-256 of every file that says what encoders and tokenizers are, weights excepted.

        Returns:
            path inside the pipeline's folder -> hash.
        """
        return {f"{file.parent.name}/{file.name}": sha256(file) for file in self._files}

    def _encoder(self, stage: str) -> TextEncoder | NoT5:
        if stage not in self._encoders:
            raise ValueError(
                f"stage must be one of {', '.join(self._encoders)}, got {stage!r}"
                f"{did_you_mean(stage, self._encoders)}"
            )
        return self._encoders[stage]


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a sequence of at least one string, got {prompts!r}")
    wrong = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if wrong:
        raise ValueError(
            f"prompts must be strings, got {wrong[0]!r} of {type(wrong[0]).__name__} among them"
        )


def prompt_encoder(
    folder: str | os.PathLike[str],
    length: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
) -> PromptEncoder:
    """The text encoders of a local pipeline folder of SD3, Flux or Z-Image. No weights are read.

    Args:
        folder: of the whole pipeline: model_index.json, transformer/config.json, text encoders and
            tokenizers. Where SD3's model_index.json has no text_encoder_3, T5 is zeros, as in a
            pipeline that was loaded with text_encoder_3=None.
        length: tokens of T5 or Qwen3, the pipeline's max_sequence_length, whose default None is;
            CLIP has 77. Padding is seen, so that this is the length to train and to sample at.
        dtype: of the encoders and the parts.
        device: where they run.

    Raises:
        ValueError: not such a folder, a class that is not read, a length outside of 1..512,
            encoders that do not fit the transformer, transformers not installed.
    """
    path = existing_path(folder, "folder")
    index = _read_json(path / "model_index.json", path)
    config = _read_json(path / "transformer" / "config.json", path)
    class_name = str(config.get("_class_name"))
    layout = layout_for(class_name, config)
    length = LENGTHS[class_name] if length is None else length
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= _LONGEST:
        raise ValueError(
            f"the length of prompts must be from 1 to {_LONGEST} tokens, got {length!r}"
        )
    folders = _Folders(path, index, dtype, torch.device(device))
    build = {
        "SD3Transformer2DModel": _sd3,
        "FluxTransformer2DModel": _flux,
        "ZImageTransformer2DModel": _z_image,
    }
    encoders = build[class_name](folders, length, config)
    return PromptEncoder(class_name, layout, length, encoders, folders.small_files())


@dataclass(frozen=True)
class _Folders:
    """A pipeline's folder and its model_index.json, and how its encoders are to run."""

    path: Path
    index: Mapping[str, object]
    dtype: torch.dtype
    device: torch.device

    def has(self, encoder: str) -> bool:
        """Whether model_index.json names a class for this part."""
        return self._class(encoder) is not None

    def place(self, number: str) -> Place:
        """The encoder "text_encoder" + number and its tokenizer."""
        encoder, tokenizer = f"text_encoder{number}", f"tokenizer{number}"
        for part in (encoder, tokenizer):
            if not self.has(part):
                raise ValueError(
                    f"model_index.json of {str(self.path)!r} has no {part}, which the prompts of "
                    "this model need: give the whole folder of the pipeline"
                )
            if not (self.path / part).is_dir():
                zeros = (
                    "; or take text_encoder_3 and tokenizer_3 out of model_index.json, and T5 is "
                    "zeros"
                    if number == "_3"
                    else ""
                )
                raise ValueError(
                    f"{str(self.path)!r} has no folder {part}, which its model_index.json names: "
                    f"give the whole folder of the pipeline{zeros}"
                )
        return Place(
            self.path, encoder, tokenizer, str(self._class(encoder)), str(self._class(tokenizer))
        )

    def build(self, kind: type[TextEncoder], name: str, number: str, length: int) -> TextEncoder:
        """An encoder by the number in its folder's name."""
        return kind(name, self.place(number), length, self.dtype, self.device)

    def clip_length(self) -> int:
        """Tokens of both CLIPs: the first tokenizer's, as the pipelines have it."""
        place = self.place("")
        return clip_length(self.path / place.tokenizer, place.tokenizer_class)

    def small_files(self) -> list[Path]:
        """Configurations of the encoders and all files of the tokenizers."""
        found: list[Path] = []
        for part in sorted(self.index):
            if part.startswith("text_encoder"):
                found += (self.path / part).glob("config.json")
            elif part.startswith("tokenizer"):
                found += sorted(f for f in (self.path / part).glob("*") if f.is_file())
        return found

    def _class(self, part: str) -> object:
        entry = self.index.get(part)
        return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _sd3(folders: _Folders, length: int, config: Mapping[str, object]) -> list[TextEncoder | NoT5]:
    clip = folders.clip_length()
    clip_l = folders.build(ClipWithProjection, "clip_l", "", clip)
    clip_g = folders.build(ClipWithProjection, "clip_g", "_2", clip)
    text, pooled = int(config["joint_attention_dim"]), int(config["pooled_projection_dim"])
    widths = [e.parts[e.name].shape[-1] for e in (clip_l, clip_g)]
    if sum(widths) > text:
        raise _does_not_fit(folders, f"CLIPs of {widths[0]} + {widths[1]} channels", text)
    projections = [e.parts[e.pooled].shape[-1] for e in (clip_l, clip_g)]
    if sum(projections) != pooled:
        raise _does_not_fit(
            folders, f"CLIPs with projections of {projections[0]} + {projections[1]}", pooled
        )
    if not folders.has("text_encoder_3"):
        return [clip_l, clip_g, NoT5(length, folders.dtype, folders.device)]
    t5 = folders.build(T5, "t5", "_3", length)
    _check_width(folders, t5, "t5", text)
    return [clip_l, clip_g, t5]


def _flux(folders: _Folders, length: int, config: Mapping[str, object]) -> list[TextEncoder]:
    clip = folders.build(ClipPooled, "clip", "", folders.clip_length())
    t5 = folders.build(T5, "t5", "_2", length)
    _check_width(folders, clip, "pooled", int(config["pooled_projection_dim"]))
    _check_width(folders, t5, "t5", int(config["joint_attention_dim"]))
    return [clip, t5]


def _z_image(folders: _Folders, length: int, config: Mapping[str, object]) -> list[TextEncoder]:
    qwen = folders.build(Qwen, "qwen", "", length)
    _check_width(folders, qwen, "prompt_embeds", int(config["cap_feat_dim"]))
    return [qwen]


def _check_width(folders: _Folders, encoder: TextEncoder, part: str, expected: int) -> None:
    width = encoder.parts[part].shape[-1]
    if width != expected:
        raise _does_not_fit(folders, f"a {encoder.name} of {width} channels", expected)


def _does_not_fit(folders: _Folders, what: str, expected: int) -> ValueError:
    return ValueError(
        f"{str(folders.path)!r} has {what}, its transformer takes {expected}: the folder is mixed "
        "from two models"
    )


def _read_json(file: Path, folder: Path) -> Mapping[str, object]:
    if not file.is_file():
        raise ValueError(
            f"{str(folder)!r} holds no {file.relative_to(folder)}: give the folder of a whole "
            "pipeline of diffusers, with its text encoders and tokenizers"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(file)!r} must be JSON of diffusers: {error_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} must hold one object, got {type(content).__name__}")
    return content
