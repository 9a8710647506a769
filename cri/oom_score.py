"""oom_score_adj of a container that runs already: of every process in its cgroup.

Refuses to reach a process that is not the container's: each is looked up in the cgroup and held by a pidfd while it is
written. Invariant: a process that is born meanwhile has its parent's score, the old or the new one, and the rounds go
on until none with the old one is left. Where this node may not lower scores they stay as low as they may be, with a
warning, as when a container starts (proc_pid_oom_score_adj(5)).
"""

from __future__ import annotations

import logging
import os

from runtime.cgroups.manager import Manager, manager_for
from runtime.linux.process import pidfd_open

log = logging.getLogger(__name__)

_ROUNDS = 16


def apply(cgroup: str, container_id: str, score: int) -> None:
    """Sets `score` for all there is in `cgroup`. Raises RuntimeFailure when the cgroup cannot be read."""
    manager = manager_for(cgroup, container_id)
    done: set[int] = set()
    for _ in range(_ROUNDS):
        left = [pid for pid in manager.pids() if pid not in done]
        if not left:
            return
        for pid in left:
            done.add(pid)
            if not _set(manager, pid, score):
                log.warning("container %s: oom_score_adj %d is lower than this node may set", container_id[:13], score)
                return


def _set(manager: Manager, pid: int, score: int) -> bool:
    """False where it may not be lowered."""
    try:
        pidfd = pidfd_open(pid)
    except OSError:  # it has ended
        return True
    try:
        with open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as file:
            if pid in manager.pids():  # after pidfd_open: the pid cannot change hands any more
                file.write(str(score))
        return True
    except PermissionError:
        return False
    except (FileNotFoundError, ProcessLookupError):
        return True
    finally:
        os.close(pidfd)
