"""Pictures of `mixflow-fast sample`: decoded, in 8 bits, of a protocol; sets of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mixflow_fast.cli.data.resumable import resumable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mixflow_fast.cli.sampler_options import SamplerChoice
    from mixflow_fast.evaluation.features.extractor import Extractor
    from mixflow_fast.evaluation.protocol import Protocol
    from mixflow_fast.evaluation.reference import Reference
    from mixflow_fast.evaluation.sample_sets import Made
    from mixflow_fast.evaluation.shard_features import ShardFeatures
    from mixflow_fast.models import Network
    from mixflow_fast.models.autoencoders.decoding import Decoder, Quantisation
    from mixflow_fast.sampling.execution import Mode, Precision
    from mixflow_fast.sampling.prepared import PreparedSampling, SampleResult
    from mixflow_fast.sampling.source import SampleSource

_GRID = 64  # pictures of a set that are shown in one PNG
# Work that is over sooner is not worth being predicted, in evaluations of the network.
_SHORT, _FIRST_STEPS = 200, 3


@dataclass(frozen=True, kw_only=True)
class Drawer:
    """What draws samples of ids, as the options of the command say.

    Attributes:
        model: on its device.
        chosen: sampler, guidance, remedy.
        guide: the other network of autoguidance, on the same device.
        weights: "ema" or "model".
        step: optimizer steps of the weights; None where their file does not say it.
        seed: of noise and labels.
        labels: classes, repeated over the ids; None draws them.
        balanced: drawn labels are id mod classes.
        batch_size: of the network.
        decoder: of latents, on the same device; None for pixels.
        quantisation: the rule that rounds to 8 bits.
        mode, precision: how the network is run, as `mixflow_fast.sampling.sample` takes them.
        num: how many samples are to be drawn in all; by it mode "auto" decides.
        source: where samples begin, on the same device; None is N(0, I).
    """

    model: Network
    chosen: SamplerChoice
    guide: Network | None
    weights: str
    step: int | None = None
    seed: int
    labels: Sequence[int] | None
    balanced: bool
    batch_size: int
    decoder: Decoder | None
    quantisation: Quantisation
    mode: Mode = "eager"
    precision: Precision | None = None
    num: int = 0
    source: SampleSource | None = None

    @cached_property
    def prepared(self) -> PreparedSampling:
        """The networks as they are sampled; what is compiled and captured is kept in it."""
        from mixflow_fast.sampling.prepared import PreparedSampling

        calls = self.chosen.sampler.network_calls
        return PreparedSampling(
            self.model,
            self.chosen.sampler,
            self.chosen.guidance,
            guide=self.guide,
            remedy=self.chosen.remedy,
            batch_size=self.batch_size,
            mode=self.mode,
            precision=self.precision,
            calls=None if calls is None else calls * -(-self.num // self.batch_size),
            source=self.source,
        )

    def samples(self, ids: Tensor, progress: bool = False) -> SampleResult:
        """(B, C, h, w) float32 of ids, as the network makes them.

        Raises:
            ValueError: some are not finite.
        """
        import torch

        labels = None
        if self.labels is not None:
            # Repeated rather than grouped: a few samples already show every class.
            labels = torch.tensor([self.labels[i % len(self.labels)] for i in ids.tolist()])
        result = self.prepared.draw(
            ids, labels, seed=self.seed, balanced=self.balanced, progress=progress
        )
        refuse_not_finite(result.x, ids)
        return result

    def pictures(self, ids: Tensor) -> Made:
        """(B, C, H, W) uint8 of ids."""
        from mixflow_fast.evaluation.sample_sets import Made

        drawn = self.samples(ids)
        latents = None if self.decoder is None else drawn.x
        return Made(self.to_pixels(drawn.x), drawn.labels, latents)

    def to_pixels(self, x: Tensor) -> Tensor:
        """Samples -> 8-bit pictures."""
        from mixflow_fast.models.autoencoders.decoding import quantise

        return quantise(x, self.quantisation) if self.decoder is None else self.decoder(x)

    @property
    def latent(self) -> bool:
        """Whether samples are latents, which cannot be looked at as they are."""
        return self.model.in_channels not in (1, 3)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a picture."""
        side = self.model.input_size
        if self.decoder is None:
            return self.model.in_channels, side, side
        return 3, self.decoder.size(side), self.decoder.size(side)

    def origin(self) -> dict[str, str]:
        """Which weights the pictures are of."""
        from mixflow_fast.models.weights.digest import weights_sha256

        found = {"weights_sha256": weights_sha256(self.model), "average": self.weights}
        if self.source is not None:
            found["source_sha256"] = weights_sha256(self.source.source.predictor)
        return found

    def protocol(self, n: int) -> Protocol:
        """How `n` pictures with the ids 0 .. n - 1 come about."""
        import torch

        from mixflow_fast.evaluation.protocol import Protocol
        from mixflow_fast.models.weights.digest import weights_sha256

        chosen, decoder = self.chosen, self.decoder
        remedy = None if chosen.remedy is None else chosen.remedy.to_record()
        guide = None if self.guide is None else weights_sha256(self.guide)
        # "auto" is what it is for this network.
        guidance = replace(chosen.guidance, channels=chosen.guidance.channels_of(self.model))
        drawn = "balanced" if self.balanced else "random"
        # What begins at N(0, I) has one protocol, whatever the network was trained with.
        begins = {} if self.source is None else {"source": self.source.to_record()}
        return Protocol(
            {
                "sampler": {**chosen.sampler.to_record(), "remedy": remedy},
                "guidance": {**guidance.to_record(), "guide_sha256": guide},
                **begins,
                "precision": {
                    "network": str(self.prepared.dtype).removeprefix("torch."),
                    "state": "float32",
                    "decode": None if decoder is None else decoder.network.precision,
                    "tf32": torch.backends.cuda.matmul.allow_tf32,
                },
                "set": {
                    "n": n,
                    "seed": self.seed,
                    "ids": "0..n-1",
                    "labels": drawn if self.labels is None else list(self.labels),
                    "K": self.model.num_classes,
                },
                "decoder": {"kind": "none"} if decoder is None else decoder.record(),
                "image": {"size": self.shape[1], "quantisation": self.quantisation},
            }
        )


