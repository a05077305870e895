"""What the ranks send each other in a step: `python -m benchmarks.collectives`.

`step_collectives` says by formula which collectives an engine makes as the trainer sets it, from
the sizes of the parameters alone, and what of them runs beside the backward pass.
`tests/benchmarks/test_collectives.py` holds it against what the real engines call
(`benchmarks/recorded_step.py`) on a small network; the table applies it to the
recipes' networks, which are on the meta device and have shapes but no memory. Nothing is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from benchmarks.flops import on_meta
from mixflow_fast.checkpoints.shards import alignment
from mixflow_fast.cli.errors import quiet_without_reader
from mixflow_fast.config.schema import TrainConfig

BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
# DeepSpeed's: elements that are sent at once where train.reduce_bucket_size has no say, and the
# size up to which ZeRO 3 keeps a parameter whole on every rank.
FIXED_BUCKET, KEPT_WHOLE = 500_000_000, 100_000


@dataclass(frozen=True)
class Collectives:
    """Collectives of one kind in a part of a step, over all ranks.

    Attributes:
        phase: forward, backward or step of the engine, or "vote": the host's, over gloo.
        kind: allreduce, allgather or reduce_scatter.
        dtype: of what is sent.
        elements: of all calls together, each counted whole and not as a rank's part.
        calls: how many; None where DeepSpeed decides by what else it finds ready.
        beside: of the elements, those that are sent on a stream of their own while gradients are
            still being made: all but the last call of each backward pass, or none.
    """

    phase: str
    kind: str
    dtype: str
    elements: int
    calls: int | None
    beside: int = 0

    @property
    def nbytes(self) -> int:
        """Of the whole tensors."""
        return self.elements * BYTES[self.dtype]

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends in a ring: the least where no switch does the adding up."""
        rounds = 2 if self.kind == "allreduce" else 1
        return rounds * self.nbytes * (ranks - 1) / ranks


def parts(sizes: Iterable[int], most: int, at_once: bool = False) -> list[int]:
    """Elements of each call in which tensors are sent that become ready in this order.

    Args:
        sizes: elements of each, none larger than `most`.
        most: elements of a part.
        at_once: all are there already: a part is then closed by the tensor that passes `most`, not
            before it.
    """
    found, filled = [], 0
    for size in sizes:
        if not at_once and filled + size > most:
            found, filled = [*found, filled], 0
        filled += size
        if at_once and filled > most:
            found, filled = [*found, filled], 0
    return [*found, filled] if filled else found


def buckets(sizes: Iterable[int], most: int, at_once: bool = False) -> int:
    """In how many parts DeepSpeed sends tensors; as `parts`."""
    return len(parts(sizes, most, at_once))


def _ddp_collectives(sizes: Sequence[int], train: TrainConfig) -> list[Collectives]:
    """Of an optimizer step without ZeRO: one sum, in the last of its micro-batches."""
    # A bucket of DDP's is closed by the tensor that fills it.
    sent = parts(sizes[::-1], train.reduce_bucket_size - 1, at_once=True)
    dtype = DTYPES[train.reduce_dtype]
    total = sum(sizes)
    return [Collectives("backward", "allreduce", dtype, total, len(sent), total - sent[-1])]


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


