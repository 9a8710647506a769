"""`linux.seccomp` of runtime-spec: parsed, compiled into classic BPF (runtime.seccomp_filter), cached, and loaded.

Refuses a profile that would have a listener decide on what hands the listener over. Invariant: a cached program is the
very bytes that were compiled from this profile, with this libseccomp, for this machine, or it is not used; and taking
it loads neither libseccomp nor the compiler.
"""

from __future__ import annotations

import errno
import os
import stat

from runtime.errors import RuntimeFailure
from runtime.linux import libseccomp, seccomp
from runtime.linux.record import Record

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from runtime.fields import Fields

_FORMAT = 1  # part of the cache key: raise it when runtime.seccomp_filter translates anything differently
_MOST_CACHED = 256
MAX_INSTRUCTIONS = 4096  # linux/bpf_common.h, BPF_MAXINSNS
_MAX_RULES = 4096
_MAX_METADATA = 16 << 10
_NEW_LISTENER = seccomp.SECCOMP_FILTER_FLAG_NEW_LISTENER

ACTIONS = {
    "SCMP_ACT_KILL": libseccomp.SCMP_ACT_KILL_THREAD,
    "SCMP_ACT_KILL_THREAD": libseccomp.SCMP_ACT_KILL_THREAD,
    "SCMP_ACT_KILL_PROCESS": libseccomp.SCMP_ACT_KILL_PROCESS,
    "SCMP_ACT_TRAP": libseccomp.SCMP_ACT_TRAP,
    "SCMP_ACT_ERRNO": libseccomp.SCMP_ACT_ERRNO,
    "SCMP_ACT_TRACE": libseccomp.SCMP_ACT_TRACE,
    "SCMP_ACT_NOTIFY": libseccomp.SCMP_ACT_NOTIFY,
    "SCMP_ACT_LOG": libseccomp.SCMP_ACT_LOG,
    "SCMP_ACT_ALLOW": libseccomp.SCMP_ACT_ALLOW,
}
OPERATORS = {f"SCMP_CMP_{name}": number for name, number in libseccomp.SCMP_CMP.items()}
FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": 0,  # the loader has one thread: there is nobody to synchronise with
    "SECCOMP_FILTER_FLAG_LOG": seccomp.SECCOMP_FILTER_FLAG_LOG,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": seccomp.SECCOMP_FILTER_FLAG_SPEC_ALLOW,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": seccomp.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV,
}
ARCHITECTURES = frozenset(
    {"X86", "X86_64", "X32", "ARM", "AARCH64", "MIPS", "MIPS64", "MIPS64N32", "MIPSEL", "MIPSEL64", "MIPSEL64N32"}
    | {"PPC", "PPC64", "PPC64LE", "S390", "S390X", "PARISC", "PARISC64", "RISCV64", "LOONGARCH64", "M68K", "SH", "SHEB"}
)


class Argument(Record):
    """A condition on one argument of a system call; `operator` is libseccomp's."""

    index: int
    operator: int
    value: int
    second: int


class Rule(Record):
    """What happens to calls of these names whose arguments match; `action` holds its errno already."""

    names: tuple[str, ...]
    action: int
    arguments: tuple[Argument, ...] = ()


class Seccomp(Record):
    """A profile. `architectures` are libseccomp's names; the native one is always in. `flags` are for seccomp(2), with
    SECCOMP_FILTER_FLAG_NEW_LISTENER when a rule notifies; who listens is told by `listener_path`, with the metadata."""

    default_action: int
    architectures: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    flags: int = seccomp.SECCOMP_FILTER_FLAG_SPEC_ALLOW
    listener_path: str = ""
    listener_metadata: str = ""


def parse(fields: Fields) -> Seccomp:
    """The object `linux.seccomp`. Raises FieldError naming what is wrong by its path."""
    syscalls = fields.objects("syscalls")
    if len(syscalls) > _MAX_RULES:
        raise fields.error("syscalls", f"{len(syscalls)} rules, at most {_MAX_RULES} are taken")
    names = fields.strs("architectures", choices=[f"SCMP_ARCH_{name}" for name in ARCHITECTURES])
    flags = seccomp.SECCOMP_FILTER_FLAG_SPEC_ALLOW  # runtime-spec's default
    if fields.has("flags"):
        flags = 0
        for name in fields.strs("flags", choices=FLAGS):
            flags |= FLAGS[name]
    default = _action(fields, "defaultAction", "defaultErrnoRet")
    if default == libseccomp.SCMP_ACT_NOTIFY:
        raise fields.error("defaultAction", "SCMP_ACT_NOTIFY cannot be used as default action")
    rules = tuple(_rule(item) for item in syscalls)
    path, metadata = _listener(fields, rules)
    # Without a listener the kernel refuses the one flag, and nobody needs the other.
    flags = flags | _NEW_LISTENER if path else flags & ~seccomp.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
    return Seccomp(
        default_action=default,
        architectures=tuple(name.removeprefix("SCMP_ARCH_").lower() for name in names),
        rules=rules,
        flags=flags,
        listener_path=path,
        listener_metadata=metadata,
    )


def _listener(fields: Fields, rules: tuple[Rule, ...]) -> tuple[str, str]:
    """listenerPath and listenerMetadata; both "" when no rule notifies, for then runtime-spec has them ignored."""
    path, metadata = fields.str("listenerPath"), fields.str("listenerMetadata")
    if metadata and not path:
        raise fields.error("listenerMetadata", "must not be set without listenerPath")
    notifying = [index for index, rule in enumerate(rules) if rule.action == libseccomp.SCMP_ACT_NOTIFY]
    for index in notifying:
        if "write" in rules[index].names:
            # The listener's number is told by write(2), under the filter: it would wait for itself.
            problem = "SCMP_ACT_NOTIFY cannot be used for the write syscall"
            raise fields.error(f"syscalls[{index}]", problem)
    if not notifying:
        return "", ""
    if not path.startswith("/"):
        problem = f'SCMP_ACT_NOTIFY needs the absolute path of a socket, got "{path:.80}"'
        raise fields.error("listenerPath", problem if path else "seccomp listenerPath is not set")
    if len(metadata) > _MAX_METADATA:
        raise fields.error("listenerMetadata", f"{len(metadata)} characters, at most {_MAX_METADATA} are taken")
    return path, metadata


