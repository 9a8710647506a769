"""One epoll, one thread: fds with callbacks, and deadlines.

Refuses threads and periodic timers: an idle loop sleeps in epoll_wait without a timeout (threats O33). Invariant: a
callback that raises is reported and takes nothing else down with it.
"""

from __future__ import annotations

import heapq
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

READ, WRITE = select.EPOLLIN, select.EPOLLOUT
DESERTED = select.EPOLLRDHUP  # the peer sends no more
HANGUP = select.EPOLLHUP | select.EPOLLERR


class Timer:
    """A deadline of `Loop.after`; `cancel` makes it do nothing."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """The epoll loop. `report` is told of exceptions that nobody else takes."""

    _epoll: select.epoll

    def __init__(self, report: Callable[[str, BaseException], None]) -> None:
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._count = 0
        self._report = report
        self.running = False

    def open(self) -> None:
        """Makes the epoll instance: in the process that uses it, since a fork would share it."""
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Calls `callback(events)` while `fd` is ready; watching it again changes events and callback."""
        if fd in self._callbacks:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def unwatch(self, fd: int) -> None:
        """Forgets `fd`; before it is closed, since another process may hold its open file description (epoll(7))."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Calls back once in `seconds` of the monotonic clock (threats P15)."""
        timer = Timer(callback)
        self._count += 1
        heapq.heappush(self._timers, (time.monotonic() + seconds, self._count, timer))
        return timer

    def run(self) -> None:
        """Serves until `stop`."""
        self.running = True
        while self.running:
            self.turn()

    def stop(self) -> None:
        self.running = False

    def turn(self) -> None:
        """Waits for something to happen and handles all of it."""
        for fd, events in self._epoll.poll(self._patience()):
            callback = self._callbacks.get(fd)  # an earlier callback of this turn may have closed it
            if callback is not None:
                self._guard("handle an event", lambda: callback(events))  # noqa: B023 - called at once
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.callback is not None:
                self._guard("handle a deadline", timer.callback)

    def _patience(self) -> float:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return -1
        return max(0.0, self._timers[0][0] - time.monotonic())

    def _guard(self, what: str, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception as error:
            self._report(what, error)

    def close(self) -> None:
        self._epoll.close()
