"""RestorePod: a pod like any other out of the caller's request, whose containers go on where an archive has them, once
they are started.

The archive gives memory and files; names, images, commands, users, rights, mounts, limits and networks are those of the
request alone: what the archive says that it is of is compared with them (cri.checkpoint_match), and so is what the
processes bring along, before they run (runtime.restored, threats S71). Refuses everything unless the configuration
enables it, handlers and user namespaces with which that cannot be compared, and archives with anything in them that the
request does not name. Invariant: pod and containers become
visible in one moment; before it, a failure or a kill -9 leaves nothing, but criu's log of a failure.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from cri import checkpoint_match, criu_logs
from cri import checkpoint_reader as reader
from cri.api import api_pb2 as pb
from cri.config import CheckpointSection
from cri.errors import AlreadyExists, InvalidArgument
from cri.events import keep_facts
from cri.interfaces import ContainerFacts
from cri.marks import INIT
from cri.node import Node, new_id, now_ns
from cri.patience import FOREVER, Patience
from cri.records import Container, Pod, facts_of
from cri.threads import to_thread
from cri.undo import Undo
from cri.verbs import create_container, run_pod
from cri.verbs.checkpoint import directory, restoring
from cri.verbs.remove_container import take_away
from runtime.linux.dataclass import dataclass
from runtime.linux.failpoint import failpoint
from runtime.linux.files import AT_FDCWD, read_bounded, remove_tree

log = logging.getLogger(__name__)

MAX_CONTAINERS = 256


async def restore_pod(node: Node, request: pb.RestorePodRequest, patience: Patience = FOREVER) -> pb.RestorePodResponse:
    """The pod is ready when this answers, with all of `container_configs`, each of which is in the archive: created,
    and for StartContainer to let go on. Or, once the caller's deadline has passed, nothing of it is there."""
    section = restoring(node, "RestorePod")
    configs = _check(node, request)
    pod = run_pod.new_record(request.config, node.handler(request.runtime_handler)[0])
    what = f"restore pod {pod.label}"
    create_container.require_room(node, what, len(configs))
    if (existing := node.store.named(pod.key)) is not None:
        raise AlreadyExists(f"{what}: the name is taken by pod sandbox {existing}; remove that first")
    archive = reader.open_archive("checkpoint_path", request.checkpoint_path)
    # Two restores are never the same request: what the archive's path names may change between them.
    work = _Work(node, section, archive, configs, directory(node) / new_id(), patience)
    try:
        pod_id = await node.pod_names.once(pod.key, os.urandom(16), what, lambda: work.run(pod))
    finally:
        work.unused()
    restored = [pb.RestoredContainer(name=one.name, container_id=one.id) for one in work.containers]
    return pb.RestorePodResponse(pod_sandbox_id=pod_id, restored_containers=restored)


def _check(node: Node, request: pb.RestorePodRequest) -> Sequence[pb.ContainerConfig]:
    """Refuses what cannot be restored, before the archive is looked at. Raises InvalidRequest, CriError."""
    if request.options:
        raise InvalidArgument(f"options: {sorted(request.options)[0][:80]!r} is not known; there are none")
    run_pod.check(node, request.config)
    name, binary = node.handler(request.runtime_handler)
    if binary:
        raise InvalidArgument(
            f"runtime_handler: {name!r} compares nothing of an archive with the request; the native one restores"
        )
    if run_pod.namespaces(request.config).ids is not None:
        raise InvalidArgument("namespace_options.userns_options: criu restores no pod with a user namespace")
    if not 0 < len(request.container_configs) <= MAX_CONTAINERS:
        raise InvalidArgument(f"container_configs: {len(request.container_configs)}, not from 1 to {MAX_CONTAINERS}")
    names: set[str] = set()
    for index, config in enumerate(request.container_configs):
        create_container.check(node, config)
        if config.annotations.get(INIT) == "true":
            raise InvalidArgument(
                f"container_configs[{index}].annotations[{INIT}]: criu restores no PID 1 whose program is in no file"
            )
        if config.metadata.name in names:
            raise InvalidArgument(f"container_configs[{index}]: {config.metadata.name!r} is there twice")
        names.add(config.metadata.name)
        create_container.find_image(node, config.image.image)
    return list(request.container_configs)


@dataclass(slots=True)
class _One:
    """A container that has been restored, but is not visible yet."""

    record: Container
    bundled: create_container.Bundled
    facts: ContainerFacts


