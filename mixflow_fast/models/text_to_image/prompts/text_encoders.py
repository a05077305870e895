"""Text encoders of transformers from a local folder: CLIP, T5 and Qwen3, each as pipelines run it.

    ids = tokenizer(prompts, padded to a fixed length, cut at it)
    parts = what the pipeline takes of encoder(ids)

CLIP and T5 get no attention mask: they see their padding, so that an embedding belongs to the
length that it was made at. A tokenizer works without the encoder's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mixflow_fast.messages import error_line
from mixflow_fast.models.dinov2 import quiet_transformers
from mixflow_fast.models.text_to_image.prompts.layout import Part, Parts
from mixflow_fast.models.weights.damage import refuse_not_finite


class _Tokenizer(Protocol):
    """transformers' tokenizer, as far as it is used here."""

    model_max_length: int

    def __call__(self, prompts: list[str], **options: object) -> object: ...

    def apply_chat_template(self, messages: list[dict[str, str]], **options: object) -> str: ...


@dataclass(frozen=True)
class Place:
    """Where an encoder and its tokenizer lie.

    Attributes:
        folder: of the pipeline.
        encoder, tokenizer: names of their folders in it.
        encoder_class, tokenizer_class: of transformers, as model_index.json names them.
    """

    folder: Path
    encoder: str
    tokenizer: str
    encoder_class: str
    tokenizer_class: str


class TextEncoder:
    """One encoder and its tokenizer.

    Args:
        name: of its stage.
        place: its folders.
        length: tokens of a prompt.
        dtype: of weights, activations and parts.
        device: where it runs.

    Attributes:
        parts, tokens: what `embed` gives and takes, of one prompt.

    Raises:
        ValueError: no such files, or other ones than the class's; transformers not installed.
    """

    MODELS: ClassVar[tuple[str, ...]] = ()
    TOKENIZERS: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, name: str, place: Place, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.name, self._place, self._length = name, place, length
        self._dtype, self._device = dtype, device
        self._model: nn.Module | None = None
        for given, known in (
            (place.encoder_class, self.MODELS),
            (place.tokenizer_class, self.TOKENIZERS),
        ):
            if given not in known:
                raise ValueError(
                    f"model_index.json of {str(place.folder)!r} names the class {given!r} for "
                    f"{name}, expected {' or '.join(known)}"
                )
        self._tokenizer: _Tokenizer = _from_folder(
            place.tokenizer_class, place.folder / place.tokenizer
        )
        self.config = _config(place.encoder_class, place.folder / place.encoder)
        self.tokens: dict[str, Part] = {f"{name}_ids": Part((length,), torch.int32)}
        self.parts: dict[str, Part] = self._parts()

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._model is not None

    def load(self) -> None:
        """Read the weights, if they are not there; ValueError if they are missing or damaged."""
        if self._model is None:
            where = self._place.folder / self._place.encoder
            model = _load(self._place.encoder_class, where, self._dtype)
            self._model = model.eval().requires_grad_(False).to(self._device)

    def release(self) -> None:
        """Give the memory of the weights back."""
        if self._model is not None:
            self._model = None
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """(B, length) int32 of each entry of `tokens`, on the CPU."""
        return {f"{self.name}_ids": self._padded(self._texts(prompts)).input_ids.to(torch.int32)}

    def count_cut(self, prompts: Sequence[str]) -> int:
        """How many of the prompts have more tokens than the encoder sees."""
        ids = self._tokenizer(self._texts(prompts), verbose=False).input_ids
        return sum(len(row) > self._length for row in ids)

    @torch.no_grad()
    def embed(self, tokens: dict[str, Tensor]) -> Parts:
        """Parts of tokenized prompts; the weights are read if they are not in memory.

        Args:
            tokens: (B, length) of each entry of `tokens`, on any device.

        Returns:
            (B, ...) of each part, on the encoder's device.
        """
        self.load()
        for name in self.tokens:
            if name not in tokens or tokens[name].shape[1:] != (self._length,):
                got = tuple(tokens[name].shape) if name in tokens else f"only {', '.join(tokens)}"
                raise ValueError(f"tokens must hold {name} of (B, {self._length}), got {got}")
        on_device = {name: tokens[name].to(self._device).long() for name in self.tokens}
        # The bits must not depend on a caller's autocast.
        with torch.autocast(self._device.type, enabled=False):
            return self._embed(self._model, on_device)

    def _texts(self, prompts: Sequence[str]) -> list[str]:
        return list(prompts)

    def _padded(self, texts: list[str]) -> object:
        options = {"padding": "max_length", "max_length": self._length, "truncation": True}
        return self._tokenizer(texts, return_tensors="pt", **options)

    def _parts(self) -> dict[str, Part]:
        raise NotImplementedError

    def _embed(self, model: nn.Module, tokens: dict[str, Tensor]) -> Parts:
        raise NotImplementedError


class ClipWithProjection(TextEncoder):
    """SD3's CLIP: the last hidden states but one, and the projected row of the end token."""

    MODELS = ("CLIPTextModelWithProjection",)
    TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")

    @property
    def pooled(self) -> str:
        """Name of the second part: clip_l has pooled_l."""
        return self.name.replace("clip", "pooled")

    def _parts(self) -> dict[str, Part]:
        width, projection = self.config.hidden_size, self.config.projection_dim
        return {
            self.name: Part((self._length, width), self._dtype),
            self.pooled: Part((projection,), self._dtype),
        }

    def _embed(self, model: nn.Module, tokens: dict[str, Tensor]) -> Parts:
        out = model(tokens[f"{self.name}_ids"], output_hidden_states=True)
        return {
            self.name: out.hidden_states[-2].to(self._dtype),
            self.pooled: out.text_embeds.to(self._dtype),
        }


