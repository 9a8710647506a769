"""StartContainer: releases the waiting process; a command that cannot run is the caller's error.

Refuses a second start and a pod that is not ready. Invariant: when it fails the container has ended, with the reason
StartError and the cause as its message, and can be removed (threats O9).
"""

from __future__ import annotations

import logging

from cri.api import api_pb2 as pb
from cri.errors import FailedPrecondition, NotFound
from cri.events import keep_facts
from cri.interfaces import ContainerError, ContainerFacts, ShimUnresponsive
from cri.node import Node, now_ns
from cri.records import Container
from cri.threads import to_thread
from cri.verbs.create_container import require_ready, while_ready
from runtime.linux.failpoint import failpoint

log = logging.getLogger(__name__)

# What shells and runtimes say for "could not be executed"; the error's text has the errno.
START_ERROR = 128


async def start_container(node: Node, request: pb.StartContainerRequest) -> pb.StartContainerResponse:
    """Runs a created container."""
    container = node.container(request.container_id)
    await node.tasks.finish(_start(node, container.id), f"start container {container.name}")
    return pb.StartContainerResponse()


async def _start(node: Node, container_id: str) -> None:
    async with node.locks.held(container_id):
        container = node.store.containers.get(container_id)
        if container is None:
            raise NotFound(f"container {container_id!r} not found")
        what = f"start container {container.name} ({container.id[:13]})"
        if container.started_ns or container.finished_ns:
            raise FailedPrecondition(f"{what}: it {'has ended' if container.finished_ns else 'is running'} already")
        require_ready(node.store.pods[container.pod_id], what)
        failpoint("start_container.begun")
        node.starting[container.id] = []
        try:
            with while_ready(node, container.pod_id, what):
                facts = await _release(node, container)
        finally:
            # An exit that was faster than the answer comes after it.
            for said in node.starting.pop(container.id):
                keep_facts(node, said)
        failpoint("start_container.started")
        await node.store.settle()
    log.info("container %s (%s) is running: pid %d", container.name, container.id[:13], facts.pid)


async def _release(node: Node, container: Container) -> ContainerFacts:
    """Runs the program, and records that it has started or why it has not."""
    try:
        facts = await to_thread(node.parts.containers.start_container, node.sandbox_of(container), container.id)
    except ShimUnresponsive:
        raise  # it may have started: what is true comes with the shim's next word
    except ContainerError as error:
        await node.store.change_container(
            container.id, finished_ns=now_ns(), exit_code=START_ERROR, reason="StartError", message=str(error)
        )
        node.exits.happened(container.id)
        raise
    keep_facts(node, facts)
    current = node.store.containers.get(container.id)
    if current is not None and not current.started_ns:
        node.store.note_container(container.id, started_ns=facts.started_ns or now_ns())
    return facts
