"""Tiny text encoders of transformers with random weights, and tokenizers made on the spot.

The tokenizers are of the official classes with vocabularies of a few hundred entries: bytes and a
few words. They differ where the real ones do: CLIP-L is padded with <|endoftext|>, CLIP-G with "!",
T5 with <pad>, and T5 has no token for most of Unicode.
"""

from __future__ import annotations

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

_START, _END = "<|startoftext|>", "<|endoftext|>"
# Pairs that are joined, in this order; the parts of each stand before it.
_MERGES = [("f", "o"), ("fo", "x</w>"), ("a", "n"), ("an", "d</w>"), ("r", "e"), ("re", "d</w>")]
_WORDS = ["▁a", "▁fox", "▁red", "▁and", "▁in", "▁the", "▁snow", "ing", "er"]
# Of the real folder's, which is longer: the same marks around a prompt.
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def _bytes() -> list[str]:
    return sorted(ByteLevel.alphabet())


def clip_tokenizer(pad: str = _END) -> CLIPTokenizer:
    """77 tokens; `pad` is "!" for CLIP-G."""
    joined = [a + b for a, b in _MERGES]
    words = [*_bytes(), *(b + "</w>" for b in _bytes()), *joined, _START, _END]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocabulary, merges=_MERGES, pad_token=pad, model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """Printable ASCII and a few words; the rest is <unk>."""
    letters = [chr(n) for n in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(word, -3.0) for word in _WORDS] + [(letter, -6.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes, with the marks of a conversation."""
    vocabulary = {word: number for number, word in enumerate([*_bytes(), "fo", _END])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[("f", "o")],
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        model_max_length=4096,
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


def _seeded(seed: int, model: type[PreTrainedModel], config: object) -> PreTrainedModel:
    """Weights spread wider than the classes' own, so that prompts differ visibly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = model(config).eval().requires_grad_(False)
        for name, weight in network.named_parameters():
            if "norm" not in name and not name.endswith("bias"):
                weight.normal_(std=0.3)
    return network


def clip(
    seed: int, width: int, projection: int | None, end: int | None = None
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Three layers.

    `end` is the id by which the pooled row is found; None: 2, as CLIP-L's file says, which
    transformers takes for "the largest id".
    """
    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer()),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection or width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act="quick_gelu" if end is None else "gelu",
        eos_token_id=2 if end is None else end,
        bos_token_id=0,
        pad_token_id=1,
    )
    return _seeded(
        seed, CLIPTextModel if projection is None else CLIPTextModelWithProjection, config
    )


def t5(seed: int, width: int = 32) -> T5EncoderModel:
    """Two layers with gated GELU, as T5 1.1."""
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return _seeded(seed, T5EncoderModel, config)


def qwen(seed: int, width: int = 32) -> Qwen3Model:
    """Three layers."""
    config = Qwen3Config(
        vocab_size=len(qwen_tokenizer()),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
    )
    return _seeded(seed, Qwen3Model, config)
