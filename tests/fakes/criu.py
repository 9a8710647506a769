"""A program that speaks as `criu swrk` does and does nothing: for what ocirun must do around a dump or a restore.

    python -m tests.fakes.criu DIRECTORY swrk 3

Writes the options it got to DIRECTORY/options, as JSON of number to text or number. DIRECTORY/plan says what it does:
"ok", "fail" (an answer that says so, and a log), "die" (no answer), "outside" (a restore that puts a process of the
host's forward as the container's).
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

from runtime import criu
from runtime.linux.process import CLONE_PARENT, clone3


def main(directory: Path) -> None:
    plan = (directory / "plan").read_text()
    channel = socket.socket(fileno=3)
    request = criu.fields(channel.recv(1 << 16))
    kind, opts = request[1], request.get(2, b"")
    assert isinstance(kind, int) and isinstance(opts, bytes)
    if kind == criu.VERSION:
        channel.send(criu.message((1, kind), (2, True), (10, criu.message((1, 3), (2, 17), (4, 1)))))
        return
    found = {number: value if isinstance(value, int) else os.fsdecode(value) for number, value in _all(opts)}
    (directory / "options").write_text(json.dumps(found))
    if plan == "die":
        os._exit(1)
    if plan == "fail":
        work = os.path.realpath(f"/proc/{os.getppid()}/fd/{found.get(17, found[1])}")
        log = "(00.1) Error (criu/x.c:1): first: cause\n(00.2) Error (criu/y.c:2): Dumping FAILED.\n"
        Path(work, str(found[10])).write_text(log)
        channel.send(criu.message((1, kind), (2, False), (7, 22)))
        return
    if plan == "outside":
        pid, _ = clone3(CLONE_PARENT)
        if pid == 0:
            os.execvp("sleep", ["sleep", "1000"])
        (directory / "pid").write_text(str(pid))
        for step in ("post-restore", "pre-resume"):
            channel.send(criu.message((1, criu.NOTIFY), (2, True), (5, criu.message((1, step), (2, pid)))))
            if not channel.recv(1 << 16):
                (directory / "let-go").touch()  # here criu would, as it does when its caller hangs up
                return
    channel.send(criu.message((1, kind), (2, True)))


def _all(data: bytes) -> list[tuple[int, int | bytes]]:
    return list(criu.fields(data).items())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
