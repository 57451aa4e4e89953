"""From the configuration to a Ray cluster: an existing one, or one for this job alone."""

from __future__ import annotations

import socket
from pathlib import Path

from cluster.host import network, resources
from cluster.raycluster import cluster_client, node_daemon, placement, ray_auth, ray_node, remote_hosts, versions
from cluster.raycluster.local_cluster import LocalRayCluster
from train.config.schema import ClusterConfig

REPOSITORY = Path(__file__).resolve().parents[2]


def connect(
    cluster: ClusterConfig, job_name: str, folder: Path, target: str, shared: bool = False
) -> tuple[LocalRayCluster | None, remote_hosts.RemoteNodes | None]:
    """Joins the cluster that is configured, or starts one; also on other hosts where the configuration names some.

    Returns the cluster if this process started it and it is of this host alone, so that it can be restarted, and the
    nodes on other hosts if there are any. ``folder`` is the job's private folder, ``target`` what its ranks run,
    ``shared`` whether several jobs will run on the cluster. To be called from the main thread. UserError says what does
    not work, and on which host.
    """
    if cluster.address is not None:
        join_lasting_cluster(cluster.address, job_name)
        return None, None
    kind, hosts = remote_hosts.other_hosts(cluster)
    ip = ray_auth.LOOPBACK
    if hosts:
        first = remote_hosts.ssh_address(hosts[0]) if kind == "ssh" else hosts[0]
        ip = cluster.bind or network.address_towards(f"{first}:22")
    token = folder / "token"
    ray_auth.create_token(token)
    spec = ray_node.NodeSpec(ip, folder, token, resources.count_cpus(), resources.count_gpus())
    if not hosts:
        return LocalRayCluster(spec, job_name, shared), None
    head = ray_node.start_head(spec)
    cluster_client.publish_versions(head.address, versions.local_versions())
    join = [
        "cluster",
        "join",
        head.address,
        f"job={folder.name}",
        f"device={cluster.device}",
        f"target={target}",
    ]
    commands_for = remote_hosts.ssh_commands if kind == "ssh" else remote_hosts.srun_commands
    commands = commands_for(hosts, join, cluster.remote_dir or str(REPOSITORY))
    remote_nodes = remote_hosts.RemoteNodes(commands, token.read_text("utf-8"), folder)
    cluster_client.init_driver(head.address, job_name, None, ip)
    remote_nodes.wait_until_joined(cluster.start_timeout)
    return None, remote_nodes


def nodes_before_start(cluster: ClusterConfig) -> list[placement.Node] | None:
    """The nodes of the cluster that ``connect`` would start, where that is of this host alone; None where it is not."""
    if cluster.address is not None or remote_hosts.other_hosts(cluster)[1]:
        return None
    cpus, gpus = float(resources.count_cpus()), float(resources.count_gpus())
    return [placement.Node(socket.gethostname(), cpus, gpus, cpus, gpus)]


def join_lasting_cluster(address: str, job_name: str) -> None:
    """Makes this process a driver on a cluster that exists; "auto": the one that this host is a node of.

    Its workers import our code from the path that it has here: it must be the same on every host.
    """
    if address == "auto":
        node = node_daemon.local_node()
        cluster_client.join_as_driver(node["address"], job_name, str(REPOSITORY), node["ip"])
    else:
        cluster_client.join_as_driver(address, job_name, str(REPOSITORY))
