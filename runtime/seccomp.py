"""Seccomp: linux.seccomp read into values, compiled to classic BPF once, cached, and loaded.

Refuses what it would have to weaken: a listener, an action it does not know. Invariant: a program in the cache is one
that this libseccomp made of exactly this profile; a damaged file is made anew, never loaded (threats S73).

A name that libseccomp does not know is skipped, as runc does; and so that a program which probes for a new system call
gets the ENOSYS it is written for instead of the profile's EPERM, every call above the newest one that the profile's
libseccomp can name answers ENOSYS (runc does the same by patching the filter).
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys

from runtime.errors import RuntimeFailure
from runtime.linux import seccomp as _kernel
from runtime.linux.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.fields import Fields

ACTIONS = {
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
_WITH_ERRNO = ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE")
OPERATORS = {
    "SCMP_CMP_NE": 1,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}
FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": 1,
    "SECCOMP_FILTER_FLAG_LOG": 2,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4,
}
_EPERM, _ENOSYS = 1, 38
_UINT64 = (1 << 64) - 1
MAX_RULES = 4096
# BPF_MAXINSNS of linux/filter.h times the size of struct sock_filter.
_MAX_PROGRAM = 4096 * 8
_FORMAT = b"ocid-seccomp-2"


class Argument(Record):
    """A condition on one argument of a call: `operator` is libseccomp's number."""

    index: int
    value: int
    value_two: int
    operator: int


class Rule(Record):
    """One entry of linux.seccomp.syscalls; `action` is SCMP_ACT_* with its errno or'ed in."""

    names: tuple[str, ...]
    action: int
    arguments: tuple[Argument, ...] = ()


class Seccomp(Record):
    """A profile. `flags` are SECCOMP_FILTER_FLAG_* for `load`."""

    default_action: int
    architectures: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    flags: int = 0


def parse(fields: Fields) -> Seccomp:
    """linux.seccomp. Raises FieldError naming the field."""
    fields.refuse("listenerPath", "listenerMetadata")
    default = _action(fields, "defaultAction", "defaultErrnoRet", required=True)
    entries = fields.objects("syscalls")
    if len(entries) > MAX_RULES:
        raise fields.error("syscalls", f"{len(entries)} rules, at most {MAX_RULES}")
    flags = 0
    for name in fields.strs("flags", choices=FLAGS):
        flags |= FLAGS[name]
    return Seccomp(default, fields.strs("architectures"), tuple(_rule(entry) for entry in entries), flags)


def _action(fields: Fields, key: str, errno_key: str, *, required: bool = False) -> int:
    name = fields.str(key, required=required)
    if name == "SCMP_ACT_NOTIFY":
        raise fields.error(key, "SCMP_ACT_NOTIFY is not supported by this runtime yet")
    if name not in ACTIONS:
        raise fields.error(key, f'unknown action "{name:.40}"')
    number = fields.optional_int(errno_key, 0, 0xFFFF)
    if name not in _WITH_ERRNO:
        if number:
            raise fields.error(errno_key, f"goes with {' or '.join(_WITH_ERRNO)}, not with {name}")
        return ACTIONS[name]
    return ACTIONS[name] | (_EPERM if number is None else number)


def _rule(fields: Fields) -> Rule:
    names = fields.strs("names")
    if not names:
        raise fields.error("names", "is required")
    arguments = []
    for entry in fields.objects("args"):
        arguments.append(
            Argument(
                entry.int("index", 0, 5, required=True),
                entry.int("value", 0, _UINT64),
                entry.int("valueTwo", 0, _UINT64),
                OPERATORS[entry.str("op", required=True, choices=OPERATORS)],
            )
        )
    return Rule(names, _action(fields, "action", "errnoRet", required=True), tuple(arguments))


def program(seccomp: Seccomp, cache_dir: str) -> bytes:
    """The profile as an array of struct sock_filter. A cached one does not load libseccomp at all; `cache_dir` is
    made 0700, "" goes without a cache. Raises RuntimeFailure."""
    key = hashlib.sha256(b"\0".join((_FORMAT, _identity().encode(), repr(seccomp).encode()))).hexdigest()
    path = f"{cache_dir}/{key}.bpf"
    if cache_dir:
        cached = _read_cache(path)
        if cached is not None:
            return cached
    try:
        compiled = _compile(seccomp)
    except OSError as error:
        raise RuntimeFailure.of(error, step="seccomp", what="compile the seccomp profile") from error
    if not compiled or len(compiled) > _MAX_PROGRAM:
        raise RuntimeFailure(
            f"linux.seccomp: {len(compiled) // 8} instructions, the kernel takes at most {_MAX_PROGRAM // 8}",
            step="seccomp",
            code="invalid_argument",
        )
    if cache_dir:
        _write_cache(cache_dir, path, compiled)
    return compiled


