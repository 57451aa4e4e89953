"""The other hosts of a job, the commands that start its nodes there, versions, tokens, daemons."""

import json
import os
import shlex
import subprocess
import sys
import time

import pytest

from cluster.host import network
from cluster.raycluster import cluster_client, node_daemon, ray_auth, ray_internals, remote_hosts, versions
from train.config.schema import ClusterConfig
from train.errors import UserError

SCONTROL = """#!/bin/sh
case "$*" in "show hostnames n[1-3]") printf 'n1\\nn2\\nn3\\n';; *) echo "Invalid hostlist: $3" >&2; exit 1;; esac
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The environment of a batch job on n1 of n[1-3]."""
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")


@pytest.fixture
def no_allocation(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)


def test_other_hosts_without_hosts_or_allocation_are_none(no_allocation):
    assert remote_hosts.other_hosts(ClusterConfig())[1] == []
    with pytest.raises(UserError, match="no SLURM job"):
        remote_hosts.other_hosts(ClusterConfig(start="slurm"))
    with pytest.raises(UserError, match=r"needs cluster.hosts"):
        remote_hosts.other_hosts(ClusterConfig(start="ssh"))


def test_other_hosts_come_from_a_list_or_a_file(no_allocation, tmp_path):
    assert remote_hosts.other_hosts(ClusterConfig(hosts=["a", "me@b"])) == ("ssh", ["a", "me@b"])
    (tmp_path / "file").write_text("# mine\na\n\n  b  # fast\n")
    assert remote_hosts.other_hosts(ClusterConfig(hosts=str(tmp_path / "file"))) == ("ssh", ["a", "b"])
    (tmp_path / "file").write_text("# none\n")
    with pytest.raises(UserError, match="names no host"):
        remote_hosts.other_hosts(ClusterConfig(hosts=str(tmp_path / "file")))
    with pytest.raises(UserError, match="is no file of host names"):
        remote_hosts.other_hosts(ClusterConfig(hosts="nowhere.txt"))


def test_other_hosts_in_a_slurm_allocation_are_its_other_nodes(slurm, monkeypatch):
    assert remote_hosts.other_hosts(ClusterConfig()) == ("slurm", ["n2", "n3"])
    assert remote_hosts.other_hosts(ClusterConfig(start="here"))[1] == []
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    assert remote_hosts.other_hosts(ClusterConfig()) == ("slurm", ["n1", "n3"])
    monkeypatch.delenv("SLURMD_NODENAME")
    with pytest.raises(UserError, match=r"submit with `sbatch launch\.sh train"):
        remote_hosts.other_hosts(ClusterConfig())
    monkeypatch.setenv("SLURM_JOB_NODELIST", "m[")
    with pytest.raises(UserError, match=r"SLURM_JOB_NODELIST=m\["):
        remote_hosts.other_hosts(ClusterConfig())


def test_ssh_command_is_quoted_for_the_remote_shell_and_asks_nothing(monkeypatch):
    monkeypatch.setenv("TRIREME_VENV", "/envs/my env")
    [command] = remote_hosts.ssh_commands(["me@b"], ["cluster", "join", "10.0.0.1:6379"], "/my code")
    assert command.argv[command.argv.index("--") + 1] == "me@b"
    assert "BatchMode=yes" in command.argv
    shell = shlex.split(command.argv[-1])
    assert shell[:3] == ["exec", "sh", "-c"]
    assert shlex.split(shell[3]) == shlex.split(
        "cd '/my code' && exec env 'TRIREME_VENV=/envs/my env' ./launch.sh cluster join 10.0.0.1:6379"
    )


def test_one_srun_command_starts_a_node_on_each_other_host():
    [command] = remote_hosts.srun_commands(["n2", "n3"], ["cluster", "join", "n1:1"], "/code")
    assert command.nodes == 2
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=n2,n3", "--overlap"} <= set(command.argv)
    assert command.argv[-4:] == ["/code/launch.sh", "cluster", "join", "n1:1"]


def script(*lines, code=0, sleep=0):
    """Arguments of Python for a command that reads the token, prints lines, and ends with ``code`` or its input."""
    words = [f"print({line!r}, flush=True)" for line in lines]
    end = [f"time.sleep({sleep})", f"sys.exit({code})"] if code else ["sys.stdin.read()"]
    return ["; ".join(["import sys, time", "assert sys.stdin.readline() == 'secret\\n'", *words, *end])]


def commands(**scripts):
    return [
        remote_hosts.RemoteCommand(name, [sys.executable, "-c", *arguments], 1, repeat=False)
        for name, arguments in scripts.items()
    ]