class _Work:
    """One restore. The archive is unpacked in a directory of its own under the root: it is as large as memory was."""

    def __init__(
        self,
        node: Node,
        section: CheckpointSection,
        take_archive: int,
        configs: Sequence[pb.ContainerConfig],
        place: Path,
        patience: Patience,
    ) -> None:
        self._node = node
        self._section = section
        self._archive = take_archive
        self._configs = configs
        self._place = place
        self._patience = patience
        self._done: list[_One] = []
        self._begun = False

    @property
    def containers(self) -> list[Container]:
        return [one.record for one in self._done]

    def unused(self) -> None:
        """Lets go of the archive where another request for the name was faster."""
        if not self._begun:
            os.close(self._archive)

    async def run(self, pod: Pod) -> str:
        self._begun = True
        try:
            names = [config.metadata.name for config in self._configs]
            try:
                await to_thread(reader.read, self._archive, self._place, names, self._section.archive_bytes)
            finally:
                os.close(self._archive)
            failpoint("restore_pod.read")
            await run_pod.make(self._node, pod, lambda undo: self._fill(pod.id, undo))
        finally:
            await to_thread(remove_tree, self._place)
        log.info("pod %s (%s) is restored, with %s", pod.label, pod.id[:13], ", ".join(names))
        return pod.id

    async def _fill(self, pod_id: str, undo: Undo) -> None:
        """Every container, and then all of it becomes visible."""
        node = self._node
        try:
            for config in self._configs:
                await self._restore(create_container.new_record(node.store.pods[pod_id], config), undo)
            failpoint("restore_pod.restored")
            self._patience.check()  # nobody has heard of it yet, and its caller will not
            # One turn of the loop, and so one transaction.
            node.store.note_pod(pod_id, made_ns=now_ns())
            for one in self._done:
                node.store.note_container(one.record.id, **one.bundled.facts(), **facts_of(one.facts))
            await node.store.change_pod(pod_id)
            node.processes |= {one.record.id: one.bundled.process for one in self._done}
        finally:
            for one in self._done:
                for said in node.starting.pop(one.record.id, ()):  # an exit that was faster than the answer
                    keep_facts(node, said)

    async def _restore(self, record: Container, undo: Undo) -> None:
        node = self._node
        undo.did("forget the container", lambda: create_container.forget(node, record, undo))
        await node.store.add(record)
        failpoint("restore_pod.recorded")
        undo.did("remove the container", lambda: to_thread(take_away, node, record))
        node.starting[record.id] = []
        try:
            bundled, facts = await node.create_threads.run(self._container, record)
        except BaseException:
            del node.starting[record.id]
            raise
        self._done.append(_One(record, bundled, facts))
        failpoint("restore_pod.container")

    def _container(self, record: Container) -> tuple[create_container.Bundled, ContainerFacts]:
        """Everything of one container; blocks. What it leaves when it fails is `take_away`'s to remove."""
        node, place = self._node, self._place / record.name
        pod = node.store.pods[record.pod_id]
        bundled = create_container.bundle(node, pod, record)
        self._compare(record, bundled)
        layer = os.open(place / reader.LAYER, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            node.parts.snapshots.unpack(record.id, layer)
        finally:
            os.close(layer)
        failpoint("restore_pod.unpacked")
        images, program = place / reader.IMAGES, self._section.criu
        seconds, limit = self._patience.within(self._section.timeout_s, "checkpoint.timeout_s in the configuration")
        with criu_logs.kept(node.config.root, record.id, place / "restore.log", limit=limit):
            facts = node.parts.checkpoints.restore(node.sandbox(pod), bundled.spec, images, place, program, seconds)
        return bundled, facts

    def _compare(self, record: Container, bundled: create_container.Bundled) -> None:
        """Raises InvalidArgument where the archive says that it is of something else than the request's container."""
        about, spec = (
            read_bounded(AT_FDCWD, str(self._place / record.name / file), reader.MAX_TOLD)
            for file in (reader.ABOUT, reader.SPEC)
        )
        number = [config.metadata.name for config in self._configs].index(record.name)
        image, config = bundled.image, record.request
        asked = {pair.key for pair in config.envs} | {entry.partition("=")[0] for entry in image.config.env}
        field = f"container_configs[{number}]"
        checkpoint_match.compare(field, record.name, bundled.process, asked, image.id, about, spec)
