"""Tests of the lines about slow work."""

from train.util import progress


def test_slow_work_is_told_every_ten_seconds_and_quick_work_never(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    tell = progress.SlowProgress("weights", said.append)
    for second in range(1, 26):
        now[0] = 100.0 + second
        tell(second / 25)
    assert said == ["weights: 40%", "weights: 80%"]
    quick = progress.SlowProgress("weights", said.append)
    now[0] += 9.9
    quick(1.0)
    assert len(said) == 2
