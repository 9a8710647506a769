"""What the shims report: exits and OOM kills, one stream per pod, read by the event loop.

Refuses to act: it keeps facts in the store and tells who waits; what a lost shim means is `recovery`'s to say.
Invariant: an exit is in the store before anybody who waited for it is woken, and the first exit of a container is
the one that counts (threats O15). A bad frame ends its stream, never the loop (threats P14).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import struct
from collections.abc import Callable
from contextvars import Context
from dataclasses import fields
from typing import Any

from cri import trace
from cri.interfaces import ContainerFacts
from cri.node import Node
from cri.records import Container, facts_of
from runtime.linux.sockets import MAX_FRAME

log = logging.getLogger(__name__)

_HEADER = struct.Struct("=I")
_FIELDS = {item.name for item in fields(ContainerFacts)}


def parse_facts(raw: Any) -> ContainerFacts:
    """ContainerFacts from its JSON. Raises ValueError or TypeError when it is not that."""
    if not isinstance(raw, dict):
        raise ValueError("facts are no object")
    facts = ContainerFacts(**{key: value for key, value in raw.items() if key in _FIELDS})
    for name in ("pid", "started_ticks", "created_ns", "started_ns", "finished_ns", "exit_code", "signal"):
        if not isinstance(getattr(facts, name), int):
            raise ValueError(f"{name} is no integer")
    return facts


def keep_facts(node: Node, facts: ContainerFacts) -> Container | None:
    """Merges what a shim says into the store and wakes who waits for the end. None for an unknown container."""
    container = node.store.containers.get(facts.id)
    if container is None or container.finished_ns:
        return container
    changed = {key: value for key, value in facts_of(facts).items() if getattr(container, key) != value}
    if changed:
        container = node.store.note_container(facts.id, **changed)
    if facts.finished_ns and container is not None:
        how = (container.name, container.id[:13], container.exit_code, container.exit_reason)
        with trace.scope(pod=container.pod_id, container=container.id):
            log.info("container %s (%s) ended: code %d, %s", *how)
        node.exits.happened(facts.id)
    return container


class Events:
    """The streams of all pods. `lost` is called with a pod's id when its stream ends unexpectedly."""

    def __init__(self, node: Node, lost: Callable[[str], None]) -> None:
        self._node = node
        self._lost = lost
        self._streams: dict[str, tuple[int, bytearray]] = {}

    def watch(self, pod_id: str, take_fd: int) -> None:
        """Reads the stream `take_fd`, which is this object's from now on."""
        self.unwatch(pod_id)
        os.set_blocking(take_fd, False)
        self._streams[pod_id] = (take_fd, bytearray())
        # In a context of its own: what a shim says later is no part of the call that began to listen.
        Context().run(asyncio.get_running_loop().add_reader, take_fd, self._readable, pod_id)

    def unwatch(self, pod_id: str) -> None:
        """Closes the pod's stream, if there is one. What is there to read by now is read first."""
        if pod_id in self._streams:
            self._drain(pod_id)
        stream = self._streams.pop(pod_id, None)
        if stream is not None:
            asyncio.get_running_loop().remove_reader(stream[0])
            os.close(stream[0])

    def close(self) -> None:
        """Closes all streams; the shims and what is in them go on."""
        for pod_id in list(self._streams):
            self.unwatch(pod_id)

    def _readable(self, pod_id: str) -> None:
        if not self._drain(pod_id):
            self.unwatch(pod_id)
            self._lost(pod_id)

    def _drain(self, pod_id: str) -> bool:
        """Reads what is there; False when the stream has ended."""
        fd, buffer = self._streams[pod_id]
        while True:
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                return True
            except OSError as error:
                log.error("pod %s: event stream: %s", pod_id[:13], error)
                return False
            if not data:
                return False
            buffer += data
            try:
                self._frames(buffer)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                log.error("pod %s: event stream broken, closing it: %s", pod_id[:13], error)
                return False

    def _frames(self, buffer: bytearray) -> None:
        while len(buffer) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(buffer)
            if length > MAX_FRAME:
                raise ValueError(f"frame of {length} bytes, at most {MAX_FRAME}")
            if len(buffer) < _HEADER.size + length:
                return
            payload = bytes(buffer[_HEADER.size : _HEADER.size + length])
            del buffer[: _HEADER.size + length]
            self._happened(payload)

    def _happened(self, payload: bytes) -> None:
        message = json.loads(payload)
        facts = parse_facts(message["facts"])
        starting = self._node.starting.get(facts.id)
        if starting is not None:
            starting.append(facts)
        else:
            keep_facts(self._node, facts)
