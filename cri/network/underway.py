"""Calls that are under way: one at a time for each pod, and all of them known, so that they can be ended.

Refuses to let one pod wait for another (threats R14). Invariant: after `interrupt` no plugin program runs on, and none
that begins does, so that the process can end.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from cri.interfaces import NetworkError
from cri.network.values import Cancel


class UnderWay:
    """Any number of threads use it."""

    def __init__(self, wait_s: float) -> None:
        """`wait_s`: how long a call waits for another of the same pod."""
        self._wait_s = wait_s
        self._pods: set[str] = set()
        self._cancels: set[Cancel] = set()
        self._interrupted = False
        self._changed = threading.Condition()

    @property
    def pods(self) -> frozenset[str]:
        """Those for which there is a call."""
        with self._changed:
            return frozenset(self._pods)

    @contextlib.contextmanager
    def one(self, pod: str) -> Iterator[None]:
        """One ADD or DEL of a pod at a time. Raises NetworkError when another takes too long."""
        with self._changed:
            if not self._changed.wait_for(lambda: pod not in self._pods, self._wait_s):
                words = f"another call for the network of pod {pod} has not ended within {self._wait_s:.0f} s"
                raise NetworkError(words, code="deadline")
            self._pods.add(pod)
        try:
            yield
        finally:
            with self._changed:
                self._pods.discard(pod)
                self._changed.notify_all()

    @contextlib.contextmanager
    def cancellable(self) -> Iterator[Cancel]:
        """For a call that runs programs: they are killed when the Cancel is set, by whoever has it or `interrupt`."""
        cancel = Cancel()
        with self._changed:
            self._cancels.add(cancel)
            if self._interrupted:
                cancel.set()
        try:
            yield cancel
        finally:
            with self._changed:
                self._cancels.discard(cancel)
            cancel.close()

    def interrupt(self) -> None:
        """Ends the programs of all calls, and of all that come."""
        with self._changed:
            self._interrupted = True
            for cancel in self._cancels:
                cancel.set()
