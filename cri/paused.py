"""A pod held still: all of its containers frozen, for a checkpoint of one moment, and thawed on every path.

    STATE/pods/POD/paused    the ids of what was to be frozen, from before the first is until all are thawed

Refuses two at once for one pod. Invariant: who finds that file thaws: whoever was to do it has been killed.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from cri.interfaces import ContainerError
from cri.node import Node
from cri.records import Container, Pod
from cri.threads import to_thread
from cri.undo import uncancelled
from runtime.linux.failpoint import failpoint
from runtime.linux.files import AT_FDCWD, read_bounded, write_durable

log = logging.getLogger(__name__)

_MAX_NOTE = 1 << 20


def _note(node: Node, pod: Pod) -> Path:
    return node.paths.pod(pod.id) / "paused"


@asynccontextmanager
async def paused(node: Node, pod: Pod, containers: Sequence[Container]) -> AsyncIterator[None]:
    """Every one of `containers`, which run, stands still inside. Raises ContainerError; then none does."""
    async with node.locks.held(f"paused {pod.id}"):
        ids = [container.id for container in containers]
        await to_thread(write_durable, _note(node, pod), json.dumps(ids).encode(), sync=False)
        begun: list[str] = []
        try:
            for container in containers:
                begun.append(container.id)  # before: a pause that fails may have frozen some of it
                await to_thread(node.parts.checkpoints.pause, node.sandbox(pod), container.id)
                failpoint("paused.one")
            yield
        except BaseException as error:
            try:
                await uncancelled(_thaw(node, pod, begun))
            except ContainerError as second:
                error.add_note(str(second))
            raise
        await uncancelled(_thaw(node, pod, begun))


async def _thaw(node: Node, pod: Pod, ids: Sequence[str]) -> None:
    """All of them, whatever one says; then the note goes. Raises the first ContainerError: then it stays."""
    failures = []
    for container_id in ids:
        try:
            await to_thread(node.parts.checkpoints.resume, node.sandbox(pod), container_id)
        except ContainerError as error:
            log.error("pod %s (%s): %s", pod.label, pod.id[:13], error)
            failures.append(error)
    if failures:
        raise failures[0]
    await to_thread(_note(node, pod).unlink, missing_ok=True)


async def thaw_left(node: Node, pod: Pod) -> None:
    """At a start: what a killed daemon left frozen goes on. Raises ContainerError, OSError."""
    try:
        raw = await to_thread(read_bounded, AT_FDCWD, str(_note(node, pod)), _MAX_NOTE)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return
        raise
    try:
        noted = [str(item) for item in json.loads(raw)]
    except (ValueError, TypeError):  # a kill in the middle cannot do that; a full disk may
        noted = [container.id for container in node.store.containers_of(pod.id)]
    log.warning("pod %s (%s) was left frozen: thawing it", pod.label, pod.id[:13])
    await _thaw(node, pod, [id_ for id_ in noted if id_ in node.store.containers])
