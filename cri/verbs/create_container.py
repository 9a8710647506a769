"""CreateContainer: a record, a writable layer, a bundle, and a process that waits before execve.

Refuses a pod that is not ready (threats O11). Invariant: a container is visible only once it is whole; after a
failure nothing of it is left, and after a kill -9 recovery finds the record and undoes it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cri import trace
from cri.api import api_pb2 as pb
from cri.errors import AlreadyExists, FailedPrecondition, InvalidArgument, LimitExceeded, NotFound
from cri.interfaces import ContainerError, ContainerFacts, ContainerSpec, IdMap
from cri.marks import INIT, RESTART
from cri.mount_sources import make_missing
from cri.node import Node, new_id, now_ns, volume_key
from cri.records import Container, Pod, facts_of
from cri.spec import images, users, validate
from cri.spec.build import FOREIGN_VERSION, PodFacts, SpecInputs, build, cgroup, user_request
from cri.spec.images import ImageMount
from cri.spec.mounts import PodFiles
from cri.threads import to_thread
from cri.undo import Undo
from cri.verbs.remove_container import take_away
from cri.verbs.run_pod import cgroup_parent, check_labels, hostname, namespaces
from cri.verbs.stop_container import signal_number
from imagestore.model import Image, KeyFile, ReferenceInvalid
from imagestore.reference import parse
from runtime.errors import RuntimeFailure
from runtime.linux.dataclass import dataclass
from runtime.linux.failpoint import failpoint
from runtime.linux.files import write_durable
from runtime.shim.restarts import most_restarts

log = logging.getLogger(__name__)


async def create_container(
    node: Node, request: pb.CreateContainerRequest, keys: tuple[KeyFile, ...] = ()
) -> pb.CreateContainerResponse:
    """Makes the container in its pod. `keys` are the caller's, for images whose layers are encrypted."""
    pod = node.pod(request.pod_sandbox_id)
    config = request.config
    metadata = config.metadata
    check(node, config)
    what = f"create container {metadata.name} in pod {pod.label}"
    require_ready(pod, what)
    require_room(node, what)
    key = (pod.id, metadata.name, metadata.attempt)
    fingerprint = config.SerializeToString(deterministic=True)
    existing = node.store.named(key)
    if existing is not None and not node.container_names.busy(key) and node.store.containers[existing].made_ns:
        if node.container_names.unclaimed(key, fingerprint) == existing:
            return pb.CreateContainerResponse(container_id=existing)
        raise AlreadyExists(f"{what}: the name is taken by container {existing}; remove that first")
    container = new_record(pod, config)
    made = await node.container_names.once(key, fingerprint, what, lambda: _make(node, pod, container, keys))
    return pb.CreateContainerResponse(container_id=made)


def check(node: Node, config: pb.ContainerConfig) -> None:
    """Refuses what can be seen to be wrong of a container before there is anything. Raises InvalidRequest, CriError."""
    validate.name("metadata.name", config.metadata.name)
    validate.log_path(config.log_path)
    check_labels(config)
    try:
        most_restarts(config.annotations.get(RESTART, ""))
    except RuntimeFailure as error:
        raise InvalidArgument(f"annotations[{RESTART}]: {error}") from None
    if config.HasField("windows"):
        raise InvalidArgument("windows: this node runs Linux")
    if config.image.runtime_handler:
        node.handler(config.image.runtime_handler)


def require_room(node: Node, what: str, count: int = 1) -> None:
    """Raises LimitExceeded where `count` more containers are too many."""
    if len(node.store.containers) + count > node.config.limits.containers:
        raise LimitExceeded(f"{what}: there are {len(node.store.containers)} containers (limits.containers)")


def new_record(pod: Pod, config: pb.ContainerConfig) -> Container:
    """A container that is to be, under an id of its own."""
    return Container(
        id=new_id(),
        pod_id=pod.id,
        name=config.metadata.name,
        attempt=config.metadata.attempt,
        config=config.SerializeToString(),
        created_ns=now_ns(),
        log_path=log_path(pod, config),
        resources=config.linux.resources.SerializeToString(),
    )


