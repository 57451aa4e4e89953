"""Messages over sockets: what is none ends its connection, and nothing else."""

import json
import socket

import pytest

from cluster.worker import agent, ipc
from cluster.worker.fork_server import ForkServer


@pytest.mark.parametrize("body", [b"\xff\xff\xff\xff", ipc.HEADER.pack(3) + b"abc", ipc.HEADER.pack(2) + b"[]", b"\0"])
def test_what_is_no_message_is_the_end_of_a_connection(body: bytes):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(body)
        theirs.shutdown(socket.SHUT_WR)
        assert ipc.receive(ours) == (None, [])


def test_peer_that_leaves_a_message_unread_has_ended():
    ours, theirs = socket.socketpair()
    with ours:
        ipc.send(ours, {"rank": 0})
        theirs.close()
        assert ipc.receive(ours) == (None, [])


def test_order_that_cannot_be_read_is_answered_and_the_fork_server_lives():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ipc.send(ours, {"rank": 0})
        ForkServer(theirs, "module:function")._serve_agent(theirs)
        answer, _ = ipc.receive(ours)
    assert answer == {"failed": "the order to start a worker cannot be read: 'gpus' is missing"}


def test_lines_of_other_processes_in_a_workers_pipe_are_left_out():
    note = {"event": "note", "text": "a"}
    lines = [
        b"Warning: a child writes here",
        b"",
        b"[1]",
        b'{"event": "none of ours"}',
        json.dumps(note).encode(),
        b"\xff",
    ]
    assert agent.read_events(b"\n".join(lines)) == [note]
