"""Device rules: the policy they make, the v1 writes between two policies, and the v2 program run by a small machine."""

from __future__ import annotations

import itertools
import random
import struct

import pytest

from runtime.cgroups import devices, devices_v2
from runtime.cgroups.devices import DEFAULT_DEVICES, Policy, policy
from runtime.errors import RuntimeFailure
from runtime.resources import DeviceRule

DENY_ALL = DeviceRule(False, "a", -1, -1, "rwm")
ALLOW_ALL = DeviceRule(True, "a", -1, -1, "rwm")
DEFAULTS = policy(()).exceptions


def rule(allow: bool, text: str) -> DeviceRule:
    kind, numbers, access = text.split()
    major, minor = (-1 if part == "*" else int(part) for part in numbers.split(":"))
    return DeviceRule(allow, kind, major, minor, access)


def shown(found: Policy) -> list[str]:
    """The exceptions without the default devices."""
    return [devices._text(key) + " " + held for key, held in found.exceptions if (key, held) not in DEFAULTS]


def test_default_devices_come_with_every_policy() -> None:
    assert policy(()) == policy((DENY_ALL,)) and not policy(()).allow
    assert len(DEFAULTS) == len(DEFAULT_DEVICES)
    assert (("c", 10, 200), "rwm") not in DEFAULTS  # /dev/net/tun is no default device
    assert policy((ALLOW_ALL,)) == Policy(True, ())


def test_rules_apply_in_order() -> None:
    assert shown(policy((rule(True, "c 10:200 r"), rule(True, "c 10:200 w")))) == ["c 10:200 rw"]
    assert shown(policy((rule(True, "c 10:200 rwm"), rule(False, "c 10:200 w")))) == ["c 10:200 rm"]
    assert shown(policy((rule(True, "c 10:200 rw"), DENY_ALL))) == []
    assert shown(policy((rule(True, "b 8:1 r"), rule(True, "b 8:2 r"), rule(False, "b 8:* rwm")))) == []
    assert shown(policy((rule(True, "b 8:1 r"), rule(False, "c *:* r")))) == ["b 8:1 r"]
    denied = policy((ALLOW_ALL, rule(False, "b 8:* rwm"), rule(True, "b 8:* m")))
    assert denied == Policy(True, ((("b", 8, -1), "rw"),))
    assert denied.describe() == "allow all but b 8:* rw"


def test_a_part_cannot_be_taken_out_of_a_wider_rule() -> None:
    with pytest.raises(RuntimeFailure, match=r"devices\[1\]: c 10:200 cannot be taken out of c 10:\*"):
        policy((rule(True, "c 10:* rw"), rule(False, "c 10:200 r")))
    with pytest.raises(RuntimeFailure, match=r"devices: a default device: c 1:3 cannot be taken out of c 1:\*"):
        policy((ALLOW_ALL, rule(False, "c 1:* rw")))
    assert shown(policy((rule(True, "c 10:* rw"), rule(False, "c 10:200 m")))) == ["c 10:* rw"]  # nothing to take


def test_v1_from_nothing() -> None:
    assert devices.v1_current("a *:* rwm\n") == Policy(True, ())
    changes = devices.v1_changes(Policy(True, ()), policy((DENY_ALL, rule(True, "c 10:200 rwm"))))
    assert changes[0] == ("devices.deny", "a") and ("devices.allow", "c 10:200 rwm") in changes
    assert len(changes) == 2 + len(DEFAULT_DEVICES)
    assert devices.v1_changes(policy(()), policy((ALLOW_ALL, rule(False, "b 8:0 w")))) == [
        ("devices.allow", "a"),
        ("devices.deny", "b 8:0 w"),
    ]


def test_o61_v1_update_touches_only_what_changes() -> None:
    listing = "".join(f"{devices._text(key)} {held}\n" for key, held in policy((rule(True, "c 10:200 rw"),)).exceptions)
    current = devices.v1_current(listing)
    assert devices.v1_changes(current, policy((rule(True, "c 10:200 rw"),))) == []
    assert devices.v1_changes(current, policy((rule(True, "c 10:200 rm"), rule(True, "b 7:* r")))) == [
        ("devices.allow", "b 7:* r"),
        ("devices.allow", "c 10:200 m"),
        ("devices.deny", "c 10:200 w"),
    ]


def run(program: bytes, kind: str, major: int, minor: int, access: str) -> int:
    """The program's answer: enough of eBPF for it, with struct bpf_cgroup_dev_ctx as its only memory."""
    wanted = sum({"m": 1, "r": 2, "w": 4}[letter] for letter in access)
    memory = struct.pack("=III", wanted << 16 | {"b": 1, "c": 2}[kind], major, minor)
    registers = [0] * 11
    code = [struct.unpack_from("=BBhi", program, at) for at in range(0, len(program), 8)]
    at = 0
    while True:
        op, both, off, imm = code[at]
        dst, src = both & 15, both >> 4
        at += 1
        if op == 0x61:
            (registers[dst],) = struct.unpack_from("=I", memory, off)
        elif op == 0xBF:
            registers[dst] = registers[src]
        elif op == 0xB7:
            registers[dst] = imm
        elif op == 0x57:
            registers[dst] &= imm
        elif op == 0x77:
            registers[dst] >>= imm
        elif op == 0x56:
            at += off if registers[dst] & 0xFFFFFFFF != imm & 0xFFFFFFFF else 0
        elif op == 0x16:
            at += off if registers[dst] & 0xFFFFFFFF == imm & 0xFFFFFFFF else 0
        elif op == 0x95:
            return registers[0]
        else:
            raise AssertionError(hex(op))


def kernel_v1(wanted: Policy, kind: str, major: int, minor: int, access: str) -> bool:
    """devcgroup_legacy_check_permission in words: an exception allows if it covers all of the access, and denies if it
    touches any of it."""
    for (other, a, b), held in wanted.exceptions:
        if other == kind and a in (-1, major) and b in (-1, minor):
            if wanted.allow and set(access) & set(held):
                return False
            if not wanted.allow and set(access) <= set(held):
                return True
    return wanted.allow


def test_v2_program_says_what_v1_says() -> None:
    chance = random.Random(61)
    accesses = ["".join(some) for size in (1, 2, 3) for some in itertools.combinations("rwm", size)]
    tried = 0
    while tried < 40:
        rules = [chance.choice((ALLOW_ALL, DENY_ALL))]
        for _ in range(chance.randrange(6)):
            key = f"{chance.choice('bc')} {chance.choice(('*', '1', '8'))}:{chance.choice(('*', '0', '3'))}"
            rules.append(rule(not rules[0].allow, f"{key} {chance.choice(accesses)}"))
        try:
            wanted = policy(tuple(rules))
        except RuntimeFailure:  # a denial that is wider than a default device
            continue
        tried += 1
        program = devices_v2.program(wanted)
        for kind, major, minor, access in itertools.product("bc", (1, 5, 8, 0xFFFFFFFF), (0, 3, 9), accesses):
            answer = run(program, kind, major, minor, access)
            assert answer == kernel_v1(wanted, kind, major, minor, access), (wanted, kind, major, minor, access)


def test_v2_default_policy() -> None:
    program = devices_v2.program(policy(()))
    assert run(program, "c", 1, 3, "rw") == 1 and run(program, "c", 136, 77, "r") == 1
    assert run(program, "b", 8, 0, "m") == 1 and run(program, "b", 8, 0, "r") == 0 == run(program, "b", 8, 0, "rm")
    assert run(program, "c", 10, 200, "rw") == 0 and run(program, "c", 0xFFFFFFFF, 3, "r") == 0
