"""The fork server's client, which a driver imports before anything else."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
HEAVY = {"torch", "numpy", "ray", "deepspeed", "pydantic", "omegaconf", "transformers"}
"""Each would delay the start of the fork server, whose own imports take longest."""


def test_early_start_of_a_driver_imports_nothing_heavy():
    code = "import sys, cluster.driver.early_start; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "cluster.worker.fork_server_client" in done.stdout.split()
    assert not HEAVY & set(done.stdout.split())
