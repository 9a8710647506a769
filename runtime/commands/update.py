"""`ocirun update`: new limits for a container, from flags or from a linux.resources object.

Refuses what is no number before it looks at the container. Invariant: all of it is in force afterwards, or nothing of
it; an update that says nothing changes nothing.
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
    "cpu-rt-period": ("cpu", "realtimePeriod", "int"),
    "cpu-rt-runtime": ("cpu", "realtimeRuntime", "int"),
    "cpu-idle": ("cpu", "idle", "int"),
    "cpuset-cpus": ("cpu", "cpus", "str"),
    "cpuset-mems": ("cpu", "mems", "str"),
    "pids-limit": ("pids", "limit", "int"),
    "blkio-weight": ("blockIO", "weight", "int"),
}
_RESCTRL = ("l3-cache-schema", "mem-bw-schema")
# As runc does: no kernel of today has such a limit apart from that of memory.
_IGNORED = ("kernel-memory", "kernel-memory-tcp")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
FLAGS = {
    "update": (
        Flag(
            ("resources", "r"),
            "str",
            "file with a linux.resources object, - for stdin; of the flags then only schemata",
        ),
        *(Flag((name,), "str", f"linux.resources.{group}.{field}") for name, (group, field, _) in _FIELDS.items()),
        Flag(("l3-cache-schema",), "str", "linux.intelRdt.l3CacheSchema"),
        Flag(("mem-bw-schema",), "str", "linux.intelRdt.memBwSchema"),
        *(Flag((name,), "str", "ignored, with a warning") for name in _IGNORED),
    )
}
WORDS = {"update": "CONTAINER"}


def run(context: Context, _name: str, values: Values) -> int:
    if len(values.words) != 1:
        raise UsageError('"CONTAINER" is required, and nothing after it')
    if values.text("resources"):
        lifecycle.update(context.root, values.words[0], _from_file(values.text("resources")), _schemata(values))
        return 0
    wanted = from_flags(values)
    for name in _IGNORED:
        if values.text(name):
            context.warn(f"Setting --{name} is ignored and will be removed")
    lifecycle.update(context.root, values.words[0], wanted, _schemata(values))
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
            if name == "pids-limit" and value == 0:
                continue  # runc's default for the flag, so no wish; in a document 0 is one
            wanted.setdefault(group, {})[field] = value
    return dict(wanted)


def _schemata(values: Values) -> tuple[str, ...]:
    """The lines for resctrl. Raises RuntimeFailure where there is none."""
    lines = tuple(line for name in _RESCTRL if (line := values.text(name)))
    if lines:
        from runtime import intel_rdt  # for machines that have it

        if "\n" in "".join(lines):
            raise UsageError("--l3-cache-schema, --mem-bw-schema: one line is one schema")
        try:
            intel_rdt.mount_point()
        except RuntimeFailure as failure:
            cache = values.text(_RESCTRL[0])
            what = "Intel RDT/CAT: l3 cache schema" if cache else "Intel RDT/MBA: memory bandwidth schema"
            failure.message = f"{what} is not enabled"
            raise
    return lines


def number(name: str, text: str, *, units: bool) -> int:
    """An integer; with `units` k, m, g, t or p may follow, "b" or "ib" after that, and a fraction be before. Raises
    UsageError."""
    plain, factor = text.lower(), 1
    if units:
        plain = plain.removesuffix("b")
        plain = plain.removesuffix("i") if plain[-2:-1] in _UNITS else plain
        unit = plain[-1:] if plain[-1:] in _UNITS else ""
        plain, factor = plain.removesuffix(unit).rstrip(" "), _UNITS[unit]
    digits = plain.removeprefix("-")
    whole, dot, fraction = digits.partition(".")
    fits = digits.isascii() and len(digits) < 20 and whole.isdecimal()
    if dot:
        fits = fits and units and plain == digits and fraction.isdecimal()
    if not fits:
        raise UsageError(f"--{name}: {text[:40]!r} is no number")
    if not dot:
        return int(plain) * factor
    tenths: int = 10 ** len(fraction)
    return int(whole) * factor + int(fraction) * factor // tenths
