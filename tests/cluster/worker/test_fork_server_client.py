"""The fork server's client, which a driver imports before anything else."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.worker.fork_server_client import ForkServerProcess

REPOSITORY = Path(__file__).resolve().parents[3]
HEAVY = {"torch", "numpy", "ray", "deepspeed", "pydantic", "omegaconf", "transformers"}
"""Each would delay the start of the fork server, whose own imports take longest."""


def test_early_start_of_a_driver_imports_nothing_heavy():
    code = "import sys, cluster.driver.early_start; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "cluster.worker.fork_server_client" in done.stdout.split()
    assert not HEAVY & set(done.stdout.split())


def test_workers_keep_freed_memory_unless_the_caller_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1000")
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    server = ForkServerProcess(tmp_path, "train.run:train_rank")
    try:
        entries = Path(f"/proc/{server.process.pid}/environ").read_bytes().split(b"\0")
    finally:
        server.close()
    assert b"MALLOC_TOP_PAD_=1000" in entries
    assert b"MALLOC_TRIM_THRESHOLD_=%d" % (256 << 20) in entries
