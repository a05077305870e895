"""Whether training waits for its data, and which stage of their way is the slow one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# The part of all time, and for how many steps in a row, that is worth a sentence.
SHARE, STEPS = 0.05, 100


@dataclass(frozen=True)
class WaysOut:
    """What to change where a stage is the slow one, as an instruction.

    Attributes:
        preparing: reading, decoding and gathering on the host.
        copying: the way to the device.
    """

    preparing: str
    copying: str


class DataWaitWatch:
    """Says once that training has been waiting for its data.

    Args:
        ways_out: what may help.
        step: steps done before the first row.
    """

    def __init__(self, ways_out: WaysOut, step: int = 0) -> None:
        self._ways_out, self._step, self._slow, self._said = ways_out, step, 0, False

    def sentence(self, step: int, row: Mapping[str, object]) -> str | None:
        """The sentence to say after a row, if there is one.

        Args:
            step: steps done.
            row: has "data_wait_fraction", "data_wait_s" and "data_stall_s".
        """
        steps, self._step = step - self._step, step
        self._slow = self._slow + steps if row["data_wait_fraction"] > SHARE else 0
        if self._slow < STEPS or self._said:
            return None
        self._said = True
        preparing = row["data_wait_s"] >= row["data_stall_s"]
        stage = "preparing examples" if preparing else "copying batches to the device"
        way_out = self._ways_out.preparing if preparing else self._ways_out.copying
        return (
            f"data: training waited for them for {row['data_wait_fraction']:.0%} of its last "
            f"steps; the slowest stage is {stage}: {way_out}"
        )
