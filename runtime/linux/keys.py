"""keyctl(2), as far as a container's start needs it. Refuses policy."""

from __future__ import annotations

import os

from runtime.linux.libc import syscall

KEYCTL_JOIN_SESSION_KEYRING = 1  # linux/keyctl.h


def join_session_keyring(name: str) -> int:
    """KEYCTL_JOIN_SESSION_KEYRING: a new (or that) session keyring for this process; returns its serial."""
    return syscall("keyctl", KEYCTL_JOIN_SESSION_KEYRING, os.fsencode(name), subject=f"session keyring {name}")
