"""Restored processes that have not been started: they stand still in a frozen cgroup, and have not run a moment.

        criu (in the container's cgroup)           who restores
          │ everybody is stopped by it, and was compared
          │ ── "pre-resume" ──────────────────────▶ │  criu and its helpers leave the cgroup
          │                                         │  `held` is written, the cgroup frozen
          │ ◀────────────────────────── answer ──── │
          │ lets go: they stop in the freezer
                            …
                                          start ──▶ thawed, `held` removed: they go on where the images have them

Refuses nothing: who may start what is lifecycle's to say. Invariant: `held` is there before criu lets go and until they
have been thawed, so whoever is killed in between leaves a container that is created, and can be started again.
"""

from __future__ import annotations

import os

from runtime import state
from runtime.cgroups.hierarchy import V2_NAME, own_directories
from runtime.errors import RuntimeFailure
from runtime.linux.files import write_durable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from runtime.cgroups.manager import Manager


def hold(directory: str, manager: Manager, leaving: Iterable[int]) -> None:
    """The processes in `manager`'s cgroups stand still from here on, but for those `leaving`, which go where the caller
    is. `directory` is the container's. Raises RuntimeFailure."""
    freezer = manager.freezer()
    own = own_directories()["freezer" if freezer.version == 1 else V2_NAME]
    for pid in leaving:
        _move(pid, own)
    write_durable(f"{directory}/{state.HELD}", b"", sync=False)
    manager.freeze(True)


def _move(pid: int, directory: str) -> None:
    try:
        fd = os.open(f"{directory}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.write(fd, b"%d" % pid)
        finally:
            os.close(fd)
    except ProcessLookupError:
        pass  # it has ended
    except OSError as error:
        raise RuntimeFailure.of(error, step="cgroup", what=f"move criu ({pid}) out of the container's cgroup") from None


def release(directory: str, manager: Manager) -> None:
    """Lets them go on. Raises RuntimeFailure; then they stand still, or this may be repeated."""
    manager.freeze(False)
    os.unlink(f"{directory}/{state.HELD}")
