"""What happens to pods and containers, told to whoever listens: CRI's container events.

    store ── a record changes ──▶ Feed ── a message, encoded once ──▶ a bounded queue per reader ──▶ GetContainerEvents

Events are computed from what changes in the store, so no way through the verbs, the shims' streams or recovery can
forget one. Refuses to wait for a reader and to grow with one (threats O55): who falls behind is ended, with a code that
says so, and lists anew. Invariant: a reader gets every event from its beginning on, in the order of the records'
changes, or an error; times of events never go back.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Iterator

from cri.api import api_pb2 as pb
from cri.errors import CriError, LimitExceeded, Unavailable
from cri.node import now_ns
from cri.records import Container, Pod
from cri.store import Store
from cri.verbs import status

log = logging.getLogger(__name__)

MAX_READERS = 32
# What one reader may be behind. A kubelet reads at once; who is so far back is better served by a list.
MAX_EVENTS = 4096
MAX_BYTES = 4 << 20


class _Reader:
    """The queue of one reader. `failure` ends it once the queue is empty."""

    __slots__ = ("bytes", "failure", "queue", "wake")

    def __init__(self) -> None:
        self.queue: deque[bytes] = deque()
        self.bytes = 0
        self.failure: CriError | None = None
        self.wake = asyncio.Event()

    def put(self, event: bytes) -> None:
        if self.failure is not None:
            return
        if self.queue and (len(self.queue) >= MAX_EVENTS or self.bytes + len(event) > MAX_BYTES):
            late = len(self.queue)
            self.end(LimitExceeded(f"the reader of container events is {late} events behind; list and read anew"))
            log.warning("container events: a reader that is %d events behind is ended", late)
            return
        self.queue.append(event)
        self.bytes += len(event)
        self.wake.set()

    def end(self, failure: CriError) -> None:
        """No more events: what is queued is dropped, since the list that must follow holds it all."""
        self.queue.clear()
        self.bytes = 0
        self.failure = failure
        self.wake.set()

    def take(self) -> bytes | None:
        """The oldest event; None when there is none now. Raises what ended the reader."""
        if self.failure is not None:
            raise self.failure
        if not self.queue:
            self.wake.clear()
            return None
        event = self.queue.popleft()
        self.bytes -= len(event)
        return event


class Feed:
    """One per node; listens to the store from the beginning, and does nothing while nobody reads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._readers: set[_Reader] = set()
        self._last_ns = 0
        self._closed = False
        store.changed = self._changed

    @property
    def readers(self) -> int:
        """How many read."""
        return len(self._readers)

    async def read(self) -> AsyncGenerator[bytes | None, None]:
        """None once it listens, then encoded ContainerEventResponses for ever. Raises LimitExceeded, Unavailable."""
        if self._closed:
            raise Unavailable("ocid is stopping")
        if len(self._readers) >= MAX_READERS:
            raise LimitExceeded(f"there are {MAX_READERS} readers of container events already")
        reader = _Reader()
        self._readers.add(reader)
        try:
            yield None
            while True:
                event = reader.take()
                if event is None:
                    await reader.wake.wait()
                else:
                    yield event
        finally:
            self._readers.discard(reader)

    def close(self) -> None:
        """Ends all readers, so that a server need not wait for them."""
        self._closed = True
        for reader in self._readers:
            reader.end(Unavailable("ocid is stopping"))

    # ------------------------------------------------------------------------------------------------------ telling

    def _changed(self, old: Pod | Container, new: Pod | Container | None) -> None:
        if not self._readers:
            return
        for kind in _happened(old, new):
            event = self._event(new or old, kind).SerializeToString()
            for reader in self._readers:
                reader.put(event)

    def _event(self, record: Pod | Container, kind: pb.ContainerEventType) -> pb.ContainerEventResponse:
        pod = record if isinstance(record, Pod) else self._store.pods.get(record.pod_id)
        self._last_ns = max(now_ns(), self._last_ns + 1)
        event = pb.ContainerEventResponse(container_id=record.id, container_event_type=kind, created_at=self._last_ns)
        if pod is not None:
            event.pod_sandbox_status.CopyFrom(status.pod_status(pod))
            event.containers_statuses.extend(status.whole(self._store.containers_of(pod.id)))
        return event


def _happened(old: Pod | Container, new: Pod | Container | None) -> Iterator[pb.ContainerEventType]:
    """What a change of a record means. One change may be several events: a program may end before its start is told.
    A pod's STOPPED comes when all in it has stopped, or its shim is lost; a half-made record is nobody's business. One
    that was created and never started stops with its pod: its process ends then, which CRI-O tells, too. containerd has
    no process by then, tells nothing and leaves it CREATED; a kubelet reads the statuses after either."""
    if new is None:
        if old.made_ns:
            yield pb.CONTAINER_DELETED_EVENT
        return
    if not new.made_ns:
        return
    if not old.made_ns:
        yield pb.CONTAINER_CREATED_EVENT
    if _started(new) and not (old.made_ns and (_started(old) or _stopped(old))):
        yield pb.CONTAINER_STARTED_EVENT
    if _stopped(new) and not (old.made_ns and _stopped(old)):
        yield pb.CONTAINER_STOPPED_EVENT


def _started(record: Pod | Container) -> bool:
    return bool(record.made_ns if isinstance(record, Pod) else record.started_ns)


def _stopped(record: Pod | Container) -> bool:
    return bool((record.lost_ns or record.stopped_ns) if isinstance(record, Pod) else record.finished_ns)
