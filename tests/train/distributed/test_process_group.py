"""The ranks' meeting and their few words, over real gloo processes."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from train.distributed import process_group
from train.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[3]

RANK = """
import json, os, sys
from train.distributed import process_group as dist
from train.errors import UserError
rank, size, port, fd = (int(a) for a in sys.argv[1:5])
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
meeting = dist.Rendezvous("127.0.0.1", port, attempt=3, listen_fd=fd if rank == 0 else None, timeout_s=30)
world = dist.init_group(rank, size, rank, "cpu", meeting)
out = {"rank": world.rank, "size": world.size, "device": str(world.device), "first": world.is_rank0}
"""


def run_world(tmp_path, body, size=2):
    """Runs ``body`` on every rank; it fills the dict ``out``. Returns the dicts by rank."""
    script = tmp_path / "rank.py"
    script.write_text(RANK + textwrap.dedent(body) + "\nprint(json.dumps(out))\ndist.destroy_group()\n")
    listener = socket.create_server(("127.0.0.1", 0))
    port, fd = listener.getsockname()[1], listener.fileno()
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(size), str(port), str(fd)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            pass_fds=[fd] if rank == 0 else [],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    listener.close()
    outs = []
    for process in ranks:
        out, err = process.communicate(timeout=90)
        assert process.returncode == 0, err
        outs.append(json.loads(out.splitlines()[-1]))
    return outs


def test_ranks_join_over_a_bound_socket_and_exchange_messages(tmp_path):
    outs = run_world(
        tmp_path,
        """
        out["sum"] = dist.all_reduce_sum([1.0 + rank, 2**53 + 0.0])
        value = {"text": "三层桨", "n": [1, None]} if rank == 1 else "unread"
        out["object"] = dist.broadcast_object(value, source=1)
        out["all"] = dist.gather_objects({"r": rank, "pad": "x" * (rank * 100)})
        dist.barrier()
        dist.assert_equal_across_ranks("configuration", "abc")
        try:
            dist.assert_equal_across_ranks("configuration", f"digest{rank}")
        except UserError as error:
            out["refused"] = str(error)
        """,
    )
    for rank, out in enumerate(outs):
        assert (out["rank"], out["size"], out["device"], out["first"]) == (rank, 2, "cpu", rank == 0)
        assert out["sum"] == [3.0, 2.0**54]
        assert out["object"] == {"text": "三层桨", "n": [1, None]}
        assert [o["r"] for o in out["all"]] == [0, 1]
        assert len(out["all"][1]["pad"]) == 100
        assert "do not agree on the configuration" in out["refused"]
        assert "rank 1 has digest1" in out["refused"]


def test_process_without_a_launcher_is_a_group_of_one():
    code = """
from train.distributed import process_group as dist
world = dist.init_from_env()
assert (world.rank, world.size, world.is_rank0) == (0, 1, True)
assert dist.all_reduce_sum([2.5]) == [2.5]
assert dist.broadcast_object({"a": 1}) == {"a": 1}
dist.destroy_group()
dist.destroy_group()
"""
    bare = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    run = subprocess.run(
        [sys.executable, "-c", code], env={**bare, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("size", [1, 2])
def test_init_from_env_reads_the_environment_of_torchrun(tmp_path, size):
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys; from train.distributed import process_group as dist\n"
        "world = dist.init_from_env()\n"
        f"assert dist.all_reduce_sum([1.0]) == [{float(size)}]\n"
        "assert world.local_rank == world.rank\n"
        "dist.destroy_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", str(script)]
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("device", "size", "bound"), [("cpu", 1, False), ("cpu", 2, False), ("cuda:0", 1, False), ("cuda:0", 2, True)]
)
def test_group_is_bound_to_a_device_only_between_gpus(device: str, size: int, bound: bool):
    world = process_group.DistContext(0, size, 0, torch.device(device))
    assert process_group.bound_device(world) == (torch.device(device) if bound else None)


ENDS_WITH_WORK_UNDER_WAY = """
import os, sys, torch, torch.distributed as dist
from train.distributed import process_group
torch.set_num_threads(1)
process_group.init_from_env()
import torch.distributed._shard.sharded_tensor
for _ in range(50):
    dist.all_reduce(torch.zeros(1 << 16), async_op=True)
process_group.destroy_group()
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
print([name for name in names if "gloo" in name])
"""


def test_destroyed_group_leaves_no_thread_to_abort_the_exit():
    """A thread of Gloo that still holds a tensor while the interpreter ends would end it with SIGABRT."""
    ended = subprocess.run(
        [sys.executable, "-c", ENDS_WITH_WORK_UNDER_WAY], capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr


@pytest.mark.parametrize("rank", ["-1", "x", "2", "", "9" * 20])
def test_variables_that_name_no_rank_are_refused(rank: str):
    with pytest.raises(UserError, match="name no rank"):
        process_group.launcher_ranks({"RANK": rank, "WORLD_SIZE": "2"})
    assert process_group.launcher_ranks({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}) == (1, 2, 1)
