"""What a compiled profile answers, by running the program on made-up calls: a classic BPF machine of a page."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from cri.spec import security
from runtime import seccomp
from runtime.errors import RuntimeFailure
from runtime.fields import Fields
from runtime.linux import libseccomp

X86_64, I386, AARCH64 = 0xC000003E, 0x40000003, 0xC00000B7
X32 = 0x40000000
ALLOW, KILL = 0x7FFF0000, 0
EPERM, ENOSYS = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
AF_ALG, AF_VSOCK = 38, 40

NOTIFYING = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}],
    "listenerPath": "/agent",
}

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers below are x86_64's")


def run(program: bytes, arch: int, number: int, *args: int) -> int:
    """The verdict of `program` on one call: linux/filter.h as far as seccomp uses it."""
    data = struct.pack("=IIQ6Q", number & 0xFFFFFFFF, arch, 0, *args, *[0] * (6 - len(args)))
    code = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    at = accumulator = 0
    while True:
        op, yes, no, k = code[at]
        at += 1
        if op == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, k)
        elif op == 0x06:
            return k
        elif op == 0x05:
            at += k
        elif op == 0x54:
            accumulator &= k
        else:
            holds = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}
            at += yes if holds[op] else no


def compiled(profile: dict[str, object], tmp_path: Path) -> bytes:
    return seccomp.program(seccomp.parse(Fields(profile, "linux.seccomp")), str(tmp_path / "cache"))


def number(name: str, arch: str = "x86_64") -> int:
    found = libseccomp.syscall_number(name, libseccomp.arch_token(arch))
    assert found is not None and found >= 0, name
    return found


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    profile = security.default_seccomp(security.DEFAULT_CAPABILITIES)
    return compiled(profile, tmp_path_factory.mktemp("default"))


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    granted = (*security.DEFAULT_CAPABILITIES, "CAP_SYS_ADMIN")
    return compiled(security.default_seccomp(granted), tmp_path_factory.mktemp("admin"))


@pytest.mark.parametrize(
    "name", ["read", "openat", "execve", "futex", "mmap", "statx", "epoll_wait", "prlimit64", "bind"]
)
def test_default_profile_allows_what_programs_need(default: bytes, name: str) -> None:
    assert run(default, X86_64, number(name)) == ALLOW
    assert run(default, X86_64, number(name, "x32")) == ALLOW


@pytest.mark.parametrize(
    "name",
    ["mount", "unshare", "setns", "bpf", "keyctl", "add_key", "request_key", "userfaultfd", "io_uring_setup", "reboot"]
    + ["init_module", "kexec_load", "swapon", "open_by_handle_at", "perf_event_open", "pidfd_getfd", "settimeofday"],
)
def test_default_profile_refuses_with_eperm(default: bytes, name: str) -> None:
    assert run(default, X86_64, number(name)) == EPERM


def test_s22_default_profile_lets_nobody_make_namespaces(default: bytes, admin: bytes) -> None:
    clone = number("clone")
    for bit in (0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert run(default, X86_64, clone, bit | 17) == EPERM
    assert run(default, X86_64, clone, 0x3D0F00) == ALLOW  # what a thread is made with
    assert run(default, X86_64, number("clone3")) == ENOSYS
    assert run(admin, X86_64, clone, 0x10000000) == ALLOW
    assert run(admin, X86_64, number("clone3")) == ALLOW
    assert run(admin, X86_64, number("unshare")) == ALLOW


@pytest.mark.parametrize("family", [AF_ALG, AF_VSOCK])
@pytest.mark.parametrize("high", [0, 1 << 32, 0xFFFFFFFF << 32])
def test_s48_alg_and_vsock_by_every_abi_whatever_the_high_bits(default: bytes, family: int, high: int) -> None:
    assert run(default, X86_64, number("socket"), family | high) == EPERM
    assert run(default, X86_64, number("socket", "x32"), family | high) == EPERM
    assert run(default, I386, 359, family) == EPERM


def test_s48_socketcall_makes_no_socket_at_all(default: bytes) -> None:
    assert run(default, I386, 102, 1) == EPERM  # SYS_SOCKET: the family is behind a pointer
    assert run(default, I386, 102, 1 | 1 << 32) == EPERM
    assert run(default, I386, 102, 2) == ALLOW  # SYS_BIND has no condition to hide
    assert run(default, I386, 4) == ALLOW  # and the number is still in the accumulator for the rest


@pytest.mark.parametrize("family", [*range(38), 39, *range(41, 46)])
def test_s48_every_other_family_works(default: bytes, family: int) -> None:
    assert run(default, X86_64, number("socket"), family) == ALLOW
    assert run(default, I386, 359, family) == ALLOW


def test_a_profile_that_names_socketcall_itself_has_decided(tmp_path: Path) -> None:
    condition = [{"index": 0, "value": AF_ALG, "op": "SCMP_CMP_LT"}]
    rules: list[dict[str, object]] = [{"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": condition}]
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86"], "syscalls": rules}
    assert run(compiled(profile, tmp_path), I386, 102, 1) == EPERM
    rules.append({"names": ["socketcall"], "action": "SCMP_ACT_ALLOW"})
    assert run(compiled(profile, tmp_path), I386, 102, 1) == ALLOW


def test_a_condition_on_system_v_ipc_is_not_lost_in_the_ipc_call(tmp_path: Path) -> None:
    condition = [{"index": 0, "value": 5, "op": "SCMP_CMP_EQ"}]
    rules = [{"names": ["shmget"], "action": "SCMP_ACT_ALLOW", "args": condition}]
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86"], "syscalls": rules}
    program = compiled(profile, tmp_path)
    assert run(program, I386, 117, 23) == EPERM
    assert run(program, I386, 117, 23 | 1 << 16) == EPERM  # the version is in the high half


def test_a_conditional_denial_may_be_widened(tmp_path: Path) -> None:
    condition = [{"index": 0, "value": AF_ALG, "op": "SCMP_CMP_EQ"}]
    rules = [{"names": ["socket"], "action": "SCMP_ACT_ERRNO", "args": condition}]
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86"], "syscalls": rules}
    program = compiled(profile, tmp_path)
    assert run(program, X86_64, 41, AF_ALG) == EPERM and run(program, X86_64, 41, 2) == ALLOW
    assert run(program, I386, 102, 1) == EPERM
    assert run(program, X86_64, 9999) == ALLOW  # nothing is ENOSYS where everything is allowed


def test_calls_newer_than_the_profile_are_enosys(default: bytes, tmp_path: Path) -> None:
    assert run(default, X86_64, 600) == ENOSYS
    assert run(default, X86_64, 600 | X32) == ENOSYS
    assert run(default, I386, 600) == ENOSYS
    rules = [{"names": ["read", "openat2"], "action": "SCMP_ACT_ALLOW"}]  # openat2 is 437
    program = compiled({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 13, "syscalls": rules}, tmp_path)
    assert run(program, X86_64, 438) == ENOSYS and run(program, X86_64, 436) == 0x5000D
    assert run(program, X86_64, 437) == ALLOW
    kills = compiled({"defaultAction": "SCMP_ACT_KILL_PROCESS", "syscalls": rules}, tmp_path)
    assert run(kills, X86_64, 436) == 0x80000000 and run(kills, X86_64, 438) == ENOSYS
    every = compiled({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38, "syscalls": rules}, tmp_path)
    assert run(every, X86_64, 438) == ENOSYS == run(every, X86_64, 0x1B4)


def test_a_profile_without_rules_answers_by_its_default(tmp_path: Path) -> None:
    program = compiled({"defaultAction": "SCMP_ACT_ERRNO"}, tmp_path)
    assert run(program, X86_64, 0) == EPERM and run(program, X86_64, 500) == EPERM


def test_calls_that_libseccomp_cannot_name_are_allowed_by_number(default: bytes) -> None:
    unknown = [name for name in ("mseal", "file_setattr", "statmount") if libseccomp.syscall_number(name) is None]
    known = {"mseal": 462, "file_setattr": 469, "statmount": 457}
    for name in unknown:
        assert run(default, X86_64, known[name]) == ALLOW
        assert run(default, X86_64, known[name] | X32) == ALLOW
        assert run(default, I386, known[name]) == ALLOW
    assert run(default, X86_64, 467) == EPERM  # open_tree_attr is for CAP_SYS_ADMIN, and not newer than the profile


def test_names_of_no_kernel_are_skipped(tmp_path: Path) -> None:
    rules = [{"names": ["read", "no_such_call", "write"], "action": "SCMP_ACT_ALLOW"}]
    program = compiled({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}, tmp_path)
    assert run(program, X86_64, 0) == ALLOW == run(program, X86_64, 1)


def test_architectures_outside_the_profile_die(tmp_path: Path) -> None:
    rules = [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]
    program = compiled({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}, tmp_path)
    assert run(program, I386, 3) == KILL and run(program, AARCH64, 63) == KILL


def test_conditions_all_hold_but_on_one_argument_they_are_alternatives(tmp_path: Path) -> None:
    def condition(index: int, value: int) -> dict[str, object]:
        return {"index": index, "value": value, "op": "SCMP_CMP_EQ"}

    rules = [
        {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [condition(0, 1), condition(1, 2)]},
        {"names": ["write"], "action": "SCMP_ACT_ALLOW", "args": [condition(0, 1), condition(0, 2)]},
    ]
    program = compiled({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}, tmp_path)
    assert run(program, X86_64, 0, 1, 2) == ALLOW and run(program, X86_64, 0, 1, 3) == EPERM
    assert run(program, X86_64, 1, 1) == ALLOW == run(program, X86_64, 1, 2)
    assert run(program, X86_64, 1, 3) == EPERM


@pytest.mark.parametrize(
    ("op", "value", "second", "yes", "no"),
    [
        ("NE", 5, 0, 6, 5),
        ("LT", 5, 0, 4, 5),
        ("LE", 5, 0, 5, 6),
        ("EQ", 5, 0, 5, 4),
        ("GE", 5, 0, 5, 4),
        ("GT", 5, 0, 6, 5),
        ("MASKED_EQ", 0xF0, 0x10, 0x1F, 0x20),
        ("EQ", 1 << 40 | 5, 0, 1 << 40 | 5, 5),
    ],
)
def test_operators(tmp_path: Path, op: str, value: int, second: int, yes: int, no: int) -> None:
    condition = [{"index": 2, "value": value, "valueTwo": second, "op": f"SCMP_CMP_{op}"}]
    rules = [{"names": ["read"], "action": "SCMP_ACT_TRACE", "errnoRet": 77, "args": condition}]
    program = compiled({"defaultAction": "SCMP_ACT_LOG", "syscalls": rules}, tmp_path)
    assert run(program, X86_64, 0, 0, 0, yes) == 0x7FF0004D
    assert run(program, X86_64, 0, 0, 0, no) == 0x7FFC0000


def test_a_hit_loads_neither_libseccomp_nor_the_compiler(tmp_path: Path) -> None:
    script = (
        "import json, sys\n"
        "from runtime import seccomp\nfrom runtime.fields import Fields\nfrom runtime.linux import libseccomp\n"
        "profile = {'defaultAction': 'SCMP_ACT_ERRNO', 'syscalls': [{'names': ['read'], 'action': 'SCMP_ACT_ALLOW'}]}\n"
        "code = seccomp.program(seccomp.parse(Fields(profile)), sys.argv[1])\n"
        "maps = open('/proc/self/maps').read()\n"
        "print(code.hex(), 'libseccomp' in maps, libseccomp.loaded(), 'runtime.seccomp_filter' in sys.modules)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "cache")]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    second = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert first[1:] == ["True", "True", "True"]
    assert second == [first[0], "False", "False", "False"]


def test_cache_is_private_and_whole(tmp_path: Path) -> None:
    rules = [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}
    good = compiled(profile, tmp_path)
    cache = tmp_path / "cache"
    (file,) = cache.iterdir()
    assert cache.stat().st_mode & 0o7777 == 0o700 and file.stat().st_mode & 0o7777 == 0o600
    raw = file.read_bytes()
    for damaged in (b"", raw[:32], raw[:-8], raw[:-1], raw + b"\0" * 8, raw[:40] + bytes(8) + raw[48:]):
        file.write_bytes(damaged)
        assert compiled(profile, tmp_path) == good
        assert file.read_bytes() == raw


def test_cache_keeps_profiles_apart_but_not_their_flags(tmp_path: Path) -> None:
    compiled({"defaultAction": "SCMP_ACT_ERRNO"}, tmp_path)
    compiled({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 2}, tmp_path)
    compiled({"defaultAction": "SCMP_ACT_ERRNO", "flags": ["SECCOMP_FILTER_FLAG_LOG"]}, tmp_path)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_cache_is_bounded(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    for index in range(300):
        file = cache / f"{index:04}"
        file.write_bytes(b"old")
        os.utime(file, (index, index))
    compiled({"defaultAction": "SCMP_ACT_ERRNO"}, tmp_path)
    left = sorted(path.name for path in cache.iterdir())
    assert len(left) == 300 - 128 + 1 and left[0] == "0128"


def test_cache_that_others_could_write_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o755)
    with pytest.raises(RuntimeFailure, match="mode 0700.*mode 0755"):
        compiled({"defaultAction": "SCMP_ACT_ERRNO"}, tmp_path)
    assert list(cache.iterdir()) == []
    cache.rmdir()
    cache.symlink_to("/tmp")
    with pytest.raises(RuntimeFailure, match="ENOTDIR|ELOOP"):
        compiled({"defaultAction": "SCMP_ACT_ERRNO"}, tmp_path)


def test_too_long_a_program_is_refused(tmp_path: Path) -> None:
    condition = [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"} for value in range(4200)]
    rules = [{"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": condition}]
    with pytest.raises(RuntimeFailure, match="the kernel takes 4096"):
        compiled({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({}, "s.defaultAction: is required"),
        ({"defaultAction": "ALLOW"}, "s.defaultAction: expected one of"),
        ({"defaultAction": "SCMP_ACT_NOTIFY"}, "s.defaultAction: SCMP_ACT_NOTIFY cannot be used as default action"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 1}, "s.defaultErrnoRet: means nothing with"),
        (
            {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 4096},
            "s.defaultErrnoRet: expected integer from 0 to 4095",
        ),
        ({"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["x86"]}, r"s.architectures\[0\]: expected one of"),
        ({"defaultAction": "SCMP_ACT_ERRNO", "flags": ["X"]}, r"s.flags\[0\]: expected one of"),
        ({**NOTIFYING, "listenerPath": None}, "s.listenerPath: seccomp listenerPath is not set"),
        ({**NOTIFYING, "listenerPath": "agent"}, "s.listenerPath: SCMP_ACT_NOTIFY needs the absolute path"),
        ({**NOTIFYING, "listenerMetadata": "x" * 20000}, "s.listenerMetadata: 20000 characters"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "listenerMetadata": "x"}, "s.listenerMetadata: must not be set without"),
        ({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{}]}, r"s.syscalls\[0\].names: expected names"),
        ({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": {}}, "s.syscalls: expected array"),
    ],
)
def test_bad_profiles_are_named_by_path(profile: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeFailure, match=message):
        seccomp.parse(Fields(profile, "s"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"index": 6, "op": "SCMP_CMP_EQ"}, "index: expected integer from 0 to 5"),
        ({"index": 0, "op": "EQ"}, "op: expected one of"),
        ({"index": 0, "op": "SCMP_CMP_EQ", "value": 1 << 64}, "value: expected integer"),
        ({"index": 0, "op": "SCMP_CMP_EQ", "value": -1}, "value: expected integer"),
    ],
)
def test_bad_conditions_are_named_by_path(argument: dict[str, object], message: str) -> None:
    rule = {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [argument]}
    with pytest.raises(RuntimeFailure, match=r"s.syscalls\[0\].args\[0\]." + message):
        seccomp.parse(Fields({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule]}, "s"))


def test_flags_default_to_spec_allow() -> None:
    def flags(value: object) -> int:
        return seccomp.parse(Fields({"defaultAction": "SCMP_ACT_ERRNO", "flags": value})).flags

    assert flags(None) == 4
    assert flags([]) == 0
    assert flags(["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC"]) == 2


def test_a_listener_is_asked_for_when_a_rule_notifies_and_only_then() -> None:
    waits = {"flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"], "listenerMetadata": "m"}
    told = seccomp.parse(Fields({**NOTIFYING, **waits}))
    assert (told.flags, told.listener_path, told.listener_metadata) == (8 | 32, "/agent", "m")
    deaf = seccomp.parse(Fields({**NOTIFYING, **waits, "syscalls": []}))
    assert (deaf.flags, deaf.listener_path, deaf.listener_metadata) == (0, "", "")


def test_notified_calls_by_every_abi(tmp_path: Path) -> None:
    condition = [{"index": 0, "value": 38, "op": "SCMP_CMP_EQ"}]
    rules = [{"names": ["socket"], "action": "SCMP_ACT_NOTIFY", "args": condition}]
    profile = {**NOTIFYING, "architectures": ["SCMP_ARCH_X86"], "syscalls": rules}
    program = compiled(profile, tmp_path)
    assert run(program, X86_64, 41, 38) == 0x7FC00000 == run(program, I386, 102, 1)
    assert run(program, X86_64, 41, 2) == ALLOW
