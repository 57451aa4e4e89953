"""Addresses and interfaces of this host, and whether a port of another refuses connections."""

from __future__ import annotations

import socket

import psutil

from train.errors import UserError


def address_towards(address: str) -> str:
    """The address of this host that packets to ``address`` (HOST:PORT) leave from. UserError without a route."""
    name, _, port = address.rpartition(":")
    try:
        family, _, _, _, peer = socket.getaddrinfo(name.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(peer)  # sends nothing
            return str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise UserError(f"no way leads from this host to {address}: {error}") from error


def refuses_connections(address: str, patience_s: float = 5.0) -> bool:
    """Whether the host of ``address`` (HOST:PORT) answers that no process listens on the port."""
    name, _, port = address.rpartition(":")
    try:
        socket.create_connection((name.strip("[]"), int(port)), patience_s).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def interface_of(ip: str) -> str | None:
    """Name of the network interface that has the address ``ip``; None where none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == ip for address in addresses):
            return name
    return None
