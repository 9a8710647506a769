"""What a caller of create, run or exec hands on to the process: descriptors after 2, and sockets to tell about it.

Refuses to count on a descriptor that is not there: its number would be given to the next file that is opened here, and
that would be handed to the container (threats S8). Invariant: `descriptors` is called before anything else is open.
"""

from __future__ import annotations

import os

from runtime.errors import RuntimeFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from runtime.spec_process import Process

_FIRST = 3  # SD_LISTEN_FDS_START of sd_listen_fds(3)
_MOST = 1024


def listening(environment: Mapping[str, str]) -> int:
    """How many sockets systemd hands to this very process (sd_listen_fds(3)): LISTEN_PID must be ours."""
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return 0
    text = environment.get("LISTEN_FDS", "")
    return min(int(text), _MOST) if text.isascii() and text.isdecimal() and len(text) < 10 else 0


def descriptors(preserved: int, listening_: int = 0) -> int:
    """How many descriptors from 3 on are handed on, once each is known to be there. Raises RuntimeFailure."""
    if not 0 <= preserved <= _MOST:
        raise RuntimeFailure(f"--preserve-fds: {preserved} is not from 0 to {_MOST}", code="invalid_argument")
    for number in range(_FIRST, _FIRST + listening_ + preserved):
        try:
            os.fstat(number)
        except OSError:
            raise RuntimeFailure(
                f"unable to stat preserved-fd {number - _FIRST} (of {listening_ + preserved}): "
                f"fd {number}: no such file or directory",
                hint="the caller of --preserve-fds must leave 3 and those after it open",
                code="invalid_argument",
            ) from None
    return listening_ + preserved


def with_listening(process: Process, count: int, environment: Mapping[str, str]) -> Process:
    """`process`, which is pid 1 where it looks, told of its `count` sockets."""
    if not count:
        return process
    entries = [f"LISTEN_FDS={count}", "LISTEN_PID=1"]
    if environment.get("LISTEN_FDNAMES"):
        entries.append(f"LISTEN_FDNAMES={environment['LISTEN_FDNAMES']}")
    return process.changed(env=(*process.env, *entries))


def send_fd(path: str, fd: int, name: str, what: str) -> None:
    """Sends `fd` to the listener at `path`: one message over a stream, its name with SCM_RIGHTS."""
    import _socket
    import struct

    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        sock.connect(path)
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("=i", fd))]
        sock.sendmsg([os.fsencode(name)], rights, _socket.MSG_NOSIGNAL)
    except OSError as error:
        raise RuntimeFailure.of(error, what=f"{what} {path}", code="invalid_argument") from None
    finally:
        sock.close()
