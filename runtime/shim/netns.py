"""Connections that begin inside a pod's network namespace, made by a helper that goes there and does not come back.

Refuses to be called where other work follows: the caller's process stays in the namespace. Invariant: a socket belongs
to the namespace it was made in, whoever holds it; so the daemon never has to enter one.
"""

from __future__ import annotations

import os
import socket

from runtime.errors import RuntimeFailure
from runtime.linux.process import CLONE_NEWNET, setns

PATIENCE = 20.0  # seconds for a peer on loopback whose backlog is full
_LOOPBACK = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


def enter(path: str) -> None:
    """Joins the network namespace pinned at `path`, for the rest of this process's life."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(fd, CLONE_NEWNET)
    finally:
        os.close(fd)


def connected(port: int) -> socket.socket:
    """A TCP connection to `port` of this namespace's loopback: IPv4, or else IPv6. Raises RuntimeFailure of the first
    that failed, since a pod without IPv6 says nothing about the port there."""
    failures: list[tuple[str, OSError]] = []
    for family, address in _LOOPBACK:
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        except OSError as error:
            failures.append((address, error))
            continue
        try:
            sock.settimeout(PATIENCE)
            sock.connect((address, port))
            sock.settimeout(None)
            return sock
        except OSError as error:
            failures.append((address, error))
            sock.close()
    address, first = failures[0]
    raise RuntimeFailure.of(first, what=f"{address}:{port}", code="unavailable")
