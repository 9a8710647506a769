"""The runtime called from Python, as the shim does: overlay roots in the container's own namespace, fds, failures."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import create, lifecycle, spec, spec_process
from runtime import exec as execution
from runtime.errors import RuntimeFailure
from runtime.linux.mount import FsMount, mountinfo
from tests.bundles import Bundle, Bundles, bundles
from tests.support import needs


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox", "overlay")
    with bundles(tmp_path) as opened:
        yield opened


class Pipes:
    """/dev/null and two pipes for a container; `read` gives all of its stdout once it has ended."""

    def __init__(self) -> None:
        self.null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC)

    def __enter__(self) -> Pipes:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in (self.null, self.reader, self.writer):
            if fd >= 0:
                os.close(fd)

    @property
    def stdio(self) -> tuple[int, int, int]:
        return self.null, self.writer, self.null

    def read(self) -> bytes:
        os.close(self.writer)
        self.writer, said = -1, b""
        while piece := os.read(self.reader, 65536):
            said += piece
        return said


def request(one: Bundle, **changes: object) -> create.CreateRequest:
    config = spec.parse(one.write().read_bytes())
    return create.CreateRequest(root=str(one.home.root), id=one.id, bundle=str(one.path), spec=config, **changes)


def ended(pid: int, pidfd: int) -> int:
    select.select([pidfd], [], [], 10)
    os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_an_overlay_root_is_mounted_in_the_container_only(home: Bundles) -> None:
    one = home.sh("echo $0 from overlay; cat /etc/lower; echo new > /etc/upper; exit 4")
    (one.rootfs / "etc/lower").write_text("lower\n")
    for name in ("upper", "work", "mnt"):
        (one.path / name).mkdir()
    one.config["root"]["path"] = "mnt"
    options = (("lowerdir", str(one.rootfs)), ("upperdir", f"{one.path}/upper"), ("workdir", f"{one.path}/work"))
    before = [point.target for point in mountinfo()]
    with Pipes() as pipes:
        made = create.create(request(one, stdio=pipes.stdio, rootfs=FsMount("overlay", "overlay", options)))
        assert made.console == -1 and made.warnings == () and made.state.rootfs == f"{one.path}/mnt"
        assert {point.target for point in mountinfo()} - set(before) == set()
        assert os.listdir(one.path / "mnt") == [] and one.status() == "created"
        lifecycle.start(str(home.root), one.id)
        assert pipes.read() == b"sh from overlay\nlower\n"
        assert ended(made.state.pid, made.pidfd) == 4
    assert (one.path / "upper/etc/upper").read_text() == "new\n" and not (one.rootfs / "etc/upper").exists()
    lifecycle.delete(str(home.root), one.id)
    one.gone()


def test_an_overlay_root_in_a_user_namespace(home: Bundles) -> None:
    one = home.sh("id -u; ls /etc").user_namespace()
    for name in ("upper", "work"):
        (one.path / name).mkdir()
        os.chown(one.path / name, 100_000, 100_000)
    one.config["root"]["path"] = "mnt"
    options = (("lowerdir", str(one.rootfs)), ("upperdir", f"{one.path}/upper"), ("workdir", f"{one.path}/work"))
    with Pipes() as pipes:
        made = create.create(request(one, stdio=pipes.stdio, rootfs=FsMount("overlay", "overlay", options)))
        lifecycle.start(str(home.root), one.id)
        assert pipes.read() == b"0\npasswd\n"
        assert ended(made.state.pid, made.pidfd) == 0
    lifecycle.delete(str(home.root), one.id)


def test_the_terminal_is_handed_to_the_caller(home: Bundles) -> None:
    one = home.sh("tty; stty size")
    one.process.update(terminal=True, consoleSize={"height": 9, "width": 33})
    made = create.create(request(one))
    lifecycle.start(str(home.root), one.id)
    said = b""
    while True:
        try:
            said += os.read(made.console, 4096)
        except OSError:
            break
    assert said.split() == [b"/dev/pts/0", b"9", b"33"] and not os.get_inheritable(made.console)
    os.close(made.console)
    assert ended(made.state.pid, made.pidfd) == 0
    lifecycle.delete(str(home.root), one.id)


def test_a_failure_has_its_step_errno_hint_and_code_and_costs_no_fd(home: Bundles) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    one = home.make("true").mount("/a", "bind", "/no/such", "bind")
    with pytest.raises(RuntimeFailure) as caught:
        create.create(request(one))
    found = caught.value
    assert (found.step, found.errno, found.code) == ("mounts", 2, "invalid_argument") and "/no/such" in str(found)
    one.gone()
    two = home.make("/bin/nothing")
    with pytest.raises(RuntimeFailure) as caught:
        create.create(request(two))
    assert (caught.value.step, caught.value.code) == ("command", "invalid_argument") and caught.value.hint
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_exec_gives_a_child_past_its_execve(home: Bundles) -> None:
    one = home.make()
    made = create.create(request(one))
    lifecycle.start(str(home.root), one.id)
    before = sorted(os.listdir("/proc/self/fd"))
    process = spec_process.parse_process(
        {"args": ["sh", "-c", "echo $A; exit 3"], "cwd": "/", "env": ["A=b", "PATH=/bin"]}, "p"
    )
    with Pipes() as pipes:
        wanted = execution.ExecRequest(root=str(home.root), id=one.id, process=process, stdio=pipes.stdio)
        done = execution.execute(wanted)
        assert done.console == -1 and pipes.read() == b"b\n"
        assert ended(done.pid, done.pidfd) == 3
    with pytest.raises(RuntimeFailure, match="executable file not found"):
        execution.execute(wanted.changed(process=process.changed(args=("none",)), stdio=(0, 1, 2)))
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert lifecycle.pids(str(home.root), one.id) == [made.state.pid]
    assert lifecycle.describe(str(home.root), one.id)["status"] == "running"
    lifecycle.kill(str(home.root), one.id, 9)
    assert ended(made.state.pid, made.pidfd) == -9
    lifecycle.delete(str(home.root), one.id)
    with pytest.raises(RuntimeFailure, match="container does not exist"):
        lifecycle.describe(str(home.root), one.id)
