"""One container of a pod file as a ContainerConfig: command, variables, limits, rights.

Pure. Refuses what it does not know by its path. Invariant: what the pod says for all of its containers holds where a
container says nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from cri.api import api_pb2 as pb
from cri.marks import POD_LABEL, RESTART
from cri.podfile.values import expand, name, only, quantity
from cri.podfile.volumes import ConfigMap, Volume, mounts
from runtime.fields import Fields
from runtime.linux.dataclass import dataclass

CPU_PERIOD_US = 100_000
_PULLS = {"": "missing", "IfNotPresent": "missing", "Always": "always", "Never": "never"}
_KNOWN = (
    *("name", "image", "imagePullPolicy", "command", "args", "env", "envFrom", "ports", "resources"),
    *("securityContext", "volumeMounts", "workingDir", "tty", "stdin", "stdinOnce"),
)
_SECURITY = (
    *("runAsUser", "runAsGroup", "runAsNonRoot", "privileged", "readOnlyRootFilesystem", "allowPrivilegeEscalation"),
    *("capabilities", "seccompProfile"),
)
_PROFILES = {
    "RuntimeDefault": pb.SecurityProfile.RuntimeDefault,
    "Unconfined": pb.SecurityProfile.Unconfined,
    "Localhost": pb.SecurityProfile.Localhost,
}
_ID_MOST = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class PodWide:
    """What a pod says for all of its containers. `security` is its securityContext; `pid` and `network` are
    namespaces of CRI; `restart` is the annotation for those that are no init containers."""

    name: str
    volumes: Mapping[str, Volume]
    maps: Mapping[str, ConfigMap]
    directory: Path
    security: Fields
    pid: pb.NamespaceMode
    network: pb.NamespaceMode
    ipc: pb.NamespaceMode
    restart: str


@dataclass(frozen=True, slots=True)
class Planned:
    """A container that is to be; `pull` is missing, always or never, `ports` are those to publish."""

    config: pb.ContainerConfig
    image: str
    pull: str
    ports: tuple[pb.PortMapping, ...]

    @property
    def name(self) -> str:
        return str(self.config.metadata.name)


def planned(fields: Fields, pod: PodWide, *, init: bool) -> Planned:
    """The container that `fields` describe. Raises FieldError."""
    only(fields, *_KNOWN)
    called = name(fields)
    config = pb.ContainerConfig(
        working_dir=fields.str("workingDir"),
        tty=fields.bool("tty"),
        stdin=fields.bool("stdin"),
        stdin_once=fields.bool("stdinOnce"),
        log_path=f"{called}.log",
    )
    config.metadata.name = called
    config.labels[POD_LABEL] = pod.name
    if pod.restart and not init:
        config.annotations[RESTART] = pod.restart
    variables = _variables(fields, pod.maps)
    for key, value in variables.items():
        config.envs.add(key=key, value=value.encode("utf-8", "surrogateescape"))
    config.command.extend(expand(word, variables) for word in fields.strs("command"))
    config.args.extend(expand(word, variables) for word in fields.strs("args"))
    config.mounts.extend(mounts(fields, pod.volumes, pod.directory))
    _limits(config.linux.resources, fields)
    _secure(config.linux.security_context, fields, pod)
    image = fields.str("image", required=True)
    pull = _PULLS[fields.str("imagePullPolicy", choices=_PULLS)]
    return Planned(config, image, pull, tuple(_ports(fields)))


def _variables(container: Fields, maps: Mapping[str, ConfigMap]) -> dict[str, str]:
    found: dict[str, str] = {}
    for fields in container.objects("envFrom"):
        only(fields, "prefix", "configMapRef")
        reference = only(fields.required_object("configMapRef"), "name", "optional")
        prefix = fields.str("prefix")
        for key, value in _data(reference, maps).items():
            found[prefix + key] = value.decode("utf-8", "surrogateescape")
    for fields in container.objects("env"):
        only(fields, "name", "value", "valueFrom")
        key = fields.str("name", required=True)
        origin = fields.object("valueFrom")
        if origin is None:
            found[key] = expand(fields.str("value"), found)
        elif fields.str("value"):
            raise fields.error("valueFrom", "not beside a value")
        else:
            reference = only(
                only(origin, "configMapKeyRef").required_object("configMapKeyRef"), *("name", "key"), "optional"
            )
            wanted = reference.str("key", required=True)
            data = _data(reference, maps)
            if wanted in data:
                found[key] = data[wanted].decode("utf-8", "surrogateescape")
            elif not reference.bool("optional"):
                raise reference.error("key", f"ConfigMap {reference.str('name')[:80]!r} has no {wanted[:80]!r}")
    return found


def _data(reference: Fields, maps: Mapping[str, ConfigMap]) -> Mapping[str, bytes]:
    wanted = reference.str("name", required=True)
    if wanted in maps:
        return maps[wanted].data
    if reference.bool("optional"):
        return {}
    raise reference.error("name", f"there is no ConfigMap {wanted[:80]!r} in this file")


def _ports(container: Fields) -> list[pb.PortMapping]:
    """Those with a hostPort; the others only say what listens."""
    kinds = {"": pb.TCP, "TCP": pb.TCP, "UDP": pb.UDP, "SCTP": pb.SCTP}
    made = []
    for fields in container.objects("ports"):
        only(fields, "name", "containerPort", "hostPort", "hostIP", "protocol")
        inside = fields.int("containerPort", 1, 65535, required=True)
        outside = fields.int("hostPort", 0, 65535)
        protocol = kinds[fields.str("protocol", choices=kinds)]
        if outside:
            made.append(
                pb.PortMapping(
                    host_ip=fields.str("hostIP"), host_port=outside, container_port=inside, protocol=protocol
                )
            )
    return made


def _limits(target: pb.LinuxContainerResources, container: Fields) -> None:
    """Limits bind; of requests the one of CPU is a share, and that of memory is for schedulers."""
    resources = container.object("resources")
    if resources is None:
        return
    only(resources, "limits", "requests")
    amounts: dict[str, dict[str, Fraction | None]] = {}
    for kind in ("limits", "requests"):
        inner = resources.object(kind)
        amounts[kind] = {}
        if inner is not None:
            only(inner, "cpu", "memory")
            amounts[kind] = {what: quantity(inner, what) for what in ("cpu", "memory")}
    cpu, memory = amounts["limits"].get("cpu"), amounts["limits"].get("memory")
    for what, limit in (("cpu", cpu), ("memory", memory)):
        request = amounts["requests"].get(what)
        if limit is not None and request is not None and request > limit:
            raise resources.error(f"requests.{what}", "is more than its limit")
    if memory:
        target.memory_limit_in_bytes = target.memory_swap_limit_in_bytes = int(memory)
    if cpu:
        target.cpu_period, target.cpu_quota = CPU_PERIOD_US, max(1000, int(cpu * CPU_PERIOD_US))
    share = amounts["requests"].get("cpu") or cpu
    if share:
        target.cpu_shares = min(max(2, int(share * 1024)), 262144)


def _secure(target: pb.LinuxContainerSecurityContext, container: Fields, pod: PodWide) -> None:
    own = container.object("securityContext") or Fields({}, container.at("securityContext"))
    only(own, *_SECURITY)
    for field, key in ((target.run_as_user, "runAsUser"), (target.run_as_group, "runAsGroup")):
        value = own.optional_int(key, 0, _ID_MOST)
        value = pod.security.optional_int(key, 0, _ID_MOST) if value is None else value
        if value is not None:
            field.value = value
            field.SetInParent()
    not_root = own.optional_bool("runAsNonRoot")
    not_root = pod.security.optional_bool("runAsNonRoot") if not_root is None else not_root
    if not_root and not (target.HasField("run_as_user") and target.run_as_user.value):
        raise own.error("runAsNonRoot", "needs a runAsUser that is not 0: the image's user is not looked at")
    target.supplemental_groups.extend(pod.security.ints("supplementalGroups", 0, _ID_MOST))
    target.privileged = own.bool("privileged")
    target.readonly_rootfs = own.bool("readOnlyRootFilesystem")
    target.no_new_privs = own.optional_bool("allowPrivilegeEscalation") is False
    if target.no_new_privs and target.privileged:
        raise own.error("allowPrivilegeEscalation", "cannot be false where privileged is true")
    capabilities = own.object("capabilities")
    if capabilities is not None:
        only(capabilities, "add", "drop")
        target.capabilities.add_capabilities.extend(capabilities.strs("add"))
        target.capabilities.drop_capabilities.extend(capabilities.strs("drop"))
    _filter(target.seccomp, own if own.has("seccompProfile") else pod.security)
    options = target.namespace_options
    options.pid, options.network, options.ipc = pod.pid, pod.network, pod.ipc


def _filter(target: pb.SecurityProfile, holder: Fields) -> None:
    """The default profile where nobody says another, as with `ocid run`."""
    profile = holder.object("seccompProfile")
    target.profile_type = pb.SecurityProfile.RuntimeDefault
    target.SetInParent()
    if profile is None:
        return
    only(profile, "type", "localhostProfile")
    kind = profile.str("type", required=True, choices=_PROFILES)
    target.profile_type = _PROFILES[kind]
    if kind == "Localhost":
        path = profile.str("localhostProfile", required=True)
        if not path.startswith("/"):
            raise profile.error("localhostProfile", f"{path[:80]!r} is not absolute: there is no kubelet's directory")
        target.localhost_ref = path
    elif profile.has("localhostProfile"):
        raise profile.error("localhostProfile", f"not with type {kind}")
