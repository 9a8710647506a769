"""Device rules of config.json as one policy, and the policy as v1 writes or as a v2 eBPF program.

The kernel's v1 model is the common ground: a default and exceptions to it. Refuses a rule that takes a part out of a
wider exception, which v1 would ignore in silence. Invariant: the default devices that every container gets stay
usable, and an update neither closes a permitted device for a moment nor leaves a second program behind (threats O61).
"""

from __future__ import annotations

import os

from runtime.errors import RuntimeFailure
from runtime.linux import bpf
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


# ------------------------------------------------------------------------------------------------------------- v2

# linux/bpf_common.h and linux/bpf.h
_LDX_W, _ALU64_AND_K, _ALU64_RSH_K, _MOV64_K, _MOV64_X, _AND64_K = 0x61, 0x57, 0x77, 0xB7, 0xBF, 0x57
_JNE_K32, _JEQ_K32, _EXIT = 0x56, 0x16, 0x95  # BPF_JMP32: a major number may use all 32 bits
_R0, _R1, _TYPE, _ACCESS, _MAJOR, _MINOR, _SCRATCH = 0, 1, 2, 3, 4, 5, 6
# linux/bpf.h: struct bpf_cgroup_dev_ctx and its bits
_DEVICE_BITS = {"b": 1, "c": 2}
_ACCESS_BITS = {"m": 1, "r": 2, "w": 4}


def program(wanted: Policy) -> bytes:
    """eBPF: the first exception that matches decides, else the default. Returns 1 to allow, 0 for EPERM."""
    code = [
        bpf.insn(_LDX_W, _TYPE, _R1, 0),
        bpf.insn(_MOV64_X, _ACCESS, _TYPE),
        bpf.insn(_ALU64_AND_K, _TYPE, imm=0xFFFF),
        bpf.insn(_ALU64_RSH_K, _ACCESS, imm=16),
        bpf.insn(_LDX_W, _MAJOR, _R1, 4),
        bpf.insn(_LDX_W, _MINOR, _R1, 8),
    ]
    for key, held in wanted.exceptions:
        code += _exception(key, held, allow=not wanted.allow)
    code += [bpf.insn(_MOV64_K, _R0, imm=int(wanted.allow)), bpf.insn(_EXIT)]
    return b"".join(code)


def _exception(key: Key, held: str, *, allow: bool) -> list[bytes]:
    kind, major, minor = key
    bits = sum(_ACCESS_BITS[letter] for letter in held)
    tests = [(_JNE_K32, _TYPE, _DEVICE_BITS[kind])]
    if major >= 0:
        tests.append((_JNE_K32, _MAJOR, major))
    if minor >= 0:
        tests.append((_JNE_K32, _MINOR, minor))
    body: list[tuple[int, int, int]] = list(tests)
    prefix = []
    if bits != 7:
        # To allow, nothing beyond the exception may be asked for; to deny, anything in it is enough.
        prefix = [
            bpf.insn(_MOV64_X, _SCRATCH, _ACCESS),
            bpf.insn(_AND64_K, _SCRATCH, imm=~bits & 7 if allow else bits),
        ]
        body.append((_JNE_K32 if allow else _JEQ_K32, _SCRATCH, 0))
    verdict = [bpf.insn(_MOV64_K, _R0, imm=int(allow)), bpf.insn(_EXIT)]
    lines: list[bytes] = []
    total = len(body) + len(prefix) + len(verdict)
    for jump, register, value in body:
        if register == _SCRATCH:
            lines += prefix
        lines.append(bpf.insn(jump, register, off=total - len(lines) - 1, imm=value))
    return lines + verdict


def attach(cgroup_fd: int, wanted: Policy) -> None:
    """Puts the program of `wanted` on a v2 cgroup in place of the one there; a failure leaves the old one in force.

    Programs of several owners all have to say yes, so one left behind would keep an old refusal in force for ever:
    several (left by another runtime, or by a kill in between) are all taken off once the new one is on.
    """
    new = bpf.bpf_prog_load_device(program(wanted))
    held = [new]
    try:
        for number in bpf.bpf_prog_query(cgroup_fd):
            held.append(bpf.bpf_prog_get_fd_by_id(number))
        old = held[1:]
        bpf.bpf_prog_attach(cgroup_fd, new, old[0] if len(old) == 1 else -1)
        if len(old) > 1:
            for fd in old:
                bpf.bpf_prog_detach(cgroup_fd, fd)
    finally:
        _close_all(held)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
