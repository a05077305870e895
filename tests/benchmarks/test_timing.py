"""Times in turns: who is called when, and which way of timing a cell takes."""

import pytest
import torch

from benchmarks import timing

CPU = torch.device("cpu")


def test_every_provider_has_a_turn_a_round_and_none_is_always_first() -> None:
    rounds = list(timing.turns(["a", "b", "c"], 4))
    assert [number for number, _ in rounds] == [0, 1, 2, 3]
    assert all(sorted(order) == ["a", "b", "c"] for _, order in rounds)
    assert [order[0] for _, order in rounds] == ["a", "b", "c", "a"]


def test_samples_and_wall_times_are_kept_by_round(monkeypatch) -> None:
    spent = iter(range(1, 1000))
    monkeypatch.setattr(timing, "wall_ms", lambda *_: float(next(spent)))
    timed = timing.measure({"a": int, "b": int}, CPU, rounds=3)
    # Two rounds warm up; three samples a turn, and their median is the wall time.
    assert timed.rounds["a"][0] == [13.0, 14.0, 15.0] and timed.wall["a"][0] == 14.0
    assert [len(rounds) for rounds in timed.rounds.values()] == [3, 3]
    assert "on the CPU" in timed.method
    with pytest.raises(ValueError, match="must be a CudaTimer"):
        timing.measure({"a": int}, torch.device("cuda"))


@pytest.mark.parametrize(
    ("quick", "captures", "method"),
    [
        (0.5, True, "CUDA events per call, cold L2"),
        (0.01, True, "CUDA graph of 100 calls, warm L2"),
        (0.01, False, "CUDA events per call, cold L2; no CUDA graph: RuntimeError: cannot"),
    ],
)
def test_short_calls_are_timed_as_graphs(monkeypatch, quick, captures, method) -> None:
    """With stand-ins for what only a GPU has."""

    class Timer:
        def quick_ms(self, call):
            return quick

        def events_ms(self, call, calls, host_ms):
            return [quick] * calls

    def capture(call):
        if not captures:
            raise RuntimeError("cannot")
        return call

    monkeypatch.setattr(timing, "_capture", capture)
    monkeypatch.setattr(timing, "_replay_ms", lambda graph, replays: [quick] * replays)
    monkeypatch.setattr(timing, "_issue_ms", lambda call: 0.1)
    timed = timing.measure({"a": int, "b": int}, CPU, Timer(), rounds=2, round_ms=10.0)
    # 10 ms a round: 20 calls of half a millisecond, 10 replays of a hundred calls of 10 us.
    samples = {0.5: 20, 0.01: 10 if captures else 50}[quick]
    assert timed.method == method and len(timed.rounds["a"][0]) == samples


def test_rounds_of_steps_end_where_they_are_told(monkeypatch) -> None:
    monkeypatch.setattr(timing, "wall_ms", lambda call, calls, device: 100.0 / calls)
    times = timing.rounds_ms({"a": int, "b": int}, CPU, seconds=0.4, rounds=6)
    assert {name: len(kept) for name, kept in times.items()} == {"a": 6, "b": 6}
    assert set(times["a"]) == {25.0}  # turns of four steps of 100 ms
    stopped = timing.rounds_ms({"a": int}, CPU, 0.0, 6, enough=lambda done: done >= 5)
    assert stopped == {"a": [100.0] * 5}
    assert timing.rounds_method(0.5) == (
        "wall time of rounds of about 0.5 s, waited for; providers take turns"
    )
    assert "single steps" in timing.rounds_method(0.0)
