"""How the parts of a prompt become the condition of a network, family by family.

    SD3       text = [pad([clip_l, clip_g]); pad(t5)] along tokens, pooled = [pooled_l, pooled_g]
    Flux      text = t5, pooled = pooled
    Z-Image   text = prompt_embeds where prompt_mask

Parts are what encoders give and caches store: without the zeros of the padding, encoder by encoder,
so that one encoder can be left out. All here are pure functions of tensors on any device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mixflow_fast.messages import did_you_mean
from mixflow_fast.models.text_to_image.adapter import Condition

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """Shape and dtype of one entry of one prompt, without the batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class PromptLayout(Protocol):
    """The parts of a family's prompts.

    Attributes:
        encoders: names of the encoders that can be left out one by one.
    """

    encoders: tuple[str, ...]

    def assemble(self, parts: Mapping[str, Tensor]) -> Condition:
        """Parts (B, ...) -> what `Adapter.velocity` takes: what `encode_prompt` returns.

        Raises:
            ValueError: a part is missing.
        """
        ...

    def check(self, parts: Mapping[str, Part]) -> None:
        """Refuse parts that the transformer cannot take.

        Raises:
            ValueError: a part is missing, or of another width than the transformer's.
        """
        ...

    def without(self, parts: Mapping[str, Tensor], encoder: str, dropped: Tensor) -> Parts:
        """The parts with zeros for one encoder in some samples, as sd-scripts drops encoders.

        Args:
            parts: (B, ...) of each; other entries are kept as they are.
            encoder: one of `encoders`.
            dropped: (B,) bool, on the device of the parts.

        Raises:
            ValueError: no such encoder, a part is missing, or dropped is not (B,) bool.
        """
        ...


