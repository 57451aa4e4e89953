"""Which other hosts a job's cluster is started on, and by what commands."""

import json
import os
import shlex
import subprocess
import sys
import time

import pytest

from cluster.host import network
from cluster.raycluster import node_daemon, ray_auth, remote_hosts, versions
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
def alone(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)


def test_without_hosts_or_an_allocation_the_job_stays_here(alone):
    assert remote_hosts.others(ClusterConfig())[1] == []
    with pytest.raises(UserError, match="no SLURM job"):
        remote_hosts.others(ClusterConfig(start="slurm"))
    with pytest.raises(UserError, match=r"needs cluster.hosts"):
        remote_hosts.others(ClusterConfig(start="ssh"))


def test_hosts_are_listed_or_named_in_a_file(alone, tmp_path):
    assert remote_hosts.others(ClusterConfig(hosts=["a", "me@b"])) == ("ssh", ["a", "me@b"])
    (tmp_path / "file").write_text("# mine\na\n\n  b  # fast\n")
    assert remote_hosts.others(ClusterConfig(hosts=str(tmp_path / "file"))) == ("ssh", ["a", "b"])
    (tmp_path / "file").write_text("# none\n")
    with pytest.raises(UserError, match="names no host"):
        remote_hosts.others(ClusterConfig(hosts=str(tmp_path / "file")))
    with pytest.raises(UserError, match="is no file of host names"):
        remote_hosts.others(ClusterConfig(hosts="nowhere.txt"))


def test_in_an_allocation_the_others_are_its_other_nodes(slurm, monkeypatch):
    assert remote_hosts.others(ClusterConfig()) == ("slurm", ["n2", "n3"])
    assert remote_hosts.others(ClusterConfig(start="here"))[1] == []
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    assert remote_hosts.others(ClusterConfig()) == ("slurm", ["n1", "n3"])
    monkeypatch.delenv("SLURMD_NODENAME")
    with pytest.raises(UserError, match=r"submit with `sbatch launch\.sh train"):
        remote_hosts.others(ClusterConfig())
    monkeypatch.setenv("SLURM_JOB_NODELIST", "m[")
    with pytest.raises(UserError, match=r"SLURM_JOB_NODELIST=m\["):
        remote_hosts.others(ClusterConfig())


def test_the_command_of_a_host_survives_its_shell_and_asks_no_questions(monkeypatch):
    monkeypatch.setenv("TRIREME_VENV", "/envs/my env")
    [command] = remote_hosts.over_ssh(["me@b"], ["cluster", "join", "10.0.0.1:6379"], "/my code")
    assert command.words[command.words.index("--") + 1] == "me@b"
    assert "BatchMode=yes" in command.words
    shell = shlex.split(command.words[-1])
    assert shell[:3] == ["exec", "sh", "-c"]
    assert shlex.split(shell[3]) == shlex.split(
        "cd '/my code' && exec env 'TRIREME_VENV=/envs/my env' ./launch.sh cluster join 10.0.0.1:6379"
    )


def test_one_srun_starts_a_node_on_each_of_the_others():
    [command] = remote_hosts.over_srun(["n2", "n3"], ["cluster", "join", "n1:1"], "/code")
    assert command.nodes == 2
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=n2,n3", "--overlap"} <= set(command.words)
    assert command.words[-4:] == ["/code/launch.sh", "cluster", "join", "n1:1"]


def says(*lines, code=0, sleep=0):
    """A command that has read the token, prints lines, and lives on for as long as its input is open, or ends."""
    words = [f"print({line!r}, flush=True)" for line in lines]
    end = [f"time.sleep({sleep})", f"sys.exit({code})"] if code else ["sys.stdin.read()"]
    return ["; ".join(["import sys, time", "assert sys.stdin.readline() == 'secret\\n'", *words, *end])]


def commands(**scripts):
    return [
        remote_hosts.RemoteCommand(name, [sys.executable, "-c", *script], 1, again=False)
        for name, script in scripts.items()
    ]


def test_nodes_are_waited_for_and_end_with_the_driver(tmp_path):
    ready = json.dumps({"address": "x"})
    others = remote_hosts.RemoteNodes(commands(a=says("Welcome to a!", ready), b=says(ready)), "secret", tmp_path)
    others.wait(20)
    others.close()
    assert [process.returncode for process in others.processes.values()] == [0, 0]


def test_every_host_that_fails_is_named_with_its_reason(tmp_path):
    refused = json.dumps({"error": "this host does not run what the cluster runs", "host": "bb"})
    scripts = {
        "a": says(json.dumps({"address": "x"})),
        "b": says(refused, code=2),
        "d": says(sleep=0, code=255),
        "e": says("hm"),
    }
    others = remote_hosts.RemoteNodes(commands(**scripts), "secret", tmp_path)
    with pytest.raises(UserError) as found:
        others.wait(3)
    others.close()
    text = str(found.value)
    assert "bb: this host does not run" in text
    assert "d: ended with code 255" in text
    assert "e: has not joined within cluster.start_timeout=3 s" in text
    assert "a:" not in text


def test_a_host_that_runs_something_else_is_told_what():
    mine = versions.here()
    versions.compare(mine, "here:1")
    versions.compare({}, "a cluster of others:1")
    with pytest.raises(UserError) as found:
        versions.compare({**mine, "torch": "1.0", "Python": "3.8.1"}, "10.0.0.1:6379")
    assert f"torch: 1.0 there, {mine['torch']} here" in str(found.value)
    assert "Python: 3.8.1 there" in str(found.value)
    assert "ray" not in str(found.value)


def test_a_token_is_made_once_for_its_user_only(tmp_path):
    path = tmp_path / "new" / "token"
    with pytest.raises(UserError, match="this host has no token"):
        ray_auth.check(path)
    ray_auth.make(path)
    made = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    ray_auth.make(path)
    assert path.read_text() == made
    path.chmod(0o640)
    with pytest.raises(UserError, match="chmod 600"):
        ray_auth.make(path)


def test_a_node_is_alive_as_long_as_its_keeper_holds_its_file(tmp_path):
    assert node_daemon.living(tmp_path) is None
    (tmp_path / "node.json").write_text('{"pid": 1, "address": "x"}')  # left by one that was killed
    assert node_daemon.living(tmp_path) is None
    hold = f"import fcntl; f=open({str(tmp_path / 'node.json')!r}); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    keeper = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    keeper.stdout.readline()
    assert node_daemon.living(tmp_path) == {"pid": 1, "address": "x"}
    keeper.kill()
    keeper.wait()
    assert node_daemon.living(tmp_path) is None


def test_where_a_host_is_reached_from_and_whether_it_refuses():
    assert network.address_towards("127.0.0.1:1") == "127.0.0.1"
    with pytest.raises(UserError, match="no way leads"):
        network.address_towards("no.such.host.invalid:1")
    began = time.monotonic()
    assert network.refuses_connections("127.0.0.1:1")
    assert time.monotonic() - began < 5
