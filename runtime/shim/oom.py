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
    from typing import Any


class OomWatch:
    """Calls back when the counter of a cgroup rises; `place` is what `memory_cgroup` found, [] calls back never."""

    def __init__(self, loop: Loop, place: list[Any], rose: Callable[[], None]) -> None:
        self._loop = loop
        self._rose = rose
        self._file = self._event = -1
        self._before = self._seen = 0
        if not place:
            return
        directory, version = place
        try:
            name = "memory.events" if version == 2 else "memory.oom_control"
            self._file = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._before = self._seen = self._count()
            if version == 2:
                loop.watch(self._file, select.EPOLLPRI, self._changed)
            else:
                self._watch_v1(directory)
        except OSError:  # a kernel without it: `rose` at the end still tells
            pass

    def _watch_v1(self, directory: str) -> None:
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        control = os.open(f"{directory}/cgroup.event_control", os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.write(control, f"{self._event} {self._file}".encode())
        finally:
            os.close(control)
        self._loop.watch(self._event, READ, self._changed)

    def _changed(self, _events: int) -> None:
        if self._event >= 0:
            try:
                os.eventfd_read(self._event)
            except BlockingIOError:
                return
        count = self._count()
        if count < 0:  # the cgroup is gone, and its eventfd fires one last time
            self.close()
        elif count > self._seen:
            self._seen = count
            self._rose()

    def _count(self) -> int:
        """oom_kill, or -1 when the cgroup has been removed."""
        try:
            text = os.pread(self._file, 4096, 0)
        except OSError:
            return -1
        for line in text.splitlines():
            key, _, value = line.partition(b" ")
            if key == b"oom_kill":
                return int(value)
        return 0

    def rose(self) -> bool:
        """True when anything was killed since the watch began."""
        return self._file >= 0 and self._count() > self._before

    def close(self) -> None:
        for fd in (self._event, self._file):
            if fd >= 0:
                self._loop.unwatch(fd)
                os.close(fd)
        self._event = self._file = -1


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
