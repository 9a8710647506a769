"""Questions to namespace fds, and the loopback device of a new network namespace.

Refuses policy. Invariant: nothing here changes the caller's own namespaces.
"""

from __future__ import annotations

import fcntl
import struct

# linux/nsfs.h, linux/sockios.h, linux/if.h
NS_GET_USERNS, NS_GET_NSTYPE = 0xB701, 0xB703
SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8913, 0x8914
IFF_UP, IFF_RUNNING = 0x1, 0x40


def namespace_type(fd: int) -> int:
    """The CLONE_NEW* flag of the namespace that `fd` refers to (ioctl_ns(2)). Raises OSError for another kind of fd."""
    return fcntl.ioctl(fd, NS_GET_NSTYPE)


def owner(fd: int) -> int:
    """The user namespace that the namespace behind `fd` belongs to, as an fd that the caller owns (ioctl_ns(2)).
    Raises OSError: EPERM where that is neither the caller's nor below it."""
    return fcntl.ioctl(fd, NS_GET_USERNS)


def loopback_up() -> None:
    """Brings up `lo` of the network namespace that the caller is in (netdevice(7))."""
    import _socket  # socket itself costs 10 ms

    with_socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    try:
        request = fcntl.ioctl(with_socket.fileno(), SIOCGIFFLAGS, struct.pack("16sH22x", b"lo", 0))
        flags = struct.unpack("16sH22x", request)[1] | IFF_UP | IFF_RUNNING
        fcntl.ioctl(with_socket.fileno(), SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags))
    finally:
        with_socket.close()
