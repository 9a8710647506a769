"""What the init (or an exec) does to itself before execve: limits, identity, capabilities, working directory, command.

Refuses to resolve the working directory through a magic link (CVE-2024-21626), and to hand on any fd but 0, 1, 2 and
those that were asked for. Invariant: each function changes the calling process only, and is called in the order of
runtime.init.STEPS.
"""

from __future__ import annotations

import errno
import os
import stat

from runtime import ids
from runtime.capabilities import names
from runtime.errors import RuntimeFailure
from runtime.linux.files import open_in_root, read_bounded
from runtime.linux.keys import join_session_keyring
from runtime.linux.libc import KernelError, prctl
from runtime.linux.process import (
    CLOSE_RANGE_CLOEXEC,
    PR_CAPBSET_READ,
    RLIM_INFINITY,
    cap_ambient_clear,
    cap_ambient_raise,
    capbset_drop,
    capget,
    capset,
    close_range,
    execveat,
    ioprio_set,
    prlimit,
    reset_all_signals,
    sched_setattr,
    set_keepcaps,
)
from runtime.linux.signals import SIGHUP, SIGINT, SIGQUIT, SIGTERM, handle, wake_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from runtime.spec_process import Capabilities, Process, Rlimit, Scheduler, User

    Warn = Callable[[str], None]

_AT_FDCWD = -100
_NULL_DEVICE = os.makedev(1, 3)
_PASSWD_LIMIT = 1 << 20
_FILES, _FEW = "RLIMIT_NOFILE", 256  # more than the interpreter of an init has open
ENDING = (SIGHUP, SIGINT, SIGQUIT, SIGTERM)
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What loading a filter and lowering the sets at the very end takes; see `Identity`.
_CAP_SYS_ADMIN, _CAP_SETPCAP = 1 << 21, 1 << 8


def end_by_signals() -> None:
    """Until it executes this process ends by what ends others: pid 1 of a PID namespace would not (pid_namespaces(7)),
    and a caller's handlers, with the fd that they write to, came along with the clone."""
    wake_up(-1)
    for number in ENDING:
        handle(number, _end)


def _end(number: int, _frame: object) -> None:
    os._exit(128 + number)


def reset_signals(*, handled: bool = True) -> None:
    """Every disposition to its default and an empty mask: the interpreter ignores SIGPIPE, a nohup'd caller SIGHUP,
    and execve(2) hands both on. `handled` as in reset_all_signals."""
    reset_all_signals(handled=handled)


def new_keyring(name: str, warn: Warn) -> None:
    """A session keyring of the container's own, so that it reads no key of the caller (keyrings(7))."""
    try:
        join_session_keyring(name)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EDQUOT):
            raise
        warn(f"no session keyring of its own: {error}")


def set_cpus(cpus: Iterable[int] = ()) -> None:
    """The affinity of this process. () undoes the caller's; the kernel keeps within the cpuset (threats O61)."""
    if not cpus:
        os.sched_setaffinity(0, range(4096))
        return
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        raise RuntimeFailure.of(
            error, what=f"process.execCPUAffinity: run on processors {cpus}", code="invalid_argument"
        ) from None


def set_rlimits(limits: Iterable[Rlimit], warn: Warn) -> None:
    """setrlimit(2) of each. Without CAP_SYS_RESOURCE a limit cannot rise: then it becomes what it may be. What would
    leave too few files for the steps to come is set by `set_few_files`."""
    for limit in limits:
        wanted = (_unlimited(limit.soft), _unlimited(limit.hard))
        if limit.name == _FILES and wanted[0] < _FEW:
            room = min(_FEW, prlimit(limit.resource)[1])
            wanted = (max(wanted[0], room), max(wanted[1], room))
        try:
            prlimit(limit.resource, wanted)
        except KernelError as error:
            what = f"set {limit.name} to {limit.soft}:{limit.hard}"
            if error.errno != errno.EPERM:
                raise RuntimeFailure.of(error, what=what) from None
            _, hard = prlimit(limit.resource)
            hard_wanted = min(wanted[1], hard)
            prlimit(limit.resource, (min(wanted[0], hard_wanted), hard_wanted))
            warn(f"{limit.name} {limit.soft}:{limit.hard} is above what this process may set: it is {hard_wanted}")


