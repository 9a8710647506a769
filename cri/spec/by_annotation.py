"""What `ocid run` asks for that the CRI has no field for: resource limits of its processes, and filesystems in memory.

    ocid.ulimits    "nofile=1024:4096,nproc=100": setrlimit(2)'s names, soft and hard; -1 is no limit
    ocid.tmpfs      {"/run": "size=64m,mode=755", …}, as JSON: mount(8)'s options for a tmpfs

They are annotations of a container, which a kubelet takes from no pod. Pure. Refuses names, numbers and options that it
does not know, by the annotation's name. Invariant: a tmpfs is nosuid, nodev and noexec unless its options say
otherwise, and no option is anything but tmpfs's own.
See https://docs.kernel.org/filesystems/tmpfs.html.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from cri.marks import TMPFS, ULIMITS
from cri.spec.validate import InvalidRequest

_LIMITS = frozenset(
    ("as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue")
    + ("nice", "nofile", "nproc", "rss", "rtprio", "rttime", "sigpending", "stack")
)
_UNLIMITED = (1 << 64) - 1
_FLAGS = {"suid": "nosuid", "dev": "nodev", "exec": "noexec", "rw": "ro"}
_OPTION = re.compile(
    r"size=[0-9]{1,18}[kmgKMG%]?|nr_blocks=[0-9]{1,18}[kmgKMG]?|nr_inodes=[0-9]{1,18}[kmgKMG]?|mode=[0-7]{1,4}"
    r"|uid=[0-9]{1,10}|gid=[0-9]{1,10}",
    re.ASCII,
)


def rlimits(annotations: Mapping[str, str]) -> list[dict[str, Any]]:
    """runtime-spec `process.rlimits`. Raises InvalidRequest."""
    found: dict[str, dict[str, Any]] = {}
    for word in filter(None, annotations.get(ULIMITS, "").split(",")):
        name, equals, values = word.partition("=")
        soft, colon, hard = values.partition(":")
        if not equals or name.lower() not in _LIMITS:
            names = ", ".join(sorted(_LIMITS))
            raise InvalidRequest(f"annotations[{ULIMITS}]: {word[:60]!r} is not NAME=SOFT[:HARD], with one of {names}")
        low = _limit(word, soft)
        high = _limit(word, hard) if colon else low
        if low > high:
            raise InvalidRequest(f"annotations[{ULIMITS}]: {word[:60]!r} has a soft limit above its hard one")
        kind = f"RLIMIT_{name.upper()}"
        found[kind] = {"type": kind, "soft": low, "hard": high}
    return list(found.values())


def _limit(word: str, text: str) -> int:
    if text in ("-1", "unlimited"):
        return _UNLIMITED
    if not (text.isascii() and text.isdecimal() and int(text) <= _UNLIMITED):
        raise InvalidRequest(f"annotations[{ULIMITS}]: {word[:60]!r} has a limit that is no number")
    return int(text)


def tmpfs(annotations: Mapping[str, str]) -> list[dict[str, Any]]:
    """runtime-spec `mounts` of type tmpfs. Raises InvalidRequest."""
    text = annotations.get(TMPFS, "")
    if not text:
        return []
    try:
        asked = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"annotations[{TMPFS}]: no JSON") from None
    if not isinstance(asked, dict) or not all(isinstance(value, str) for value in asked.values()):
        raise InvalidRequest(f"annotations[{TMPFS}]: expected an object of strings")
    return [
        {"destination": _path(path), "type": "tmpfs", "source": "tmpfs", "options": _options(path, options)}
        for path, options in asked.items()
    ]


def _path(path: str) -> str:
    if not path.startswith("/") or "\0" in path or ".." in path.split("/") or not path.strip("/"):
        raise InvalidRequest(f"annotations[{TMPFS}]: {path[:60]!r} is not an absolute path below the root, without ..")
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def _options(path: str, text: str) -> list[str]:
    flags, own = ["nosuid", "nodev", "noexec"], []
    for word in filter(None, text.split(",")):
        if word in _FLAGS:
            flags = [flag for flag in flags if flag != _FLAGS[word]]
        elif word in _FLAGS.values():
            flags = [*(flag for flag in flags if flag != word), word]
        elif _OPTION.fullmatch(word):
            own.append(word)
        else:
            raise InvalidRequest(f"annotations[{TMPFS}]: unknown option {word[:40]!r} for {path[:60]}")
    return [*flags, *own]
