"""CUDA stays untouched in the fork server, and what it fails for is said once, in words."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cluster.worker import fork_server_client, ipc
from cluster.worker.cuda_probe import CudaProbe, answer_without_cuda, describe_versions, explain
from cluster.worker.fork_server_client import BEFORE_FORK_ENV

REPOSITORY = Path(__file__).resolve().parents[3]
IMPORTS = """
import contextlib, os, sys
import torch
from cluster.worker import cuda_probe, fork_server
fork_server.ForkServer.import_early()
calls = []
torch.cuda._is_compiled = lambda: True
torch._C._cuda_getDeviceCount = lambda: calls.append("cudaGetDeviceCount") or 0
start = torch.cuda._lazy_init
torch.cuda._lazy_init = lambda: calls.append("_lazy_init") or start()
if sys.argv[1] == "unguarded":
    cuda_probe.answer_without_cuda = lambda gpus: contextlib.nullcontext()
asks = torch.cuda.is_available, torch.cuda.device_count
server = fork_server.ForkServer(None, "train.run:train_rank", probe=object())
server.import_target()
assert server.failure is None, server.failure
assert (torch.cuda.is_available, torch.cuda.device_count) == asks
print(*calls, f"threads={len(os.listdir('/proc/self/task'))}")
"""
"""A build of torch without CUDA that takes itself for one with it, and counts what reaches CUDA."""


@pytest.mark.parametrize(("guard", "calls"), [("guarded", set()), ("unguarded", {"cudaGetDeviceCount"})])
def test_imports_with_mig_ids_do_not_touch_cuda(guard, calls):
    env = {**os.environ, **BEFORE_FORK_ENV, "DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "MIG-1a,MIG-2b"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, guard], cwd=REPOSITORY, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *seen, threads = done.stdout.split()
    assert set(seen) == calls
    assert threads == "threads=1"


def test_torch_answers_for_itself_again_after_the_imports():
    kept = torch.cuda.is_available, torch.cuda.device_count
    with contextlib.suppress(ImportError), answer_without_cuda(2):
        assert (torch.cuda.is_available(), torch.cuda.device_count()) == (True, 2)
        raise ImportError
    assert (torch.cuda.is_available, torch.cuda.device_count) == kept
    with answer_without_cuda(0):
        assert not torch.cuda.is_available()


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a build of torch without CUDA")
def test_probe_says_once_what_is_wrong_and_leaves_this_process_alone():
    probe = CudaProbe()
    failure = probe.failure()
    assert failure.startswith("CUDA cannot be started on this host: Torch not compiled with CUDA enabled.")
    assert "is a build without CUDA: install one with it" in failure
    assert probe.failure() == failure
    assert os.waitpid(probe.pid, 0)[1] == 0
    assert not torch.cuda.is_initialized()


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a build of torch without CUDA")
def test_fork_server_of_gpus_refuses_orders_in_words_where_cuda_fails(order, tmp_path):
    server = fork_server_client.ForkServerProcess(tmp_path, "cluster.worker.worker_main:load_target")
    try:
        server.set_device("gpu")
        agent = fork_server_client.connect_fork_server(tmp_path)
        with agent:
            for _ in range(2):  # each rank of the host is told the same, and none is forked to find out
                ipc.send(agent, order.to_json(), [])
                answer, _ = ipc.receive(agent)
                assert set(answer) == {"refused"}
                assert "is a build without CUDA: install one with it" in answer["refused"]
    finally:
        server.close()


@pytest.mark.parametrize(
    ("torch_version", "built_for", "driver", "supports", "words"),
    [
        ("2.13.0+cpu", None, "550.54.15", "12.4", ["2.13.0+cpu", "without CUDA", "cluster.device=cpu"]),
        ("2.13.0", "12.9", None, None, ["CUDA 12.9", "no NVIDIA driver answers", "container"]),
        ("2.13.0", "13.0", "550.54.15", "12.4", ["550.54.15, for CUDA 12.4 and older", "install a newer driver"]),
        ("2.13.0", "12.9", "580.65.06", "13.0", ["for CUDA 13.0 and older", "nvidia-smi", "dmesg"]),
        ("2.13.0", "12.9", "550.54.15", "12.4", ["for CUDA 12.4 and older", "nvidia-smi"]),
        ("2.13.0", "12.9", "550.54.15", None, ["libcuda.so.1 cannot be loaded"]),
    ],
)
def test_versions_say_what_does_not_fit_and_the_cure(torch_version, built_for, driver, supports, words):
    text = describe_versions(torch_version, built_for, driver, supports)
    assert all(word in text for word in words), text


def test_explanation_is_one_sentence_of_the_error_and_the_versions():
    error = "The NVIDIA driver on your system is too old (found version 12040).\nPlease update your GPU driver\n"
    assert explain(error, "Versions.") == (
        "CUDA cannot be started on this host: The NVIDIA driver on your system is too old (found version 12040). "
        "Versions."
    )
    assert "no reason was given" in explain("", "")