def set_few_files(limits: Iterable[Rlimit]) -> None:
    """The limit of open files where it is lower than what the interpreter has open: once it has closed them. A limit
    is lowered by right of everybody."""
    for limit in limits:
        if limit.name == _FILES and limit.soft < _FEW:
            hard = min(_unlimited(limit.hard), prlimit(limit.resource)[1])
            prlimit(limit.resource, (min(limit.soft, hard), hard))


def _unlimited(value: int) -> int:
    return RLIM_INFINITY if value >= (1 << 63) - 1 else value


def set_io_priority(priority: tuple[int, int]) -> None:
    """ioprio_set(2) for this process."""
    ioprio_set(*priority)


def set_scheduler(wanted: Scheduler) -> None:
    """sched_setattr(2) for this process, once it is in its cgroup: real-time policies take from that one's budget."""
    times = (wanted.runtime, wanted.deadline, wanted.period)
    try:
        sched_setattr(wanted.policy, wanted.flags, wanted.nice, wanted.priority, times)
    except KernelError as error:
        hints = {
            errno.EPERM: "it takes CAP_SYS_NICE, and for a real-time policy on cgroup v1 a cpu.realtimeRuntime",
            errno.EBUSY: "the processors have not that much time left to promise",
            errno.EINVAL: "this kernel has not this policy, or not with these values",
        }
        failure = RuntimeFailure.of(error, what="process.scheduler", code="invalid_argument")
        failure.hint = hints.get(error.errno or 0, "")
        raise failure from None


def own_stdio(user: User) -> None:
    """Gives pipes and terminals on 0, 1 and 2 to the user, so that it can reopen them under /proc/self/fd.

    Never a device such as /dev/null: that inode is the host's (threats S20), and where the container has a null device
    it takes the place of the host's. Neither a regular file: its owner is the caller's business."""
    for fd in (0, 1, 2):
        try:
            status = os.fstat(fd)
        except OSError:
            continue  # closed by the caller, who may
        if _is_null(status):
            _take_own_null(fd)
            continue
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) or status.st_uid == user.uid:
            continue
        if stat.S_ISCHR(status.st_mode) and not os.isatty(fd):
            continue
        try:
            os.fchown(fd, user.uid, -1)
        except OSError as error:
            # In a user namespace the pipe's owner may be unmapped, and some filesystems have no owners.
            if error.errno not in (errno.EINVAL, errno.EPERM, errno.EROFS, errno.ENOSYS):
                raise


