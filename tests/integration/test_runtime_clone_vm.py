"""A child that works in its parent's memory, what it leaves there, and what it does when it waits."""

from __future__ import annotations

import errno
import os
import select
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from runtime import sync
from runtime.errors import RuntimeFailure
from runtime.fields import encode
from runtime.linux import clone_vm
from runtime.linux.process import CLONE_NEWPID, end_child

ACCEPTED = encode({"kind": "Accepted", "pid": 0, "text": []})
PATIENCE_MS = 60_000


class Child:
    """A child that is to execute `args`; what it `does` before is the test's."""

    def __init__(self, directory: Path, args: Sequence[str], does: Callable[[], object], flags: int, bad: str) -> None:
        self.directory = str(directory)
        self.mine, self.its = sync.Channel.pair()
        self.listener = sync.listen(self.directory, "start.sock")
        self._args, self._does, self._bad = args, does, bad
        self._block = clone_vm.Block(1 << 18)
        try:
            self.pid, self.pidfd = clone_vm.clone(flags, self._block, self._work, last_words=(2, b"last words"))
        finally:
            self.its.close()
            self.listener.close()

    def _work(self) -> bool:
        if self._does() is False:
            return False
        os.close(self.mine.fileno())
        clone_vm.end_by_signals(signal.SIGTERM)
        if self._bad == "capset":
            self._block.call("capset", 126, 0, 0)  # EFAULT
        words = [os.fsencode(word) for word in self._args]
        self._block.execute("exec", words[0], words, [b"A=b"])
        self._block.wait_for_start(self.its.fileno(), self.listener.fileno(), ACCEPTED, refused)
        return True

    def connect(self) -> sync.Channel:
        channel = sync.connect(self.directory, "start.sock")
        assert channel is not None
        return channel

    def start(self, *, goes: bool = True) -> sync.Channel:
        if goes:
            self.mine.send("Go")
        channel = self.connect()
        channel.send("Start")
        channel.receive("Accepted")
        return channel

    def status(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        self.mine.close()
        try:
            end_child(self.pid, self.pidfd)
        except ChildProcessError:
            pass

    def lives(self) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)


def refused(names: list[str]) -> tuple[bytes, int, int]:
    message = encode({"kind": "Refused", "pid": 0, "text": ["000", "0", *names, "/the/command"]})
    digits = message.index(b'"000"') + 1
    return message, digits, digits + 6


Make = Callable[..., Child]


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Make]:
    assert clone_vm.AVAILABLE, "this machine is an x86-64 one, whose code is known"
    made = []

    def make(*args: str, does: Callable[[], object] = lambda: None, flags: int = CLONE_NEWPID, bad: str = "") -> Child:
        directory = tmp_path / str(len(made))
        directory.mkdir()
        made.append(Child(directory, args or ("/bin/true",), does, flags, bad))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_the_child_works_here_waits_and_becomes_a_program(child: Make, tmp_path: Path) -> None:
    found: list[int] = []
    out = tmp_path / "out"
    one = child("/bin/sh", "-c", f'echo "$$ $A" >{out}; exit 7', does=lambda: found.append(os.getpid()))
    assert found == [1]  # in a PID namespace of its own, and in our list
    assert one.lives() and not out.exists()
    one.start()
    assert (one.status(), out.read_text()) == (7, "1 b\n")


def test_no_page_is_copied(child: Make) -> None:
    block = bytearray(16 << 20)
    block[::4096] = b"\1" * 4096
    before = faults()

    def does() -> None:
        block[::4096] = b"\2" * 4096

    one = child(does=does)
    assert faults(one.pid) < 256 and faults() - before < 256 and block[4096] == 2


def faults(pid: int | str = "self") -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def test_a_child_that_fails_has_ended_and_the_parent_goes_on(child: Make) -> None:
    one = child(does=lambda: False)
    assert one.status() == 1

    def does() -> None:
        raise ValueError("of the child")

    two = child(does=does)
    assert two.status() == 1
    three = child()
    three.start()
    assert three.status() == 0


