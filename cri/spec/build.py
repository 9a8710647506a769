"""config.json of a container: one CRI request, one image config and the pod's facts in, one runtime-spec object out.

Refuses by `InvalidRequest` what cannot be honoured; changes nothing on the machine. Invariant: image labels,
annotations and environment never become anything that the runtime interprets (threats S46, S60, S66).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from cri.api import api_pb2 as pb
from cri.interfaces import IdMap
from cri.spec import by_annotation, cdi, confine, devices, limits, mounts, security, userns
from cri.spec.images import ImageMount
from cri.spec.mounts import PodFiles
from cri.spec.users import User, UserRequest
from cri.spec.validate import InvalidRequest
from imagestore.model import ImageConfig
from runtime.linux.dataclass import dataclass

OCI_VERSION = "1.2.0"
FOREIGN_VERSION = "1.0.2"  # for other binaries: crun before 1.9 runs nothing that is not of a 1.0
UNIT_PREFIX = "ocid"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MAX_ARGUMENTS = 4096
MAX_ENVIRONMENT = 1 << 20


@dataclass(frozen=True, slots=True)
class PodFacts:
    """What of the pod a container joins. Namespace paths are "" for the host's; `pid` "" means one of its own unless
    `host_pid`. `cgroup_parent` is absolute. `ids` are those of the user namespace, if there is one.
    `systemd`: the parent is a slice, and containers are scopes in it."""

    id: str
    hostname: str
    cgroup_parent: str
    network: str = ""
    ipc: str = ""
    uts: str = ""
    pid: str = ""
    host_pid: bool = False
    files: PodFiles = PodFiles()
    user: str = ""
    ids: IdMap | None = None
    systemd: bool = False


@dataclass(frozen=True, slots=True)
class SpecInputs:
    """All that `build` looks at."""

    container_id: str
    config: pb.ContainerConfig
    sandbox: pb.PodSandboxConfig
    image: ImageConfig
    user: User
    pod: PodFacts
    unset_seccomp: str = "unconfined"  # or "default": what it means that a request names no seccomp profile
    image_mounts: Mapping[int, ImageMount] = field(default_factory=dict)
    cdi_dirs: tuple[Path, ...] = ()
    ignore_selinux: bool = False
    default_apparmor: bool = False  # whether our profile is loaded, for who names none
    annotations: Mapping[str, str] = field(default_factory=dict)  # those that the configuration passes on


def cgroups_path(pod: PodFacts, container_id: str) -> str:
    """config.json's linux.cgroupsPath: a path, or, for systemd, "slice:prefix:name"."""
    if pod.systemd:
        return f"{pod.cgroup_parent.rpartition('/')[2]}:{UNIT_PREFIX}:{container_id}"
    return f"{pod.cgroup_parent.rstrip('/')}/{container_id}"


def cgroup(pod: PodFacts, container_id: str) -> str:
    """Where a container's cgroup is then."""
    name = f"{UNIT_PREFIX}-{container_id}.scope" if pod.systemd else container_id
    return f"{pod.cgroup_parent.rstrip('/')}/{name}"


def user_request(config: pb.ContainerConfig, image: ImageConfig) -> UserRequest:
    """Who the container is to run as, before names are looked up. Raises InvalidRequest."""
    context = config.linux.security_context
    if context.supplemental_groups_policy not in (pb.Merge, pb.Strict):
        raise InvalidRequest(f"supplemental_groups_policy: unknown value {context.supplemental_groups_policy}")
    return UserRequest(
        image_user=image.user,
        uid=context.run_as_user.value if context.HasField("run_as_user") else None,
        gid=context.run_as_group.value if context.HasField("run_as_group") else None,
        username=context.run_as_username,
        supplemental=tuple(context.supplemental_groups),
        strict=context.supplemental_groups_policy == pb.Strict,
    )


