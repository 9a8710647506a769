"""Ending everybody in a cgroup, and removing it once they are gone.

Refuses to signal a bare pid: a pid is opened, seen in the cgroup again, and signalled through its pidfd, so a number
that was reused meanwhile cannot hit a stranger. Invariant: every wait is for an event (a pidfd, cgroup.events) or at
most a few milliseconds long, and all of them together end with the deadline.
"""

from __future__ import annotations

import errno
import os
import select
import time

from runtime.cgroups.stats import table
from runtime.cgroups.tree import remove_place
from runtime.errors import RuntimeFailure
from runtime.linux.libc import KernelError
from runtime.linux.process import pidfd_open, signal_running

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from collections.abc import Callable

    from runtime.cgroups.freezer import Freezer
    from runtime.cgroups.hierarchy import Place
    from runtime.cgroups.tree import Verify

SIGKILL = 9  # the signal module costs as much to import as all of this package
_LONGEST_NAP_S = 0.004
_FREEZE_S = 0.1
_BATCH = 256  # pidfds open at once: the usual limit of open files is 1024


def kill_all(number: int, pids: Callable[[], list[int]], freezer: Freezer, v2: str, deadline_s: float) -> bool:
    """See Manager.kill. `v2` is the container's v2 directory, "" without."""
    deadline = time.monotonic() + deadline_s
    if number != SIGKILL:
        _signal_once(number, pids)
        return not pids()
    if v2:
        _cgroup_kill(v2)
    was_frozen = freezer.version == 1 and freezer.frozen()
    rounds = 0
    while True:
        # Somebody who forks faster than we list is stopped first; the common case is one process and one round.
        held = rounds > 0 and freezer.version == 1 and _try_freeze(freezer)
        gone = _signal_once(number, pids, 0 if held or was_frozen else deadline - time.monotonic())
        if held or was_frozen:
            freezer.freeze(False)  # v1 keeps even SIGKILL from a frozen task
            was_frozen = False
        if gone and not pids():
            return True
        if time.monotonic() >= deadline:
            return not pids()
        rounds += 1
        if rounds > 2:
            select.select([], [], [], _LONGEST_NAP_S)


def _cgroup_kill(directory: str) -> None:
    """v2's own way (5.14): atomic against forks, and it reaches the frozen."""
    try:
        fd = os.open(f"{directory}/cgroup.kill", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return  # an older kernel, or the cgroup is gone: the rounds do it
    try:
        os.write(fd, b"1")
    except OSError as error:
        # Removed meanwhile (ENODEV), or just being removed by somebody, as systemd does with a scope that has run
        # empty (ENOENT: cgroup_kn_lock_live in kernel/cgroup/cgroup.c); threaded.
        if error.errno not in (errno.ENODEV, errno.ENOENT, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(fd)


def _try_freeze(freezer: Freezer) -> bool:
    try:
        freezer.freeze(True, _FREEZE_S)
    except RuntimeFailure:
        return False
    return True


def _signal_once(number: int, pids: Callable[[], list[int]], wait_s: float = 0) -> bool:
    """Signals whoever is there; waits up to `wait_s` for them to exit. True when nobody was there, or all exited."""
    everybody = pids()
    deadline = time.monotonic() + wait_s
    gone = True
    for start in range(0, len(everybody), _BATCH):
        gone = _signal_batch(number, everybody[start : start + _BATCH], pids, deadline) and gone
    return gone


def _signal_batch(number: int, batch: list[int], pids: Callable[[], list[int]], deadline: float) -> bool:
    opened: dict[int, int] = {}
    try:
        for pid in batch:
            try:
                opened[pid] = pidfd_open(pid)
            except KernelError as error:
                # ESRCH, EINVAL: gone, or reused as a thread's id.
                if error.errno not in (errno.ESRCH, errno.EINVAL):
                    raise
        still_here = set(pids())
        poll = select.poll()
        waiting = set()
        for pid, fd in opened.items():
            if pid not in still_here:
                continue
            if not signal_running(fd, number):
                continue
            poll.register(fd, select.POLLIN)
            waiting.add(fd)
        while waiting and (left := deadline - time.monotonic()) > 0:
            for fd, _ in poll.poll(left * 1000):
                poll.unregister(fd)
                waiting.discard(fd)
        return not waiting
    finally:
        for fd in opened.values():
            os.close(fd)


def wait_until_removable(places: tuple[Place, ...], verify: Verify, deadline_s: float) -> None:
    """See Manager.destroy: removes every place, goes on after a failure, and raises the first one."""
    deadline = time.monotonic() + deadline_s
    first: RuntimeFailure | None = None
    for place in reversed(places):
        try:
            remove_place(place, verify, deadline, _waiter(place, deadline))
        except OSError as error:
            first = first or RuntimeFailure.of(error, step="cgroup", what=f"remove cgroup {place.directory}")
        except RuntimeFailure as error:
            first = first or error
    if first is not None:
        raise first


def _waiter(place: Place, deadline: float) -> Callable[[], None]:
    """What to do between two tries: v2 tells when a cgroup runs empty (cgroup.events), v1 does not."""
    nap = 0.00025

    def wait() -> None:
        nonlocal nap
        nap = min(nap * 2, _LONGEST_NAP_S)
        if place.hierarchy.version == 2:
            _wait_for_empty(place.directory, min(deadline - time.monotonic(), 0.1))
        select.select([], [], [], nap)

    return wait


def _wait_for_empty(directory: str, seconds: float) -> None:
    try:
        events = os.open(f"{directory}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        # Reading arms it: POLLPRI comes for changes after the last read of this fd.
        if table(os.pread(events, 4096, 0)).get(b"populated") == 1 and seconds > 0:
            poll = select.poll()
            poll.register(events, select.POLLPRI)
            poll.poll(seconds * 1000)
    except OSError:
        return  # removed meanwhile
    finally:
        os.close(events)
