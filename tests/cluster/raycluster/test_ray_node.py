"""Ray's own processes, started for real, one of which is killed at once."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray

from cluster.host import job_dir
from cluster.raycluster import cluster_client, ray_auth, ray_internals, ray_node
from train.errors import UserError


@pytest.fixture
def folder():
    """A job's private folder, with a token."""
    before = dict(os.environ)
    made = job_dir.make_folder()
    ray_auth.create_token(made / "token")
    yield made
    os.environ.clear()
    os.environ.update(before)
    shutil.rmtree(made, ignore_errors=True)


def test_raylet_that_ends_at_its_start_raises_a_user_error(folder):
    def kill_raylet():
        end = time.monotonic() + 30
        while time.monotonic() < end:
            for child in psutil.Process().children():
                if child.name() == "raylet":
                    child.kill()
                    return
            time.sleep(0.001)

    killer = threading.Thread(target=kill_raylet)
    killer.start()
    with pytest.raises(UserError, match="Ray's processes on this host ended as they started"):
        ray_node.start_head(ray_node.NodeSpec(ray_auth.LOOPBACK, folder, folder / "token", cpus=1, gpus=0))
    killer.join()
    assert not [
        child for child in psutil.Process().children() if child.name() == "gcs_server" and child.status() != "zombie"
    ]


def test_raylet_kills_no_agent_for_want_of_memory(folder):
    """Its memory monitor would choose the agent, which holds nothing, and with it the worker that holds all."""
    node = ray_node.start_head(ray_node.NodeSpec(ray_auth.LOOPBACK, folder, folder / "token", cpus=1, gpus=0))
    try:
        (raylet,) = [child for child in psutil.Process().children(recursive=True) if child.name() == "raylet"]
        assert raylet.environ()["RAY_memory_monitor_refresh_ms"] == "0"
        logs = [path.read_text() for path in folder.rglob("raylet.*") if path.is_file()]
        assert any("MemoryMonitor disabled" in text for text in logs), logs
    finally:
        node.end()


def test_worker_environment_starts_python_in_path_with_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    python = tmp_path / "ein Ordner mit Straße" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    assert cluster_client.worker_environment("/code") == {"env_vars": {"PYTHONPATH": "/code", "PYTHONSAFEPATH": "1"}}
    monkeypatch.setattr(sys, "executable", str(python))
    command = (
        f"exec {cluster_client.worker_environment('/code')['py_executable']} -c 'print(1)'"  # as Ray gives it to bash
    )
    assert subprocess.run(["bash", "-c", command], capture_output=True, text=True).stdout == "1\n"


def test_unknown_word_for_the_token_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Ray would take it for "disabled", and the job would speak to the cluster without a token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "tokn")
    with pytest.raises(UserError, match="RAY_AUTH_MODE=tokn is neither token nor disabled"):
        ray_auth.authenticate(None, "10.0.0.1:6379")


def test_cluster_is_up_before_rays_own_agents_are(folder, monkeypatch):
    """They take two seconds of imports; here they never begin."""
    forever = ["sh", "-c", "while kill -0 $PPID; do sleep 0.2; done"]
    command = ray_internals._interpreter_command
    monkeypatch.setattr(
        ray_internals,
        "_interpreter_command",
        lambda component, folder, unbuffered=True: (
            forever if component in ray_internals.RAY_AGENTS else command(component, folder, unbuffered)
        ),
    )
    node = ray_node.start_head(ray_node.NodeSpec(ray_auth.LOOPBACK, folder, folder / "token", cpus=1, gpus=0))
    try:
        cluster_client.init_driver(node.address, "tests", None, ray_auth.LOOPBACK)
        answer = ray.remote(num_cpus=0)(lambda: os.getpid()).remote()
        assert ray.get(answer, timeout=60) != os.getpid()
        assert not node.lost()
    finally:
        ray.shutdown()
        node.end()