class ClipPooled(TextEncoder):
    """Flux's CLIP: the row of the end token after the last norm, not projected."""

    MODELS = ("CLIPTextModel",)
    TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")

    def _parts(self) -> dict[str, Part]:
        return {"pooled": Part((self.config.hidden_size,), self._dtype)}

    def _embed(self, model: nn.Module, tokens: dict[str, Tensor]) -> Parts:
        out = model(tokens[f"{self.name}_ids"], output_hidden_states=False)
        return {"pooled": out.pooler_output.to(self._dtype)}


class T5(TextEncoder):
    """T5's encoder, whose padding is embedded as every other token is."""

    MODELS = ("T5EncoderModel",)
    TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast")

    def _parts(self) -> dict[str, Part]:
        return {self.name: Part((self._length, self.config.d_model), self._dtype)}

    def _embed(self, model: nn.Module, tokens: dict[str, Tensor]) -> Parts:
        return {self.name: model(tokens[f"{self.name}_ids"])[0].to(self._dtype)}


class Qwen(TextEncoder):
    """Z-Image's Qwen3: the last hidden states but one of a conversation of one question.

    Rows of the padding, which the pipeline cuts out, are zeros here.
    """

    MODELS = ("Qwen3Model", "Qwen3ForCausalLM")
    TOKENIZERS = ("Qwen2Tokenizer", "Qwen2TokenizerFast")

    def _parts(self) -> dict[str, Part]:
        self.tokens[f"{self.name}_mask"] = Part((self._length,), torch.int32)
        return {
            "prompt_embeds": Part((self._length, self.config.hidden_size), self._dtype),
            "prompt_mask": Part((self._length,), torch.uint8),
        }

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        padded = self._padded(self._texts(prompts))
        return {
            f"{self.name}_ids": padded.input_ids.to(torch.int32),
            f"{self.name}_mask": padded.attention_mask.to(torch.int32),
        }

    def _texts(self, prompts: Sequence[str]) -> list[str]:
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        questions = ([{"role": "user", "content": prompt}] for prompt in prompts)
        return [self._tokenizer.apply_chat_template(q, **options) for q in questions]

    def _embed(self, model: nn.Module, tokens: dict[str, Tensor]) -> Parts:
        mask = tokens[f"{self.name}_mask"].bool()
        out = model(
            input_ids=tokens[f"{self.name}_ids"], attention_mask=mask, output_hidden_states=True
        )
        embeds = out.hidden_states[-2].to(self._dtype)
        return {
            "prompt_embeds": embeds.masked_fill(~mask.unsqueeze(-1), 0),
            "prompt_mask": mask.to(torch.uint8),
        }


class NoT5:
    """The T5 of a folder that has none: zeros, of which one column is kept.

    It stands as a `TextEncoder` without weights. Its one token says how many prompts there are.
    """

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self._device, self.loaded = "t5", device, False
        self.parts = {"t5": Part((length, 1), dtype)}
        self.tokens = {"t5_ids": Part((1,), torch.int32)}

    def load(self) -> None:
        """Nothing is read."""

    def release(self) -> None:
        """Nothing is held."""

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Zeros, (B, 1) int32."""
        return {"t5_ids": torch.zeros(len(prompts), 1, dtype=torch.int32)}

    def count_cut(self, prompts: Sequence[str]) -> int:
        """0."""
        return 0

    def embed(self, tokens: dict[str, Tensor]) -> Parts:
        """Zeros, (B, length, 1)."""
        part = self.parts["t5"]
        shape = (len(tokens["t5_ids"]), *part.shape)
        return {"t5": torch.zeros(shape, dtype=part.dtype, device=self._device)}


def clip_length(tokenizer_folder: Path, class_name: str) -> int:
    """Tokens of CLIP, which is 77: what the first tokenizer of a pipeline says."""
    return _from_folder(class_name, tokenizer_folder).model_max_length


def _transformers() -> object:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f'text encoders need transformers ({error}): pip install "mixflow_fast[text]"'
        ) from error
    return transformers


def _from_folder(class_name: str, folder: Path, **options: object) -> object:
    """`from_pretrained` of a class of transformers, with errors that name the folder."""
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not there: give the whole folder of the pipeline")
    found = getattr(_transformers(), class_name, None)
    if found is None:
        raise ValueError(
            f"{str(folder)!r} is of class {class_name!r}, which transformers "
            f"{_transformers().__version__} does not have: install a newer one"
        )
    try:
        # Some weights are made of random numbers first, which must not be those a caller draws.
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            return found.from_pretrained(str(folder), local_files_only=True, **options)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"cannot read {str(folder)!r}: {error_line(error)}") from error


def _config(class_name: str, folder: Path) -> object:
    return _from_folder(getattr(_transformers(), class_name).config_class.__name__, folder)


def _load(class_name: str, folder: Path, dtype: torch.dtype) -> nn.Module:
    """The encoder with every weight from the folder; a pickle beside them is not read."""
    model, report = _from_folder(
        class_name, folder, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    lacking = sorted(map(str, [*report["missing_keys"], *report.get("mismatched_keys", ())]))
    if lacking:
        raise ValueError(
            f"{str(folder)!r} lacks {len(lacking)} of the encoder's weights, the first is "
            f"{lacking[0]}: copy the folder again"
        )
    refuse_not_finite(dict(model.named_parameters()), folder, "copy the folder again")
    return model
