"""Addresses and interfaces of this host, and whether a port of another refuses connections."""

from __future__ import annotations

import contextlib
import random
import re
import socket
from pathlib import Path

import psutil

from train.errors import UserError

MAX_PORT = 65535
LEAST_PORT = 10_000
"""The ports below are those that people give their servers."""
PORTS_OF_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")
NAME = re.compile(r"[A-Za-z0-9._-]{1,253}|\[?[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9._-]+)?\]?")
"""A host name, or an address of IPv4 or IPv6."""


def split_address(address: str) -> tuple[str, int]:
    """The host and the port of ``address``, HOST:PORT or [IPV6]:PORT. Raises UserError for another text."""
    name, _, port = address.rpartition(":")
    if port.isascii() and port.isdecimal() and 0 < int(port[:6]) <= MAX_PORT and NAME.fullmatch(name):
        return name.strip("[]"), int(port[:6])
    raise UserError(
        f"{address!r} is not HOST:PORT, with a port from 1 to {MAX_PORT}: "
        "`./launch.sh cluster status` on a cluster's head shows its address"
    )


def address_towards(address: str) -> str:
    """The address of this host that packets to ``address`` (HOST:PORT) leave from. UserError without a route."""
    name, port = split_address(address)
    try:
        family, _, _, _, peer = socket.getaddrinfo(name, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(peer)  # sends nothing
            return str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise UserError(f"no way leads from this host to {address}: {error}") from error


def refuses_connections(address: str, patience_s: float = 5.0) -> bool:
    """Whether the host of ``address`` (HOST:PORT) answers that no process listens on the port."""
    try:
        socket.create_connection(split_address(address), patience_s).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def free_port() -> int:
    """A port that no socket of this host has, outside the range that the kernel takes ports of connections from.

    So it is still free some seconds later, unless another server is given this very port.
    """
    first, last = (int(word) for word in PORTS_OF_CONNECTIONS.read_text("utf-8").split())
    servers = range(LEAST_PORT, MAX_PORT + 1)
    ports = [port for port in servers if not first <= port <= last] or servers
    first_tried = random.SystemRandom().randrange(len(ports))  # a run's seed must not choose it
    for port in [*ports[first_tried:], *ports[:first_tried]]:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise UserError("no port of this host is free")


def interface_of(ip: str) -> str | None:
    """Name of the network interface that has the address ``ip``; None where none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == ip for address in addresses):
            return name
    return None