def step_collectives(
    sizes: Sequence[int],
    train: TrainConfig,
    ranks: int,
    microsteps: int = 1,
    frozen: Sequence[int] = (),
) -> list[Collectives]:
    """The collectives of one optimizer step.

    Args:
        sizes: elements of each trained parameter, in the network's order; none larger than
            train.reduce_bucket_size, and no more than 1e9 together (beyond, ZeRO 3 lets go of
            weights between the forward and the backward pass, and gathers them again).
        train: its ZeRO stage, precision, dtype and buckets of the sums.
        ranks: processes.
        microsteps: micro-batches of a step.
        frozen: elements of the parameters that are not trained, which ZeRO 3 shards, too.

    Raises:
        ValueError: a parameter larger than a bucket, which DeepSpeed sends by other rules.
    """
    if max(sizes) > train.reduce_bucket_size:
        raise ValueError(
            f"reduce_bucket_size = {train.reduce_bucket_size} must hold the largest parameter, got "
            f"one of {max(sizes)} elements"
        )
    total, own = sum(sizes), DTYPES[train.precision]
    summed = DTYPES[train.reduce_dtype]
    vote = Collectives("vote", "allreduce", "float32", 1, 1)
    if train.engine == "ddp":
        return [*_ddp_collectives(sizes, train), vote]
    sent = parts(sizes[::-1], train.reduce_bucket_size)
    in_buckets = len(sent)
    if train.zero_stage == 3:
        every = [*sizes, *frozen]
        large = sum(_multiple(size, ranks) for size in every if size > KEPT_WHOLE)
        small = [_multiple(size, ranks) for size in every if size <= KEPT_WHOLE]
        shards = sum(_multiple(size, ranks) for size in sizes)
        calls = microsteps * in_buckets
        return [
            Collectives("forward", "allgather", own, microsteps * large, None),
            Collectives(
                "backward",
                "reduce_scatter",
                summed,
                microsteps * shards,
                calls,
                microsteps * sum(sent[:-1]),
            ),
            Collectives("step", "allreduce", "float64", 1, 1),  # the gradient norm
            Collectives("step", "allgather", own, sum(small), len(small)),
            vote,
        ]
    if train.zero_stage == 0:
        calls = buckets(sizes, FIXED_BUCKET, at_once=True)
        return [Collectives("backward", "allreduce", summed, total, calls), vote]
    # Between parameters, so that each begins at 16 bytes, and at the end.
    unit = max(1, alignment(train.zero_stage, train.precision) // BYTES[own])
    padded = _multiple(sum(_multiple(size, unit) for size in sizes), 2 * ranks)
    beside = 0
    if train.zero_stage == 2:  # each micro-batch
        sums = microsteps * total, microsteps * in_buckets
        beside = microsteps * sum(sent[:-1]) if train.overlap_comm else 0
    elif train.precision == "fp32":  # once a step, when all gradients are there
        sums = total, buckets(sizes, train.reduce_bucket_size)
    else:  # DeepSpeed's BF16_Optimizer
        sums = padded, buckets(sizes, FIXED_BUCKET, at_once=True)
    return [
        Collectives("backward", "allreduce", summed, *sums, beside),
        Collectives("step", "allreduce", "float32", 1, 1),  # the gradient norm
        Collectives("step", "allgather", own, padded, max(1, padded // FIXED_BUCKET)),
        vote,
    ]


# The networks of the recipes, and what is compared: a name and the settings.
NETWORKS = ("SiT-XL/2 256", "REPA XL/2 256", "DiTDH-XL 256")
RANKS = (8, 64)
RECIPES = "ZeRO 2, as the recipes have it"
WAYS = {
    RECIPES: TrainConfig(),
    "ZeRO 2, reduce_dtype=bf16": TrainConfig(reduce_dtype="bf16"),
    "ZeRO 2 as DeepSpeed would": TrainConfig(reduce_dtype="bf16", reduce_bucket_size=FIXED_BUCKET),
    "ZeRO 2, overlap_comm=true": TrainConfig(overlap_comm=True),
    "ddp": TrainConfig(engine="ddp", zero_stage=0),
    "ddp, reduce_dtype=bf16": TrainConfig(engine="ddp", zero_stage=0, reduce_dtype="bf16"),
    "ZeRO 1": TrainConfig(zero_stage=1),
    "ZeRO 3": TrainConfig(zero_stage=3),
}


@dataclass(frozen=True)
class Row:
    """A line of the table: one way of summing, one network, so many ranks and micro-batches."""

    network: str
    parameters: int
    way: str
    ranks: int
    microsteps: int
    sums_gb: float
    sums_calls: int
    beside_gb: float
    weights_gb: float
    sent_gb: float


def rows() -> Iterator[Row]:
    """Every network and way on 8 and 64 ranks; two micro-batches on 8 for two of the ways."""
    for network, ranks in itertools.product(NETWORKS, RANKS):
        parameters = list(on_meta(network).parameters())
        sizes = [p.numel() for p in parameters if p.requires_grad]
        frozen = [p.numel() for p in parameters if not p.requires_grad]
        for (way, train), micro in itertools.product(WAYS.items(), (1, 2)):
            if micro == 2 and (ranks != RANKS[0] or way not in (RECIPES, "ddp")):
                continue
            made = step_collectives(sizes, train, ranks, micro, frozen)
            sums = next(c for c in made if c.phase == "backward")
            weights = sum(c.nbytes for c in made if c.kind == "allgather")
            sent = sum(c.sent(ranks) for c in made)
            yield Row(
                network=network,
                parameters=sum(sizes),
                way=way,
                ranks=ranks,
                microsteps=micro,
                sums_gb=sums.nbytes / 1e9,
                sums_calls=sums.calls or 0,
                beside_gb=sums.beside * BYTES[sums.dtype] / 1e9,
                weights_gb=weights / 1e9,
                sent_gb=sent / 1e9,
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(argv)
    table = list(rows())
    if options.json:
        for row in table:
            print(json.dumps(asdict(row)))
        return 0
    print(
        "GB of one step in bf16, whole tensors: gradients that are summed (and in how many calls),"
    )
    print(
        "what of them is sent beside the backward pass, weights that are gathered; what each rank"
    )
    print("sends of both in a ring. Counted by formula.")
    for network, lines in itertools.groupby(table, key=lambda row: row.network):
        lines = list(lines)
        print(f"\n{network}, {lines[0].parameters / 1e6:.1f} M trained parameters")
        head = f"{'sums':>8}{'calls':>6}{'beside':>8}{'weights':>9}{'sent':>7}"
        print(f"  {'':<30}{'ranks':>6}{'micro':>6}{head}")
        for r in lines:
            print(
                f"  {r.way:<30}{r.ranks:>6}{r.microsteps:>6}{r.sums_gb:>8.2f}{r.sums_calls:>6}"
                f"{r.beside_gb:>8.2f}{r.weights_gb:>9.2f}{r.sent_gb:>7.2f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(quiet_without_reader(main))