def _action(fields: Fields, key: str, errno_key: str) -> int:
    name = fields.str(key, required=True)
    if name not in ACTIONS:
        raise fields.error(key, f"expected one of {', '.join(sorted(ACTIONS))}, got {name[:60]!r}")
    action = ACTIONS[name]
    if action not in (libseccomp.SCMP_ACT_ERRNO, libseccomp.SCMP_ACT_TRACE):
        # runtime-spec: errnoRet is for ERRNO and TRACE alone, and an error anywhere else.
        if fields.int(errno_key):
            raise fields.error(errno_key, f"means nothing with {name}")
        return action
    # linux/err.h, MAX_ERRNO: what is above reads as success in a C library. A tracer takes 16 bits of anything.
    highest = 4095 if action == libseccomp.SCMP_ACT_ERRNO else 0xFFFF
    return action | fields.int(errno_key, 0, highest, errno.EPERM)


def _rule(fields: Fields) -> Rule:
    names = fields.strs("names")
    if not names or "" in names:
        raise fields.error("names", "expected names of system calls")
    arguments = tuple(
        Argument(
            item.int("index", 0, 5, required=True),
            OPERATORS[item.str("op", required=True, choices=OPERATORS)],
            item.int("value", 0, (1 << 64) - 1),
            item.int("valueTwo", 0, (1 << 64) - 1),
        )
        for item in fields.objects("args")
    )
    return Rule(names, _action(fields, "action", "errnoRet"), arguments)


# ----------------------------------------------------------------------------------------------------------- program


def program(profile: Seccomp, cache_dir: str) -> bytes:
    """The profile as struct sock_filter[], from `cache_dir` (made 0700 when missing) where it is known there.
    Raises RuntimeFailure."""
    name = _cache_name(profile)
    if not name:  # libseccomp is where only the loader finds it: its version cannot be part of the key
        return _compiled(profile)
    try:
        directory = _open_cache(cache_dir)
        try:
            found = _recall(directory, name)
            if found is None:
                found = _compiled(profile)
                _remember(directory, name, found)
            return found
        finally:
            os.close(directory)
    except OSError as error:
        raise RuntimeFailure.of(error, step="seccomp", what=f"use the seccomp cache {cache_dir}") from error


def _compiled(profile: Seccomp) -> bytes:
    from runtime.seccomp_filter import compile_profile  # rarely needed: see the module

    return compile_profile(profile)


def _digest(data: bytes) -> bytes:
    # hashlib would load OpenSSL: 3 ms, and a third of a megabyte in every shim. Without it this is the quickest.
    try:
        from _blake2 import blake2b
    except ImportError:
        from hashlib import blake2b
    return bytes(blake2b(data, digest_size=32).digest())


def _cache_name(profile: Seccomp) -> str:
    identity = libseccomp.identity()
    if not identity:
        return ""
    # A record of ints, strings and tuples of records: its repr is canonical. The flags are no part of the program, and
    # neither is who listens.
    bare = profile.changed(flags=0, listener_path="", listener_metadata="")
    what = (_FORMAT, os.uname().machine, identity, bare)
    return _digest(repr(what).encode("utf-8", "surrogatepass")).hex()


def _open_cache(path: str) -> int:
    """The directory's fd. Raises RuntimeFailure when others could write there: a filter is a security boundary."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        os.makedirs(path, 0o700, exist_ok=True)
        fd = os.open(path, flags)
    info = os.fstat(fd)
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
        os.close(fd)
        raise RuntimeFailure(
            f"use the seccomp cache {path}: it must belong to uid {os.geteuid()} with mode 0700, "
            f"and has uid {info.st_uid} with mode {stat.S_IMODE(info.st_mode):04o}",
            step="seccomp",
            hint="remove it: it is made again",
            code="failed_precondition",
        )
    return fd


def _recall(directory: int, name: str) -> bytes | None:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    except FileNotFoundError:
        return None
    try:
        raw = os.read(fd, 32 + MAX_INSTRUCTIONS * 8 + 1)
    finally:
        os.close(fd)
    code = raw[32:]
    # A power cut may have left half of it, and half a filter lets through what the other half refuses.
    return code if code and len(code) % 8 == 0 and _digest(code) == raw[:32] else None


def _remember(directory: int, name: str, code: bytes) -> None:
    _make_room(directory)
    temporary = f".{name[:16]}.{os.getpid()}.{os.urandom(4).hex()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        try:
            os.write(fd, _digest(code) + code)
        finally:
            os.close(fd)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        os.unlink(temporary, dir_fd=directory)
        raise


def _make_room(directory: int) -> None:
    """Profiles come from pods, so there is no end to them: beyond the limit the older half goes."""
    names = os.listdir(directory)
    if len(names) < _MOST_CACHED:
        return
    aged = []
    for name in names:
        try:
            aged.append((os.stat(name, dir_fd=directory, follow_symlinks=False).st_mtime_ns, name))
        except FileNotFoundError:
            continue
    for _, name in sorted(aged)[: _MOST_CACHED // 2]:
        try:
            os.unlink(name, dir_fd=directory)
        except FileNotFoundError:
            continue