def refuse_not_finite(x: Tensor, ids: Tensor) -> None:
    """Nothing is written of samples that are no numbers: a picture would show them as black."""
    wrong = ids[(~x.isfinite()).flatten(1).any(1)].tolist()
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(x)} samples are not finite (the first has id {wrong[0]}), and "
            "nothing was written: the weights are finite, so what the network makes of them is "
            "too large; check --clock, --cfg-scale and --steps, or choose another checkpoint"
        )


@dataclass(frozen=True)
class Measure:
    """What a set is measured with when it is whole.

    Attributes:
        reference: what against.
        networks: feature extractors, on this process's device.
        device: its name.
    """

    reference: Reference
    networks: Sequence[Extractor]
    device: str


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What is made of a set beside its file of all pictures.

    Attributes:
        keep_shards: the shards stay.
        keep_latents: float16 latents of each shard.
        png: an image file of each picture.
        measure: numbers; None: none.
    """

    keep_shards: bool = False
    keep_latents: bool = False
    png: bool = False
    measure: Measure | None = None


def make_set(drawer: Drawer, n: int, folder: Path, extras: Extras) -> int:
    """A set of n pictures in a folder, by this process and those that were started with it.

    Returns:
        the exit code.
    """
    from mixflow_fast.data.preparation.shard_work import ranks_of_environment
    from mixflow_fast.distributed.one_voice import is_first_to_say
    from mixflow_fast.evaluation.sample_sets import SetPlan, npz_of, read_set, write_set
    from mixflow_fast.evaluation.shard_features import ShardFeatures
    from mixflow_fast.evaluation.shard_pngs import ShardPngs
    from mixflow_fast.reports.images import save_grid

    rank, world = ranks_of_environment()
    side, channels = drawer.model.input_size, drawer.model.in_channels
    plan = SetPlan(
        protocol=drawer.protocol(n),
        shape=drawer.shape,
        origin=drawer.origin(),
        step=drawer.step,
        latents=(channels, side, side) if extras.keep_latents else None,
    )
    pngs = ShardPngs(folder, plan.shard)
    networks = () if extras.measure is None else extras.measure.networks
    features = ShardFeatures(folder / "features", networks, plan.shard)

    def on_shard(number: int, pictures: np.ndarray) -> None:
        if extras.png:
            pngs.on_shard(number, pictures)
        features.on_shard(number, pictures)

    def begins(mine: int) -> None:
        if rank == 0 and (seconds := predicted_seconds(drawer, mine)) is not None:
            print(_expected(seconds, mine, world), flush=True)

    def work() -> int:
        whole = write_set(
            drawer.pictures,
            plan,
            folder,
            rank=rank,
            world=world,
            batch_size=drawer.batch_size,
            keep_shards=extras.keep_shards,
            quiet=rank != 0,
            begins=begins,
            on_shard=on_shard,
            on_shard_bytes=plan.bytes // plan.n if extras.png else 0,
        )
        if whole and extras.png:
            pngs.complete(read_set(folder))
        if whole and not (folder / "grid.png").is_file():
            pictures = next(read_set(folder).batches(_GRID))
            scale = max(1, 64 // pictures.shape[-1])
            save_grid(folder / "grid.png", pictures, columns=8, scale=scale)
        said = f"{npz_of(folder)}: {n:,} pictures, protocol {plan.protocol.short}"
        if whole and is_first_to_say(said):
            print(said)
            if extras.measure is not None:
                _measure(folder, features, extras.measure)
        elif not whole and rank == 0:
            print(f"{folder}: the other processes make the rest, and the last one the whole set")
        return 0

    return resumable(work, folder, speaks=rank == 0)


def _measure(folder: Path, of_shards: ShardFeatures, measure: Measure) -> None:
    """The numbers of a whole set, from the features of its shards."""
    from mixflow_fast.cli.evaluate import place_of_features, say, with_image_features
    from mixflow_fast.evaluation.evaluate import evaluate
    from mixflow_fast.evaluation.features.extractor import kept_features
    from mixflow_fast.evaluation.pictures import open_pictures
    from mixflow_fast.evaluation.sample_sets import read_set

    pictures, place = open_pictures(folder), place_of_features(folder, None)
    features = [kept_features(place.folder, e, pictures.source) for e in measure.networks]
    if None in features:
        features = of_shards.gather(read_set(folder).pictures, pictures.source)
        for each in features:
            each.save(place.folder)
    of_shards.delete()
    reference = with_image_features(measure.reference, measure.networks, None)
    found = evaluate(features, reference, device=measure.device)
    say(found, pictures, str(folder), place, folder.with_name(f"{folder.name}.metrics.jsonl"))


def predicted_seconds(drawer: Drawer, pictures: int) -> float | None:
    """How long so many pictures take here, from a few steps; None where it is not worth a try.

    The first step is not counted: it compiles and warms up.
    """
    import torch

    from mixflow_fast.sampling.sampler import Sampler

    calls, batches = drawer.chosen.sampler.network_calls, -(-pictures // drawer.batch_size)
    if calls is None or calls * batches < _SHORT:
        return None
    ids, taken = torch.arange(drawer.batch_size), []
    for steps in (1, _FIRST_STEPS):
        short = drawer.prepared.with_sampler(Sampler("euler", steps))
        began = time.perf_counter()
        drawn = short.draw(ids, seed=drawer.seed, balanced=drawer.balanced)
        sampled = time.perf_counter()
        drawer.to_pixels(drawn.x).cpu()
        taken = [(sampled - began) / steps, time.perf_counter() - sampled]
    step, pixels = taken
    return batches * (calls * step + pixels)


def _expected(seconds: float, pictures: int, world: int) -> str:
    from mixflow_fast.messages import duration

    whose = f", this process's part of {world}," if world > 1 else ""
    return (
        f"{pictures:,} pictures{whose} take about {duration(seconds)} "
        f"({pictures / seconds:.3g} pictures/s, from {_FIRST_STEPS} steps)"
    )
