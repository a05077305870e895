"""Waiting times, of events that a device reaches some time after."""

from __future__ import annotations

import time

from mixflow_fast.data.copy_stream import WaitTimes
from tests.support.late_copies import LateCopies, LateStream


def test_stalls_are_read_when_the_device_has_come_to_them() -> None:
    copies = LateCopies(copy_s=0.0, train_s=0.0)
    slow = LateStream(0.0, seed=1)
    wait, held = WaitTimes(host_s=0.25, batches=2), []
    for seconds in (0.05, 0.1):
        ready = copies.event()
        slow.queue(lambda seconds=seconds: time.sleep(seconds))
        ready.record(slow)
        wait.have_wait(copies, ready)
        held.append(ready)
    early = wait.take()
    assert early.host_s == 0.25 and early.batches == 2 and early.device_s == 0.0
    copies.training.synchronize()
    late = wait.take()
    assert late.host_s == 0.0 and late.batches == 0 and 0.13 < late.device_s
    assert wait.take().device_s == 0.0