def require_ready(pod: Pod, what: str) -> None:
    """Raises FailedPrecondition when nothing may start in `pod` any more."""
    if not pod.ready:
        raise FailedPrecondition(f"{what}: the pod sandbox is not ready; make a new one")


@contextlib.contextmanager
def while_ready(node: Node, pod_id: str, what: str) -> Iterator[None]:
    """For what the shim of a pod is needed for, which ends with it: a pod that was stopped meanwhile is what there is
    to say of a failure. Raises FailedPrecondition."""
    try:
        yield
    except ContainerError as error:
        pod = node.store.pods.get(pod_id)
        if pod is not None and not pod.ready:
            raise FailedPrecondition(f"{what}: the pod sandbox was stopped meanwhile") from error
        raise


def log_path(pod: Pod, config: pb.ContainerConfig) -> str:
    """Where the log goes, "" for nowhere: both parts are needed, as CRI words it."""
    directory = pod.request.log_directory
    return os.path.join(directory, config.log_path) if directory and config.log_path else ""


async def _make(node: Node, pod: Pod, container: Container, keys: tuple[KeyFile, ...]) -> str:
    trace.about(container=container.id)
    async with node.locks.held(container.id), Undo() as undo:
        undo.did("forget the container", lambda: forget(node, container, undo))
        await node.store.add(container)
        failpoint("create_container.recorded")
        undo.did("remove the container", lambda: to_thread(take_away, node, container))
        # Threads of its own: a program that is to open an encrypted image may be waited for.
        with while_ready(node, pod.id, f"create container {container.name} in pod {pod.label}"):
            made, facts = await node.create_threads.run(_create, node, pod, container, keys)
        failpoint("create_container.created")
        # Before it is visible: StopPodSandbox may have begun meanwhile, and would have missed it.
        require_ready(node.store.pods[pod.id], f"create container {container.name}")
        await node.store.change_container(container.id, **made.facts(), **facts_of(facts))
        failpoint("create_container.made")
        node.processes[container.id] = made.process
        undo.keep_all()
    log.info(
        "container %s (%s) of %s is created in pod %s", container.name, container.id[:13], made.image.id, pod.label
    )
    return container.id


async def forget(node: Node, container: Container, undo: Undo) -> None:
    if not undo.failed:
        await node.store.remove(container)
        return
    # Something of it is left: it stays, as one that never started, to be removed by whoever lists it.
    await node.store.change_container(
        container.id,
        made_ns=now_ns(),
        finished_ns=now_ns(),
        exit_code=128,
        reason="CreateError",
        message="its creation failed, and so did taking it back",
    )


@dataclass(frozen=True, slots=True)
class Bundled:
    """A container with its writable layer and its bundle, and no process yet."""

    image: Image
    name: str
    ref: str
    volumes: str
    user: users.User
    cgroup: str
    stop_signal: str
    process: dict[str, object]
    spec: ContainerSpec

    def facts(self) -> dict[str, Any]:
        """What its record says once it is made."""
        return {
            "made_ns": now_ns(),
            "image_id": self.image.id,
            "image_name": self.name,
            "image_ref": self.ref,
            "volume_images": self.volumes,
            "cgroup": self.cgroup,
            "stop_signal": self.stop_signal,
            "uid": self.user.uid,
            "gid": self.user.gid,
            "groups": ",".join(map(str, self.user.groups)),
        }


def _create(node: Node, pod: Pod, container: Container, keys: tuple[KeyFile, ...]) -> tuple[Bundled, ContainerFacts]:
    """All that blocks, in one go. What it leaves when it fails is `take_away`'s to remove."""
    bundled = bundle(node, pod, container, keys)
    return bundled, node.parts.containers.create(node.sandbox(pod), bundled.spec)


