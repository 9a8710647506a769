"""Commands that are not to lie where each process of theirs lies: those that read bytes which came from elsewhere.

`ocid` goes on from a dump (cri/cli/resumed.py), where nothing is random; an overflow in a library that reads bytes of a
registry, an archive or a layer would know where everything is. Refuses nothing. Invariant: `random` is called before
anything was read, printed or made, and returns in a process that was started as an interpreter.
"""

from __future__ import annotations

import sys

# All that these do is to read or write such bytes, or to serve for days.
COMMANDS = frozenset(("serve", "pull", "push", "load", "save", "copy", "sync", "verify", "sign", "manifest", "doctor"))


def random() -> None:
    """Starts this command again, as an interpreter, where it went on from a dump."""
    dumped = sys.modules.get("runtime.linux.dumped")  # not imported for this
    if dumped is not None and dumped.is_resumed:
        dumped.go_slowly()