def test_remote_nodes_are_waited_for_and_end_with_the_driver(tmp_path):
    ready = json.dumps({"address": "x"})
    nodes = remote_hosts.RemoteNodes(commands(a=script("Welcome to a!", ready), b=script(ready)), "secret", tmp_path)
    nodes.wait_until_joined(20)
    nodes.close()
    assert [process.returncode for process in nodes.processes.values()] == [0, 0]


def test_hosts_that_fail_to_join_are_each_named_with_the_reason(tmp_path):
    refused = json.dumps({"error": "this host does not run what the cluster runs", "host": "bb"})
    scripts = {
        "a": script(json.dumps({"address": "x"})),
        "b": script(refused, code=2),
        "d": script(sleep=0, code=255),
        "e": script("hm"),
    }
    nodes = remote_hosts.RemoteNodes(commands(**scripts), "secret", tmp_path)
    with pytest.raises(UserError) as refused:
        nodes.wait_until_joined(3)
    nodes.close()
    text = str(refused.value)
    assert "bb: this host does not run" in text
    assert "d: ended with code 255" in text
    assert "e: has not joined within cluster.start_timeout=3 s" in text
    assert "a:" not in text


def test_host_with_other_versions_is_refused_naming_each():
    mine = versions.local_versions()
    versions.check_versions(mine, "here:1")
    versions.check_versions({}, "a cluster of others:1")
    with pytest.raises(UserError) as refused:
        versions.check_versions({**mine, "torch": "1.0", "Python": "3.8.1"}, "10.0.0.1:6379")
    assert f"torch: 1.0 there, {mine['torch']} here" in str(refused.value)
    assert "Python: 3.8.1 there" in str(refused.value)
    assert "ray" not in str(refused.value)


def test_token_is_created_once_and_readable_by_its_user_only(tmp_path):
    path = tmp_path / "new" / "token"
    with pytest.raises(UserError, match="this host has no token"):
        ray_auth.check_token(path)
    ray_auth.create_token(path)
    made = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    ray_auth.create_token(path)
    assert path.read_text() == made
    path.chmod(0o640)
    with pytest.raises(UserError, match="chmod 600"):
        ray_auth.create_token(path)


def test_node_is_living_while_its_daemon_holds_the_lock(tmp_path):
    assert node_daemon.read_living_node(tmp_path) is None
    node = {"pid": 1, "address": "x", "ip": "y", "head": True, "node": "z", "host": "h", "cpus": 2, "gpus": 0}
    (tmp_path / "node.json").write_text(json.dumps(node))  # left by one that was killed
    assert node_daemon.read_living_node(tmp_path) is None
    opened = f"import fcntl; f=open({str(tmp_path / 'node.json')!r})"
    hold = f"{opened}; fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    daemon = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    daemon.stdout.readline()
    assert node_daemon.read_living_node(tmp_path) == node
    daemon.kill()
    daemon.wait()
    assert node_daemon.read_living_node(tmp_path) is None


def test_address_towards_a_host_and_refused_connections():
    assert network.address_towards("127.0.0.1:1") == "127.0.0.1"
    with pytest.raises(UserError, match="no way leads"):
        network.address_towards("no.such.host.invalid:1")
    began = time.monotonic()
    assert network.refuses_connections("127.0.0.1:1")
    assert time.monotonic() - began < 5


def test_order_for_a_node_comes_back_and_anything_else_is_refused():
    order = node_daemon.NodeOrder("/tmp/node", "/tmp/token", "127.0.0.1", 0, 2, 0)
    assert node_daemon.from_argument(node_daemon.to_argument(order)) == order
    for text in ("", "[]", '{"folder": "/tmp"}', "[" * 5000):
        with pytest.raises(UserError, match="no order for a node"):
            node_daemon.from_argument(text)


def test_versions_that_others_have_stored_with_a_head_are_none_of_ours():
    for stored in (b"{}", b"[1]", b"\xff", b"[" * 5000):
        assert cluster_client.parse_versions(stored) == {}
    assert cluster_client.parse_versions(b'{"ray": "2"}') == {"ray": "2"}


def test_token_file_that_is_empty_or_missing_is_named(tmp_path, monkeypatch):
    for path in (tmp_path / "token", tmp_path / "missing"):
        (tmp_path / "token").touch()
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
        ray_internals.forget_auth_token()
        with pytest.raises(UserError, match=f"{path}.*Write the cluster's token into it, or unset RAY_AUTH_TOKEN_PATH"):
            ray_internals.has_auth_token()
    ray_internals.forget_auth_token()
