"""One rank of a real run that counts the bytes that the kernel sends for it, step by step.

    python -m bench.tools.counted_rank OUT CORPUS [key=value ...]     (in the environment that torchrun makes)

Gloo talks over TCP, and the kernel counts what each socket has sent: nothing is estimated. The sums over all sockets at
the start of each step go to ``OUT``, a JSON list, and rank 0 writes the number of parameters beside it.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from train.config import load as configuration
from train.distributed import heartbeat, process_group
from train.events import Event, PlanEvent
from train.run import train_rank

TCP_INFO_BYTES, BYTES_SENT_AT = 256, 200
"""Size of the kernel's record of a TCP socket, and where in it the bytes sent are, see linux/tcp.h."""


def bytes_sent() -> int:
    """Bytes that the TCP sockets of this process have sent so far."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            if not str(link.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(link.name))) as copy:
                if copy.type == socket.SOCK_STREAM and copy.family in (socket.AF_INET, socket.AF_INET6):
                    record = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
                    total += struct.unpack_from("=Q", record, BYTES_SENT_AT)[0]
        except OSError:
            continue  # closed meanwhile
    return total


def main(arguments: Sequence[str]) -> int:
    """Trains one rank to its end and writes its counts."""
    out, corpus, *overrides = arguments
    world = process_group.init_from_env()
    config = configuration.with_workers(configuration.load(overrides), world.size)
    counts: list[int] = []

    def note_step(phase: str, micro: int) -> None:
        if phase == "data" and micro == 0:
            counts.append(bytes_sent())

    heartbeat.on_phase(note_step)

    def note_plan(event: Event) -> None:
        if isinstance(event, PlanEvent):
            Path(out).with_suffix(".params").write_text(str(event.params), encoding="utf-8")

    train_rank(config, corpus, world, note_plan, lambda: False)
    Path(out).write_text(json.dumps(counts), encoding="utf-8")
    process_group.destroy_group()
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