def bundle(node: Node, pod: Pod, container: Container, keys: tuple[KeyFile, ...] = ()) -> Bundled:
    """Everything of a container but its process, out of its request and its image; blocks."""
    config = container.request
    image = find_image(node, config.image.image)
    if image.artifact:
        what = f"image {config.image.image[:200]!r} is an artifact ({image.artifact[:80]})"
        raise InvalidArgument(f"{what}, which has no program to run; mount it")
    # By the name that the pod asked for: a kubelet asks by id, and policies are about names.
    node.parts.images.permit(image, config.image.user_specified_image or config.image.image, pod.namespace, keys)
    stop_signal = stop_signal_of(config, image)
    user = _user(node, config, image)
    name, handler = node.handler(pod.handler)
    if handler:
        _check_foreign(name, config)
    ids = namespaces(pod.request).ids
    facts_of_pod = _pod_facts(node, pod, config)
    if node.config.runtime.missing_host_paths == "create":
        make_missing(config.mounts)
    volumes = {} if handler else _image_mounts(node, container, pod.namespace, ids, keys)
    spec = build(
        SpecInputs(
            container_id=container.id,
            config=config,
            sandbox=pod.request,
            image=image.config,
            user=user,
            pod=facts_of_pod,
            unset_seccomp=node.config.runtime.unset_seccomp,
            cdi_dirs=node.config.runtime.cdi_dirs,
            ignore_selinux=node.config.runtime.without_selinux == "ignore",
            default_apparmor=node.default_apparmor(),
            annotations={
                **validate.passed(pod.request.annotations, node.config.runtime.pod_annotations),
                **validate.passed(config.annotations, node.config.runtime.container_annotations),
                **{key: value for key, value in config.annotations.items() if key in (INIT, RESTART)},
            },
            image_mounts=volumes,
        )
    )
    if handler:
        spec["ociVersion"] = FOREIGN_VERSION
    rootfs = node.parts.snapshots.prepare(container.id, image.chain_id if image.layers else None, ids)
    failpoint("create_container.prepared")
    directory = node.paths.bundle(container.id)
    os.mkdir(directory, 0o700)
    write_durable(directory / "config.json", json.dumps(spec).encode("utf-8", "surrogateescape"), sync=False)
    failpoint("create_container.bundled")
    if container.log_path:
        os.makedirs(os.path.dirname(container.log_path), 0o755, exist_ok=True)
    wanted = ContainerSpec(
        id=container.id,
        bundle=directory,
        rootfs=rootfs,
        log_path=Path(container.log_path) if container.log_path else None,
        terminal=config.tty,
        stdin=config.stdin,
        stdin_once=config.stdin_once,
        handler=handler,
    )
    named, ref, shown = (
        image_name(config, image),
        image_ref(config, image),
        ",".join(one.id for one in volumes.values()),
    )
    place = cgroup(facts_of_pod, container.id)
    return Bundled(image, named, ref, shown, user, place, stop_signal, spec["process"], wanted)


def _check_foreign(handler: str, config: pb.ContainerConfig) -> None:
    """Refuses what another binary may pass over without a word: runc before 1.2 knows no ids of mounts."""
    for index, mount in enumerate(config.mounts):
        for field in ("uidMappings", "gidMappings", "image"):
            if mount.HasField("image") if field == "image" else getattr(mount, field):
                raise InvalidArgument(f"mounts[{index}].{field}: not with runtime handler {handler!r}; native has it")
    if INIT in config.annotations:
        raise InvalidArgument(f"annotations[{INIT}]: not with runtime handler {handler!r}; native has it")


def _image_mounts(
    node: Node, container: Container, namespace: str, ids: IdMap | None, keys: tuple[KeyFile, ...]
) -> dict[int, ImageMount]:
    """The images that mounts show, each by a snapshot that keeps its layers; `take_away` removes those."""
    found = {}
    for index, mount in enumerate(container.request.mounts):
        if not mount.HasField("image"):
            continue
        image = find_image(node, images.check(f"mounts[{index}]", mount))
        node.parts.images.permit(image, mount.image.user_specified_image or mount.image.image, namespace, keys)
        key = volume_key(container.id, index)
        layers = node.parts.snapshots.prepare(key, image.chain_id if image.layers else None, ids)
        found[index] = ImageMount(image.id, layers, ids)
    return found


