"""What a container is called at systemd, and its limits in systemd's words: pure functions, no bus.

    linux.cgroupsPath      unit                   cgroup
    machine.slice:pod:a    pod-a.scope            /machine.slice/pod-a.scope
    a-b.slice:pod:a        pod-a.scope            /a.slice/a-b.slice/pod-a.scope
    (none), id a           ocirun-a.scope         /system.slice/ocirun-a.scope

A user's are below the cgroup of his systemd, without a path in its user.slice.

systemd gets the limits that it has words for, so that it never puts others into force on its own; what it has none for
(devices among them, see `properties`) is written to the cgroup alone, which is the container's (Delegate=). Refuses
unit names that systemd would not take, units that are no scope, and unit properties from annotations that are not in a
short list: an annotation may bound a container's life or order its end, never run anything or loosen a limit (S60).
"""

from __future__ import annotations

from runtime.cgroups.dbus import Variant
from runtime.cgroups.v2 import io_weight, shares_to_weight, swap_only
from runtime.errors import RuntimeFailure
from runtime.linux.record import Record

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from collections.abc import Iterable

    from runtime.cgroups.plan import Now
    from runtime.resources import Resources

    Properties = list[tuple[str, Variant]]

SLICE, USER_SLICE, PREFIX = "system.slice", "user.slice", "ocirun"
ANNOTATION = "org.systemd.property."
_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:-_.\\@")
_UNIT_LENGTH = 255  # UNIT_NAME_MAX of systemd
_INFINITY = (1 << 64) - 1
# systemd takes a quota as microseconds for each second and keeps it as CPUQuota= in whole percents, cut off.
_QUOTA_STEP = 10_000
# property: signature of its value
_FROM_ANNOTATIONS = {
    "After": "as",
    "Before": "as",
    "CollectMode": "s",
    "DefaultDependencies": "b",
    "Description": "s",
    "RuntimeMaxUSec": "t",
    "TimeoutStopUSec": "t",
}


class Scope(Record):
    """A transient unit; `slice` is the unit it is in, `below` the cgroup of the systemd that makes it."""

    slice: str
    unit: str
    below: str = ""

    @property
    def relative(self) -> str:
        """Its cgroup, without a slash at either end."""
        return f"{self.below}{expand_slice(self.slice)}/{self.unit}".strip("/")


def scope_for(cgroups_path: str, container_id: str, usual: str = SLICE) -> Scope:
    """The unit that linux.cgroupsPath ("slice:prefix:name", each of the first two may be empty) names, in the slice
    `usual` where it names none.
    Raises RuntimeFailure."""
    if cgroups_path:
        parts = cgroups_path.split(":")
        if len(parts) != 3:
            got = repr(cgroups_path[:80])
            raise _bad(
                f'expected cgroupsPath to be of format "slice:prefix:name" for systemd cgroups, got {got} instead'
            )
        parent, prefix, name = parts
    else:
        parent, prefix, name = "", PREFIX, container_id
    if name.endswith(".slice"):
        raise _bad(f"{name[:80]!r}: a slice holds no process of its own; name a scope")
    if not name:
        raise _bad(f"{cgroups_path[:80]!r} names no unit: the part after the second colon is empty")
    parent = parent or usual
    expand_slice(parent)
    return Scope(parent, _checked(f"{prefix}-{name}.scope" if prefix else f"{name}.scope"))


def expand_slice(name: str) -> str:
    """systemd.slice(5): "a-b.slice" is "/a.slice/a-b.slice", "-.slice" the top, "". Raises RuntimeFailure."""
    stem = _checked(name).removesuffix(".slice")
    if stem == name or not stem:
        raise _bad(f"{name[:80]!r} is no slice: its name has to end in .slice")
    if stem == "-":
        return ""
    words = stem.split("-")
    if "" in words:
        raise _bad(f"{name[:80]!r} is no slice: a part between dashes is empty")
    return "".join(f"/{'-'.join(words[: count + 1])}.slice" for count in range(len(words)))


def _checked(unit: str) -> str:
    if len(unit) > _UNIT_LENGTH or set(unit) - _CHARACTERS or unit[:1] in ("", "."):
        raise _bad(f"{unit[:80]!r} is no unit's name: letters, digits and :-_.@\\ only, at most {_UNIT_LENGTH}")
    return unit


