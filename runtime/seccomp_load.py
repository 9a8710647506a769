"""Puts a compiled seccomp filter in force.

Refuses nothing: the kernel does. Invariant: apart from runtime.seccomp, so that an exec, whose filter was compiled for
its container's init, loads nothing that parses or compiles profiles.
"""

from __future__ import annotations

import errno

from runtime.errors import RuntimeFailure
from runtime.linux import seccomp
from runtime.linux.libc import KernelError


def load(code: bytes, flags: int = 0) -> int:
    """Puts the filter on this thread, for good. Returns the listener, which is the caller's, or -1 where `flags` ask
    for none. Raises RuntimeFailure."""
    try:
        listener = seccomp.set_mode_filter(code, flags)
        return listener if flags & seccomp.SECCOMP_FILTER_FLAG_NEW_LISTENER else -1
    except KernelError as error:
        raise not_loaded(error) from error


def not_loaded(error: KernelError) -> RuntimeFailure:
    """What is said of a filter that the kernel does not take."""
    failure = RuntimeFailure.of(error, step="seccomp", what="load the seccomp filter")
    if error.errno == errno.EACCES:
        failure.hint = "without noNewPrivileges this takes CAP_SYS_ADMIN: load it before capabilities are dropped"
    return failure
