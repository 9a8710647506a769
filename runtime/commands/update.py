"""`ocirun update`: new limits for a container, from flags or from a linux.resources object.

Refuses an update that says nothing. Invariant: all of it is in force afterwards, or nothing of it.
"""

from __future__ import annotations

import os

from runtime import lifecycle
from runtime.errors import RuntimeFailure
from runtime.fields import decode
from runtime.linux.files import AT_FDCWD, read_bounded
from runtime.options import Flag, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.cli import Context
    from runtime.options import Values

_MAX_RESOURCES = 1 << 20
# flag: (object, field, what it takes)
_FIELDS = {
    "memory": ("memory", "limit", "bytes"),
    "memory-reservation": ("memory", "reservation", "bytes"),
    "memory-swap": ("memory", "swap", "bytes"),
    "cpu-period": ("cpu", "period", "int"),
    "cpu-quota": ("cpu", "quota", "int"),
    "cpu-burst": ("cpu", "burst", "int"),
    "cpu-share": ("cpu", "shares", "int"),
    "cpu-idle": ("cpu", "idle", "int"),
    "cpuset-cpus": ("cpu", "cpus", "str"),
    "cpuset-mems": ("cpu", "mems", "str"),
    "pids-limit": ("pids", "limit", "int"),
    "blkio-weight": ("blockIO", "weight", "int"),
}
_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
FLAGS = {
    "update": (
        Flag(("resources", "r"), "str", "file with a linux.resources object, - for stdin; then no other flag counts"),
        *(Flag((name,), "str", f"linux.resources.{group}.{field}") for name, (group, field, _) in _FIELDS.items()),
    )
}
WORDS = {"update": "CONTAINER"}


def run(context: Context, _name: str, values: Values) -> int:
    if len(values.words) != 1:
        raise UsageError('"CONTAINER" is required, and nothing after it')
    wanted = _from_file(values.text("resources")) if values.text("resources") else from_flags(values)
    if not wanted:
        raise UsageError("there is nothing to update: give a limit or --resources")
    lifecycle.update(context.root, values.words[0], wanted)
    return 0


def _from_file(path: str) -> dict[str, object]:
    if path == "-":
        raw = b""
        while piece := os.read(0, 1 << 16):
            raw += piece
            if len(raw) > _MAX_RESOURCES:
                raise RuntimeFailure(f"stdin: more than {_MAX_RESOURCES} bytes", code="invalid_argument")
    else:
        try:
            raw = read_bounded(AT_FDCWD, path, _MAX_RESOURCES)
        except OSError as error:
            raise RuntimeFailure.of(error, what="read the resources", code="invalid_argument") from None
    document = decode(raw, "resources")
    if not isinstance(document, dict):
        raise RuntimeFailure("resources: expected an object", code="invalid_argument")
    return document


def from_flags(values: Values) -> dict[str, object]:
    """linux.resources as the flags give it. Raises UsageError."""
    wanted: dict[str, dict[str, object]] = {}
    for name, (group, field, kind) in _FIELDS.items():
        if values.text(name):
            value = values.text(name) if kind == "str" else number(name, values.text(name), units=kind == "bytes")
            wanted.setdefault(group, {})[field] = value
    return dict(wanted)


def number(name: str, text: str, *, units: bool) -> int:
    """An integer; with `units` k, m, g or t may follow, and a b. Raises UsageError."""
    plain, factor = text.lower(), 1
    if units:
        plain = plain.removesuffix("b")
        factor = _UNITS.get(plain[-1:], 1)
        plain = plain[:-1] if factor > 1 else plain
    if not (plain.isascii() and plain.removeprefix("-").isdecimal() and len(plain) < 20):
        raise UsageError(f"--{name}: {text[:40]!r} is no number")
    return int(plain) * factor
