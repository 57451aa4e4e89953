"""Words of ``./launch.sh cluster`` that mean nothing are refused before anything is started or ended."""

from __future__ import annotations

import pytest

from cluster.cli import cluster


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("up port=99999", "port=99999 is not a whole number from 1 to 65,535"),
        ("up port=-1", "port=-1"),
        ("up port=1.5", "port=1.5"),
        ("up port=", "port="),
        ("up cpus=0", "cpus=0"),
        ("up gpus=-1", "gpus=-1"),
        ("up cpus=\u0663", "cpus=\u0663"),
        ("up 10.0.0.1:6379", "'10.0.0.1:6379'"),
        ("join 10.0.0.1:6379 10.0.0.2:6379", "'10.0.0.2:6379'"),
        ("join --all", "'--all'"),
        ("status 10.0.0.1:6379 more", "'more'"),
        ("down --al", "'--al'"),
        ("down all", "'all'"),
    ],
)
def test_words_and_numbers_that_mean_nothing_are_refused(words: str, named: str, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # where the token is made and the lasting node is looked for
    monkeypatch.setattr(cluster, "_start_daemon", lambda order: pytest.fail("a node was started"))
    assert cluster.run(words.split()) == 2
    assert named in capsys.readouterr().err
