"""Formats that processes of a job, of a node and of the machine hand to each other: messages, environments, tokens."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
from pathlib import Path
from typing import Any

from fuzz import mutate
from fuzz.format import Format, in_file

from cluster.chaos.train_process import TrainProcess
from cluster.host import network, resources
from cluster.raycluster import cluster_client, node_daemon, ray_auth, ray_internals, versions
from cluster.worker import agent, ipc
from cluster.worker.messages import RendezvousAddress, StartOrder
from kernels import tuning
from train.config import load as configuration
from train.config.wandb_mode import requested_mode
from train.data.tokenizer import Tokenizer, given_tokenizer
from train.distributed import heartbeat, process_group
from train.events import DoneEvent, NoteEvent, StepEvent, from_json
from train.reporting import tracking
from train.util.reading import UNREADABLE
from train.util.run_layout import RunDir

SEEDS = Path(__file__).parent / "seeds"


def all_formats(folder: Path) -> list[Format]:
    """The formats, with their files in ``folder``."""
    rooms = (_of_workers, _of_nodes, _of_files_beside, _of_environments)
    return [form for room in rooms for form in room(folder)]


def _of_workers(folder: Path) -> list[Format]:
    order = StartOrder(
        "job", 0, 1, 0, RendezvousAddress("h", 1, 3), "m:f", "cpu", "{}", "c", "/", "/x/logs/rank_0.log", 1
    )
    body = json.dumps(order.to_json()).encode()
    step = StepEvent(3, {"loss": 2.5, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_s": 9.0})
    events = [NoteEvent("a note"), step, DoneEvent({"val_loss": 2.5, "step": 3})]
    lines = b"".join(json.dumps(event.to_json()).encode() + b"\n" for event in events)

    def message(draw: random.Random, content: bytes) -> bytes:
        """A message whose length is right; or with its bytes mutated, those of the length among them."""
        if draw.random() < 0.3:
            return mutate.of_bytes(draw, ipc.HEADER.pack(len(content)) + content)
        content = mutate.json_file(draw, content)
        return ipc.HEADER.pack(len(content)) + content

    def receive(content: bytes) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.setblocking(False)  # a message too long for the buffer arrives cut
            theirs.send(content)
            theirs.shutdown(socket.SHUT_WR)
            answer, _ = ipc.receive(ours, max_fds=3)
            assert answer is None or isinstance(answer, dict)
            if answer is not None:
                _start_order(answer)

    def tell(content: bytes) -> None:
        for event in agent.read_events(content):
            from_json(event)

    return [
        Format("message between processes", [body, b'{"pid": 3, "ready": 1.5}'], message, receive),
        Format("events of a worker", [lines], mutate.json_lines, tell),
        Format("heartbeat of a worker", [bytes(heartbeat.SIZE)], mutate.of_bytes, lambda c: heartbeat.read(_page(c))),
    ]


def _start_order(message: dict[str, Any]) -> None:
    """As the fork server reads an order, which answers what it cannot read."""
    with contextlib.suppress(*UNREADABLE):
        StartOrder.from_json(message)


def _page(content: bytes) -> bytes:
    return content[: heartbeat.SIZE].ljust(heartbeat.SIZE, b"\0")


def _of_nodes(folder: Path) -> list[Format]:
    order = node_daemon.NodeOrder("/tmp/node", "/tmp/token", "127.0.0.1", 6379, 2, 0, "10.0.0.1:6379")
    about = versions.local_versions()
    answer = {"pid": 3, "address": "10.0.0.1:6379", "ip": "10.0.0.1", "host": "h", "cpus": 2, "gpus": 0}
    token = folder / "auth_token"
    token.touch(mode=0o600)

    def compare(content: bytes) -> None:
        versions.check_versions(cluster_client.parse_versions(content), "10.0.0.1:6379")

    def look_for_token() -> None:
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        try:
            ray_auth.check_token(token)
            ray_internals.forget_auth_token()
            ray_internals.has_auth_token()
        finally:
            del os.environ["RAY_AUTH_TOKEN_PATH"]

    return [
        Format("cluster: versions of a head", [json.dumps(about).encode()], mutate.json_file, compare),
        Format(
            "cluster: line of a node",
            [json.dumps(answer).encode() + b"\n"],
            mutate.json_file,
            lambda content: node_daemon.parse_message(content.decode("utf-8", "replace")),
        ),
        Format(
            "cluster: order for a node",
            [node_daemon.to_argument(order).encode()],
            mutate.json_file,
            lambda content: node_daemon.from_argument(content.decode("utf-8", "surrogateescape")),
        ),
        Format(
            "cluster: address",
            [b"10.0.0.1:6379", b"[fe80::1%eth0]:6379", b"gpu-7.cluster.example:1"],
            mutate.of_bytes,
            lambda content: network.split_address(content.decode("utf-8", "surrogateescape")),
        ),
        Format("cluster: token", [b"ab12" * 16], mutate.of_bytes, in_file(token, look_for_token)),
    ]


def _of_files_beside(folder: Path) -> list[Format]:
    """Files beside those that a verb names: of a running job, of W&B's client, of Hugging Face, of the kernels."""
    processes = [TrainProcess(folder / name, []) for name in ("placed", "restarted")]
    placed, restarted = (RunDir(process.folder) for process in processes)
    rank = {"rank": 0, "pid": 3, "steward": 2, "host": "h", "ip": "127.0.0.1", "node": "ab"}
    world = {"generation": 1, "ranks": [rank, {**rank, "rank": 1}]}
    restarts = b'{"event": "recovered", "generation": 1, "failed": 1.5, "ended": 2.0}\n'
    world_seed = json.dumps(world).encode()
    for run in (placed, restarted):
        run.path.mkdir()
        run.world.write_bytes(world_seed)
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    tokenizer.parent.mkdir()
    tokenizer.write_bytes((SEEDS / "unigram.json").read_bytes())
    named = ("data.tokenizer.kind=file", f"data.tokenizer.path={tokenizer}", "data.tokenizer.vocab_size=null")
    settings = configuration.load([*named, "tracking=off"]).data.tokenizer
    config_seeds = [b'{"eos_token": "a"}', b'{"eos_token": {"content": "</s>", "special": true}}']
    table, wandb, netrc = folder / "tiles.json", folder / "wandb", folder / "netrc"

    def read_table() -> None:
        tuning._read_table.cache_clear()
        tuning._read_table(table)

    def look_for_key() -> None:
        os.environ["NETRC"] = str(netrc)
        try:
            tracking._mode(configuration.load(["tracking.wandb=auto"]).tracking)
        finally:
            del os.environ["NETRC"]

    return [
        Format(
            "run: world.json", [world_seed], mutate.json_file, in_file(placed.world, lambda: processes[0].locations)
        ),
        Format(
            "run: restarts.jsonl",
            [restarts * 2],
            mutate.json_lines,
            in_file(restarted.restarts, lambda: processes[1].world_size),
        ),
        Format(
            "tokenizer_config.json",
            config_seeds,
            mutate.json_file,
            in_file(tokenizer.with_name("tokenizer_config.json"), lambda: Tokenizer(given_tokenizer(settings))),
        ),
        Format(
            "kernels: table of tiles", [b'{"attention 64": {"ROWS": 4}}'], mutate.json_file, in_file(table, read_table)
        ),
        Format(
            "W&B: settings",
            [b"[default]\nmode = offline\nproject = x\n"],
            mutate.of_bytes,
            in_file(
                wandb / "settings", lambda: requested_mode({"WANDB_CONFIG_DIR": str(wandb), "WANDB_DIR": "/nowhere"})
            ),
        ),
        Format(
            "W&B: netrc",
            [b"machine api.wandb.ai\n  login user\n  password 0123\n"],
            mutate.of_bytes,
            in_file(netrc, look_for_key),
        ),
    ]


def _of_environments(folder: Path) -> list[Format]:
    """Variables of the environment, one a line."""

    def variables(content: bytes) -> dict[str, str]:
        lines = content.decode("utf-8", "surrogateescape").replace("\0", "").split("\n")
        return dict(line.partition("=")[::2] for line in lines)

    def usable_gpus(content: bytes) -> None:
        resources.usable_gpus(["nvidia0", "nvidia1"], variables(content).get("CUDA_VISIBLE_DEVICES"))

    return [
        Format(
            "variables of torchrun",
            [b"RANK=1\nWORLD_SIZE=2\nLOCAL_RANK=1"],
            mutate.words,
            lambda content: process_group.launcher_ranks(variables(content)),
        ),
        Format(
            "variables of W&B",
            [b"WANDB_MODE=offline\nWANDB_DISABLED=false", b"WANDB_DISABLED=true"],
            mutate.words,
            lambda content: requested_mode(variables(content)),
        ),
        Format("CUDA_VISIBLE_DEVICES", [b"CUDA_VISIBLE_DEVICES=0,MIG-ab,1"], mutate.words, usable_gpus),
    ]
