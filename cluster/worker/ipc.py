"""JSON messages and open file descriptors over Unix sockets between the processes of a host."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import threading
from typing import Any

from train.events import Event
from train.util.io import to_json
from train.util.reading import UNREADABLE, as_object

HEADER = struct.Struct("!I")
"""Length of the message that follows, in bytes."""
MAX_BYTES = 64 << 20
"""A longer message is none of ours: its length was never one."""
PR_SET_PDEATHSIG = 1
PARENT_CHECK_S = 1.0
"""Between looks at whether a parent is there, should its signal not have come."""
_libc = ctypes.CDLL(None, use_errno=True)

Message = dict[str, Any]


class EventPipe:
    """Sends a rank's events to its agent: ``events(event)`` writes one whole line, from any thread."""

    def __init__(self, fd: int) -> None:
        self._file = os.fdopen(fd, "wb", buffering=0)
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Sends ``event``; numbers of foreign types become floats. Does nothing when the agent is gone."""
        line = to_json(event.to_json()).encode() + b"\n"
        with self._lock, contextlib.suppress(BrokenPipeError):
            while line:
                line = line[self._file.write(line) :]


def send(sock: socket.socket, message: Message, fds: list[int] | None = None) -> None:
    """Sends one message, and with it copies of the open files ``fds``."""
    body = json.dumps(message).encode()
    data = HEADER.pack(len(body)) + body
    sent = socket.send_fds(sock, [data], fds or [])
    sock.sendall(data[sent:])


def receive(sock: socket.socket, max_fds: int = 0) -> tuple[Message | None, list[int]]:
    """The next message and the files that came with it; None when the other side is gone, or sends no message."""
    try:
        head, fds, _, _ = socket.recv_fds(sock, HEADER.size, max_fds)
    except ConnectionError:  # it ended with messages of ours unread
        return None, []
    head += _receive_exactly(sock, HEADER.size - len(head)) if head else b""
    if len(head) < HEADER.size:
        return None, fds
    size = HEADER.unpack(head)[0]
    body = _receive_exactly(sock, size) if size <= MAX_BYTES else b""
    try:
        return (as_object(json.loads(body)) if len(body) == size else None), fds
    except UNREADABLE:
        return None, fds


def _receive_exactly(sock: socket.socket, size: int) -> bytes:
    """``size`` bytes, or fewer when the other side went away."""
    data = b""
    while len(data) < size:
        try:
            part = sock.recv(size - len(data))
        except ConnectionError:
            break
        if not part:
            break
        data += part
    return data


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when the thread that made it ends; at once if ``parent`` is gone already."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def wait_for_parents_end(parent: int) -> None:
    """Waits until the thread that made this process has ended; returns at once if ``parent`` is gone already."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    while os.getppid() == parent:
        signal.sigtimedwait({signal.SIGUSR1}, PARENT_CHECK_S)
    _libc.prctl(PR_SET_PDEATHSIG, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
