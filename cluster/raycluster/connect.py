"""From the configuration to a Ray cluster that this process is a driver of: one that is up, or one for this job alone."""

from __future__ import annotations

from pathlib import Path

from cluster.host import network, resources
from cluster.raycluster import node_daemon, ray_auth, ray_node, remote_hosts, versions
from cluster.raycluster.local_cluster import LocalRayCluster
from train.config.schema import ClusterConfig

REPOSITORY = Path(__file__).resolve().parents[2]


def connect(
    cluster: ClusterConfig, name: str, folder: Path, target: str
) -> tuple[LocalRayCluster | None, remote_hosts.RemoteNodes | None]:
    """Joins the cluster that is configured, or starts one; the nodes of it on other hosts, if the job called ``name`` has such.

    Returns the cluster, where it is this job's own and this machine's alone, so that it can be started anew; and the other hosts'
    nodes. To be called from the main thread. UserError says in words what does not work, and on which host.
    """
    if cluster.address is not None:
        join(cluster.address, name)
        return None, None
    kind, names = remote_hosts.others(cluster)
    ip = ray_node.LOOPBACK
    if names:
        seen = [remote_hosts.ssh_address(name) for name in names] if kind == "ssh" else names
        ip = cluster.bind or network.address_towards(f"{seen[0]}:22")
    secret = folder / "token"
    ray_auth.make(secret)
    start = ray_node.NodeSpec(ip, folder, secret, resources.count_cpus(), resources.count_gpus())
    if not names:
        return LocalRayCluster(start, name), None
    node = ray_node.start_head(start)
    ray_node.publish(node.address, versions.here())
    words = [
        "cluster",
        "join",
        node.address,
        f"job={folder.name}",
        f"device={cluster.device}",
        f"target={target}",
    ]
    over = remote_hosts.over_ssh if kind == "ssh" else remote_hosts.over_srun
    others = remote_hosts.RemoteNodes(
        over(names, words, cluster.remote_dir or str(REPOSITORY)), secret.read_text(), folder
    )
    ray_node.drive(node.address, name, None, ip)
    others.wait(cluster.start_timeout)
    return None, others


def join(address: str, name: str) -> None:
    """On a cluster that is up, the workers import our code from where we do: its path must be the same on every host."""
    if address == "auto":
        found = node_daemon.local()
        ray_node.join(found["address"], name, str(REPOSITORY), found["ip"])
    else:
        ray_node.join(address, name, str(REPOSITORY))
