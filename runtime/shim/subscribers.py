"""Who wants to hear what happens in a pod: one daemon, mostly.

Refuses to wait for a reader: one that is EVENT_LIMIT behind is let go, and lists anew when it is back (threats O55).
Invariant: a subscriber hears everything from its answer on, in order, or its end.
"""

from __future__ import annotations

import os

from runtime.shim import protocol
from runtime.shim.loop import READ, Loop
from runtime.shim.sink import Sink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.shim.protocol import Facts

EVENT_LIMIT = 256 << 10  # bytes of events that a subscriber may lag behind


class Subscribers:
    """Those of one shim."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._sinks: dict[int, Sink] = {}

    def __len__(self) -> int:
        return len(self._sinks)

    def add(self, take_fd: int, answer: bytes) -> None:
        """A connection; `answer` is what it hears first."""
        fd, probe = take_fd, os.dup(take_fd)  # epoll takes an fd once: one to write to, one to hear the end of
        sink = self._sinks[fd] = Sink(self._loop, fd, EVENT_LIMIT, lambda: self._remove(fd, probe))
        self._loop.watch(probe, READ, lambda _events: self._remove(fd, probe))
        sink.write(answer)

    def _remove(self, fd: int, probe: int) -> None:
        """It has closed, said something, which subscribers do not, or fallen too far behind."""
        sink = self._sinks.pop(fd, None)
        if sink is not None:
            self._loop.unwatch(probe)
            os.close(probe)
            sink.close()

    def tell(self, kind: str, facts: Facts) -> None:
        """An event of a container."""
        payload = protocol.frame(protocol.event(kind, facts))
        for sink in list(self._sinks.values()):
            sink.write(payload)

    def close(self) -> None:
        """Closes what the process's end would close."""
        for sink in list(self._sinks.values()):
            sink.close()
