"""The verb ``cluster``: a lasting Ray cluster, a node a host: up, join, status, down."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.table import Table
from rich.text import Text

from cluster.host import network, resources
from cluster.raycluster import cluster_client, node_daemon, ray_auth
from cluster.raycluster import status as cluster_status
from train.errors import ExitCode, UserError, guard_verb
from train.reporting.terminal import UserConsole
from train.util.format import duration, plural
from train.util.io import FileLock

OUT, ERR = UserConsole(), UserConsole(stderr=True)
PORT = 6379
"""The port on which Ray's heads listen by default."""
MAX_NUMBER = 100_000
"""Of cores or GPUs of a host: more than any has."""
Options = dict[str, str]


def up(options: Options, words: Sequence[str]) -> int:
    """cluster up [bind=127.0.0.1] [port=6379] [cpus=N] [gpus=N]: start the head of a lasting cluster on this host.

    bind   the address of this host that the others reach it by; the default is for this host alone
    cpus   cores to offer; default: all that this process may use. gpus: likewise

    The token is made once, in ~/.ray/auth_token, readable by you only.
    """
    folder = node_daemon.lasting_folder()
    node = node_daemon.read_living_node(folder)
    if node is not None:
        if not node["head"]:
            raise UserError(
                f"this host is a node of the cluster at {node['address']}: `./launch.sh cluster down` ends that"
            )
        OUT.print(f"The cluster is up already, at {node['address']}.")
        return _print_next_steps(node["address"])
    ip, port = options.get("bind", ray_auth.LOOPBACK), _number(options, "port", PORT, 1, network.MAX_PORT)
    _check_port_is_free(ip, port)
    ray_auth.create_token(ray_auth.token_path())
    node = _start_daemon(_node_order(folder, ip, options, port=port))
    OUT.print(
        Text.assemble("The cluster is up at ", (node["address"], "bold"), f", with {_resources(node)} of this host.")
    )
    return _print_next_steps(node["address"])


def _print_next_steps(address: str) -> int:
    file, ip = ray_auth.token_path(), address.rpartition(":")[0]
    if ip == ray_auth.LOOPBACK:
        OUT.print(
            "  join    no other host can reach it: for that, take it down and say ./launch.sh cluster up bind=ADDRESS"
        )
    else:
        OUT.print(f"  join    on every other host, once it has your token: ./launch.sh cluster join {address}")
        OUT.print(
            f"  token   the file {file}: copy it to {ray_auth.DEFAULT_PATH} there, mode 600 (scp -p keeps the mode)"
        )
    OUT.print("  train   ./launch.sh train cluster.address=auto")
    OUT.print("  end     ./launch.sh cluster down")
    return ExitCode.OK


def join(options: Options, words: Sequence[str]) -> int:
    """cluster join ADDRESS [bind=...] [cpus=N] [gpus=N]: make this host a node of the cluster whose head is at ADDRESS.

    bind   the address of this host that the others reach it by; default: the one that leads to the head

    Needs the head's token in ~/.ray/auth_token, and the same Python, Ray, torch and code.
    """
    if "job" in options:  # a job's driver gives this command, over ssh or srun
        return node_daemon.serve_job(words[0], options["job"], options["device"], options["target"])
    if len(words) != 1 or ":" not in words[0]:
        raise UserError(
            "join needs the address of a head, such as 10.0.0.1:6379: `./launch.sh cluster status` shows it there"
        )
    address, folder = words[0], node_daemon.lasting_folder()
    node = node_daemon.read_living_node(folder)
    if node is not None:
        if node["address"] != address:
            raise UserError(
                f"this host is a node of the cluster at {node['address']}: `./launch.sh cluster down` ends that"
            )
        OUT.print(f"This host is a node of the cluster at {address} already.")
        return ExitCode.OK
    ray_auth.check_token(ray_auth.token_path())
    ip = options.get("bind") or network.address_towards(address)
    node = _start_daemon(_node_order(folder, ip, options, address=address))
    host = f"{node['host']}, {node['ip']}"
    joined = f"This host ({host}) has joined the cluster at "
    OUT.print(Text.assemble(joined, (address, "bold"), f", with {_resources(node)}."))
    return ExitCode.OK


def status(options: Options, words: Sequence[str]) -> int:
    """cluster status [ADDRESS]: the nodes of the cluster, what they have, and the jobs that hold it."""
    cluster = cluster_status.read_status(words[0] if words else node_daemon.local_node()["address"])
    table = Table(title=f"cluster at {cluster.address}", title_justify="left")
    for column in ("host", "address", "cores free", "GPUs free", ""):
        table.add_column(column, justify="right" if "free" in column else "left")
    for node, location in cluster.nodes:
        cpus, gpus = f"{node.free_cpus:g} of {node.cpus:g}", f"{node.free_gpus:g} of {node.gpus:g}"
        table.add_row(node.name, location.address, cpus, gpus, "head" if location.head else "")
    OUT.print(table)
    if not cluster.jobs:
        OUT.print("No job holds any of it.")
        return ExitCode.OK
    table = Table(title="jobs", title_justify="left")
    for column in ("job", "driver", "running for", "holds"):
        table.add_column(column)
    for job in cluster.jobs:
        holds = ", ".join(f"{host}: {resources}" for host, resources in job.holds.items()) or "nothing yet"
        table.add_row(job.name, f"pid {job.pid} on {job.host}", duration(job.seconds), holds)
    OUT.print(table)
    return ExitCode.OK


