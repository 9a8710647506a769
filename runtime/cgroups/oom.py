"""The kernel's notice that a container has run out of memory, as one fd to poll.

v1 signals an eventfd on memory.oom_control (cgroup-v1/memory.rst, 10), v2 a change of memory.events by POLLPRI
(cgroup-v2.rst). Refuses inotify, of which a node has few (threats O33). Invariant: `take` is true at most once for
each notice, and never for the one with which a removed cgroup says goodbye.
"""

from __future__ import annotations

import os
import select

from runtime.cgroups.stats import table

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType


class OomNotice:
    """Watches the memory cgroup among `paths` (as Manager.paths() gives them). `fd` and `events` are for poll(2); -1
    where the kernel has nothing to watch."""

    def __init__(self, paths: Mapping[str, str]) -> None:
        self.fd = self._file = self._event = -1
        self.events = select.POLLPRI
        try:
            if "memory" in paths:
                self._watch_v1(paths["memory"])
            else:
                self.fd = self._file = _open(f"{paths.get('', '')}/memory.events", os.O_RDONLY)
                self._seen = self._kills()
        except OSError:
            self.close()

    def _watch_v1(self, directory: str) -> None:
        self._file = _open(f"{directory}/memory.oom_control", os.O_RDONLY)
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        control = _open(f"{directory}/cgroup.event_control", os.O_WRONLY)
        try:
            os.write(control, f"{self._event} {self._file}".encode())
        finally:
            os.close(control)
        self.fd, self.events = self._event, select.POLLIN

    def take(self) -> bool:
        """After poll(2) said so: whether it is about memory."""
        if self._event >= 0:
            try:
                os.eventfd_read(self._event)
            except BlockingIOError:
                return False
            return self.there()
        seen, self._seen = self._seen, self._kills()
        return self._seen > seen

    def there(self) -> bool:
        """False once the cgroup has been removed."""
        try:
            os.pread(self._file, 1, 0)
            return True
        except OSError:
            return False

    def _kills(self) -> int:
        try:
            return table(os.pread(self._file, 4096, 0)).get(b"oom_kill", 0)
        except OSError:
            return 0

    def close(self) -> None:
        for fd in {self._file, self._event} - {-1}:
            os.close(fd)
        self.fd = self._file = self._event = -1

    def __enter__(self) -> OomNotice:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
