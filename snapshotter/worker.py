"""The unpack worker: a process of its own, since making 70,000 files holds an interpreter that has RPCs to answer.

It is spawned by `Pool`, serves one request at a time on the socket that is its fd 0, and refuses to outlive the
daemon: when that end closes it exits at once, in the middle of whatever it does (the half-made directory has no record
and is swept). Invariant: no umask, no privilege it has no use for, and nothing but the given fds and the named
lower layers is opened.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal itself is a quarter of a start
import _socket
import os
import resource

from runtime.linux.failpoint import failpoint
from runtime.linux.process import capget, capset, set_name, set_no_new_privs
from runtime.linux.sockets import recv_frame, send_frame
from snapshotter import protocol
from snapshotter.arriving import Reader
from snapshotter.finish import finish
from snapshotter.model import SnapshotError
from snapshotter.thread import Thread
from snapshotter.unpack import unpack

# linux/capability.h: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SYS_ADMIN (trusted.* xattrs), MKNOD, SETFCAP
_CAPABILITIES = (0, 1, 3, 4, 21, 27, 31)


def work(request: protocol.Unpack | protocol.Finish, fds: list[int]) -> protocol.Done:
    """Does one request in the calling thread. `fds` stay the caller's. Raises UnpackError, OSError."""
    if isinstance(request, protocol.Finish):
        aliases = finish(fds[0], request.lowers, request.implied, request.links)
        return protocol.Done(aliases=[part for pair in aliases.items() for part in pair])
    blob, layer, *credit = fds
    reader = Reader(blob, request.size, *credit)
    made = unpack(
        reader,
        layer,
        request.media_type,
        request.diff_id,
        request.limits,
        base=request.base,
        aliases=request.aliases,
        key=request.key,
    ).extracted
    failpoint("snapshots.worker.unpacked")
    return protocol.Done(made.inodes, made.opaque, made.implied, made.links)


def _job(sock: _socket.socket, frame: bytes, fds: list[int]) -> None:
    reply: protocol.Done | protocol.Failed
    try:
        reply = work(protocol.decode_request(frame), fds)
    except BaseException as error:  # whatever it is, the daemon is told
        reply = protocol.failed(error)
    finally:
        for fd in fds:
            os.close(fd)
    try:
        send_frame(sock, protocol.encode_reply(reply))
    except OSError:
        os._exit(1)


def _drop_capabilities() -> None:
    """Keeps what making files of any owner and kind takes, trusted.* xattrs among it: layers are hostile, and
    inflating them is C code."""
    keep = sum(1 << capability for capability in _CAPABILITIES)
    effective, permitted, _ = capget()
    capset(effective & keep, permitted & keep, 0)


def main() -> None:
    """Serves until the daemon's end of fd 0 closes."""
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)  # ^C is for the daemon, which closes the socket if it ends
    set_name("ocid-unpack")
    set_no_new_privs()
    _drop_capabilities()
    os.umask(0)
    os.chdir("/")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sock = _socket.socket(fileno=0)
    while True:
        try:
            message = recv_frame(sock, want_fds=True)
        except (OSError, SnapshotError):
            os._exit(1)
        if message is None:
            # _exit: threads in the middle of a write must not keep the process.
            os._exit(0)
        Thread(_job, sock, *message)
