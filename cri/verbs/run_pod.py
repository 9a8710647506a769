"""RunPodSandbox: a record, a network namespace, a shim, a network; then the pod is ready.

Refuses what a later step could not honour before anything is made. Invariant: a pod is visible only once it is whole;
after a failure nothing of it is left, and after a kill -9 recovery finds the record and undoes it.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from pathlib import Path

from cri import trace
from cri.api import api_pb2 as pb
from cri.capabilities import capabilities
from cri.cgroups import first_missing, is_within, remove_made
from cri.errors import AlreadyExists, InvalidArgument
from cri.interfaces import IdMap, NetworkError, NetworkResult, Sandbox, Sandboxes, SandboxSpec
from cri.node import Node, new_id, now_ns
from cri.records import Pod
from cri.spec import confine, etc, limits, security, userns, users, validate
from cri.threads import to_thread
from cri.undo import Undo, both
from runtime.cgroups.scope import expand_slice
from runtime.errors import RuntimeFailure
from runtime.linux.dataclass import dataclass
from runtime.linux.failpoint import failpoint
from runtime.linux.files import remove_tree, write_durable

log = logging.getLogger(__name__)

LOOPBACK_ONLY = "none"


@dataclass(frozen=True, slots=True)
class Namespaces:
    """Which namespaces a pod has of its own; `ids` are those of its user namespace."""

    network: bool
    ipc: bool
    pid: bool
    host_pid: bool
    ids: IdMap | None


def namespaces(config: pb.PodSandboxConfig) -> Namespaces:
    """The pod's namespaces as asked for. Raises InvalidArgument, InvalidRequest."""
    options = config.linux.security_context.namespace_options
    for field, value in (("network", options.network), ("ipc", options.ipc)):
        if value not in (pb.POD, pb.NODE):
            raise InvalidArgument(f"namespace_options.{field}: a pod's is POD or NODE")
    if options.pid not in (pb.POD, pb.CONTAINER, pb.NODE):
        raise InvalidArgument("namespace_options.pid: a pod's is POD, CONTAINER or NODE")
    ids = userns.of_pod(options)
    if ids is not None and options.pid == pb.NODE:
        raise InvalidArgument(
            "namespace_options.pid: NODE cannot be had with a user namespace, which may show no processes of the host's"
        )
    return Namespaces(
        network=options.network == pb.POD,
        ipc=options.ipc == pb.POD,
        pid=options.pid == pb.POD,
        host_pid=options.pid == pb.NODE,
        ids=ids,
    )


def hostname(config: pb.PodSandboxConfig) -> str:
    """What the pod's processes see as host name: as asked, else the node's in its network, else the pod's name."""
    if config.hostname:
        return validate.hostname(config.hostname)
    if not namespaces(config).network:
        return etc.host_name()
    return str(config.metadata.name)[:63].rstrip(".-").replace("_", "-")


def cgroup_parent(node: Node, config: pb.PodSandboxConfig) -> str:
    """The absolute parent of the pod's cgroups; with the systemd driver that of a slice, of which the last name alone
    counts: it has all the others in it. Raises InvalidArgument (threats S19)."""
    asked: str = config.linux.cgroup_parent
    if not asked:
        return node.config.runtime.cgroup_parent
    parts = [part for part in asked.split("/") if part]
    if not parts or len(asked) > 4096 or any(part in (".", "..") or not part.isprintable() for part in parts):
        raise InvalidArgument(f"linux.cgroup_parent: {asked[:80]!r} is no path of cgroup names")
    if node.config.runtime.cgroup_driver == "systemd":
        try:
            return expand_slice(parts[-1])
        except RuntimeFailure as error:
            raise InvalidArgument(f"linux.cgroup_parent: {asked[:80]!r}: {error}") from None
    return "/" + "/".join(parts)


def own_cgroups(node: Node, pods: Collection[Pod]) -> dict[str, str]:
    """The cgroup of each of `pods` that has one for itself: a kubelet's do; those that were run without a parent, or
    with that of another pod, do not. A pod that has stopped leaves its cgroup to the next one."""
    parents = {
        pod.id: cgroup_parent(node, pod.request)
        for pod in node.store.pods.values()
        if pod.ready and pod.request.linux.cgroup_parent
    }
    users = Counter(parents.values())
    return {pod.id: parents[pod.id] for pod in pods if users[parents.get(pod.id, "")] == 1}


