"""Fixtures and hooks of all tests: a small prepared corpus, runs on it, and a directory for temporary files."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from multiprocessing import forkserver
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    gloo_ranks,
    interpret,  # noqa: F401  before anything imports Triton
)

from train.config.schema import Config
from train.data.prepare.prepare import prepare


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give one xdist worker all tests of clusters, which mostly wait, one after another; the others share the rest."""
    from xdist.scheduler import LoadScopeScheduling

    class OneClusterAtATime(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            clusters = ("tests/cluster/", "tests/integration/cluster/", "tests/bench/test_gpu.py")
            return "clusters" if nodeid.startswith(clusters) else nodeid

    return OneClusterAtATime(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """Give the tests a directory for temporary files that is removed in the end; pytest's own stays beside it."""
    if hasattr(config, "workerinput"):  # of xdist: the controller has made it
        return
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    directory = tempfile.mkdtemp(prefix="t-")  # short, for the paths of sockets
    os.environ["TMPDIR"], tempfile.tempdir = directory, None
    # multiprocessing removes its own folder in it first, at priority -100
    Finalize(None, shutil.rmtree, (directory, True), exitpriority=-1000)


def pytest_collection_finish() -> None:
    """Start the fork server with the imports of ``gloo_ranks``, before prepare's workers start one with fewer."""
    forkserver.ensure_running()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 60 short documents of made-up words, in bytes, in several small shards."""
    folder = tmp_path_factory.mktemp("text", numbered=False)
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioumnrst", k=draw.randint(1, 7))) for _ in range(50)]
    for n in range(60):
        (folder / f"{n:02}.txt").write_text(" ".join(draw.choices(words, k=draw.randint(3, 40))))
    data = gloo_ranks.compose(*gloo_ranks.TEXT, f"data.paths=[{folder}]", f"data.dir={folder.with_name('corpus')}").data
    return prepare(data, lambda event: None)


@pytest.fixture
def make(corpus: Path, tmp_path: Path):
    """make(*overrides, name=...) -> the configuration of a run on the corpus, in a folder of its own."""

    def composed(*overrides: str, name: str = "run") -> Config:
        return gloo_ranks.on_corpus(corpus, tmp_path / name, *overrides)

    return composed


@pytest.fixture
def as_typed(corpus: Path, tmp_path: Path):
    """as_typed(*overrides, name=...) -> the words of a command line for a run on the corpus, given its text."""

    def typed(*overrides: str, name: str = "run") -> list[str]:
        text = corpus.parent / "text"
        here = [f"data.paths=[{text}]", f"data.dir={corpus}", f"run.dir={tmp_path / name}"]
        return [*gloo_ranks.TINY, *gloo_ranks.TEXT, *here, *overrides]

    return typed
