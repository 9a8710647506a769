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


def handle(number: int, handler: Callable[[int, object], None] | None) -> None:
    """sigaction(2): `handler`, or with None the default action."""
    _signal.signal(number, _signal.SIG_DFL if handler is None else handler)


def wake_up(fd: int) -> None:
    """Each handled signal writes a byte to the nonblocking `fd`; -1 ends it."""
    _signal.set_wakeup_fd(fd, warn_on_full_buffer=False)


def block(*numbers: int) -> None:
    """pthread_sigmask(3) with SIG_BLOCK."""
    _signal.pthread_sigmask(_signal.SIG_BLOCK, numbers)


def wait_for(*numbers: int) -> int:
    """sigwait(3)."""
    return int(_signal.sigwait(numbers))
