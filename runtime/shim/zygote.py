"""The process that shims are forked from: everything imported once, the garbage collector's view frozen, one thread.

    daemon ── posix_spawn ──▶ starter ── fork ──▶ zygote       the starter ends, so init (or a subreaper) adopts it
    zygote ── fork ──▶ · ── fork ──▶ shim                      and so is each shim

Two roles, by the arguments: `zygote STATE` serves STATE/zygote.sock; `direct` serves a single request on fd 3, as a
shim forked for it would (`ocid run` without a daemon), and goes on from ocirun's dump, mostly. Refuses a second zygote
for one state directory (flock).
Invariant: neither role has threads, and each fork of the zygote closes every fd that is not its own.
"""

from __future__ import annotations

import fcntl
import gc
import os

import runtime.rootfs_cgroup  # noqa: F401 - a helper would import it for each container
from runtime.errors import RuntimeFailure
from runtime.linux import template
from runtime.linux.dumped import outlive_starter
from runtime.linux.memory import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, malloc_trim, mallopt
from runtime.linux.process import close_range, set_child_subreaper, set_comm
from runtime.linux.sockets import listen_unix
from runtime.process import bounding_set
from runtime.shim.cgroup import ZYGOTE, leave_daemon
from runtime.shim.helper import first_helper, kill_command, kill_rest, serve, start_again
from runtime.shim.rehearsal import rehearse
from runtime.shim.report import report
from runtime.shim.resident import Resident
from runtime.shim.spare import Spare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from runtime.shim.resident import Work

_CONNECTION = 3  # the fd on which a direct process is given its request
# Objects/obmalloc.c of CPython 3.10 and later; where they are others, pools are filled as far as they happen to be.
_POOL, _POOL_HEADER, _STEP, _LARGEST = 1 << 14, 48, 16, 512
_BYTES_HEADER = 33  # sys.getsizeof(b"")
_SMALLEST = 48  # of a bytes object that is not one of the interpreter's own
_MOST_HOLES = 4096
_ballast: list[bytes] = []
_OOM_SCORE = "-999"  # kubelet's for node-critical daemons: killed after all pods (threats S68)


def main(arguments: list[str]) -> int:
    """Runs a role. Exit code 0 for the zygote also when another one serves already."""
    if len(arguments) == 2 and arguments[0] == "zygote":
        _zygote(arguments[1])
    elif arguments == ["direct"]:
        _direct()
    else:
        os.write(2, b"usage: zygote STATE | direct\n")
        return 2
    return 0


def _zygote(state: str) -> None:
    """Detaches, says on fd 1 that it serves (or why not), and serves until it is told to quit."""
    close_range(3)
    lock = os.open(f"{state}/zygote.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if os.fork():
        os._exit(0)
    _detach(ZYGOTE)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.write(1, b"taken")
        return
    leave_daemon(always=True)
    _protect_from_oom()
    spare = Spare(listen_unix(f"{state}/zygote.sock").detach())
    os.write(1, b"ready")
    _to_null(0, 1)
    try:
        rehearse(state)
    except (OSError, RuntimeFailure) as error:
        report("rehearse", error)
    resident = Resident(serve, kill_rest, kill_command, start_again)
    first = first_helper(state, os.getpid(), spare)
    bounding_set()
    _settle()
    _ballast.extend(_fill_pools())
    _share(resident)
    _fork_for_ever(spare, resident, first)


def _fork_for_ever(spare: Spare, resident: Resident, first: Work) -> NoReturn:
    """A process for the next connection, and nothing else: each page that this loop writes to is one that the shims
    forked before have to themselves from then on. So no look at the request, no ctypes, no objects but ints."""
    while True:
        if spare.fork():
            _become_shim(resident, first, *spare.filenos())


def _become_shim(resident: Resident, first: Work, *take: int) -> NoReturn:
    """A shim, unless its first helper finds that the request is another. What is done here before that helper is
    forked costs memory for as long as the pod lives: only what a process can do for none but itself."""
    try:
        try:
            os.setsid()
        except PermissionError:  # a direct one leads its session already
            pass
        set_child_subreaper(True)
        resident.run(first, *take)
    except BaseException as error:
        report("serve the pod", error)
    finally:
        os._exit(0)


def _direct() -> None:
    """The one request comes on fd 3; a shim that starts is a child of init from the beginning."""
    gc.enable()  # a command is over before there is garbage (runtime/resumable.py, runtime/boot.py)
    if not outlive_starter() and os.fork():
        os._exit(0)
    close_range(_CONNECTION + 1)
    os.set_inheritable(_CONNECTION, False)
    _detach("ocid-shim")
    _to_null(0, 1)
    leave_daemon(always=False)
    _protect_from_oom()
    _settle()
    _become_shim(Resident(serve, kill_rest, kill_command, start_again), first_helper("", 0), _CONNECTION)


def _detach(name: str) -> None:
    """A session and a process group of its own, out of everybody's way; the terminal's signals are nobody's."""
    try:
        os.setsid()
    except PermissionError:  # leads one already
        pass
    os.chdir("/")
    os.umask(0o077)
    set_comm(name)


def _to_null(*fds: int) -> None:
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for fd in fds:
        os.dup2(null, fd, inheritable=False)
    os.close(null)


def _settle() -> None:
    """Memory as it is to be shared from now on.

    Large buffers (log chunks, output of execs) are mapped and unmapped, never kept: glibc would raise the limit for
    that with the first of them, and an idle shim would hold megabytes. The collector never writes to what is frozen.
    """
    mallopt(M_MMAP_THRESHOLD, 1 << 16)
    mallopt(M_TRIM_THRESHOLD, 1 << 17)
    gc.collect()
    malloc_trim()
    gc.freeze()


def _fill_pools() -> list[bytes]:
    """Small objects in every hole that this process's life has left among others. What a shim makes goes where the
    allocator has room: from here on into fresh pools, side by side, and not into pages that it shares until then."""
    filling = []
    for size in range(_SMALLEST, _LARGEST + 1, _STEP):
        for _ in range(_MOST_HOLES):
            one = bytes(size - _BYTES_HEADER)
            if id(one) % _POOL == _POOL_HEADER:  # the first of a fresh pool
                break
            filling.append(one)
    return filling


def _share(resident: Resident) -> None:
    """Shims at rest give back what they have copied without need; without that they only weigh more."""
    try:
        taken = template.take()
    except OSError as error:
        report("take a template of the memory", error)
    else:
        if taken is not None:
            resident.rest.act = taken.give_back
            resident.make_ready = taken.copy


def _protect_from_oom() -> None:
    """As far as this machine lets us: without CAP_SYS_RESOURCE lowering it is refused."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(_OOM_SCORE)
    except OSError:
        pass
