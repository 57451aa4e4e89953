"""Real Ray on three hosts: the cluster verbs, training over the network, and the token."""

import re
import secrets
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import gloo_ranks
from helpers.netns_hosts import PORT, TOKEN, WHY_NOT, form_cluster, give_token, hosts, living_hosts, trireme

from train.config import load as configuration

pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.timeout(600)]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A cluster of three hosts of a core each: the head on a, which b and c have joined; and what `up` has said."""
    with hosts(3, shared=tmp_path_factory.getbasetemp()) as (a, b, c):
        yield a, b, c, form_cluster(a, b, c)


def test_cluster_up_creates_a_private_token_once_and_says_how_to_join(three):
    a, b, c, said = three
    address = f"{a.ip}:{PORT}"
    assert f"./launch.sh cluster join {address}" in said
    assert TOKEN in said
    token = a.run(["cat", TOKEN]).stdout
    assert len(token) >= 32
    assert token not in said
    assert a.run(["stat", "-c", "%a", TOKEN]).stdout.strip() == "600"
    again = trireme(a, "cluster", "up", f"bind={a.ip}")
    assert again.returncode == 0
    assert "up already" in again.stdout
    assert a.run(["cat", TOKEN]).stdout == token
    again = trireme(b, "cluster", "join", address)
    assert again.returncode == 0
    assert "already" in again.stdout
    assert living_hosts(c, address) == {a.ip, b.ip, c.ip}


def test_training_on_three_hosts_equals_training_on_one(three, corpus, make, as_typed, tmp_path):
    a, _, _, _ = three
    overrides = ["cluster.workers=3", "cluster.address=auto"]
    done = trireme(a, "train", *as_typed(*overrides, name="spread"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "on up to 3 hosts" in done.stdout
    alone = make("cluster.workers=3", name="alone")
    assert gloo_ranks.train_world(alone, corpus) == ["done"] * 3
    spread = configuration.load(as_typed(*overrides, name="spread"))
    assert len(gloo_ranks.metrics(spread)) == spread.steps
    assert gloo_ranks.metrics(spread) == gloo_ranks.metrics(alone)


def test_too_many_workers_fail_at_once_naming_each_hosts_shortage(three, as_typed, tmp_path):
    a, b, c, _ = three
    began = time.monotonic()
    done = trireme(a, "train", *as_typed("cluster.workers=4", "cluster.address=auto"), cwd=tmp_path)
    assert time.monotonic() - began < 10
    assert done.returncode == 2
    assert "asks for 4 workers of 1 core; only 3 fit" in done.stdout
    for host in (a, b, c):
        assert f"  {host.name}: 1 core, 0 GPUs: room for 1, 1 core short of another" in done.stdout


def test_status_shows_what_each_job_holds_until_it_is_stopped(three, as_typed, tmp_path):
    a, _, c, _ = three
    overrides = as_typed(
        "cluster.workers=2", "cluster.address=auto", "steps=100000", "run.name=long", "eval_every=0", name="long"
    )
    with (tmp_path / "out").open("w") as out:
        job = a.start([sys.executable, "-m", "cluster", "train", *overrides], cwd=tmp_path, stdout=out, stderr=out)
    wait_for(lambda: (tmp_path / "long" / "metrics.jsonl").exists() or job.poll() is not None, 120)
    shown = trireme(c, "cluster", "status").stdout
    assert re.search(r"│ long +│ pid \d+ on a +│ .* │ [abc]: 1 core, [abc]: 1 core +│", shown), shown
    assert "0 of 1" in shown
    held = re.search(r"│ ([abc]: 1 core, [abc]: 1 core)", shown)[1]
    late = trireme(
        a,
        "train",
        *as_typed("cluster.workers=2", "cluster.address=auto", "cluster.start_timeout=1", name="late"),
        cwd=tmp_path,
    )
    assert late.returncode == 2
    assert re.search(rf"waiting: no room yet for 1 worker: long \(pid \d+ on a\) holds {held}", late.stdout), (
        late.stdout
    )
    job.terminate()
    assert job.wait(60) == 75, (tmp_path / "out").read_text()
    wait_for(lambda: "No job holds any of it" in trireme(c, "cluster", "status").stdout, 20)


CLIENT = """
import pathlib, sys, urllib.request
import ray
from ray._raylet import GcsClient

address, mark, ports = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3].split(",")

def touch():
    mark.write_text("ran")

def submit():
    ray.init(address=address, log_to_driver=False, configure_logging=False)
    ray.get(ray.remote(num_cpus=1)(touch).remote(), timeout=60)

def post():
    for port in ports:
        url = f"http://{address.split(':')[0]}:{port}/api/jobs/"
        body = b'{"entrypoint": "touch ' + str(mark).encode() + b'"}'
        try:
            print("post", urllib.request.urlopen(urllib.request.Request(url, body), timeout=3).status)
        except Exception as error:
            print("refused", port, error)

for name, action in {
    "list": lambda: GcsClient(address=address).get_all_node_info(timeout=5),
    "read": lambda: GcsClient(address=address).internal_kv_keys(b"", b"session", timeout=5),
    "submit": submit,
    "post": post,
}.items():
    try:
        action()
        print("did", name)
    except Exception as error:
        print("could not", name, type(error).__name__)