class FamilyLayout:
    """What the layouts share. A subclass says which parts there are and which encoder makes which.

    Args:
        config: of the transformer, as its config.json has it.
    """

    NEEDS: ClassVar[tuple[str, ...]] = ()
    OF_ENCODER: ClassVar[dict[str, tuple[str, ...]]] = {}
    # The setting of the transformer that says how wide an entry of the condition is.
    WIDTHS: ClassVar[dict[str, str]] = {}

    def __init__(self, config: Mapping[str, object]) -> None:
        self._config = config
        self.encoders = tuple(self.OF_ENCODER)

    def check(self, parts: Mapping[str, Part]) -> None:
        """As `PromptLayout.check`."""
        one = {
            name: torch.empty(1, *part.shape, dtype=part.dtype, device="meta")
            for name, part in parts.items()
        }
        made = self.assemble(one)
        for name, setting in self.WIDTHS.items():
            self._check_width(name, made[name].shape[-1], (int(self._config[setting]),), setting)

    def _check_width(self, name: str, found: int, expected: tuple[int, ...], setting: str) -> None:
        if found not in expected:
            raise ValueError(
                f"{name} of the prompts has a width of {found}, the transformer's {setting} is "
                f"{self._config[setting]}: encode them by the folder of the same model"
            )

    def without(self, parts: Mapping[str, Tensor], encoder: str, dropped: Tensor) -> Parts:
        """As `PromptLayout.without`."""
        if encoder not in self.encoders:
            known = f"one of {', '.join(self.encoders)}" if self.encoders else "nothing"
            raise ValueError(
                f"an encoder to leave out must be {known} for {type(self).__name__}, got "
                f"{encoder!r}{did_you_mean(encoder, self.encoders)}; whole prompts are dropped by "
                "cond.drop"
            )
        names = self.OF_ENCODER[encoder]
        self._check(parts, names)
        batch = len(parts[names[0]])
        if dropped.shape != (batch,) or dropped.dtype != torch.bool:
            raise ValueError(
                f"dropped must be (B,) = ({batch},) bool, got {tuple(dropped.shape)} "
                f"{dropped.dtype}"
            )
        zeroed = {
            name: parts[name].masked_fill(dropped.view(-1, *(1 for _ in parts[name].shape[1:])), 0)
            for name in names
        }
        return dict(parts) | zeroed

    def _check(self, parts: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
        missing = [name for name in names if name not in parts]
        if missing:
            raise ValueError(
                f"the parts of a prompt must hold {', '.join(names)} for {type(self).__name__}, "
                f"got {', '.join(parts) or 'nothing'}: encode them by the folder of the same model"
            )


class SD3Layout(FamilyLayout):
    """Of `SD3Transformer2DModel`.

        clip_l (77, 768), pooled_l (768), clip_g (77, 1280), pooled_g (1280), t5 (L, 4096)

    A folder without T5 has a t5 of (L, 1), zeros: what is narrower than the network's text is
    padded with zeros, and the pipeline makes zeros of (L, 4096) there.
    """

    NEEDS = ("clip_l", "pooled_l", "clip_g", "pooled_g", "t5")
    OF_ENCODER: ClassVar[dict[str, tuple[str, ...]]] = {
        "clip_l": ("clip_l", "pooled_l"),
        "clip_g": ("clip_g", "pooled_g"),
        "t5": ("t5",),
    }
    WIDTHS: ClassVar[dict[str, str]] = {
        "prompt_embeds": "joint_attention_dim",
        "pooled_prompt_embeds": "pooled_projection_dim",
    }

    def check(self, parts: Mapping[str, Part]) -> None:
        """As `PromptLayout.check`."""
        super().check(parts)
        self._check_padded({name: part.shape[-1] for name, part in parts.items()})

    def _check_padded(self, widths: Mapping[str, int]) -> None:
        """ValueError for what padding would hide: another T5, or CLIPs that it would cut."""
        setting = "joint_attention_dim"
        width = int(self._config[setting])
        self._check_width("t5", widths["t5"], (1, width), setting)
        clips = widths["clip_l"] + widths["clip_g"]
        if clips > width:
            self._check_width("clip_l and clip_g", clips, (width,), setting)

    def assemble(self, parts: Mapping[str, Tensor]) -> Condition:
        """prompt_embeds (B, 77 + L, 4096) and pooled_prompt_embeds (B, 2048).

        Raises:
            ValueError: a part is missing, or of another width than the network's.
        """
        self._check(parts, self.NEEDS)
        self._check_padded({name: parts[name].shape[-1] for name in self.NEEDS})
        width = int(self._config["joint_attention_dim"])
        clips = torch.cat([parts["clip_l"], parts["clip_g"]], dim=-1)
        text = [F.pad(part, (0, width - part.shape[-1])) for part in (clips, parts["t5"])]
        return {
            "prompt_embeds": torch.cat(text, dim=-2),
            "pooled_prompt_embeds": torch.cat([parts["pooled_l"], parts["pooled_g"]], dim=-1),
        }


class FluxLayout(FamilyLayout):
    """Of `FluxTransformer2DModel`: pooled (768), t5 (L, 4096).

    A network that was distilled with a guidance gets the strength that the pipeline has by
    default, `GUIDANCE`.
    """

    NEEDS = ("pooled", "t5")
    OF_ENCODER: ClassVar[dict[str, tuple[str, ...]]] = {"clip": ("pooled",), "t5": ("t5",)}
    WIDTHS = SD3Layout.WIDTHS
    GUIDANCE = 3.5

    def assemble(self, parts: Mapping[str, Tensor]) -> Condition:
        """prompt_embeds (B, L, 4096), pooled_prompt_embeds (B, 768), guidance (B,) where needed."""
        self._check(parts, self.NEEDS)
        cond = {"prompt_embeds": parts["t5"], "pooled_prompt_embeds": parts["pooled"]}
        if self._config.get("guidance_embeds"):
            pooled = parts["pooled"]
            cond["guidance"] = torch.full(
                (len(pooled),), self.GUIDANCE, dtype=torch.float32, device=pooled.device
            )
        return cond


class ZImageLayout(FamilyLayout):
    """Of `ZImageTransformer2DModel`: prompt_embeds (L, D), prompt_mask (L) uint8, 1 for a token.

    There is one encoder, and a caption of zeros is no caption: it cannot be left out.
    """

    NEEDS = ("prompt_embeds", "prompt_mask")
    WIDTHS: ClassVar[dict[str, str]] = {"prompt_embeds": "cap_feat_dim"}

    def assemble(self, parts: Mapping[str, Tensor]) -> Condition:
        """prompt_embeds (B, L, D) and prompt_mask (B, L) bool."""
        self._check(parts, self.NEEDS)
        return {
            "prompt_embeds": parts["prompt_embeds"],
            "prompt_mask": parts["prompt_mask"].bool(),
        }


LAYOUTS: dict[str, type[SD3Layout] | type[FluxLayout] | type[ZImageLayout]] = {
    "SD3Transformer2DModel": SD3Layout,
    "FluxTransformer2DModel": FluxLayout,
    "ZImageTransformer2DModel": ZImageLayout,
}


def layout_for(class_name: str, config: Mapping[str, object]) -> PromptLayout:
    """The layout of a transformer's prompts.

    Args:
        class_name: of the transformer in diffusers.
        config: of the transformer, as its config.json has it.

    Raises:
        ValueError: no layout for this class.
    """
    if class_name not in LAYOUTS:
        raise ValueError(
            f"there are prompts for {', '.join(LAYOUTS)}, got {class_name!r}"
            f"{did_you_mean(class_name, LAYOUTS)}"
        )
    return LAYOUTS[class_name](config)
