"""The section `lora`: adapters beside a frozen network."""

from __future__ import annotations

from dataclasses import dataclass

from mixflow_fast.config.section import NotNegative, PositiveFloat, Section


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Section, name="lora"):
    """Low-rank adapters, for text-to-image networks: they alone are trained, averaged and saved."""

    rank: NotNegative = 0
    """Rank of each adapter; 0 trains the whole network."""
    alpha: PositiveFloat | None = None
    """An adapter's output is multiplied by alpha / rank; null is rank."""
    targets: tuple[str, ...] | None = None
    """Ends of the names of the linear layers that have one, as [attn.to_q, attn.to_v]; null: the
    attention of SD3 (with the second one of 3.5 medium) and Z-Image, attention and MLP of FLUX.1's
    double blocks."""

    def check(self) -> None:
        given = [name for name in ("alpha", "targets") if getattr(self, name) is not None]
        if given and not self.rank:
            raise ValueError(
                f"lora.{given[0]} has no meaning for lora.rank=0, which trains the whole network: "
                "set lora.rank, or leave it out"
            )