def down(options: Options, words: Sequence[str]) -> int:
    """cluster down [--all]: end the node on this host and all that runs on it; the head's end is everybody's.

    --all   said on a host that joined: end the whole cluster
    """
    folder = node_daemon.lasting_folder()
    node = node_daemon.read_living_node(folder)
    if node is None:
        node_daemon.end_node(folder)  # what a crash has left
        OUT.print("No cluster's node is up on this host.")
        return ExitCode.OK
    everything = node["head"] or "--all" in words
    ray_auth.authenticate(ray_auth.token_path(), node["address"])
    try:
        cluster_client.drain_nodes(node["address"], None if everything else node["node"])
    except UserError as error:
        ERR.print(f"the others were not told: {error}")
    node_daemon.end_node(folder)
    what = "The cluster" if everything else "This host's node"
    OUT.print(f"{what} at {node['address']} is down.")
    return ExitCode.OK


def _node_order(
    folder: Path, ip: str, options: Options, port: int = 0, address: str | None = None
) -> node_daemon.NodeOrder:
    """A node to be started in a new folder. ``address``: the cluster to join; None: this is the head of a new one."""
    cpus = _number(options, "cpus", resources.count_cpus(), 1)
    gpus = _number(options, "gpus", resources.count_gpus(), 0)
    made, token = node_daemon.make_node_folder(folder), ray_auth.token_path()
    return node_daemon.NodeOrder(str(made), str(token), ip, port, cpus, gpus, address)


def _start_daemon(order: node_daemon.NodeOrder) -> dict:
    """Starts the node's daemon in the background; returns the node's description once it is up, or raises UserError."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.raycluster.node_daemon", node_daemon.to_argument(order)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd="/",
        encoding="utf-8",
        errors="replace",
    )
    assert process.stdout is not None
    assert process.stderr is not None
    answer = node_daemon.parse_message(process.stdout.readline())
    if answer is None:
        answer = {"error": f"the node could not be started:\n{process.stderr.read()[-2000:]}"}
    if "error" in answer:
        process.wait()
        raise UserError(answer["error"])
    return answer


def _check_port_is_free(ip: str, port: int) -> None:
    """Raises UserError unless a head can listen on this address and port."""
    if ip in ("0.0.0.0", "::"):
        raise UserError(f"bind={ip} is no address that others can be told: give the one by which they reach this host")
    with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ip, port))
        except OSError as error:
            raise UserError(
                f"bind={ip} port={port}: {error.strerror}. Give an address of this host, and a port that is free"
            ) from error


def _resources(node: dict) -> str:
    """Cores and GPUs of a node, in words."""
    return plural(node["cpus"], "core") + (f" and {plural(node['gpus'], 'GPU')}" if node["gpus"] else "")


def _number(options: Options, key: str, usual: int, least: int, most: int = MAX_NUMBER) -> int:
    text = options.get(key, str(usual))
    if not re.fullmatch(r"-?[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise UserError(f"{key}={text} is not a whole number from {least} to {most:,}")
    return int(text)


VERBS: dict[str, tuple[Callable[[Options, Sequence[str]], int], set[str]]] = {
    "up": (up, {"bind", "port", "cpus", "gpus"}),
    "join": (join, {"bind", "cpus", "gpus", "job", "device", "target"}),
    "status": (status, set()),
    "down": (down, set()),
}
WORDS = {"up": "(?!)", "join": "[^-].*", "status": "[^-].*", "down": "--all"}
"""Pattern of the one word that a verb may have beside its options."""


def _check_words(name: str, words: Sequence[str]) -> None:
    """Raises UserError for a word that the verb would leave unread: what is meant by it would not be done."""
    left = [word for n, word in enumerate(words) if n or not re.fullmatch(WORDS[name], word)]
    if left:
        raise UserError(f"{name} does not know the word {left[0]!r}: try `./launch.sh cluster {name} --help`")


def _exclusive(name: str, options: Options) -> contextlib.AbstractContextManager[object]:
    """Serializes commands that change this user's lasting node on this host; a node of one job waits for none."""
    if name == "status" or "job" in options:
        return contextlib.nullcontext()
    folder = Path(ray_auth.DEFAULT_PATH).expanduser().parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    wait = partial(ERR.print, f"waiting for another `cluster` command on {socket.gethostname()}")
    return FileLock(folder / f"trireme-{socket.gethostname()}.lock", on_wait=wait)


def run(arguments: Sequence[str]) -> int:
    """Runs ``cluster VERB [key=value] [word]`` and returns the exit code."""
    name, *rest = arguments or ["--help"]
    verb, known = VERBS.get(name, (None, set()))
    if verb is None or {"-h", "--help"} & set(rest):
        shown = [verb] if verb else [function for function, _ in VERBS.values()]
        texts = [(function.__doc__ or "").rstrip().replace("\n    ", "\n") for function in shown]
        OUT.print("\n\n".join(texts))
        return ExitCode.OK if verb or name in ("-h", "--help") else ExitCode.BAD_INPUT
    options = dict(word.removeprefix("cluster.").split("=", 1) for word in rest if "=" in word)
    words = [word for word in rest if "=" not in word]
    try:
        if unknown := [key for key in options if key not in known]:
            raise UserError(f"{name} knows no {unknown[0]}=...: try `./launch.sh cluster {name} --help`")
        _check_words(name, words)
        with guard_verb(arguments), _exclusive(name, options):
            return verb(options, words)
    except UserError as error:
        ERR.print(Text.assemble(("error: ", "bold red"), str(error)))
        return ExitCode.BAD_INPUT