"""


def test_client_without_the_token_cannot_list_read_or_submit(three, tmp_path):
    a, _, c, _ = three
    sockets = a.run(["ss", "-ltnp"]).stdout.splitlines()[1:]
    assert {re.search(r'\(\("([^"]+)"', line)[1] for line in sockets} <= {"gcs_server", "raylet", "ray::RuntimeEnv"}, (
        sockets
    )
    ports = ",".join(["8265", *(line.split()[3].rpartition(":")[2] for line in sockets)])
    (tmp_path / "client.py").write_text(CLIENT)
    (tmp_path / "wrong").write_text(secrets.token_hex(32))

    def client(mark, **env):
        """The output of a client on c that belongs to a user with another home."""
        words = [sys.executable, tmp_path / "client.py", f"{a.ip}:{PORT}", tmp_path / mark, ports]
        return c.run(words, env={"HOME": str(tmp_path), "RAY_NUM_REDIS_GET_RETRIES": "2", **env}, timeout=120).stdout

    for mark, env in (
        ("none", {}),
        ("wrong", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")}),
    ):
        said = client(f"{mark}.mark", **env)
        for action in ("list", "read", "submit"):
            assert f"could not {action} " in said, said
        assert len(re.findall("^refused", said, re.MULTILINE)) == len(ports.split(",")), said
        assert not (tmp_path / f"{mark}.mark").exists()
    said = client("right.mark", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=TOKEN)
    assert [action for action in ("list", "read", "submit") if f"did {action}" in said] == ["list", "read", "submit"], (
        said
    )
    assert (tmp_path / "right.mark").exists()


def test_token_is_in_its_file_and_nowhere_else(three):
    a, b, c, _ = three
    token = a.run(["cat", TOKEN]).stdout
    for host in (a, b, c):
        with Path(f"/proc/{host.init}/root{TOKEN}").open() as pattern:
            holders = host.run(
                ["sh", "-c", "grep -rlF -f - /tmp /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null"], stdin=pattern
            )
        assert holders.stdout.split() == [TOKEN], holders.stdout
    assert len(token) == 64


def test_host_that_was_cut_off_is_missed_and_rejoins_by_itself(three):
    a, b, c, _ = three
    address = f"{a.ip}:{PORT}"
    b.cut_off()
    wait_for(lambda: living_hosts(a, address) == {a.ip, c.ip}, 60)
    b.reconnect()
    wait_for(lambda: living_hosts(a, address) == {a.ip, b.ip, c.ip}, 60)


def test_cluster_down_ends_a_member_alone_and_on_the_head_all(three):
    a, b, c, _ = three
    gone = trireme(b, "cluster", "down")
    assert gone.returncode == 0, gone.stdout
    wait_for(lambda: not b.pids())
    wait_for(lambda: living_hosts(a, f"{a.ip}:{PORT}") == {a.ip, c.ip}, 60)
    assert trireme(a, "cluster", "down").returncode == 0
    wait_for(lambda: not (a.pids() + c.pids()))
    assert "No cluster's node is up" in trireme(a, "cluster", "down").stdout
    for host in (a, b, c):
        assert "trireme-" not in host.run(["ls", "/tmp"]).stdout
    refused = trireme(c, "cluster", "status")
    assert refused.returncode == 2
    assert "no cluster is up on this host" in refused.stdout


def test_two_cluster_up_at_once_make_one_cluster(tmp_path):
    with hosts(1, shared=tmp_path) as [a]:
        outs = [tmp_path / name for name in ("first", "second")]
        both = [
            a.start([sys.executable, "-m", "cluster", "cluster", "up"], stdout=out.open("w"), stderr=subprocess.STDOUT)
            for out in outs
        ]
        codes = [one.wait(120) for one in both]
        assert codes == [0, 0], [out.read_text() for out in outs]
        said = sorted("is up already" in out.read_text() for out in outs)
        assert said == [False, True]
        assert len([pid for pid in a.pids() if psutil.Process(pid).name() == "gcs_server"]) == 1
        assert trireme(a, "cluster", "down").returncode == 0


def test_host_without_token_or_cluster_is_refused_with_the_cure(as_typed, tmp_path_factory, tmp_path):
    """And a cluster that plain ``ray start`` has made, with a token, is as good as ours."""
    with hosts(2, shared=tmp_path_factory.getbasetemp()) as (a, b):
        address = f"{a.ip}:{PORT}"
        token = secrets.token_hex(32)
        give_token(a, token)
        ray = str(Path(sys.executable).with_name("ray"))
        started = a.run(
            [ray, "start", "--head", f"--node-ip-address={a.ip}", f"--port={PORT}", "--num-cpus=1"],
            env={"RAY_AUTH_MODE": "token"},
        )
        assert started.returncode == 0, started.stdout
        refused = trireme(b, "train", *as_typed("cluster.workers=2", f"cluster.address={address}"), cwd=tmp_path)
        assert refused.returncode == 2
        assert f"the cluster at {address} asks for a token, and this host has none" in refused.stdout
        for what, cure in (
            (lambda: None, "this host has no token: copy ~/.ray/auth_token"),
            (lambda: give_token(b, token[::-1]), f"the cluster at {address} refuses the token that this host has"),
            (lambda: b.run(["chmod", "644", TOKEN]), "can be read by others: chmod 600"),
        ):
            what()
            refused = trireme(b, "cluster", "join", address)
            assert refused.returncode == 2
            assert cure in refused.stdout, refused.stdout
        give_token(b, token)
        b.run(["chmod", "600", TOKEN])
        assert "no Ray cluster answers at 10.77.0.1:1" in trireme(b, "cluster", "join", f"{a.ip}:1").stdout
        joined = trireme(b, "cluster", "join", address)
        assert joined.returncode == 0, joined.stdout
        done = trireme(a, "train", *as_typed("cluster.workers=2", f"cluster.address={address}"), cwd=tmp_path)
        assert done.returncode == 0, done.stdout
        assert "2 workers, 1 core each, on up to 2 hosts" in done.stdout
