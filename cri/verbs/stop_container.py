"""StopContainer: the stop signal, time to end, then SIGKILL to everything in the container.

Refuses to invent an end: it returns once the container is known to have ended, or says that it has not. Invariant:
there is one stopping of a container at a time, its deadline only ever moves closer, and nobody who hangs up ends it
(threats O54).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import signal

from cri.api import api_pb2 as pb
from cri.errors import DeadlineExceeded, InvalidArgument, NotFound
from cri.events import keep_facts
from cri.interfaces import ContainerError, ShimUnresponsive
from cri.marks import RESTART
from cri.node import Node
from cri.records import Container
from cri.threads import to_thread
from runtime.linux.process import is_running, process_state

log = logging.getLogger(__name__)

MAX_GRACE_S = 10 * 365 * 86400
# An exit event that got lost (threats O12) is noticed this long after the process is gone.
RESYNC_S = 1.0


@functools.cache
def _signals() -> dict[str, int]:
    """Numbers by name, as signal(7), as docker images ("RTMIN+3") and as CRI ("RTMINPLUS3") write them."""
    table = {item.name.removeprefix("SIG"): int(item) for item in signal.Signals}
    table |= {"CLD": table["CHLD"], "IOT": table["ABRT"], "POLL": table["IO"]}
    for step in range(1, 16):
        table[f"RTMIN+{step}"] = table[f"RTMINPLUS{step}"] = table["RTMIN"] + step
        table[f"RTMAX-{step}"] = table[f"RTMAXMINUS{step}"] = table["RTMAX"] - step
    return table | {str(number): number for number in range(1, signal.NSIG)}


def signal_number(name: str) -> int:
    """The number of "TERM", "SIGTERM", "SIGRTMIN+3", "SIGRTMINPLUS3" or "15". Raises InvalidArgument."""
    number = _signals().get(name.upper().removeprefix("SIG"))
    if number is None:
        raise InvalidArgument(f"stop signal {name[:40]!r} is no signal")
    return number


class Stopping:
    """One stopping of one container."""

    __slots__ = ("deadline", "sooner", "task")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.sooner = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def hurry(self, deadline: float) -> None:
        """Brings the deadline forward, never back."""
        if deadline < self.deadline:
            self.deadline = deadline
            self.sooner.set()


async def stop_container(node: Node, request: pb.StopContainerRequest) -> pb.StopContainerResponse:
    """Ends the container; it is fine with one that has ended, was never started, or is not there (as containerd)."""
    if request.timeout < 0:
        raise InvalidArgument(f"timeout: {request.timeout} s is less than none")
    try:
        container = node.container(request.container_id)
    except NotFound:
        return pb.StopContainerResponse()
    if container.running:
        await stop(node, container, float(request.timeout))
    return pb.StopContainerResponse()


async def stop(node: Node, container: Container, grace_s: float) -> None:
    """Joins the stopping of `container`, or begins it. Raises DeadlineExceeded when even SIGKILL did not end it."""
    deadline = asyncio.get_running_loop().time() + min(grace_s, MAX_GRACE_S)
    stopping = node.stopping.get(container.id)
    if stopping is None:
        stopping = node.stopping[container.id] = Stopping(deadline)
        stopping.task = node.tasks.spawn(_stop(node, container, stopping, grace_s > 0), f"stop {container.id[:13]}")
        stopping.task.add_done_callback(lambda _: node.stopping.pop(container.id, None))
    else:
        stopping.hurry(deadline)
    assert stopping.task is not None
    await asyncio.shield(stopping.task)


async def _stop(node: Node, container: Container, stopping: Stopping, ask_first: bool) -> None:
    loop = asyncio.get_running_loop()
    await _retire(node, container)
    if ask_first:
        await _signal(node, container, signal_number(container.stop_signal or "SIGTERM"), everyone=False)
        while not _ended(node, container.id) and loop.time() < stopping.deadline:
            stopping.sooner.clear()
            await _wait(node, container.id, stopping.deadline - loop.time(), stopping.sooner)
            await _resync(node, container.id)
    if not _ended(node, container.id):
        await kill(node, container)


async def kill(node: Node, container: Container) -> None:
    """SIGKILL to everything in the container, and waits for its end. Raises DeadlineExceeded."""
    loop = asyncio.get_running_loop()
    await _retire(node, container)
    give_up = loop.time() + node.config.limits.stop_s
    await _signal(node, container, signal.SIGKILL, everyone=True)
    while not _ended(node, container.id):
        if loop.time() >= give_up:
            raise DeadlineExceeded(
                f"stop {container.name} ({container.id[:13]}): process {container.pid} is still there "
                f"{node.config.limits.stop_s:g} s after SIGKILL, in state {_state(container.pid)}; "
                "the kernel holds it, often for a hung disk or network filesystem"
            )
        await _wait(node, container.id, give_up - loop.time(), None)
        await _resync(node, container.id)


async def _retire(node: Node, container: Container) -> None:
    """Nobody starts it again. What is not known of its end by now is told, and found out as any other."""
    pod = node.store.pods.get(container.pod_id)
    if pod is None or not container.request.annotations.get(RESTART):
        return
    try:
        await to_thread(node.parts.containers.retire, node.sandbox(pod), container.id)
    except ShimUnresponsive:
        raise
    except ContainerError as error:
        log.warning("end the restarts of %s (%s): %s", container.name, container.id[:13], error)


def _state(pid: int) -> str:
    try:
        return process_state(pid)
    except ProcessLookupError:
        return "gone"


def _ended(node: Node, container_id: str) -> bool:
    current = node.store.containers.get(container_id)
    return current is None or bool(current.finished_ns)


async def _signal(node: Node, container: Container, number: int, *, everyone: bool) -> None:
    if (pod := node.store.pods.get(container.pod_id)) is None:
        return
    try:
        await to_thread(node.parts.containers.signal, node.sandbox(pod), container.id, int(number), everyone=everyone)
    except ShimUnresponsive:
        raise
    except ContainerError as error:
        # The shim may just be gone; whether the container has ended is found out below either way.
        log.warning("signal %d to %s (%s): %s", number, container.name, container.id[:13], error)


async def _wait(node: Node, container_id: str, seconds: float, sooner: asyncio.Event | None) -> None:
    """Until the container ends, `sooner` is set, or RESYNC_S or `seconds` have passed."""
    waits = [asyncio.ensure_future(node.exits.event(container_id).wait())]
    if sooner is not None:
        waits.append(asyncio.ensure_future(sooner.wait()))
    try:
        await asyncio.wait(waits, timeout=max(0.0, min(seconds, RESYNC_S)), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def _resync(node: Node, container_id: str) -> None:
    """Asks the shim when the process is gone and nobody was told (threats O12)."""
    container = node.store.containers.get(container_id)
    if container is None or not container.running or is_running(container.pid, container.started_ticks):
        return
    pod = node.store.pods.get(container.pod_id)
    if pod is None:
        return
    try:
        facts = await to_thread(node.parts.sandboxes.reconnect, node.sandbox(pod))
    except ContainerError as error:
        log.warning("pod %s: %s", pod.label, error)
        return
    for item in facts or ():
        keep_facts(node, item)