def find_image(node: Node, name: str) -> Image:
    """The image that a request names. Raises InvalidArgument, NotFound."""
    if not name:
        raise InvalidArgument("image: the name is empty")
    image = node.parts.images.get(name)
    if image is None:
        raise NotFound(f"image {name[:200]!r} is not here; pull it first")
    return image


def image_name(config: pb.ContainerConfig, image: Image) -> str:
    """What people call the image, "" where the request has it already."""
    if not image.id.removeprefix("sha256:").startswith(config.image.image.removeprefix("sha256:")):
        return ""
    return config.image.user_specified_image or next(iter((*image.repo_tags, *image.repo_digests)), "")


def image_ref(config: pb.ContainerConfig, image: Image) -> str:
    """The image by digest, in the repository that it was asked for from if it is known there; its id where no registry
    knows it. A kubelet tells its API server this as the image's id, which is not what it collects images by."""
    try:
        repository = parse(config.image.user_specified_image or config.image.image).repository
    except ReferenceInvalid:  # an id
        repository = ""
    mine = (digest for digest in image.repo_digests if digest.startswith(f"{repository}@"))
    return next(mine, next(iter(image.repo_digests), image.id))


def stop_signal_of(config: pb.ContainerConfig, image: Image) -> str:
    """The request's, else the image's, else SIGTERM. Raises InvalidArgument for a word that is no signal."""
    if config.stop_signal != pb.SIGNAL_RUNTIME_DEFAULT:
        try:
            name: str = pb.Signal.Name(config.stop_signal).removeprefix("SIGNAL_")
        except ValueError:
            raise InvalidArgument(f"stop_signal: {config.stop_signal} is no signal") from None
    else:
        name = image.config.stop_signal or "SIGTERM"
    signal_number(name)
    return name


def _user(node: Node, config: pb.ContainerConfig, image: Image) -> users.User:
    @functools.cache  # for the user, and for the groups that have him
    def database() -> users.Database:
        if not image.layers:
            return users.Database()
        return node.users.of(image.chain_id, lambda: node.parts.snapshots.lower_directories(image.chain_id))

    return users.resolve(user_request(config, image.config), database)


def _pod_facts(node: Node, pod: Pod, config: pb.ContainerConfig) -> PodFacts:
    """What of the pod the container joins: network, IPC and UTS are the pod's, whatever the container says."""
    own = namespaces(pod.request)
    asked = config.linux.security_context.namespace_options
    directory = node.paths.pod(pod.id)
    pid, host_pid = _pid_namespace(node, pod, asked)
    return PodFacts(
        id=pod.id,
        hostname=hostname(pod.request),
        cgroup_parent=cgroup_parent(node, pod.request),
        network=pod.netns,
        ipc=str(directory / "ns" / "ipc") if own.ipc else "",
        uts=str(directory / "ns" / "uts") if own.network else "",
        pid=pid,
        host_pid=host_pid,
        user=str(directory / "ns" / "user") if own.ids else "",
        ids=own.ids,
        systemd=node.config.runtime.cgroup_driver == "systemd",
        files=PodFiles(
            shm=str(directory / "shm") if own.ipc else "/dev/shm",
            hosts=str(directory / "hosts"),
            hostname=str(directory / "hostname"),
            resolv_conf=str(directory / "resolv.conf"),
        ),
    )


def _pid_namespace(node: Node, pod: Pod, asked: pb.NamespaceOption) -> tuple[str, bool]:
    own = namespaces(pod.request)
    if asked.pid == pb.TARGET:
        target = node.container(asked.target_id)
        if target.pod_id != pod.id:
            raise InvalidArgument(f"namespace_options.target_id: container {target.id} is of another pod")
        node.running(target, "join the PID namespace of")
        return f"/proc/{target.pid}/ns/pid", False
    if asked.pid == pb.NODE:
        if not own.host_pid:
            raise InvalidArgument("namespace_options.pid: NODE needs a pod sandbox with NODE")
        return "", True
    if asked.pid == pb.POD:
        return (str(node.paths.pod(pod.id) / "ns" / "pid"), False) if own.pid else ("", own.host_pid)
    return "", False