def build(inputs: SpecInputs) -> dict[str, Any]:
    """The runtime-spec object (spec version 1.2) that `inputs` describe. Raises InvalidRequest."""
    config, context = inputs.config, inputs.config.linux.security_context
    privileged = context.privileged
    if privileged and not inputs.sandbox.linux.security_context.privileged:
        raise InvalidRequest("security_context.privileged: the pod sandbox is not privileged")
    _check_namespaces(inputs)
    mounts.check_volumes(inputs.image.volumes)
    if inputs.pod.ids is not None:
        mounts.check_inside_user_namespace(config.mounts)
    all_mounts, propagation = mounts.build(
        config.mounts,
        inputs.pod.files,
        privileged=privileged,
        private_ipc=bool(inputs.pod.ipc),
        readonly_rootfs=context.readonly_rootfs,
        host_sysfs=bool(inputs.pod.user and not inputs.pod.network),
        image_mounts=inputs.image_mounts,
        more=by_annotation.tmpfs(config.annotations),
    )
    nodes, rules = devices.build(config.devices, privileged=privileged)
    resources = limits.build(config.linux.resources)
    resources["devices"] = rules
    capabilities = security.capabilities(
        context.capabilities.add_capabilities,
        context.capabilities.drop_capabilities,
        context.capabilities.add_ambient_capabilities,
        privileged=privileged,
    )
    linux: dict[str, Any] = {
        "namespaces": _namespaces(inputs),
        "resources": resources,
        "cgroupsPath": cgroups_path(inputs.pod, inputs.container_id),
        "devices": nodes,
    }
    if inputs.pod.ids is not None:
        linux["uidMappings"] = userns.as_oci(inputs.pod.ids.uids)
        linux["gidMappings"] = userns.as_oci(inputs.pod.ids.gids)
    if propagation:
        linux["rootfsPropagation"] = propagation
    if not privileged:
        # An empty list cannot be told from none on the wire. It is what procMount: Unmasked becomes, and that needs a
        # user namespace; without one, none means the defaults.
        unmasked = inputs.pod.ids is not None
        linux["maskedPaths"] = list(context.masked_paths) or ([] if unmasked else list(security.masked_paths()))
        linux["readonlyPaths"] = list(context.readonly_paths) or ([] if unmasked else list(security.READONLY_PATHS))
    profile = _seccomp(context, capabilities["bounding"], inputs.unset_seccomp)
    if profile is not None:
        linux["seccomp"] = profile
    selinux = confine.selinux("security_context", context.selinux_options, ignore=inputs.ignore_selinux)
    if selinux.files:
        linux["mountLabel"] = selinux.files
    spec: dict[str, Any] = {
        "ociVersion": OCI_VERSION,
        "root": {"path": "rootfs", "readonly": context.readonly_rootfs},
        "process": _process(inputs, capabilities),
        "mounts": all_mounts,
        "linux": linux,
        "annotations": {
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": inputs.pod.id,
            "io.kubernetes.cri.container-name": config.metadata.name,
            **inputs.annotations,
        },
    }
    if selinux.process:
        spec["process"]["selinuxLabel"] = selinux.process
    names = cdi.requested(config)
    if names:
        cdi.apply(spec, names, inputs.cdi_dirs)
    return spec


def _check_namespaces(inputs: SpecInputs) -> None:
    """A container has its pod's namespaces, so it may not ask for others; 0 is POD, and what a request without any of
    this says."""
    asked, own = inputs.config.linux.security_context.namespace_options, inputs.pod
    for name, private in (("network", own.network), ("ipc", own.ipc)):
        value = getattr(asked, name)
        if value not in (pb.POD, pb.NODE) or (value == pb.NODE and private):
            raise InvalidRequest(f"namespace_options.{name}: a container's is that of its pod sandbox")
    if asked.target_id and asked.pid != pb.TARGET:
        raise InvalidRequest("namespace_options.target_id: needs pid TARGET")
    userns.check_container(own.ids, asked)


def _process(inputs: SpecInputs, capabilities: dict[str, list[str]]) -> dict[str, Any]:
    config, user = inputs.config, inputs.user
    process: dict[str, Any] = {
        "terminal": config.tty,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
        "args": arguments(config, inputs.image),
        "env": environment(config, inputs.image, user, inputs.pod.hostname),
        "cwd": working_directory(config.working_dir or inputs.image.working_dir),
        "capabilities": capabilities,
        "noNewPrivileges": config.linux.security_context.no_new_privs,
        "oomScoreAdj": limits.oom_score_adj(config.linux.resources),
    }
    context = config.linux.security_context
    profile = confine.apparmor("security_context", context, default=inputs.default_apparmor)
    if profile:
        process["apparmorProfile"] = profile
    if rlimits := by_annotation.rlimits(config.annotations):
        process["rlimits"] = rlimits
    return process


