"""What is, in the CRI's words: from records to messages. Pure.

Refuses to ask anybody: all of it comes from the records. Invariant: a time that has not come is 0, and an exit code
is shown only for what has ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cri.api import api_pb2 as pb
from cri.records import Container, Pod


def pod_state(pod: Pod) -> pb.PodSandboxState:
    """SANDBOX_READY or not."""
    return pb.SANDBOX_READY if pod.ready else pb.SANDBOX_NOTREADY


def pod_metadata(pod: Pod) -> pb.PodSandboxMetadata:
    """What the pod was named."""
    return pb.PodSandboxMetadata(name=pod.name, uid=pod.uid, namespace=pod.namespace, attempt=pod.attempt)


def pod_item(pod: Pod) -> pb.PodSandbox:
    """The pod as ListPodSandbox has it."""
    config = pod.request
    return pb.PodSandbox(
        id=pod.id,
        metadata=pod_metadata(pod),
        state=pod_state(pod),
        created_at=pod.created_ns,
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=pod.handler,
    )


def pod_status(pod: Pod) -> pb.PodSandboxStatus:
    """The pod as PodSandboxStatus has it."""
    config = pod.request
    status = pb.PodSandboxStatus(
        id=pod.id,
        metadata=pod_metadata(pod),
        state=pod_state(pod),
        created_at=pod.created_ns,
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=pod.handler,
    )
    status.linux.namespaces.options.CopyFrom(config.linux.security_context.namespace_options)
    # A stopped pod has given its addresses back; one that is only not ready still has them (threats O60).
    ips = pod.ips.split(",") if pod.ips and not pod.stopped_ns else []
    status.network.ip = ips[0] if ips else ""
    status.network.additional_ips.extend(pb.PodIP(ip=ip) for ip in ips[1:])
    return status


def container_item(container: Container) -> pb.Container:
    """The container as ListContainers has it."""
    config = container.request
    return pb.Container(
        id=container.id,
        pod_sandbox_id=container.pod_id,
        metadata=config.metadata,
        image=_image(container),
        image_ref=container.image_ref or container.image_id,
        image_id=container.image_id,
        state=container.state,
        created_at=container.created_ns,
        labels=config.labels,
        annotations=config.annotations,
    )


def container_status(container: Container) -> pb.ContainerStatus:
    """The container as ContainerStatus has it."""
    config = container.request
    status = pb.ContainerStatus(
        id=container.id,
        metadata=config.metadata,
        state=container.state,
        created_at=container.created_ns,
        started_at=container.started_ns,
        finished_at=container.finished_ns,
        exit_code=container.exit_code if container.finished_ns else 0,
        image=_image(container),
        image_ref=container.image_ref or container.image_id,
        image_id=container.image_id,
        reason=container.exit_reason,
        message=container.message,
        labels=config.labels,
        annotations=config.annotations,
        mounts=config.mounts,
        log_path=container.log_path,
        stop_signal=_signal(container.stop_signal),
    )
    shown = (mount.image for mount in status.mounts if mount.HasField("image"))
    for spec, id_ in zip(shown, filter(None, container.volume_images.split(",")), strict=False):
        spec.image_ref = id_
    status.resources.linux.ParseFromString(container.resources)
    user = status.user.linux
    user.uid, user.gid = container.uid, container.gid
    user.supplemental_groups.extend(int(group) for group in container.groups.split(",") if group)
    return status


def whole(containers: Iterable[Container]) -> Iterator[pb.ContainerStatus]:
    """The statuses of those that are not half-made, the newest first: of several with one name a kubelet takes the
    first for the last try."""
    made = [container for container in containers if container.made_ns]
    made.sort(key=lambda container: container.created_ns, reverse=True)
    return map(container_status, made)


def _image(container: Container) -> pb.ImageSpec:
    """The image as asked for, by the name that people know it by: a kubelet asks by id and shows what comes back."""
    spec = pb.ImageSpec()
    spec.CopyFrom(container.request.image)
    spec.image = container.image_name or spec.image
    return spec


def _signal(name: str) -> pb.Signal:
    """The CRI's Signal of a signal's name; SIGNAL_RUNTIME_DEFAULT for those it has no word for."""
    word = name.upper().removeprefix("SIG").replace("+", "PLUS").replace("-", "MINUS")
    try:
        number: pb.Signal = pb.Signal.Value(f"SIGNAL_SIG{word}")  # type: ignore[assignment]
        return number
    except ValueError:
        return pb.SIGNAL_RUNTIME_DEFAULT