def _is_null(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(1, 3)


def _take_own_null(fd: int) -> None:
    """Puts the container's null device on `fd`, as the peers do: an fd on a mount of the host's cannot be checkpointed.
    Nothing else at that name is taken, nor waited for."""
    try:
        null = os.open("/dev/null", os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return  # it has none
    try:
        if _is_null(os.fstat(null)):
            os.dup2(null, fd)
    finally:
        os.close(null)


class Identity:
    """Becomes the user with the capabilities asked for, in two halves around the seccomp filter.

    Without no_new_privs, loading a filter needs CAP_SYS_ADMIN; were the filter loaded before setuid, it would have to
    allow setuid, setgroups and all the rest. So CAP_SYS_ADMIN is held until the filter is in force, and the only calls
    after it are capset and execve.
    """

    def __init__(self, process: Process, warn: Warn) -> None:
        self._user = process.user
        self._effective, self._permitted, self._inheritable = capget()
        self.final: tuple[int, int, int] | None = None  # what `finish` sets, if it has anything to set
        if process.capabilities.unknown:
            warn(f"ignored unknown capabilities: {', '.join(process.capabilities.unknown)}")
        self._wanted = self._available(process.capabilities, warn)

    def _available(self, wanted: Capabilities, warn: Warn) -> Capabilities:
        """Without what this process lacks itself: nobody can give what he has not."""
        have = bounding_set() & self._permitted
        every = wanted.bounding | wanted.effective | wanted.permitted | wanted.inheritable | wanted.ambient
        if every & ~have:
            warn(f"ignored unavailable capabilities: {', '.join(names(every & ~have))}")
        permitted = wanted.permitted & have
        inheritable = wanted.inheritable & have
        return wanted.changed(
            bounding=wanted.bounding & have,
            permitted=permitted,
            effective=wanted.effective & permitted,
            inheritable=inheritable,
            # The kernel raises in the ambient set only what is in both of these, capabilities(7).
            ambient=wanted.ambient & permitted & inheritable,
        )

    def drop(self) -> None:
        """Bounding set, groups, gid, uid; afterwards the sets are the final ones, plus CAP_SYS_ADMIN."""
        wanted = self._wanted
        if self._effective & _CAP_SETPCAP:
            current = bounding_set()
            for number in range(64):
                if (current & ~wanted.bounding) >> number & 1:
                    capbset_drop(number)
        set_keepcaps(True)
        ids.become(self._user)
        os.umask(0o022 if self._user.umask is None else self._user.umask)
        keep = _CAP_SYS_ADMIN & self._permitted
        capset(wanted.effective | keep, wanted.permitted | keep, wanted.inheritable)
        set_keepcaps(False)
        cap_ambient_clear()
        for number in range(64):
            if wanted.ambient >> number & 1:
                cap_ambient_raise(number)
        if keep & ~wanted.effective or keep & ~wanted.permitted:
            self.final = (wanted.effective, wanted.permitted, wanted.inheritable)

    def finish(self) -> None:
        """The last change before execve: gives up what the filter needed."""
        if self.final is not None:
            capset(*self.final)


_bounding: list[int] = []


def bounding_set() -> int:
    """The bounding set of this process as a mask, asked for once: it can only shrink, and only by what is done here,
    just before execve. A zygote asks before it forks, so that its children need not make 41 system calls."""
    if not _bounding:
        _bounding.append(_read_bounding_set())
    return _bounding[0]


def _read_bounding_set() -> int:
    mask = 0
    for number in range(64):
        try:
            mask |= prctl(PR_CAPBSET_READ, number) << number
        except KernelError:
            break  # EINVAL: above the last one that this kernel knows
    return mask


def home_of(root_fd: int, uid: int) -> str:
    """The home directory that /etc/passwd inside the root has for `uid`, or "/". Bounded, regular file only (S42)."""
    try:
        raw = read_bounded(root_fd, "etc/passwd", _PASSWD_LIMIT, in_root=True)
    except OSError:
        return "/"
    for line in raw.split(b"\n"):
        fields = line.split(b":")
        if len(fields) >= 7 and fields[2] == b"%d" % uid:
            return os.fsdecode(fields[5]) if fields[5].startswith(b"/") else "/"
    return "/"


def environment(process: Process, root_fd: int) -> list[bytes]:
    """The config's environment, later entries winning, with HOME where it has none (as runc does)."""
    entries: dict[bytes, bytes] = {}
    for entry in process.env:
        name, _, value = os.fsencode(entry).partition(b"=")
        entries[name] = value
    if not entries.get(b"HOME"):
        entries[b"HOME"] = os.fsencode(home_of(root_fd, process.user.uid))
    return [name + b"=" + value for name, value in entries.items()]


def enter_directory(root_fd: int, cwd: str) -> None:
    """fchdir(2) to `cwd` as seen from `root_fd`: no magic link on the way can lead to an fd of the host (S8)."""
    fd = open_in_root(root_fd, cwd, os.O_PATH | os.O_DIRECTORY)
    try:
        os.fchdir(fd)
    finally:
        os.close(fd)


def verify_directory() -> None:
    """Raises when the working directory is not below the root: getcwd(3) says (unreachable) then."""
    try:
        inside = os.getcwd().startswith("/")
    except FileNotFoundError:
        inside = False
    if not inside:
        raise RuntimeFailure("the working directory is outside of the container's root", code="failed_precondition")


def find_command(name: str, env: Iterable[bytes]) -> str:
    """The path to execute for `name`, in the words that callers of runc look for when there is none."""
    if "/" in name:
        _check_executable(name, name)
        return name
    path = next((entry[5:] for entry in env if entry.startswith(b"PATH=")), os.fsencode(DEFAULT_PATH))
    denied = False
    for directory in os.fsdecode(path).split(":"):
        if not directory.startswith("/"):
            continue  # a relative entry finds what somebody put into the working directory
        try:
            _check_executable(f"{directory}/{name}", name)
        except RuntimeFailure as failure:
            denied = denied or failure.errno == errno.EACCES
            continue
        return f"{directory}/{name}"
    problem = "permission denied" if denied else "executable file not found in $PATH"
    raise RuntimeFailure(
        f'exec: "{name}": {problem}',
        step="command",
        errno=errno.EACCES if denied else errno.ENOENT,
        code="invalid_argument",
        hint="process.args[0] must exist in the root filesystem and be executable",
    )


def _check_executable(path: str, name: str) -> None:
    code = 0
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            code = errno.EISDIR
        elif not status.st_mode & 0o111 or not os.access(path, os.X_OK, effective_ids=True):
            code = errno.EACCES
    except (OSError, ValueError) as error:
        code = error.errno or errno.EINVAL if isinstance(error, OSError) else errno.EINVAL
    if code:
        problem = "is a directory: permission denied" if code == errno.EISDIR else os.strerror(code).lower()
        where = "" if code in (errno.EACCES, errno.EISDIR) else f"stat {path}: "
        raise RuntimeFailure(
            f'exec: "{name}": {where}{problem}',
            step="command",
            errno=code,
            code="invalid_argument",
            hint="process.args[0] must exist in the root filesystem and be executable",
        )


def close_all_but(keep: Iterable[int], preserved: int) -> None:
    """Closes every fd above 2 but `keep` and the first `preserved`; those of `keep` that stay open are CLOEXEC."""
    start = 3 + preserved
    for fd in sorted({fd for fd in keep if fd >= start}):
        if fd > start:
            close_range(start, fd - 1)
        start = fd + 1
    close_range(start)
    close_range(3 + preserved, flags=CLOSE_RANGE_CLOEXEC)
    for fd in range(3, 3 + preserved):
        os.set_inheritable(fd, True)


def execute(path: str, args: Iterable[str], env: Iterable[bytes]) -> None:
    """execve(2). Returns only by raising, in a sentence with the file and what is likely wrong with it."""
    try:
        execveat(_AT_FDCWD, path, [os.fsencode(arg) for arg in args], list(env))
    except KernelError as error:
        raise not_executed(path, error.errno or 0) from None


def not_executed(path: str, code: int) -> RuntimeFailure:
    """What is said of an execve(2) of `path` that failed with the errno `code`."""
    hints = {
        errno.ENOEXEC: "it is neither a program of this architecture nor a script with a #! line",
        errno.ENOENT: "the file is there, but its interpreter (#! line, dynamic loader) is not",
        errno.EACCES: "it or its interpreter is not executable, or its mount is noexec",
        errno.E2BIG: "arguments and environment have room for a quarter of the stack's limit, each for 128 KiB",
    }
    return RuntimeFailure(
        f"exec {path}: {os.strerror(code).lower()} ({errno.errorcode.get(code, code)})",
        step="exec",
        errno=code,
        hint=hints.get(code, ""),
        code="invalid_argument" if code in hints else "internal",
    )