def arguments(config: pb.ContainerConfig, image: ImageConfig) -> list[str]:
    """Kubernetes' table: `command` replaces ENTRYPOINT and drops CMD, `args` replaces CMD."""
    if config.command:
        chosen = [*config.command, *config.args]
    else:
        chosen = [*image.entrypoint, *(config.args or image.cmd)]
    if not chosen or not chosen[0]:
        raise InvalidRequest("command: neither the request nor the image names a command")
    return checked_arguments("command", chosen)


def checked_arguments(field: str, words: Iterable[str]) -> list[str]:
    """Words that execve(2) can take: no NUL, and not too many."""
    checked = list(words)
    if len(checked) > MAX_ARGUMENTS:
        raise InvalidRequest(f"{field}: {len(checked)} words, at most {MAX_ARGUMENTS}")
    for word in checked:
        if "\0" in word:
            raise InvalidRequest(f"{field}: {word[:40]!r} holds a NUL")
    return checked


def environment(config: pb.ContainerConfig, image: ImageConfig, user: User, hostname: str) -> list[str]:
    """The image's variables, then the request's, the last of a name winning; then PATH, HOME, HOSTNAME, TERM where
    nobody set them. An image entry without "=" names a variable of the builder and is dropped (CVE-2026-57231)."""
    values: dict[str, str] = {}
    for entry in image.env:
        name, equals, value = entry.partition("=")
        if equals and name and "\0" not in entry:
            values[name] = value
    for pair in config.envs:
        raw = pair.value.decode("utf-8", "surrogateescape") if isinstance(pair.value, bytes) else pair.value
        if not pair.key or "=" in pair.key or "\0" in pair.key or "\0" in raw:
            raise InvalidRequest(f"envs: {pair.key[:40]!r} cannot be an environment variable")
        values[pair.key] = raw
    values.setdefault("PATH", DEFAULT_PATH)
    values.setdefault("HOME", user.home)
    if hostname:
        values.setdefault("HOSTNAME", hostname)
    if config.tty:
        values.setdefault("TERM", "xterm")
    entries = [f"{name}={value}" for name, value in values.items()]
    if sum(map(len, entries)) > MAX_ENVIRONMENT:
        raise InvalidRequest(f"envs: more than {MAX_ENVIRONMENT} bytes in all")
    return entries


def working_directory(path: str) -> str:
    """An absolute path, "/" for none; where it leads is for the runtime to check, inside the container."""
    if path and (not path.startswith("/") or "\0" in path or len(path) > 4095):
        raise InvalidRequest(f"working_dir: {path[:80]!r} must be an absolute path")
    return path or "/"


def _namespaces(inputs: SpecInputs) -> list[dict[str, str]]:
    pod = inputs.pod
    joined = (("user", pod.user), ("network", pod.network), ("ipc", pod.ipc), ("uts", pod.uts), ("pid", pod.pid))
    namespaces = [{"type": "mount"}, *({"type": kind, "path": path} for kind, path in joined if path)]
    if not pod.pid and not pod.host_pid:
        namespaces.append({"type": "pid"})
    # One that a user namespace owns, too: without it no cgroup filesystem could be mounted there.
    if pod.user or not inputs.config.linux.security_context.privileged:
        namespaces.append({"type": "cgroup"})
    return namespaces


def _seccomp(context: pb.LinuxContainerSecurityContext, granted: list[str], unset: str) -> dict[str, Any] | None:
    if context.seccomp_profile_path:
        raise InvalidRequest("security_context.seccomp_profile_path: gone from Kubernetes; say seccomp instead")
    if context.privileged:
        return None
    profile = context.seccomp
    if not context.HasField("seccomp") and unset == "unconfined":
        return None
    if profile.profile_type == pb.SecurityProfile.RuntimeDefault:
        return _default_seccomp(tuple(granted))
    if profile.profile_type == pb.SecurityProfile.Localhost:
        return security.localhost_seccomp(profile.localhost_ref)
    return None


@functools.lru_cache(maxsize=8)
def _default_seccomp(granted: tuple[str, ...]) -> dict[str, Any]:
    # Shared between specs and never written to: config.json is serialised from it right away.
    return security.default_seccomp(granted)


def exec_process(config: dict[str, Any], command: Iterable[str], *, terminal: bool = False) -> dict[str, Any]:
    """The runtime-spec process of a command in the container of `config`: its user, environment and limits, no more.
    Raises InvalidRequest."""
    words = checked_arguments("cmd", command)
    if not words or not words[0]:
        raise InvalidRequest("cmd: empty")
    process = copy.copy(config["process"])
    process["args"] = words
    process["terminal"] = terminal
    return dict(process)
