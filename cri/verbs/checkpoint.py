"""CheckpointContainer and CheckpointPod: what runs becomes an archive, and runs on.

Refuses everything unless the configuration enables it: peers were broken through such archives (threats S71). All that
is written down of a pod is of one moment: its containers stand still while criu dumps them and their writable layers
are packed. Invariant: whatever fails, they go on afterwards, and nothing is left but a whole archive or criu's log.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cri import checkpoint_archive as archive
from cri import criu_logs
from cri.api import api_pb2 as pb
from cri.config import CheckpointSection
from cri.errors import FailedPrecondition, InvalidArgument, Unimplemented
from cri.node import Node, new_id, now_ns
from cri.patience import FOREVER, Patience
from cri.paused import paused
from cri.records import Container, Pod
from cri.threads import to_thread
from runtime.linux.failpoint import failpoint
from runtime.linux.files import AT_FDCWD, read_bounded, remove_tree

log = logging.getLogger(__name__)

MAX_CONFIG = 16 << 20
MAX_TIMEOUT_S = 24 * 3600


def enabled(node: Node, call: str) -> CheckpointSection:
    """The section that allows it. Raises Unimplemented, which a kubelet reads as "not here"."""
    section = node.config.checkpoint
    if not section.enabled:
        raise Unimplemented(f"{call}: checkpoints are off; checkpoint.enabled in the configuration allows them")
    return section


def restoring(node: Node, call: str) -> CheckpointSection:
    """As `enabled`, for what reads archives."""
    section = node.config.checkpoint
    if not section.restore:
        raise Unimplemented(f"{call}: restoring is off; checkpoint.restore in the configuration allows it")
    return section


async def checkpoint_container(node: Node, request: pb.CheckpointContainerRequest) -> pb.CheckpointContainerResponse:
    """An archive at `location` of a container that runs, and runs on. `timeout` 0 means the configured one."""
    section = enabled(node, "CheckpointContainer")
    if not 0 <= request.timeout <= MAX_TIMEOUT_S:
        raise InvalidArgument(f"timeout: {request.timeout} s is not between 0 and {MAX_TIMEOUT_S}")
    target = archive.check_target("location", request.location)
    container = _running(node, request.container_id)
    pod = node.store.pods[container.pod_id]
    work = _Work(node, pod, section, request.timeout)
    await node.tasks.finish(work.container(container, target), f"checkpoint container {container.name}")
    return pb.CheckpointContainerResponse()


async def checkpoint_pod(
    node: Node, request: pb.CheckpointPodRequest, patience: Patience = FOREVER
) -> pb.CheckpointPodResponse:
    """An archive in the directory `output_path` of the containers that `container_ids` name, one at least; or, by the
    caller's deadline, none, and all of them go on."""
    section = enabled(node, "CheckpointPod")
    if request.options:
        raise InvalidArgument(f"options: {sorted(request.options)[0][:80]!r} is not known; there are none")
    target = archive.check_output("output_path", request.output_path)
    pod = node.pod(request.pod_sandbox_id)
    if not pod.ready:
        raise FailedPrecondition(f"checkpoint pod {pod.label} ({pod.id[:13]}): it is not ready")
    chosen = _chosen(node, pod, request.container_ids)
    work = _Work(node, pod, section, patience=patience)
    await node.tasks.finish(work.pod(chosen, target), f"checkpoint pod {pod.label}")
    return pb.CheckpointPodResponse()


def _chosen(node: Node, pod: Pod, ids: Sequence[str]) -> list[Container]:
    if not ids:
        raise InvalidArgument("container_ids: none is named; the caller chooses which containers an archive is of")
    chosen = {}
    for index, id_ in enumerate(ids):
        container = _running(node, id_)
        if container.pod_id != pod.id:
            raise InvalidArgument(f"container_ids[{index}]: container {container.id} is of another pod")
        if container.id in chosen:
            raise InvalidArgument(f"container_ids[{index}]: container {container.id} is there twice")
        chosen[container.id] = container
    return list(chosen.values())


