"""Whether the kernel killed something of a container for want of memory: the oom_kill counter of its cgroup.

v2 announces a change of memory.events by EPOLLPRI (cgroup-v2.rst), v1 by an eventfd on memory.oom_control
(cgroup-v1/memory.rst, 10). Refuses inotify, of which a node has few (threats O33). Invariant: the counter is read anew
at the end, so that an exit which is seen before its OOM event counts as one all the same (O56).
"""

from __future__ import annotations

import os
import select

from runtime.cgroups.hierarchy import detect, places_from
from runtime.errors import RuntimeFailure
from runtime.linux.cgroup import cgroups_of
from runtime.shim.loop import READ, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class OomSource:
    """The fds of a cgroup's counter, opened by a helper for the shim. -1 where there is none."""

    def __init__(self, pid: int) -> None:
        self.fds: dict[str, int] = {}
        self.before = 0
        found = memory_cgroup(pid)
        if found is None:
            return
        directory, version = found
        try:
            name = "memory.events" if version == 2 else "memory.oom_control"
            file = self.fds["oom"] = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            self.before = max(0, count(file))
            if version == 1:
                event = self.fds["oom_event"] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                control = os.open(f"{directory}/cgroup.event_control", os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    os.write(control, f"{event} {file}".encode())
                finally:
                    os.close(control)
        except OSError:  # a kernel without it: the counter at the end still tells, if there is one
            pass


class OomWatch:
    """Calls back when the counter rises. `file` is the counter's, `event` v1's eventfd; both -1: never."""

    def __init__(self, loop: Loop, take_file: int, take_event: int, before: int, rose: Callable[[], None]) -> None:
        self._loop = loop
        self._rose = rose
        self._file = take_file
        self._event = take_event
        self._before = self._seen = before
        if take_event >= 0:
            loop.watch(take_event, READ, self._changed)
        elif take_file >= 0:
            loop.watch(take_file, select.EPOLLPRI, self._changed)

    def _changed(self, _events: int) -> None:
        if self._event >= 0:
            try:
                os.eventfd_read(self._event)
            except BlockingIOError:
                return
        killed = count(self._file)
        if killed < 0:  # the cgroup is gone, and its eventfd fires one last time
            self.close()
        elif killed > self._seen:
            self._seen = killed
            self._rose()

    def rose(self) -> bool:
        """True when anything was killed since the watch began."""
        return self._file >= 0 and count(self._file) > self._before

    def close(self) -> None:
        for fd in (self._event, self._file):
            if fd >= 0:
                self._loop.unwatch(fd)
                os.close(fd)
        self._event = self._file = -1


def count(file: int) -> int:
    """oom_kill, or -1 when the cgroup has been removed."""
    try:
        text = os.pread(file, 4096, 0)
    except OSError:
        return -1
    for line in text.splitlines():
        key, _, value = line.partition(b" ")
        if key == b"oom_kill":
            return int(value)
    return 0


def memory_cgroup(pid: int) -> tuple[str, int] | None:
    """(directory, version) of the memory cgroup that `pid` is in; None for the top, which belongs to everybody."""
    try:
        paths = cgroups_of(pid)
        for hierarchy in detect():
            name = "memory" if "memory" in hierarchy.controllers else ""
            if (name == "" and hierarchy.version == 1) or (name == "" and "memory" in paths):
                continue
            path = paths.get(name, "/")
            root = hierarchy.root.rstrip("/")
            if path == "/" or not path.startswith(root + "/"):
                return None
            directory = hierarchy.mount + path[len(root) :]
            places_from({name: directory})
            return directory, hierarchy.version
    except (OSError, RuntimeFailure):
        pass
    return None
