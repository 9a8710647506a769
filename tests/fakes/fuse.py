"""A filesystem in a process (FUSE, linux/fuse.h): a directory with one file of somebody's, `FILE`.

Knows the four requests that stat(2) needs; everything else is ENOSYS, as of a server that has not heard of it. Refuses
writes. Whether ids may be mapped on its mounts is the server's to say, as the kernel has it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from runtime.linux.mount import MNT_DETACH, mount, umount2

FILE = "file"
_LOOKUP, _FORGET, _GETATTR, _STATFS, _INIT, _INTERRUPT, _BATCH_FORGET = 1, 2, 3, 17, 26, 36, 42
_EXTENDED, _ALLOW_IDMAP = 1 << 30, 1 << 8  # FUSE_INIT_EXT; FUSE_ALLOW_IDMAP, in flags2
_HEADER = struct.Struct("=IIQQIIII")
_ROOT, _THE_FILE = 1, 2
_VALID_S = 3600


def _attributes(node: int, uid: int, gid: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o644
    return struct.pack("=6Q10I", node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, uid, gid, 0, 4096, 0)


def _answer(opcode: int, node: int, body: bytes, uid: int, gid: int, maps_ids: bool) -> tuple[int, bytes]:
    if opcode == _INIT:
        flags, more = (_EXTENDED, _ALLOW_IDMAP) if maps_ids else (0, 0)
        return 0, struct.pack("=4I2H2I2H2I24x", 7, 40, 0, flags, 8, 8, 4096, 1, 1, 0, more, 0)
    if opcode == _GETATTR:
        return 0, struct.pack("=QII", _VALID_S, 0, 0) + _attributes(node, uid, gid)
    if opcode == _LOOKUP:
        if body.rstrip(b"\0") != FILE.encode():
            return errno.ENOENT, b""
        return 0, struct.pack("=4Q2I", _THE_FILE, 0, _VALID_S, _VALID_S, 0, 0) + _attributes(_THE_FILE, uid, gid)
    if opcode == _STATFS:
        return 0, bytes(80)
    return errno.ENOSYS, b""


def _serve(fd: int, uid: int, gid: int, maps_ids: bool) -> None:
    with contextlib.suppress(OSError):  # ENODEV: it is mounted nowhere any more
        while True:
            request = os.read(fd, 1 << 17)
            _, opcode, unique, node, *_ = _HEADER.unpack_from(request)
            if opcode in (_FORGET, _BATCH_FORGET, _INTERRUPT):
                continue
            error, body = _answer(opcode, node, request[_HEADER.size :], uid, gid, maps_ids)
            os.write(fd, struct.pack("=IiQ", 16 + len(body), -error, unique) + body)


@contextlib.contextmanager
def mounted(target: Path, uid: int, gid: int, *, maps_ids: bool) -> Iterator[Path]:
    """At `target`, with FILE and the directory of that user and group."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    server = threading.Thread(target=_serve, args=(fd, uid, gid, maps_ids))
    try:
        options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other"
        mount("ocid-test", str(target), "fuse", 0, options)
        server.start()
        try:
            yield target
        finally:
            umount2(str(target), MNT_DETACH)
            server.join()
    finally:
        os.close(fd)
