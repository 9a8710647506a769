"""One epoll, one thread: fds with callbacks, deadlines, and tasks that wait for promises.

Long work is written as a generator that yields `Promise`s and is resumed with their values, so that a slow runtime
binary or a running exec never holds up the logs of a pod. Refuses threads and periodic timers: an idle loop sleeps
in epoll_wait without a timeout (threats O33). Invariant: a callback that raises is reported and takes nothing else
down with it.
"""

from __future__ import annotations

import heapq
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any, Generic, TypeAlias, TypeVar

    T = TypeVar("T")
    Task: TypeAlias = Generator["Promise[Any]", Any, T]
else:  # at run time nobody looks at these: `typing` would cost more than the loop

    class Generic:
        def __class_getitem__(cls, _item):
            return cls

    T = Task = None

READ, WRITE = select.EPOLLIN, select.EPOLLOUT
HANGUP = select.EPOLLHUP | select.EPOLLERR


class Promise(Generic[T]):
    """A value or a failure that is not there yet. The first `resolve` or `fail` counts, later ones do nothing."""

    __slots__ = ("_waiters", "done", "error", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: T | None = None
        self.error: BaseException | None = None
        self._waiters: list[Callable[[], None]] = []

    def resolve(self, value: T | None = None) -> None:
        if not self.done:
            self.done, self.value = True, value
            self._wake()

    def fail(self, error: BaseException) -> None:
        if not self.done:
            self.done, self.error = True, error
            self._wake()

    def waker(self) -> Callable[[int], None]:
        """A callback for `Loop.watch` that resolves this."""
        return lambda _events: self.resolve()

    def when_done(self, callback: Callable[[], None]) -> None:
        """Calls back once: at once when it is done already."""
        if self.done:
            callback()
        else:
            self._waiters.append(callback)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter()


class Timer:
    """A deadline of `Loop.after`; `cancel` makes it do nothing."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """The epoll loop. `report` is told of exceptions that nobody else takes."""

    def __init__(self, report: Callable[[str, BaseException], None]) -> None:
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._count = 0
        self._report = report
        self.running = False

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

    def spawn(self, task: Task[T]) -> Promise[T]:
        """Runs a generator until its first promise that is not done; the promise returned is its return value."""
        result: Promise[T] = Promise()
        self._step(task, result, None, None)
        return result

    def _step(self, task: Task[T], result: Promise[T], value: Any, error: BaseException | None) -> None:
        while True:
            try:
                promise = task.send(value) if error is None else task.throw(error)
            except StopIteration as stop:
                result.resolve(stop.value)
                return
            except Exception as failure:
                result.fail(failure)
                return
            if not promise.done:
                self._resume_after(promise, task, result)
                return
            value, error = promise.value, promise.error

    def _resume_after(self, promise: Promise[Any], task: Task[T], result: Promise[T]) -> None:
        promise.when_done(lambda: self._step(task, result, promise.value, promise.error))

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
