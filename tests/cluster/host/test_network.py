"""Addresses of clusters: HOST:PORT, or a refusal in words."""

import random
import socket
from pathlib import Path

import pytest

from cluster.host import network
from train.errors import UserError


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("gpu-7.cluster:1", ("gpu-7.cluster", 1)),
        ("[fe80::1%eth0]:65535", ("fe80::1%eth0", 65535)),
    ],
)
def test_host_and_port_of_an_address_are_read(address: str, expected: tuple[str, int]):
    assert network.split_address(address) == expected


@pytest.mark.parametrize(
    "address", ["", "host", "host:", "host:0", "host:65536", "host:1e3", "a b:1", f"h:{'9' * 5000}", "h\n:1"]
)
def test_what_is_no_address_is_refused_before_it_is_asked(address: str):
    for use in (network.split_address, network.address_towards, network.refuses_connections):
        with pytest.raises(UserError, match="is not HOST:PORT, with a port from 1 to 65535"):
            use(address)


def test_free_port_is_outside_the_range_of_connections_whatever_the_seed():
    first, last = map(int, network.PORTS_OF_CONNECTIONS.read_text().split())
    ports = set()
    for _ in range(8):
        random.seed(0)
        port = network.free_port()
        assert not first <= port <= last
        with socket.socket() as server:
            server.bind(("", port))
        ports.add(port)
    assert len(ports) > 1


def test_free_port_is_found_where_connections_may_take_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "range").write_text("1024\t65535\n")
    monkeypatch.setattr(network, "PORTS_OF_CONNECTIONS", tmp_path / "range")
    assert network.LEAST_PORT <= network.free_port() <= network.MAX_PORT
