"""A program that speaks as `criu swrk` does and does nothing: for what ocirun must do around a dump or a restore.

    python -m tests.fakes.criu DIRECTORY swrk 3

Writes the options it got to DIRECTORY/options, as JSON of number to text or number. DIRECTORY/plan says what it does:
"ok", "fail" (an answer that says so, and a log), "die" (no answer), "hang" (no end before its caller hangs up, which
it notes as DIRECTORY/let-go), "deaf" (nor then, nor by SIGTERM), "outside" (a restore that puts a process of the host's
forward as the container's), "restore" (a container made of the bundle's config.json stands for what was in the images,
and waits for a line as all wait for criu to let them go). Those that hang write a log, start somebody, and leave both
pids in DIRECTORY/pids.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from runtime import create, criu, lifecycle, spec
from runtime import state as runtime_state
from runtime.linux.process import CLONE_PARENT, clone3

_ROOT = 13  # criu's images/rpc.proto: the option "root"


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
    if plan in ("hang", "deaf"):
        _log(found, "(00.1) Warn (criu/x.c:1): this may take a while\n")
        _hang(directory, channel, deaf=plan == "deaf")
        return
    if plan == "fail":
        _log(found, "(00.1) Error (criu/x.c:1): first: cause\n(00.2) Error (criu/y.c:2): Dumping FAILED.\n")
        channel.send(criu.message((1, kind), (2, False), (7, 22)))
        return
    if plan == "restore":
        _restore(channel, str(found[_ROOT]))
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


def _restore(channel: socket.socket, root: str) -> None:
    state, container_id = Path(root).parents[2], Path(root).parent.name
    bundle = state / "bundles" / container_id
    wanted = spec.parse((bundle / "config.json").read_bytes())
    assert wanted.process is not None
    waiting = ("sh", "-c", 'read x; exec "$@"', "sh", *wanted.process.args)
    # Below the cgroups that this process is in, which are the container's.
    wanted = wanted.changed(root_path=root, cgroups_path="", process=wanted.process.changed(args=waiting))
    gate, go = os.pipe()
    ours = f"{bundle}/criu"
    maker = os.fork()  # which leaves an orphan: what criu restores is no child of its own either
    if maker == 0:
        os.close(go)
        create.create(create.CreateRequest(ours, container_id, str(bundle), wanted, stdio=(gate, 1, 2)))
        lifecycle.start(ours, container_id)
        os._exit(0)
    if os.waitpid(maker, 0)[1]:
        os._exit(1)
    init = runtime_state.load(ours, container_id).pid
    for step in ("post-restore", "pre-resume"):
        channel.send(criu.message((1, criu.NOTIFY), (2, True), (5, criu.message((1, step), (2, init)))))
        if not channel.recv(1 << 16):
            os._exit(1)
    os.write(go, b"\n")


def _log(options: dict[int, int | str], text: str) -> None:
    work = os.path.realpath(f"/proc/{os.getppid()}/fd/{options.get(17, options[1])}")
    Path(work, str(options[10])).write_text(text)


def _hang(directory: Path, channel: socket.socket, *, deaf: bool) -> None:
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    fresh = directory / "pids.new"
    fresh.write_text(f"{os.getpid()} {child.pid}")
    fresh.rename(directory / "pids")
    if deaf:
        child.wait()
    channel.recv(1 << 16)
    (directory / "let-go").touch()


def _all(data: bytes) -> list[tuple[int, int | bytes]]:
    return list(criu.fields(data).items())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
