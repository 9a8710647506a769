"""How a container ended when no event said so: as the shim wrote it down, or not known.

Refuses to invent: an end that nobody saw has the code LOST_EXIT and says why, never 0 (threats O13, O15, O17).
Invariant: only what is known to be dead is said to have ended.
"""

from __future__ import annotations

import errno
import json
import logging

from cri.events import keep_facts, parse_facts
from cri.interfaces import ContainerError, ContainerFacts
from cri.node import Node, now_ns
from cri.records import LOST_EXIT, Container
from cri.threads import to_thread
from runtime.linux.files import AT_FDCWD, read_bounded

log = logging.getLogger(__name__)

MAX_FACTS = 1 << 20
UNKNOWN = "ContainerStatusUnknown"
_KILLED = 128 + 9


async def end_orphan(node: Node, container: Container, why: str) -> None:
    """Ends a container whose shim is gone: what the shim wrote counts, else it is killed, since nobody could log,
    reap or stop it any more. One that cannot be killed is not said to have ended."""
    if await _keep_written(node, container):
        return
    pod = node.store.pods[container.pod_id]
    try:
        await to_thread(node.parts.containers.delete, node.sandbox(pod), container.id)
    except ContainerError as error:
        log.error("container %s (%s): %s, and it cannot be killed: %s", container.name, container.id[:13], why, error)
        return
    if not await _keep_written(node, container):  # who cleaned up may have seen more
        _end(node, container, why)


async def end_dead(node: Node, container: Container, why: str) -> None:
    """Records the end of a container that is known to be dead."""
    if not await _keep_written(node, container):
        _end(node, container, why)


async def _keep_written(node: Node, container: Container) -> bool:
    facts = await to_thread(written_facts, node, container)
    if facts is None or not facts.finished_ns:
        return False
    # Whoever cleans up after a dead shim writes down, in its place, that it does not know.
    unknown = facts.exit_code == LOST_EXIT and "is not known" in facts.message
    current = node.store.containers.get(container.id)
    if unknown and current is not None and not current.finished_ns:
        node.store.note_container(container.id, reason=UNKNOWN)
    keep_facts(node, facts)
    return True


def _end(node: Node, container: Container, why: str) -> None:
    current = node.store.containers.get(container.id)
    if current is None or current.finished_ns:
        return
    if current.started_ns:
        node.store.note_container(
            container.id,
            finished_ns=now_ns(),
            exit_code=LOST_EXIT,
            reason=UNKNOWN,
            message=f"{why}; how it ended is not known",
        )
    else:
        node.store.note_container(
            container.id, finished_ns=now_ns(), exit_code=_KILLED, signal=9, message=f"{why} before it was started"
        )
    node.exits.happened(container.id)


def written_facts(node: Node, container: Container) -> ContainerFacts | None:
    """The shim's last word on a container, from its bundle; None when there is none that can be used."""
    path = node.paths.bundle(container.id) / "exit.json"
    try:
        facts = parse_facts(json.loads(read_bounded(AT_FDCWD, str(path), MAX_FACTS)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOENT:
            return None
        log.warning("container %s: %s: %s", container.id[:13], path, error)
        return None
    return facts if facts.id == container.id else None
