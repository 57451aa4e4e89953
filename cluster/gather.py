"""From the configuration to a Ray cluster that this process is a driver of: one that is up, or one for this job alone."""

from __future__ import annotations

from pathlib import Path

from cluster import host, member, nodes, remote, token, versions
from cluster.begin import Begun
from cluster.private import Private
from train.schema import Cluster

REPOSITORY = Path(__file__).resolve().parent.parent


def gather(cluster: Cluster, name: str, begun: Begun) -> tuple[Private | None, remote.Remote | None]:
    """Joins the cluster that is configured, or starts one; the nodes of it on other hosts, if the job called ``name`` has such.

    Returns the cluster, where it is this job's own and this machine's alone, so that it can be started anew; and the other hosts'
    nodes. To be called from the main thread. UserError says in words what does not work, and on which host.
    """
    if cluster.address is not None:
        join(cluster.address, name)
        return None, None
    kind, names = remote.others(cluster)
    ip = nodes.LOOPBACK
    if names:
        seen = [remote.ssh_address(name) for name in names] if kind == "ssh" else names
        ip = cluster.bind or host.address_towards(f"{seen[0]}:22")
    secret = begun.folder / "token"
    token.make(secret)
    start = nodes.Start(ip, begun.folder, secret, host.count_cpus(), host.count_gpus())
    if not names:
        return Private(start, name), None
    node = nodes.start_head(start)
    nodes.publish(node.address, versions.here())
    words = ["cluster", "join", node.address, f"job={begun.folder.name}", f"device={cluster.device}", f"target={begun.target}"]
    over = remote.over_ssh if kind == "ssh" else remote.over_srun
    others = remote.Remote(over(names, words, cluster.remote_dir or str(REPOSITORY)), secret.read_text(), begun.folder)
    nodes.drive(node.address, name, None, ip)
    others.wait(cluster.start_timeout)
    return None, others


def join(address: str, name: str) -> None:
    """On a cluster that is up, the workers import our code from where we do: its path must be the same on every host."""
    if address == "auto":
        found = member.local()
        nodes.join(found["address"], name, str(REPOSITORY), found["ip"])
    else:
        nodes.join(address, name, str(REPOSITORY))
