"""From the configuration to a Ray cluster that this process is a driver of: one that is up, or one for this job alone."""

from __future__ import annotations

from pathlib import Path

from cluster import host, member, nodes, remote, token, versions
from cluster.begin import Begun
from train.schema import Cluster

REPOSITORY = Path(__file__).resolve().parent.parent


def gather(cluster: Cluster, name: str, begun: Begun) -> remote.Remote | None:
    """Joins the cluster that is configured, or starts one; the nodes of it on other hosts, if the job called ``name`` has such.

    To be called from the main thread. UserError says in words what does not work, and on which host.
    """
    if cluster.address is not None:
        _join(cluster.address, name)
        return None
    kind, names = remote.others(cluster)
    ip = nodes.LOOPBACK
    if names:
        seen = [remote.ssh_address(name) for name in names] if kind == "ssh" else names
        ip = cluster.bind or host.address_towards(f"{seen[0]}:22")
    secret = begun.folder / "token"
    token.make(secret)
    node = nodes.start_head(nodes.Start(ip, begun.folder, secret, host.count_cpus(), host.count_gpus()))
    others = None
    if names:
        nodes.publish(node.address, versions.here())
        words = ["cluster", "join", node.address, f"job={begun.folder.name}", f"device={cluster.device}", f"target={begun.target}"]
        over = remote.over_ssh if kind == "ssh" else remote.over_srun
        commands = over(names, words, cluster.remote_dir or str(REPOSITORY))
        others = remote.Remote(commands, secret.read_text(), begun.folder)
    nodes.drive(node.address, name, None, ip)
    if others is not None:
        others.wait(cluster.start_timeout)
    return others


def _join(address: str, name: str) -> None:
    """On a cluster that is up, the workers import our code from where we do: its path must be the same on every host."""
    if address == "auto":
        found = member.local()
        nodes.join(found["address"], name, str(REPOSITORY), found["ip"])
    else:
        nodes.join(address, name, str(REPOSITORY))