def load(program: bytes, flags: int) -> None:
    """seccomp(2), SECCOMP_SET_MODE_FILTER. Raises KernelError."""
    _kernel.set_mode_filter(program, flags)


def _identity() -> str:
    from runtime.linux import libseccomp

    return f"{os.uname().machine} {libseccomp.identity()}"


def _read_cache(path: str) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        raw = os.read(fd, _MAX_PROGRAM + 64)
    finally:
        os.close(fd)
    digest, body = raw[:32], raw[32:]
    if not body or len(body) % 8 or hashlib.sha256(body).digest() != digest:
        return None
    return body


def _write_cache(directory: str, path: str, body: bytes) -> None:
    """A cache that cannot be written only costs time."""
    temporary = f"{path}.{os.getpid()}"
    try:
        os.makedirs(directory, 0o700, exist_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.write(fd, hashlib.sha256(body).digest() + body)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except OSError:
        try:
            os.unlink(temporary)
        except OSError:
            pass


def _compile(seccomp: Seccomp) -> bytes:
    from runtime.linux import libseccomp

    with libseccomp.Filter(seccomp.default_action) as building:
        building.optimize()
        tokens = [libseccomp.native_token()]
        for name in seccomp.architectures:
            token = libseccomp.arch_token(name.removeprefix("SCMP_ARCH_").lower())
            if not token:
                raise RuntimeFailure(
                    f'linux.seccomp.architectures: unknown "{name:.40}"', step="seccomp", code="invalid_argument"
                )
            if token not in tokens:
                building.add_arch(token)
                tokens.append(token)
        for rule in seccomp.rules:
            if rule.action == seccomp.default_action:
                continue  # libseccomp refuses a rule that says what is so already
            for name in rule.names:
                number = libseccomp.syscall_number(name)
                if number is None:
                    continue
                for conditions in _alternatives(rule.arguments):
                    building.add_rule(rule.action, number, conditions)
        compiled = building.export()
    if seccomp.default_action & 0xFFFF0000 == ACTIONS["SCMP_ACT_ERRNO"]:
        return _unknown_calls_are_enosys(compiled, _newest(libseccomp))
    return compiled


def _alternatives(arguments: tuple[Argument, ...]) -> list[tuple[tuple[int, int, int, int], ...]]:
    """libseccomp takes one condition an argument; several on the same one are alternatives, as runc reads them."""
    conditions = tuple((a.index, a.operator, a.value, a.value_two) for a in arguments)
    if len({a.index for a in arguments}) == len(arguments):
        return [conditions]
    return [(condition,) for condition in conditions]


# New calls get the same number everywhere since 424; these are the newest by kernel, read from the top.
_NEWEST_NAMES = (
    *("file_setattr", "file_getattr", "open_tree_attr", "removexattrat", "listxattrat", "getxattrat", "setxattrat"),
    *("mseal", "lsm_list_modules", "lsm_set_self_attr", "lsm_get_self_attr", "listmount", "statmount"),
    *("futex_requeue", "futex_wait", "futex_wake", "map_shadow_stack", "fchmodat2", "cachestat"),
    *("set_mempolicy_home_node", "futex_waitv", "process_mrelease", "memfd_secret", "landlock_restrict_self"),
    *("mount_setattr", "epoll_pwait2", "process_madvise", "faccessat2", "openat2", "close_range", "clone3"),
)


def _newest(libseccomp: object) -> int:
    number_of = libseccomp.syscall_number  # type: ignore[attr-defined]
    numbers = [number for name in _NEWEST_NAMES if (number := number_of(name)) is not None]
    return max(numbers, default=0)


def _unknown_calls_are_enosys(compiled: bytes, newest: int) -> bytes:
    """Puts before the filter: a native call number above `newest`, and not of the x32 ABI, returns ENOSYS.

      ld  [4]              ; seccomp_data.arch
      jne native, filter
      ld  [0]              ; seccomp_data.nr
      jge 0x40000000, filter   ; x32, and -1 of a tracer
      jgt newest, enosys
      ja  filter
    enosys: ret ERRNO(ENOSYS)
    filter: …
    """
    native = _kernel.AUDIT_ARCH.get(os.uname().machine)
    if native is None or newest <= 0:
        return compiled
    instructions = (
        (0x20, 0, 0, 4),
        (0x15, 0, 5, native),
        (0x20, 0, 0, 0),
        (0x35, 3, 0, 0x40000000),
        (0x25, 1, 0, newest),
        (0x05, 0, 0, 1),
        (0x06, 0, 0, ACTIONS["SCMP_ACT_ERRNO"] | _ENOSYS),
    )
    order = "<" if sys.byteorder == "little" else ">"
    return b"".join(struct.pack(f"{order}HBBI", *instruction) for instruction in instructions) + compiled
