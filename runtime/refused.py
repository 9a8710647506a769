"""What is said of a system call that failed between Start and execve, in an init that waited in machine code.

Refuses to be imported for starts that succeed. Invariant: each sentence is the one that runtime.init.start has for the
same failure.
"""

from __future__ import annotations

import errno

from runtime import process, seccomp_load
from runtime.errors import RuntimeFailure
from runtime.linux.libc import KernelError


def failure(text: tuple[str, ...]) -> RuntimeFailure:
    """Of a Refused (runtime.shared_birth): errno, place of the step's name among those that follow, the names, and the
    command."""
    try:
        number, step, path = int(text[0]), text[2 + int(text[1])], text[-1]
    except (ValueError, IndexError):
        return RuntimeFailure(f"the other process reported no readable failure: {text!r:.200}")
    if step == "exec":
        return process.not_executed(path, number)
    if step == "seccomp":
        return seccomp_load.not_loaded(KernelError(number, "seccomp", "filter"))
    return RuntimeFailure.of(KernelError(number or errno.EIO, "capset", "capabilities"), step=step)