def check_labels(config: pb.PodSandboxConfig | pb.ContainerConfig) -> None:
    """Bounds labels and annotations as Kubernetes does. Raises InvalidArgument."""
    for field, values in (("labels", config.labels), ("annotations", config.annotations)):
        if sum(len(key) + len(value) for key, value in values.items()) > validate.MAX_ANNOTATIONS:
            raise InvalidArgument(f"{field}: more than {validate.MAX_ANNOTATIONS} bytes in all")


def check(node: Node, config: pb.PodSandboxConfig) -> None:
    """Refuses what cannot be run, before anything is made. Raises InvalidRequest and CriError."""
    metadata = config.metadata
    validate.name("metadata.name", metadata.name)
    if metadata.namespace:
        validate.name("metadata.namespace", metadata.namespace)
    if metadata.uid:
        validate.uid("metadata.uid", metadata.uid)
    validate.log_directory(config.log_directory)
    check_labels(config)
    if config.HasField("windows"):
        raise InvalidArgument("windows: this node runs Linux")
    _check_security(node, config.linux.security_context)
    for field, given in (("overhead", config.linux.overhead), ("resources", config.linux.resources)):
        try:
            limits.build_pod(given)
        except validate.InvalidRequest as error:
            raise InvalidArgument(f"linux.{field}: {error}") from None
    cgroup_parent(node, config)
    hostname(config)
    own = namespaces(config)
    validate.sysctls(config.linux.sysctls, private_network=own.network, private_ipc=own.ipc)
    if config.HasField("dns_config"):
        dns = config.dns_config
        etc.resolv_conf(dns.servers, dns.searches, dns.options)
    capabilities(config)
    for index, port in enumerate(config.port_mappings):
        if not (0 <= port.host_port <= 65535 and 0 < port.container_port <= 65535):
            raise InvalidArgument(f"port_mappings[{index}]: ports go from 1 to 65535")
        if port.protocol not in pb.Protocol.values():
            raise InvalidArgument(f"port_mappings[{index}].protocol: unknown value {port.protocol}")
        if port.host_ip:
            try:
                ipaddress.ip_address(port.host_ip)
            except ValueError:
                raise InvalidArgument(f"port_mappings[{index}].host_ip: {port.host_ip[:80]!r} is no address") from None


def _check_security(node: Node, context: pb.LinuxSandboxSecurityContext) -> None:
    """A pod has no process that its security context could be applied to: ocid-pause has no rights at all. What its
    containers could not be given is refused already here, as a kubelet says it of both."""
    if context.seccomp_profile_path:
        raise InvalidArgument("security_context.seccomp_profile_path: gone from Kubernetes; say seccomp instead")
    if context.HasField("seccomp") and context.seccomp.profile_type == pb.SecurityProfile.Localhost:
        security.localhost_seccomp(context.seccomp.localhost_ref)
    confine.apparmor("security_context", context)
    ignore = node.config.runtime.without_selinux == "ignore"
    confine.selinux("security_context", context.selinux_options, ignore=ignore)
    for field in ("run_as_user", "run_as_group"):
        if context.HasField(field) and not 0 <= getattr(context, field).value <= users.MAX_ID:
            raise InvalidArgument(f"security_context.{field}: not from 0 to {users.MAX_ID}")
    if context.HasField("run_as_group") and not context.HasField("run_as_user"):
        raise InvalidArgument("security_context.run_as_group: needs run_as_user")
    if any(not 0 <= group <= users.MAX_ID for group in context.supplemental_groups):
        raise InvalidArgument(f"security_context.supplemental_groups: not from 0 to {users.MAX_ID}")


async def run_pod(node: Node, request: pb.RunPodSandboxRequest, network: str = "") -> pb.RunPodSandboxResponse:
    """`network` is "" for the default network, "none" for loopback alone, else the name of a conflist."""
    config = request.config
    check(node, config)
    handler, binary = node.handler(request.runtime_handler)
    if binary and namespaces(config).ids is not None:
        raise InvalidArgument(
            f"namespace_options.userns_options: runtime handler {handler!r} runs no pods with user namespaces; "
            "the native one does"
        )
    metadata = config.metadata
    pod = new_record(config, handler, network)
    key = pod.key
    what = f"run pod {metadata.namespace}/{metadata.name}"
    fingerprint = request.SerializeToString(deterministic=True) + network.encode()
    await node.pod_names.forsaken(key, fingerprint)
    existing, forsaken = node.store.named(key), ""
    if existing is not None and not node.pod_names.busy(key) and node.store.pods[existing].made_ns:
        if node.pod_names.unclaimed(key, fingerprint) == existing and node.store.pods[existing].ready:
            return pb.RunPodSandboxResponse(pod_sandbox_id=existing)
        if node.pod_names.left_over(key) != existing or node.store.containers_of(existing):
            raise AlreadyExists(f"{what}: the name is taken by pod sandbox {existing}; remove that first")
        forsaken = existing
    made = await node.pod_names.once(key, fingerprint, what, lambda: _make_instead(node, pod, forsaken))
    return pb.RunPodSandboxResponse(pod_sandbox_id=made)


