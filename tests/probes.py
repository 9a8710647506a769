"""Programs that a container runs for a test: the host's interpreter, bound in, and the answers of system calls.

busybox calls what it needs; a filter, a policy or a limit is asked by calling something by its number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from tests.bundles import Bundle, Result

_CALL = """
import ctypes, json, os
_libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    result = _libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, args))
    return -ctypes.get_errno() if result == -1 else result
"""


def interpreter(bundle: Bundle) -> Bundle:
    """Binds the host's /usr into the container, read-only, so that /usr/bin/python3 is there; the bundle itself."""
    for name in ("lib", "lib32", "lib64"):
        if Path("/", name).is_symlink():
            (bundle.rootfs / name).symlink_to(os.readlink(f"/{name}"))
    return bundle.mount("/usr", "bind", "/usr", "rbind", "ro", "nosuid")


def python(script: str) -> list[str]:
    """The arguments that run `script`, which has `call(number, *args)`: the result of a system call, or -errno."""
    return ["/usr/bin/python3", "-I", "-S", "-c", _CALL + script]


def asking(bundle: Bundle, calls: Iterable[tuple[int, ...]]) -> Bundle:
    """Makes the container print what the kernel answers to `calls`; see `answers`."""
    interpreter(bundle)
    bundle.process["args"] = python(f"print(json.dumps([call(*each) for each in {list(calls)!r}]))")
    return bundle


def answers(result: Result) -> list[int]:
    """What a container made by `asking` has printed."""
    found: list[int] = json.loads(result.ok())
    return found
