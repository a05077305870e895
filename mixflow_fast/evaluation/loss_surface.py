"""The loss of a network over the time m of its input and the time t that it is told.

What slowing trains is the wedge m <= t: a network that stands inputs noisier than their label says
has low losses below the diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mixflow_fast.evaluation.validation_loss import (
    GRID,
    TIMES,
    Network,
    ValidationLoss,
    bin_centers,
)

# Cuts m = c t: the diagonal, and inputs that are slower and slower.
CUTS = (1.0, 0.9, 0.8, 0.5, 0.2)


@dataclass(frozen=True)
class LossSurface:
    """Mean losses over the wedge m <= t, and along cuts through it.

    Attributes:
        times: centers of the grid's rows and columns.
        grid: rows m, columns t; None where m > t.
        cut_times: t of the cuts.
        cuts: losses at (t, c t), by c.
    """

    times: list[float]
    grid: list[list[float | None]]
    cut_times: list[float]
    cuts: Mapping[float, list[float]]

    def to_record(self) -> dict[str, object]:
        """Plain numbers for a JSON file."""
        cuts = {f"{c:g}": losses for c, losses in self.cuts.items()}
        return {
            "times": self.times,
            "grid": self.grid,
            "cut_times": self.cut_times,
            "cuts": cuts,
        }


def loss_surface(losses: ValidationLoss, net: Network, grid: int = GRID) -> LossSurface:
    """Measure the losses of a network.

    Args:
        losses: the examples, their noise and the objective.
        net: as the objective trains it.
        grid: rows and columns.

    Raises:
        ValueError: fewer than 2 rows.
    """
    if grid < 2:
        raise ValueError(f"grid must be >= 2, got {grid}")
    times, cut_times = bin_centers(grid), bin_centers(TIMES)
    cells = [(row, column) for row in range(grid) for column in range(row, grid)]
    points = [(times[column], times[row]) for row, column in cells]
    points += [(t, c * t) for c in CUTS for t in cut_times]
    found = losses.at(net, points)
    table: list[list[float | None]] = [[None] * grid for _ in range(grid)]
    for (row, column), value in zip(cells, found, strict=False):
        table[row][column] = value
    rest = found[len(cells) :]
    cuts = {c: rest[place * TIMES : (place + 1) * TIMES] for place, c in enumerate(CUTS)}
    return LossSurface(times, table, cut_times, cuts)