async def _make_instead(node: Node, pod: Pod, forsaken: str) -> str:
    """Makes the pod, and before it takes away what nobody was told of: a kubelet that was restarted meanwhile asks for
    the same name with other annotations (when it has seen the pod), and knows of none that it could remove."""
    if forsaken:
        from cri.verbs.remove_pod import remove  # which imports this module

        log.info("pod %s (%s) is made again: nobody waited for it, and it is asked for anew", pod.label, forsaken[:13])
        await remove(node, forsaken)
    return await make(node, pod)


def new_record(config: pb.PodSandboxConfig, handler: str, network: str = "") -> Pod:
    """A pod that is to be, under an id of its own."""
    metadata = config.metadata
    return Pod(
        id=new_id(),
        name=metadata.name,
        namespace=metadata.namespace,
        uid=metadata.uid,
        attempt=metadata.attempt,
        handler=handler,
        config=config.SerializeToString(),
        created_ns=now_ns(),
        network=network,
    )


async def make(node: Node, pod: Pod, fill: Callable[[Undo], Awaitable[None]] | None = None) -> str:
    """Makes the pod. `fill` puts into it what it is to begin with, and makes its record visible (`made_ns`) together
    with those of what it has put there: after a kill in between there is all of it, or nothing."""
    config = pod.request
    own = namespaces(config)
    directory, parent = node.paths.pod(pod.id), cgroup_parent(node, config)
    pod = replace(
        pod,
        netns=str(node.parts.network.netns_path(pod.id)) if _has_netns_first(own) else "",
        cgroup_made=_cgroup_to_make(node, parent),
    )
    trace.about(pod=pod.id)
    async with node.locks.held(pod.id), Undo() as undo:
        undo.did("forget the pod", lambda: _forget(node, pod, undo))
        # All that can be known ahead: whoever finds this record knows that addresses may be in use (threats O3).
        await node.store.add(pod)
        failpoint("run_pod.recorded")
        undo.did("remove the pod's directory", lambda: to_thread(remove_tree, directory))
        _, netns = await both(to_thread(os.mkdir, directory, 0o700), _new_netns(node, pod, undo, own))
        failpoint("run_pod.netns")
        spec = SandboxSpec(
            id=pod.id,
            directory=directory,
            hostname=hostname(config),
            netns=netns,
            new_netns=own.network and netns is None,
            private_ipc=own.ipc,
            private_uts=own.network,
            shared_pid=own.pid,
            shm_bytes=node.config.runtime.shm_bytes if own.ipc else 0,
            sysctls=_early_sysctls(pod, own),
            cgroup_parent=parent,
            uids=own.ids.uids if own.ids else (),
            gids=own.ids.gids if own.ids else (),
        )
        if own.ids is None:
            sandbox, network = await both(_start(node, spec, undo), _connect(node, pod, undo, own))
        else:
            # The network namespace belongs to the user namespace, so the shim makes both before anything is connected.
            sandbox = await _start(node, spec, undo)
            if own.network:
                netns = await _pinned(node, pod, undo, directory / "ns" / "net")
                pod = await node.store.change_pod(pod.id, netns=str(netns))
            network = await _connect(node, pod, undo, own)
        failpoint("run_pod.connected")
        await node.store.change_pod(
            pod.id,
            pid=sandbox.pid,
            started_ticks=sandbox.started_ticks,
            pause_pid=sandbox.pause_pid,
            made_ns=now_ns() if fill is None else 0,
            ips=",".join(network.ips),
            network_result=json.dumps(dict(network.raw)) if network.raw else "",
        )
        if fill is not None:
            await fill(undo)
        failpoint("run_pod.made")
        undo.keep_all()
    log.info("pod %s (%s) is ready: %s", pod.label, pod.id[:13], ", ".join(network.ips) or "no address of its own")
    return pod.id


