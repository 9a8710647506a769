"""Pseudo terminals: the container's console out of its own devpts, and a console socket as runc's callers hand one in.

Refuses to open a terminal by a name that the rootfs can choose: the slave comes from TIOCGPTPEER of a master that was
verified to be a ptmx of a devpts (CVE-2025-52565). Invariant: masters and slaves are CLOEXEC and never become the
controlling terminal of the caller.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct

from runtime.errors import RuntimeFailure
from runtime.linux.files import fstatfs_type, open_in_root

# asm-generic/ioctls.h, linux/magic.h
TIOCSCTTY, TIOCGWINSZ, TIOCSWINSZ, TIOCSPTLCK, TIOCGPTPEER = 0x540E, 0x5413, 0x5414, 0x40045431, 0x5441
TIOCGPTN = 0x80045430
DEVPTS_SUPER_MAGIC = 0x1CD1
_PTMX = os.makedev(5, 2)


def open_pair(root_fd: int, size: tuple[int, int]) -> tuple[int, int]:
    """(master, slave) of the devpts at /dev/pts inside `root_fd`; both the caller's. `size` is (rows, columns)."""
    try:
        master = open_in_root(root_fd, "dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        failure = RuntimeFailure.of(error, step="console", what="open a terminal in /dev/pts")
        failure.hint = "a container with a terminal needs a devpts mount on /dev/pts"
        raise failure from None
    try:
        status = os.fstat(master)
        if not stat.S_ISCHR(status.st_mode) or status.st_rdev != _PTMX or fstatfs_type(master) != DEVPTS_SUPER_MAGIC:
            raise RuntimeFailure(
                "open a terminal in /dev/pts: /dev/pts/ptmx is not that of a devpts",
                step="console",
                hint="mount devpts on /dev/pts and nothing on top of it",
                code="failed_precondition",
            )
        os.set_blocking(master, True)
        fcntl.ioctl(master, TIOCSPTLCK, struct.pack("i", 0))
        slave = fcntl.ioctl(master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        if size != (0, 0):
            resize(master, *size)
        return master, slave
    except BaseException:
        os.close(master)
        raise


def resize(fd: int, rows: int, columns: int) -> None:
    """TIOCSWINSZ (ioctl_tty(2))."""
    fcntl.ioctl(fd, TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))


def size_of(fd: int) -> tuple[int, int]:
    """(rows, columns) of a terminal."""
    rows, columns, _, _ = struct.unpack("4H", fcntl.ioctl(fd, TIOCGWINSZ, bytes(8)))
    return rows, columns


def name_of(master: int) -> str:
    """The slave's name by its number (TIOCGPTN): what the container's own /dev/pts says is not asked."""
    return f"/dev/pts/{struct.unpack('I', fcntl.ioctl(master, TIOCGPTN, bytes(4)))[0]}"


def make_controlling(fd: int) -> None:
    """TIOCSCTTY: the terminal becomes that of the caller's new session."""
    fcntl.ioctl(fd, TIOCSCTTY, 0)


def send_master(path: str, master: int, name: str) -> None:
    """Sends the master to the listener at `path`, as runc's --console-socket. Raises RuntimeFailure."""
    from runtime.inherited import send_fd

    try:
        send_fd(path, master, name, "send the terminal to console socket")
    except RuntimeFailure as failure:
        raise failure.in_step("console") from None
