"""Device rules of config.json as one policy, and the policy as v1 writes (as a v2 program: devices_v2).

The kernel's v1 model is the common ground: a default and exceptions to it. Refuses a rule that takes a part out of a
wider exception, which v1 would ignore in silence. Invariant: the default devices that every container gets stay
usable, and an update closes no permitted device for a moment (threats O61).
"""

from __future__ import annotations

from runtime.errors import RuntimeFailure
from runtime.linux.record import Record
from runtime.resources import DeviceRule

# runtime-spec, "Default Devices", with the pseudo terminals, and mknod of everything: making a node opens nothing.
DEFAULT_DEVICES = (
    DeviceRule(True, "c", -1, -1, "m"),
    DeviceRule(True, "b", -1, -1, "m"),
    DeviceRule(True, "c", 1, 3, "rwm"),  # null
    DeviceRule(True, "c", 1, 5, "rwm"),  # zero
    DeviceRule(True, "c", 1, 7, "rwm"),  # full
    DeviceRule(True, "c", 1, 8, "rwm"),  # random
    DeviceRule(True, "c", 1, 9, "rwm"),  # urandom
    DeviceRule(True, "c", 5, 0, "rwm"),  # tty
    DeviceRule(True, "c", 5, 1, "rwm"),  # console
    DeviceRule(True, "c", 5, 2, "rwm"),  # ptmx
    DeviceRule(True, "c", 136, -1, "rwm"),  # pts/*
)

Key = tuple[str, int, int]


class Policy(Record):
    """What is not an exception is allowed iff `allow`; exceptions are (device, access), sorted."""

    allow: bool
    exceptions: tuple[tuple[Key, str], ...]

    def describe(self) -> str:
        words = [
            f"{kind} {_number(major)}:{_number(minor)} {access}" for (kind, major, minor), access in self.exceptions
        ]
        return f"{'allow' if self.allow else 'deny'} all but {', '.join(words) or 'nothing'}"


def policy(rules: tuple[DeviceRule, ...]) -> Policy:
    """The policy of `rules`, applied in order from "deny all", and of the default devices after them."""
    allow, exceptions = False, dict[Key, str]()
    for index, rule in enumerate((*rules, *DEFAULT_DEVICES)):
        key = (rule.type, rule.major, rule.minor)
        if rule.type == "a":
            allow, exceptions = rule.allow, {}
        elif rule.allow != allow:
            exceptions[key] = _union(exceptions.get(key, ""), rule.access)
        else:
            where = f"devices[{index}]" if index < len(rules) else "devices: a default device"
            _take_out(exceptions, key, rule.access, where)
    return Policy(allow, tuple(sorted(exceptions.items())))


def _take_out(exceptions: dict[Key, str], key: Key, access: str, where: str) -> None:
    """Removes from the exceptions what a rule that says the default again covers."""
    for other, held in list(exceptions.items()):
        if other[0] != key[0] or not _overlap(other, key) or not set(held) & set(access):
            continue
        if not _covers(key, other):
            raise RuntimeFailure(
                f"linux.resources.{where}: {_text(key)} cannot be taken out of {_text(other)}, a wider rule before it",
                hint="name the devices one by one",
                code="invalid_argument",
            )
        left = "".join(letter for letter in held if letter not in access)
        if left:
            exceptions[other] = left
        else:
            del exceptions[other]


def _covers(wide: Key, narrow: Key) -> bool:
    return all(a in (-1, b) for a, b in zip(wide[1:], narrow[1:], strict=True))


def _overlap(one: Key, two: Key) -> bool:
    return all(-1 in (a, b) or a == b for a, b in zip(one[1:], two[1:], strict=True))


def _union(one: str, two: str) -> str:
    return "".join(letter for letter in "rwm" if letter in one + two)


def _number(value: int) -> str:
    return "*" if value < 0 else str(value)


def _text(key: Key) -> str:
    return f"{key[0]} {_number(key[1])}:{_number(key[2])}"


# ------------------------------------------------------------------------------------------------------------- v1


def v1_current(listing: str) -> Policy:
    """devices.list as a policy. "a *:* rwm" means that everything is allowed and hides the exceptions there are."""
    exceptions: dict[Key, str] = {}
    for line in listing.splitlines():
        kind, numbers, access = line.split()
        if kind == "a":
            return Policy(True, ())
        major, minor = (-1 if part == "*" else int(part) for part in numbers.split(":"))
        exceptions[kind, major, minor] = _union("", access)
    return Policy(False, tuple(sorted(exceptions.items())))


def v1_changes(current: Policy, wanted: Policy) -> list[tuple[str, str]]:
    """(file, value) writes that lead from one policy to the other; what both allow stays allowed all the while."""
    if wanted.allow:
        # Whatever was denied is hidden from us: start anew. Only a cgroup without children takes this (EINVAL).
        return [("devices.allow", "a")] + [("devices.deny", f"{_text(key)} {held}") for key, held in wanted.exceptions]
    if current.allow:
        return [("devices.deny", "a")] + [("devices.allow", f"{_text(key)} {held}") for key, held in wanted.exceptions]
    before, after = dict(current.exceptions), dict(wanted.exceptions)
    changes = []
    for file, old, new in (("devices.allow", before, after), ("devices.deny", after, before)):
        for key, held in new.items():
            missing = "".join(letter for letter in held if letter not in old.get(key, ""))
            if missing:
                changes.append((file, f"{_text(key)} {missing}"))
    return changes
