"""Seconds of a start by its parts."""

from verl.trainer.worker_groups import Laps


def test_a_start_is_told_by_its_parts(monkeypatch):
    """From 100 to 103.4, 109 and 110.6 s of the clock."""
    laps, clock = Laps(100.0), iter((103.4, 109.0, 110.6))
    monkeypatch.setattr("verl.trainer.worker_groups.time.time", lambda: next(clock))
    for name in ("checks", "ranks", "probe"):
        laps.mark(name)
    assert str(laps) == "Started in 11 s: checks 3, ranks 6, probe 2"