def _running(node: Node, container_id: str) -> Container:
    """The container, if it has a process. Raises NotFound, FailedPrecondition."""
    container = node.running(node.container(container_id), "checkpoint")
    if container.is_due:
        raise FailedPrecondition(
            f"checkpoint {container.name} ({container.id[:13]}): the container has ended, and is to be started again"
        )
    return container


class _Work:
    """One checkpoint, in a directory of its own under the root: criu's images are as large as memory is."""

    def __init__(
        self, node: Node, pod: Pod, section: CheckpointSection, seconds: int = 0, patience: Patience = FOREVER
    ) -> None:
        self._node = node
        self._pod = pod
        self._section = section
        self._seconds = float(seconds) or section.timeout_s
        self._limit = "the request's timeout" if seconds else "checkpoint.timeout_s in the configuration"
        self._patience = patience
        self._directory = directory(node) / new_id()

    async def container(self, container: Container, target: Path) -> None:
        await self._run({container: self._directory}, target)

    async def pod(self, containers: Sequence[Container], target: Path) -> None:
        # Names are unique but for attempts, of which one at most runs.
        places = {container: self._directory / "containers" / container.name for container in containers}
        await self._run(places, target, _about_pod(self._pod, containers))

    async def _run(self, places: dict[Container, Path], target: Path, pod: bytes = b"") -> None:
        try:
            await to_thread(os.makedirs, self._directory, 0o700)
            async with paused(self._node, self._pod, list(places)):
                for container, place in places.items():
                    await to_thread(self._dump, container, place)
            failpoint("checkpoint.dumped")
            if pod:
                await to_thread((self._directory / "pod.dump").write_bytes, pod)
            await to_thread(archive.write, self._directory, target, self._section.archive_bytes, self._patience.check)
        finally:
            await to_thread(remove_tree, self._directory)
        names = ", ".join(container.name for container in places)
        log.info("pod %s (%s): %s checkpointed to %s", self._pod.label, self._pod.id[:13], names, target)

    def _dump(self, container: Container, place: Path) -> None:
        """Everything of one container, which stands still; blocks."""
        node, sandbox = self._node, self._node.sandbox(self._pod)
        images = place / "checkpoint"
        os.makedirs(images, 0o700)
        log_file = place / "dump.log"
        seconds, limit = self._patience.within(self._seconds, self._limit)
        with criu_logs.kept(node.config.root, container.id, log_file, limit=limit):
            node.parts.checkpoints.checkpoint(sandbox, container.id, images, place, self._section.criu, seconds)
        failpoint("checkpoint.imaged")
        fd = os.open(place / "rootfs-diff.tar", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            node.parts.snapshots.pack(container.id, fd, self._patience.check)
        finally:
            os.close(fd)
        spec = read_bounded(AT_FDCWD, str(node.paths.bundle(container.id) / "config.json"), MAX_CONFIG)
        (place / "spec.dump").write_bytes(spec)
        (place / "config.dump").write_bytes(_about(self._pod, container))


def directory(node: Node) -> Path:
    """Where checkpoints are put together; what a killed daemon left there is nobody's."""
    return node.config.root / "checkpoints"


def _about(pod: Pod, container: Container) -> bytes:
    """config.dump, by the names that checkpointctl and the peers read."""
    facts = {
        "id": container.id,
        "name": container.name,
        "rootfsImage": container.image_name or container.request.image.image,
        "rootfsImageRef": container.image_id,
        "rootfsImageName": container.image_name or container.request.image.image,
        "runtime": pod.handler,
        "createdTime": _moment(container.created_ns),
        "checkpointedTime": _moment(now_ns()),
    }
    return json.dumps(facts).encode()


def _about_pod(pod: Pod, containers: Sequence[Container]) -> bytes:
    facts = {
        "id": pod.id,
        "name": pod.name,
        "namespace": pod.namespace,
        "uid": pod.uid,
        "runtime": pod.handler,
        "checkpointedTime": _moment(now_ns()),
        "containers": {container.name: container.id for container in containers},
    }
    return json.dumps(facts).encode()


def _moment(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC).isoformat().replace("+00:00", "Z")