def test_what_the_child_closes_and_enters_is_its_own(child: Make, tmp_path: Path) -> None:
    before, umask, directory = sorted(os.listdir("/proc/self/fd")), os.umask(0o22), os.getcwd()
    os.umask(umask)

    def does() -> None:
        os.chdir(tmp_path)
        os.umask(0o77)
        os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        os.close(0)

    one = child(does=does)
    one.start().close()
    assert one.status() == 0
    one.mine.close()
    left = set(os.listdir("/proc/self/fd")) - {str(one.pidfd)}
    assert left == set(before) and os.getcwd() == directory
    assert os.umask(umask) == umask


def test_signals_of_the_childs_are_not_the_interpreters(child: Make) -> None:
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}

    def does() -> None:
        clone_vm.unignore(signal.SIGPIPE)

    one = child(does=does)
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{one.pid}/status").read_text().splitlines())
    assert not int(status["SigIgn"], 16) >> (signal.SIGPIPE - 1) & 1
    signal.pidfd_send_signal(one.pidfd, signal.SIGTERM)  # pid 1 of its namespace, which would ignore it
    assert one.status() == 128 + signal.SIGTERM
    with pytest.raises(BrokenPipeError):
        one.mine.send("Go")  # SIGPIPE is ignored here as before


def test_a_parent_that_ends_before_its_go_takes_the_child_along(child: Make) -> None:
    one = child()
    one.mine.close()
    assert one.status() == 1


def test_who_only_looks_whether_somebody_listens_is_passed_over(child: Make) -> None:
    one = child("/bin/sh", "-c", "exit 3")
    one.mine.send("Go")
    one.connect().close()
    other = one.connect()
    other.send("Go")  # no Start
    with pytest.raises(sync.Closed):
        other.receive("Accepted")
    assert one.lives()
    one.start(goes=False)
    assert one.status() == 3


def test_one_that_is_told_to_start_by_its_parent_waits_for_nobody_else(child: Make) -> None:
    one = child("/bin/sh", "-c", "exit 4")
    one.mine.send("Start")
    sync.until_executed(one.mine)
    assert one.status() == 4


@pytest.mark.parametrize(
    ("args", "bad", "step", "code", "says"),
    [
        (["/no/such"], "", "exec", errno.ENOENT, "exec /the/command: no such file or directory (ENOENT)"),
        (["/etc/passwd"], "", "exec", errno.EACCES, "exec /the/command: permission denied (EACCES)"),
        (["/bin/true", "x" * (128 << 10)], "", "exec", errno.E2BIG, "argument list too long (E2BIG)"),
        (["/bin/true"], "capset", "capset", errno.EFAULT, "capset capabilities: EFAULT"),
    ],
)
def test_a_call_that_fails_is_told_with_its_step(
    child: Make, args: list[str], bad: str, step: str, code: int, says: str
) -> None:
    one = child(*args, bad=bad)
    channel = one.start()
    with pytest.raises(RuntimeFailure) as caught:
        sync.until_executed(channel)
    assert (caught.value.step, caught.value.errno) == (step, code) and says in str(caught.value)
    assert one.status() == 1


def test_a_child_that_is_killed_in_the_middle_takes_its_parent_along(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(writer, 2)
            Child(tmp_path, ["/bin/true"], lambda: os.kill(os.getpid(), signal.SIGKILL), 0, "")
        finally:
            os._exit(99)  # an interpreter in the middle of something would come here
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        assert file.read() == "last words"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_a_block_takes_no_more_than_its_size() -> None:
    with pytest.raises(OSError, match="11 bytes into a block"):
        clone_vm.Block(10).put(bytes(11))


def test_a_stranger_to_x86_64_has_none_of_this(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clone_vm, "_born", None)
    with pytest.raises(OSError, match="clone3: ENOSYS"):
        clone_vm.clone(0, clone_vm.Block(100), lambda: True)
