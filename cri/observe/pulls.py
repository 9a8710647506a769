"""A pull's progress as times: when each blob was downloaded and unpacked, and how much was downloaded.

Refuses to judge: a pull that fails has told what it had come to. Invariant: each phase of each blob is told once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from cri.trace import Phase
from imagestore.model import Progress, ProgressFunction

_TIMED = ("download", "unpack")


class PullTimes:
    """cri.trace.PullWatch. `downloaded` hears the bytes of each blob that came, `phases` at the end the times."""

    def __init__(self, downloaded: Callable[[int], None] | None, phases: Callable[[Sequence[Phase]], None] | None):
        self._downloaded = downloaded
        self._phases = phases
        self._running: dict[str, tuple[str, int]] = {}
        self._ended: set[tuple[str, str]] = set()
        self._found: list[Phase] = []

    def tell(self) -> ProgressFunction:
        return self._tell

    def _tell(self, progress: Progress) -> None:
        phase, since = self._running.get(progress.digest, ("", 0))
        if phase != progress.phase:
            if phase:
                self._end(progress.digest, phase, since)
            if progress.phase in _TIMED and (progress.phase, progress.digest) not in self._ended:
                self._running[progress.digest] = progress.phase, time.time_ns()
        phase, since = self._running.get(progress.digest, ("", 0))
        if phase == "download" and progress.done >= progress.total:
            self._end(progress.digest, phase, since)
            if self._downloaded is not None:
                self._downloaded(progress.total)

    def _end(self, digest: str, phase: str, since: int) -> None:
        del self._running[digest]
        self._ended.add((phase, digest))
        self._found.append((f"{phase} {digest}", "", since, time.time_ns()))

    def over(self) -> None:
        for digest, (phase, since) in list(self._running.items()):
            self._end(digest, phase, since)
        if self._phases is not None:
            self._phases(self._found)
