"""Which examples a step trains on where they have several shapes, and a batch can have but one.

A dataset of B buckets numbers its samples bucket by bucket. A global batch comes from one of them,
chosen by (seed, step): a cycle of 4096 steps gives bucket b

    n_b ~ 4096 N_b / N      (largest remainders; at least 1)

of its steps, in an order that is a permutation of (seed, cycle). So shares are exact in each cycle,
where draws with these probabilities would have them on average alone. The v-th step of a bucket
has the positions [v G, (v + 1) G) of that bucket's own shuffled order, with G the global batch, so
that a bucket is gone through before it begins again. Nothing is kept from step to step: v follows
from the cycle, whatever it is, and a resumed run needs only the number of its step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixflow_fast.data.order import sample_index
from mixflow_fast.kernels.philox import Stream

CYCLE = 4096


class BucketOrder:
    """Indices of the samples at global positions, where each step's samples have one shape.

    With one bucket it is `sample_index`. Not for several threads.

    Args:
        sizes: samples of each bucket.
        seed: in [0, 2**64).
        global_batch_size: samples of one optimizer step, over all ranks.
        shuffle: False keeps the stored order inside a bucket.

    Raises:
        ValueError: no bucket, an empty one, more than a cycle has steps, a bad seed.
    """

    def __init__(
        self, sizes: Sequence[int], *, seed: int, global_batch_size: int, shuffle: bool = True
    ) -> None:
        if not sizes or min(sizes) < 1 or len(sizes) > CYCLE:
            raise ValueError(
                "dataset must hold at least one sample, and one in each bucket, of which there may "
                f"be {CYCLE}, got {list(sizes)[:8]}"
            )
        self._seed, self._batch, self._shuffle = seed, global_batch_size, shuffle
        self._sizes = list(sizes)
        self._steps = torch.tensor(_shares(self._sizes))
        self._first_step = torch.cumsum(self._steps, 0) - self._steps
        size = torch.tensor(self._sizes)
        self._first_index = torch.cumsum(size, 0) - size
        self._held: tuple[int, Tensor, Tensor] | None = None
        # Refuses a bad seed here and not in a worker.
        sample_index(torch.zeros(1, dtype=torch.int64), self._sizes[0], seed)

    def __call__(self, positions: Tensor) -> Tensor:
        """(B,) int64 indices in the dataset of the samples at global positions, (B,) int64."""
        if len(self._sizes) == 1:
            return sample_index(positions, self._sizes[0], self._seed, self._shuffle)
        step = positions // self._batch
        bucket, visit = torch.empty_like(step), torch.empty_like(step)
        cycle = step // CYCLE
        for number in cycle.unique().tolist():
            here = cycle == number
            buckets, visits = self._cycle(number)
            bucket[here], visit[here] = buckets[step[here] % CYCLE], visits[step[here] % CYCLE]
        inside = visit * self._batch + positions % self._batch
        indices = torch.empty_like(positions)
        for number in bucket.unique().tolist():
            here = bucket == number
            own = sample_index(inside[here], self._sizes[number], self._seed, self._shuffle)
            indices[here] = own + self._first_index[number]
        return indices

    def _cycle(self, number: int) -> tuple[Tensor, Tensor]:
        """(CYCLE,) buckets of a cycle's steps, and how often each was there before."""
        if self._held is None or self._held[0] != number:
            steps = number * CYCLE + torch.arange(CYCLE)
            slots = sample_index(steps, CYCLE, self._seed, stream=Stream.BUCKET)
            buckets = torch.searchsorted(self._first_step, slots, right=True) - 1
            visits = number * self._steps[buckets]
            for bucket in range(len(self._sizes)):
                here = buckets == bucket
                visits[here] += torch.arange(int(here.sum()))
            self._held = number, buckets, visits
        return self._held[1:]

    def bucket_of(self, index: int) -> int:
        """The number of the bucket that a sample is in."""
        return int(torch.searchsorted(self._first_index, index, right=True)) - 1


def bucket_sizes(dataset: object) -> list[int]:
    """Samples of each bucket of a dataset; one bucket where it does not say `bucket_sizes`."""
    sizes = getattr(dataset, "bucket_sizes", None)
    return [len(dataset)] if sizes is None else list(sizes)


def _shares(sizes: Sequence[int]) -> list[int]:
    """Steps of a cycle for each bucket: CYCLE in all, by largest remainders, at least 1."""
    total = sum(sizes)
    steps = [max(1, CYCLE * size // total) for size in sizes]
    rest = [CYCLE * size / total - count for size, count in zip(sizes, steps, strict=True)]
    by_rest = sorted(range(len(sizes)), key=lambda number: (-rest[number], number))
    missing = CYCLE - sum(steps)
    for number in by_rest[: max(missing, 0)]:
        steps[number] += 1
    # Steps that buckets of less than half a share were given come from those that have most.
    for _ in range(-missing):
        steps[max(range(len(steps)), key=steps.__getitem__)] -= 1
    return steps
