"""Hosts joined over ssh with real sshd, and nodes of a real SLURM, from start to the driver's end."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import gloo_ranks
from helpers.netns_hosts import HOME, WHY_NOT, hosts

LAUNCH = gloo_ranks.REPOSITORY / "launch.sh"
VENV = Path(os.environ.get("TRIREME_VENV", gloo_ranks.REPOSITORY / ".venv"))
WHY_NOT = WHY_NOT or (
    "" if Path(sys.prefix) == VENV else "not run by ./launch.sh test, whose environment the hosts are to use"
)
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.timeout(600)]
USES = {"TRIREME_VENV": str(VENV)}


def missing(*programs):
    absent = [name for name in programs if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    return pytest.mark.skipif(bool(absent), reason=f"{', '.join(absent)} not found")


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


SSHD = """
HostKey {0}/host
AuthorizedKeysFile {0}/key.pub
StrictModes no
UsePAM no
PidFile none
PasswordAuthentication no
KbdInteractiveAuthentication no
SetEnv HOME={1}
"""


@pytest.fixture
def reachable(tmp_path, tmp_path_factory):
    """Three hosts of a core each, of which a reaches b (its ssh calls it bee) and c; and a's environment."""
    folder = tmp_path / "ssh"
    (folder / "bin").mkdir(parents=True)
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "sshd").write_text(SSHD.format(folder, HOME))
    key = " ".join((folder / "host.pub").read_text().split()[:2])
    (folder / "known").write_text(f"b {key}\nc {key}\n")
    (folder / "config").write_text(
        f"IdentityFile {folder}/key\nUserKnownHostsFile {folder}/known\nHost bee\n HostName b\n"
    )
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    with hosts(3, shared=tmp_path_factory.getbasetemp()) as (a, b, c):
        for host in (b, c):
            host.run(["mkdir", "-p", "/run/sshd"])
            host.start(["/usr/sbin/sshd", "-D", "-e", "-f", folder / "sshd"], stderr=subprocess.DEVNULL)
        yield (a, b, c), {**USES, "PATH": f"{folder}/bin:{os.environ['PATH']}"}


@missing("ssh", "ssh-keygen", "/usr/sbin/sshd")
def test_job_over_ssh_ends_on_every_host_with_its_driver(reachable, as_typed, tmp_path):
    (a, b, c), env = reachable
    (tmp_path / "others").write_text("bee  # by another name\n\nc\n")
    overrides = as_typed("cluster=ssh", "cluster.workers=3", "steps=100000", "eval_every=0", "save_every=0", name="run")

    wrong = a.run(
        [LAUNCH, "train", *overrides, "cluster.hosts=[bee,c]", "cluster.remote_dir=/nowhere"], env=env, timeout=120
    )
    assert wrong.returncode == 2
    assert re.search(r"bee: ended with code \d+: .*can't cd to /nowhere", wrong.stdout), wrong.stdout
    assert not (tmp_path / "run").exists()

    for number, code in ((signal.SIGINT, 75), (signal.SIGKILL, -signal.SIGKILL)):
        with (tmp_path / "out").open("w") as out:
            words = [LAUNCH, "train", *overrides, f"cluster.hosts={tmp_path}/others"]
            driver = a.start(words, env=env, cwd=tmp_path, stdout=out, stderr=out)
        said = (tmp_path / "out").read_text
        wait_for(
            lambda said=said, driver=driver: "step 1" in said() or "resumes" in said() or driver.poll() is not None
        )
        assert driver.poll() is None, said()
        assert "on up to 3 hosts" in said()
        token = c.run(["sh", "-c", "cat /tmp/trireme-*/token"]).stdout
        shown = c.run(["sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ"]).stdout
        assert len(token) == 64
        assert "cluster.worker.fork_server" in shown
        assert token not in shown
        assert c.run(["sh", "-c", "stat -c %a /tmp/trireme-*/token"]).stdout.strip() == "600"
        driver.send_signal(number)
        assert driver.wait(60) == code, said()
        wait_for(lambda: len(b.pids()) == len(c.pids()) == 1, 30)  # the sshd of each
        assert "trireme-" not in b.run(["ls", "/tmp"]).stdout
        assert token not in said()
    assert not subprocess.run(["grep", "-rlF", token, str(tmp_path / "run")], capture_output=True).stdout


SLURM = """
ClusterName=test
SlurmctldHost=a
SlurmUser=root
SlurmdUser=root
StateSaveLocation=/tmp/state
SlurmdSpoolDir=/tmp/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
NodeName=a,b,c CPUs=1
PartitionName=all Nodes=ALL Default=YES
"""
MUNGED = (
    "mkdir -p -m 755 /run/munge /tmp/state; "
    "munged --force --key-file={0}/munge.key --pid-file=/run/munge/pid --log-file=/tmp/munge.log --seed-file=/tmp/seed"
)


@pytest.fixture
def allocation(tmp_path, tmp_path_factory):
    """A SLURM of three nodes, on hosts of a core each; and what its commands need in the environment."""
    (tmp_path / "slurm.conf").write_text(SLURM)
    (tmp_path / "munge.key").write_bytes(secrets.token_bytes(64))
    (tmp_path / "munge.key").chmod(0o600)
    env = {**USES, "SLURM_CONF": str(tmp_path / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    with hosts(3, shared=tmp_path_factory.getbasetemp()) as three:
        with (tmp_path / "daemons").open("w") as log:
            for host in three:
                host.run(["sh", "-c", MUNGED.format(tmp_path)], env=env)
            three[0].start(["slurmctld", "-D"], env=env, stdout=log, stderr=log)
            for host in three:
                host.start(["slurmd", "-D"], env=env, stdout=log, stderr=log)
        wait_for(lambda: three[0].run(["sinfo", "-h", "-o", "%T %D"], env=env).stdout == "idle 3\n", 60)
        yield three, env


@missing("slurmctld", "slurmd", "munged", "sbatch")
def test_slurm_job_spans_its_nodes_and_saves_when_cancelled(allocation, as_typed, tmp_path):
    (a, b, c), env = allocation
    overrides = as_typed("cluster.workers=3", "steps=100000", "eval_every=0", "save_every=0", name="run")
    words = ["sbatch", "--parsable", "--nodes=3", f"--output={tmp_path}/out", LAUNCH, "train", *overrides]
    before = len(b.pids())
    job = a.run(words, env=env, cwd=tmp_path).stdout.strip()

    def said():
        return (tmp_path / "out").read_text() if (tmp_path / "out").exists() else ""

    def state():
        return a.run(["scontrol", "show", "job", job], env=env).stdout

    wait_for(lambda: "step 1" in said() or "JobState=FAILED" in state())
    assert "on up to 3 hosts" in said(), said() + state()
    a.run(["scancel", job], env=env)
    wait_for(lambda: "ExitCode=75:0" in state() or "JobState=FAILED" in state(), 90)
    assert "Stopped and saved" in said()
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))
    wait_for(lambda: len(b.pids()) <= before, 30)
    assert "trireme-" not in c.run(["ls", "/tmp"]).stdout