def _bad(problem: str) -> RuntimeFailure:
    return RuntimeFailure(f"linux.cgroupsPath: {problem}", step="cgroup", code="invalid_argument")


# ------------------------------------------------------------------------------------------------------ properties


def start_properties(scope: Scope, pid: int, container_id: str, extra: Properties) -> Properties:
    """What makes the unit: who is in it, where it is, and that its cgroup is ours to write to."""
    made: Properties = [
        ("Description", Variant("s", f"ocirun container {container_id}")),
        ("Slice", Variant("s", scope.slice)),
        ("PIDs", Variant("au", [pid])),
        ("Delegate", Variant("b", True)),
        ("DefaultDependencies", Variant("b", False)),
        # A failed unit would keep its name, and so the container's, after everything of it is gone.
        ("CollectMode", Variant("s", "inactive-or-failed")),
        *((f"{name}Accounting", Variant("b", True)) for name in ("CPU", "Memory", "IO", "Tasks")),
    ]
    given = dict(extra)
    return [(name, value) for name, value in made if name not in given] + extra


def properties(resources: Resources, now: Now) -> Properties:
    """The limits that systemd has words for; `now` is what is in force, of which an update may change a part.

    Not devices: our program on the cgroup holds them, and systemd, which has been told of none, neither adds a second
    one nor takes ours away (threats O61)."""
    found: Properties = []
    _memory(resources, now, found)
    _cpu(resources, now, found)
    if resources.cpuset.cpus is not None:
        found.append(("AllowedCPUs", Variant("ay", bits(resources.cpuset.cpus))))
    if resources.cpuset.mems is not None:
        found.append(("AllowedMemoryNodes", Variant("ay", bits(resources.cpuset.mems))))
    if resources.pids.limit is not None:
        limit = resources.pids.limit
        found.append(("TasksMax", Variant("t", _INFINITY if limit < 0 else max(limit, 1))))
    if resources.blkio.weight is not None:
        found.append(("IOWeight", Variant("t", io_weight(resources.blkio.weight))))
    known = dict(resources.unified)
    for file, name in _UNIFIED_LIMITS.items():
        if file in known:
            _replace(found, name, Variant("t", _limit_of(file, known[file])))
    for file, name in (("cpuset.cpus", "AllowedCPUs"), ("cpuset.mems", "AllowedMemoryNodes")):
        if known.get(file, "").strip():
            _replace(found, name, Variant("ay", bits(known[file].strip())))
    if "cpu.max" in known:
        _unified_quota(known["cpu.max"], found)
    return found


_UNIFIED_LIMITS = {
    "memory.max": "MemoryMax",
    "memory.high": "MemoryHigh",
    "memory.low": "MemoryLow",
    "memory.min": "MemoryMin",
    "memory.swap.max": "MemorySwapMax",
    "pids.max": "TasksMax",
    "cpu.weight": "CPUWeight",
}


def _memory(resources: Resources, now: Now, found: Properties) -> None:
    memory = resources.memory
    swap = swap_only(memory, now)
    for name, value in (("MemoryMax", memory.limit), ("MemoryLow", memory.reservation), ("MemorySwapMax", swap)):
        if value is not None:
            found.append((name, Variant("t", _INFINITY if value < 0 else value)))


def _cpu(resources: Resources, now: Now, found: Properties) -> None:
    cpu = resources.cpu
    if cpu.shares is not None and cpu.idle != 1:
        found.append(("CPUWeight", Variant("t", shares_to_weight(cpu.shares))))
    if cpu.idle == 1:
        found.append(("CPUWeight", Variant("t", 0)))  # CPUWeight=idle
    if cpu.quota is not None or cpu.period is not None:
        quota = cpu.quota if cpu.quota is not None else now.cpu_quota
        period = cpu.period or now.cpu_period or 100_000
        found.append(("CPUQuotaPerSecUSec", Variant("t", _quota(-1 if quota is None else quota, period))))
        found.append(("CPUQuotaPeriodUSec", Variant("t", period)))


