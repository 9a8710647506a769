"""A process that takes another's place in its memory, and what is left of the other."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.linux import dumped
from runtime.linux.libc import KernelError
from runtime.linux.process import CLONE_CLEAR_SIGHAND, CLONE_NEWPID, set_child_subreaper, unshare
from runtime.linux.successor import AVAILABLE, orphan, succeed
from tests.support import eventually, needs


@pytest.fixture(autouse=True)
def subreaper() -> Iterator[None]:
    assert AVAILABLE, "this machine is an x86-64 one, whose code is known"
    set_child_subreaper(True)
    yield
    set_child_subreaper(False)


def caller(act: Callable[[int], None]) -> tuple[int, int]:
    """The pid of a forked process that does `act`, which ends in a successor of it, and what that writes to."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            act(writer)
        finally:
            os._exit(99)
    os.close(writer)
    return pid, reader


def heard(take_reader: int) -> str:
    with open(take_reader, encoding="utf-8") as file:
        return file.read()


def reaped(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_the_successor_runs_on_in_python_and_becomes_a_program_and_a_child_of_the_callers_parent() -> None:
    def act(writer: int) -> None:
        words = [str(number) for number in range(1000)]  # memory of the caller's
        pid = succeed(CLONE_CLEAR_SIGHAND)
        os.write(writer, f"{pid} {os.getpid()} {sum(map(int, words))}\n".encode())
        os.dup2(writer, 1)
        os.execv("/bin/sh", ["sh", "-c", "echo $$; exit 7"])

    pid, reader = caller(act)
    own, successor, total, program = heard(reader).split()
    assert own == successor == program and total == "499500"
    assert reaped(pid) == 0
    assert reaped(int(own)) == 7


def test_the_caller_waits_until_the_successor_executes_and_no_page_is_copied() -> None:
    def act(writer: int) -> None:
        before = anonymous()
        block = bytearray(8 << 20)
        succeed(CLONE_CLEAR_SIGHAND)
        for page in range(0, len(block), 4096):
            block[page] = 1
        os.write(writer, f"{before} {anonymous()}".encode())
        signal.pause()

    pid, reader = caller(act)
    before, after = map(int, os.read(reader, 100).split())
    assert after - before < (9 << 10)  # KiB: the block once
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    (successor,) = set(children()) - {pid}
    os.kill(successor, signal.SIGKILL)
    assert (reaped(successor), reaped(pid)) == (-signal.SIGKILL, 0)
    os.close(reader)


def test_an_orphan_goes_on_in_the_memory_of_a_caller_that_has_ended() -> None:
    """No page is copied; the C library has the id of the new process's thread, also once the other has ended."""
    block_of_thread = dumped._pthread_self()

    def act(writer: int) -> None:
        before, parent = anonymous(), os.getpid()
        block = bytearray(8 << 20)
        orphan(block_of_thread + dumped._TID_AT)
        for page in range(0, len(block), 4096):
            block[page] = 1
        eventually(lambda: os.getppid() != parent, what="the caller's end")
        thread = dumped._quad(block_of_thread + dumped._TID_AT) & 0xFFFFFFFF
        forked = os.fork()
        if not forked:
            os._exit(7)
        code = os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1])
        os.write(writer, f"{parent} {os.getpid()} {thread} {os.getppid()} {anonymous() - before} {code}\n".encode())
        signal.raise_signal(signal.SIGKILL)

    for _ in range(20):
        pid, reader = caller(act)
        parent, own, thread, adopter, copied, code = map(int, heard(reader).split())
        assert (parent, thread, adopter, code) == (pid, own, os.getpid(), 7) and own != pid
        assert copied < (10 << 10)  # KiB: the block once
        assert (reaped(pid), reaped(own)) == (0, -signal.SIGKILL)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSEGV])
def test_a_successor_that_dies_at_any_instant_leaves_a_caller_that_ends(end: signal.Signals) -> None:
    """Its stack was used by another since: a caller that came back to it would crash, or go on."""

    def act(writer: int) -> None:
        pid = succeed(CLONE_CLEAR_SIGHAND)
        deeper(200, lambda: os.write(writer, f"{pid}\n".encode()))
        os.kill(os.getpid(), end)

    for _ in range(20):
        pid, reader = caller(act)
        successor = int(heard(reader))
        assert (reaped(successor), reaped(pid)) == (-end, 0)


def test_a_caller_that_is_killed_is_not_missed() -> None:
    def act(writer: int) -> None:
        os.dup2(writer, 1)
        own = os.getpid()
        pid = succeed(CLONE_CLEAR_SIGHAND)
        pidfd = os.pidfd_open(own)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [])
        os.execv("/bin/sh", ["sh", "-c", f"echo {pid}; exit 7"])

    pid, reader = caller(act)
    assert reaped(int(heard(reader))) == 7
    assert reaped(pid) == -signal.SIGKILL


def test_the_pid_is_the_one_outside_of_a_pid_namespace() -> None:
    needs("root")

    def act(writer: int) -> None:
        unshare(CLONE_NEWPID)
        pid = succeed(CLONE_CLEAR_SIGHAND)
        os.write(writer, f"{pid} {os.getpid()}".encode())
        os._exit(0)

    pid, reader = caller(act)
    outside, inside = map(int, heard(reader).split())
    assert inside == 1 and outside != 1
    assert (reaped(outside), reaped(pid)) == (0, 0)


def test_a_refusal_of_the_kernel_is_an_error_and_the_caller_goes_on() -> None:
    with pytest.raises(KernelError) as caught:
        succeed(0x80000000 << 8)  # no flag of clone3(2)
    assert caught.value.call == "clone3" and caught.value.errno


def deeper(levels: int, act: Callable[[], object]) -> None:
    """`act`, far down the stack: by way of C, since calls of Python alone need none of it."""
    if levels:
        max([0], key=lambda _: deeper(levels - 1, act) or 0)
    else:
        act()


def anonymous() -> int:
    """KiB."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1])
    raise AssertionError("no Anonymous")


def children() -> list[int]:
    own = os.getpid()
    return [int(pid) for pid in Path(f"/proc/{own}/task/{own}/children").read_text().split()]
