"""Signals without the enums of the standard module, which cost 5 ms to import and 200 KiB of a forked process to use.

Refuses nothing and keeps nothing. Numbers are those of asm/signal.h, the same on x86-64 and arm64.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SIGHUP, SIGINT, SIGQUIT, SIGKILL, SIGPIPE, SIGTERM, SIGCHLD, SIGSTOP, SIGXFSZ = 1, 2, 3, 9, 13, 15, 17, 19, 25
NSIG = 65
KEPT_BY_LIBC = (32, 33)  # nptl(7)
_ALL = frozenset(range(1, NSIG)) - {*KEPT_BY_LIBC}


def handle(number: int, handler: Callable[[int, object], None] | None) -> None:
    """sigaction(2): `handler`, or with None the default action."""
    _signal.signal(number, _signal.SIG_DFL if handler is None else handler)


def ignored() -> list[int]:
    """Those that the interpreter has set, or found, to be ignored."""
    return [number for number in range(1, NSIG) if _signal.getsignal(number) == _signal.SIG_IGN]


def wake_up(fd: int) -> None:
    """Each handled signal writes a byte to the nonblocking `fd`; -1 ends it."""
    _signal.set_wakeup_fd(fd, warn_on_full_buffer=False)


def block(*numbers: int) -> None:
    """pthread_sigmask(3) with SIG_BLOCK."""
    _signal.pthread_sigmask(_signal.SIG_BLOCK, numbers)


def as_at_start() -> None:
    """The dispositions that an interpreter has set when it starts, and what it has found, for a process that never was
    started as one: it knows those of another process, which may have been started by who ignores others."""
    with open("/proc/self/status", "rb", buffering=0) as file:
        found = int(file.read().partition(b"SigIgn:")[2].split(maxsplit=1)[0], 16)
    for number in _ALL - {SIGKILL, SIGSTOP}:
        if number in (SIGPIPE, SIGXFSZ) or found >> (number - 1) & 1:
            wanted = _signal.SIG_IGN
        else:
            wanted = _signal.default_int_handler if number == SIGINT else _signal.SIG_DFL
        # What the kernel has is known to the interpreter alone by what was set through it.
        if number in (SIGINT, SIGPIPE, SIGXFSZ) or _signal.getsignal(number) != wanted:
            _signal.signal(number, wanted)


def block_all() -> set[int]:
    """As `block`, all that can be. The signals that were blocked before, for `set_mask`."""
    return set(_signal.pthread_sigmask(_signal.SIG_BLOCK, _ALL))


def set_mask(numbers: set[int]) -> None:
    """pthread_sigmask(3) with SIG_SETMASK."""
    _signal.pthread_sigmask(_signal.SIG_SETMASK, numbers)


def wait_for(*numbers: int) -> int:
    """sigwait(3)."""
    return int(_signal.sigwait(numbers))