def _quota(quota: int, period: int) -> int:
    if quota < 0:
        return _INFINITY
    return -(-quota * 1_000_000 // period // _QUOTA_STEP) * _QUOTA_STEP


def _unified_quota(text: str, found: Properties) -> None:
    words = text.split()
    if not words or not all(word == "max" or word.isdecimal() for word in words) or len(words) > 2:
        raise RuntimeFailure(f"linux.resources.unified.cpu.max: {text[:40]!r} is no quota", code="invalid_argument")
    period = int(words[1]) if len(words) == 2 and words[1] != "max" else 100_000
    quota = -1 if words[0] == "max" else int(words[0])
    _replace(found, "CPUQuotaPerSecUSec", Variant("t", _quota(quota, max(period, 1))))
    _replace(found, "CPUQuotaPeriodUSec", Variant("t", period))


def _limit_of(file: str, text: str) -> int:
    word = text.strip()
    if word == "max":
        return _INFINITY
    if not word.isdecimal() or int(word) > _INFINITY:
        raise RuntimeFailure(f"linux.resources.unified.{file}: {word[:40]!r} is no limit", code="invalid_argument")
    return int(word)


def _replace(found: Properties, name: str, value: Variant) -> None:
    """A unified key says the last word, as it does in the cgroup."""
    found[:] = [item for item in found if item[0] != name]
    found.append((name, value))


def bits(cpus: str) -> bytes:
    """A list such as "0-3,7" as systemd's bit mask, the lowest first. Raises RuntimeFailure."""
    mask = 0
    for part in cpus.split(","):
        first, _, last = part.partition("-")
        if ":" in part or not first.isdecimal() or (last and not last.isdecimal()) or int(last or first) > 8191:
            raise RuntimeFailure(
                f"linux.resources.cpu: {part[:40]!r} is no range that systemd takes", code="invalid_argument"
            )
        for number in range(int(first), int(last or first) + 1):
            mask |= 1 << number
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


# ----------------------------------------------------------------------------------------------------- annotations


def annotated(annotations: Iterable[tuple[str, str]]) -> Properties:
    """The unit properties that annotations ask for: org.systemd.property.NAME, the value in GVariant's text format.
    Raises RuntimeFailure for every name that is not in the list, and for a value of another type."""
    found: Properties = []
    for key, text in annotations:
        if not key.startswith(ANNOTATION):
            continue
        name = key.removeprefix(ANNOTATION)
        scale = 1
        if name.endswith("Sec") and not name.endswith("USec"):
            name, scale = f"{name.removesuffix('Sec')}USec", 1_000_000
        kind = _FROM_ANNOTATIONS.get(name)
        if kind is None:
            raise _refused(key, f"is not one of {', '.join(sorted(_FROM_ANNOTATIONS))}")
        found.append((name, Variant(kind, _value(key, kind, text.strip(), scale))))
    return found


def _value(key: str, kind: str, text: str, scale: int) -> object:
    if kind == "b" and text in ("true", "false"):
        return text == "true"
    if kind == "t":
        number = text.removeprefix("uint64").removeprefix("uint32").removeprefix("int32").strip()
        if number.isascii() and number.isdecimal() and int(number) * scale <= _INFINITY:
            return int(number) * scale
    if kind == "s" and (word := _quoted(text)) is not None:
        return word
    if kind == "as" and text[:1] == "[" and text[-1:] == "]":
        words = [_quoted(part.strip()) for part in text[1:-1].split(",") if part.strip()]
        if None not in words:
            return words
    wanted = {"b": "true or false", "t": "a number, such as uint64 5", "s": "a quoted word", "as": "['a', 'b']"}
    raise _refused(key, f"expected {wanted[kind]}, got {text[:40]!r}")


def _quoted(text: str) -> str | None:
    """The inside of 'word' or "word"; nothing in it means anything, so neither quotes nor backslashes may be there."""
    inner = text[1:-1]
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        return None
    return inner if inner.isprintable() and not set(inner) & set("'\"\\%") else None


def _refused(key: str, problem: str) -> RuntimeFailure:
    return RuntimeFailure(f"annotations.{key[:80]}: {problem}", step="cgroup", code="invalid_argument")