def leave_cgroup(node: Node, pod: Pod) -> None:
    """Removes what was made above the pod's cgroups, or leaves that to another pod there. Does not await: no pod can
    come between the look at the others and the removal."""
    made, parent = pod.cgroup_made, cgroup_parent(node, pod.request)
    if not made:
        return
    others = {other.id: cgroup_parent(node, other.request) for other in node.store.pods.values() if other.id != pod.id}
    remove_made(parent, made, others.values())
    heir = next((node.store.pods[id_] for id_, path in others.items() if is_within(path, made)), None)
    if heir is not None and (not heir.cgroup_made or len(made) < len(heir.cgroup_made)):
        node.store.note_pod(heir.id, cgroup_made=made)


def _early_sysctls(pod: Pod, own: Namespaces) -> dict[str, str]:
    """What the shim sets; those of interfaces, which it comes before, are the network's."""
    found = validate.sysctls(pod.request.linux.sysctls, private_network=own.network, private_ipc=own.ipc)
    late = pod.network != LOOPBACK_ONLY
    return {key: value for key, value in found.items() if not (late and validate.names_interface(key))}


def _cgroup_to_make(node: Node, parent: str) -> str:
    # Slices are systemd's: it makes them with the first unit in them, and they are not taken away from under it.
    return first_missing(parent) if node.config.runtime.cgroup_driver == "cgroupfs" else ""


async def _forget(node: Node, pod: Pod, undo: Undo) -> None:
    if not undo.failed:
        leave_cgroup(node, node.store.pods.get(pod.id, pod))
        await node.store.remove(pod)
        return
    # Something of it is left that only the record knows of: it stays, as a pod that is not ready, to be stopped and
    # removed by whoever lists it.
    await node.store.change_pod(pod.id, made_ns=now_ns(), lost_ns=now_ns())


def _has_netns_first(own: Namespaces) -> bool:
    """Whether the network namespace is made before the shim; one of a user namespace is made by it."""
    return own.network and own.ids is None


async def _new_netns(node: Node, pod: Pod, undo: Undo, own: Namespaces) -> Path | None:
    if not _has_netns_first(own):
        return None
    return await _pinned(node, pod, undo)


async def _pinned(node: Node, pod: Pod, undo: Undo, source: Path | None = None) -> Path:
    netns = await node.parts.network.new_netns(pod.id, source)
    undo.did("remove the network namespace", lambda: node.parts.network.remove_netns(netns))
    return netns


async def _start(node: Node, spec: SandboxSpec, undo: Undo) -> Sandbox:
    sandbox, events = await to_thread(_start_watched, node.parts.sandboxes, spec)
    node.events.watch(spec.id, events)

    async def stop() -> None:
        node.events.unwatch(spec.id)
        await to_thread(node.parts.sandboxes.stop, sandbox)

    undo.did("stop the shim", stop)
    return sandbox


def _start_watched(sandboxes: Sandboxes, spec: SandboxSpec) -> tuple[Sandbox, int]:
    sandbox = sandboxes.start(spec)
    try:
        return sandbox, sandboxes.events(sandbox)
    except BaseException:
        sandboxes.stop(sandbox)
        raise


async def _connect(node: Node, pod: Pod, undo: Undo, own: Namespaces) -> NetworkResult:
    result = NetworkResult((), {})
    if own.network and pod.network != LOOPBACK_ONLY:

        def release() -> Awaitable[None]:
            return node.parts.network.delete(pod.pod_network())

        try:
            result = await node.parts.network.add(pod.pod_network())
        except NetworkError as error:
            if error.left:  # if it cannot be released now either, the pod stays to be removed by whoever lists it
                undo.did("release the pod's addresses", release)
            raise
        undo.did("release the pod's addresses", release)
    await to_thread(_write_files, node.paths.pod(pod.id), pod.request, own, result.ips)
    return result


def _write_files(directory: Path, config: pb.PodSandboxConfig, own: Namespaces, ips: tuple[str, ...]) -> None:
    name = hostname(config)
    dns = config.dns_config
    texts = {
        "hostname": f"{name}\n",
        "hosts": etc.hosts(name, ips) if own.network else etc.host_file("/etc/hosts"),
        "resolv.conf": etc.resolv_conf(dns.servers, dns.searches, dns.options)
        if config.HasField("dns_config")
        else etc.host_file("/etc/resolv.conf"),
    }
    for file, text in texts.items():
        write_durable(directory / file, text.encode("utf-8", "surrogateescape"), 0o644, sync=False)
        if own.ids is not None:
            os.chown(directory / file, *own.ids.outside(0, 0))
