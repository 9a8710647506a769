"""config.json (OCI runtime-spec 1.3, Linux) as frozen values: read once, here, and checked field by field.

Refuses by its path every field that this runtime knows and does not support yet, if it asks for something; what the
specification does not know is ignored, as it wants. Invariant: who holds a `Spec` sees no dict, and ids, counts and
lengths in it are in range.
"""

from __future__ import annotations

from runtime import mounts, resources, spec_namespaces
from runtime.fields import FieldError, Fields, decode
from runtime.linux.record import Record
from runtime.mounts import Mount
from runtime.namespaces import Namespace
from runtime.resources import Resources
from runtime.spec_hooks import Hooks, parse_hooks
from runtime.spec_namespaces import IdMapping, TimeOffset
from runtime.spec_process import MAX_ID, Process, parse_process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from runtime.intel_rdt import IntelRdt
    from runtime.memory_policy import MemoryPolicy
    from runtime.net_devices import NetDevice
    from runtime.seccomp import Seccomp


class Device(Record):
    """One of linux.devices; `kind` is "c", "b" or "p"."""

    path: str
    kind: str
    major: int = 0
    minor: int = 0
    mode: int = 0o666
    uid: int = 0
    gid: int = 0


class Spec(Record):
    """A whole config.json."""

    version: str
    root_path: str
    resources: Resources
    process: Process | None = None
    root_readonly: bool = False
    hostname: str = ""
    domainname: str = ""
    mounts: tuple[Mount, ...] = ()
    namespaces: tuple[Namespace, ...] = ()
    uid_mappings: tuple[IdMapping, ...] = ()
    gid_mappings: tuple[IdMapping, ...] = ()
    time_offsets: tuple[TimeOffset, ...] = ()
    devices: tuple[Device, ...] = ()
    cgroups_path: str = ""
    seccomp: Seccomp | None = None
    sysctl: tuple[tuple[str, str], ...] = ()
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    rootfs_propagation: tuple[int, bool] | None = None
    mount_label: str = ""
    personality: int | None = None
    net_devices: tuple[NetDevice, ...] = ()
    intel_rdt: IntelRdt | None = None
    memory_policy: MemoryPolicy | None = None
    hooks: Hooks = Hooks()
    annotations: tuple[tuple[str, str], ...] = ()

    def has_new(self, kind: str) -> bool:
        """True when a namespace of this kind is to be made."""
        return any(namespace.kind == kind and not namespace.path for namespace in self.namespaces)

    def has(self, kind: str) -> bool:
        """True when a namespace of this kind is made or joined."""
        return any(namespace.kind == kind for namespace in self.namespaces)


def parse(raw: bytes) -> Spec:
    """config.json's bytes. Raises FieldError, naming the field."""
    fields = Fields(decode(raw, "config.json"))
    version = fields.str("ociVersion", required=True)
    if version.split(".")[0] != "1":
        raise fields.error("ociVersion", f'expected a version 1.x of the runtime specification, got "{version:.40}"')
    root = fields.required_object("root")
    linux = fields.object("linux") or Fields({}, "linux")
    process = fields.raw("process")
    namespaces = spec_namespaces.namespaces(linux)
    kinds = {namespace.kind for namespace in namespaces}
    spec = Spec(
        version=version,
        root_path=root.str("path", required=True),
        root_readonly=root.bool("readonly"),
        process=None if process is None else parse_process(process, "process"),
        hostname=_hostname(fields, "hostname", kinds),
        domainname=_hostname(fields, "domainname", kinds),
        mounts=tuple(mounts.parse(entry) for entry in fields.objects("mounts")),
        namespaces=namespaces,
        uid_mappings=spec_namespaces.mappings(linux, "uidMappings"),
        gid_mappings=spec_namespaces.mappings(linux, "gidMappings"),
        time_offsets=spec_namespaces.time_offsets(linux),
        devices=tuple(_device(entry) for entry in linux.objects("devices")),
        cgroups_path=linux.str("cgroupsPath"),
        resources=resources.parse(linux.object("resources") or Fields({}, "linux.resources")),
        seccomp=_seccomp(linux),
        sysctl=_sysctl(linux, namespaces),
        masked_paths=_absolute(linux, "maskedPaths"),
        readonly_paths=_absolute(linux, "readonlyPaths"),
        rootfs_propagation=_propagation(linux),
        mount_label=linux.str("mountLabel"),
        personality=_personality(linux),
        net_devices=_net_devices(linux, kinds),
        intel_rdt=_intel_rdt(linux.object("intelRdt")),
        memory_policy=_memory_policy(linux.object("memoryPolicy")),
        hooks=parse_hooks(fields),
        annotations=tuple(fields.mapping("annotations").items()),
    )
    spec_namespaces.check(linux, namespaces, spec.uid_mappings, spec.gid_mappings, spec.time_offsets)
    mounts.check_idmaps(spec.mounts, user_namespace=spec.has("user"))
    return spec


def _device(fields: Fields) -> Device:
    path = fields.str("path", required=True)
    if not path.startswith("/") or ".." in path.split("/"):
        raise fields.error("path", f'expected an absolute path without "..", got "{path:.80}"')
    kind = fields.str("type", required=True, choices=("c", "b", "u", "p"))
    numbers = (
        {} if kind == "p" else {key: fields.int(key, 0, (1 << 32) - 1, required=True) for key in ("major", "minor")}
    )
    return Device(
        path=path,
        kind="c" if kind == "u" else kind,
        mode=fields.int("fileMode", 0, 0xFFFF, 0o666) & 0o7777,
        uid=fields.int("uid", 0, MAX_ID),
        gid=fields.int("gid", 0, MAX_ID),
        **numbers,
    )


def _seccomp(linux: Fields) -> Seccomp | None:
    fields = linux.object("seccomp")
    if fields is None:
        return None
    from runtime import seccomp  # not every container has a profile

    return seccomp.parse(fields)


# sysctl(8) names that belong to a namespace; everything else is the host's (threats S59).
_IPC_SYSCTLS = frozenset({"msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced"})


def _sysctl(linux: Fields, namespaces: Sequence[Namespace]) -> tuple[tuple[str, str], ...]:
    kinds = {namespace.kind for namespace in namespaces}
    found = linux.mapping("sysctl")
    for name, value in found.items():
        parts = name.replace("/", ".").split(".")
        if parts == ["kernel", "hostname"]:
            raise linux.error("sysctl", f'"{name}" conflicts with the field hostname: use that')
        needs = namespace_of(name)
        if not needs:
            raise linux.error("sysctl", f'sysctl "{name:.80}" is not in a separate kernel namespace')
        if "" in parts or ".." in parts or not name.isascii() or not name.isprintable() or " " in name:
            raise linux.error("sysctl", f'"{name:.80}" is no name of a sysctl')
        if "\n" in value:
            raise linux.error("sysctl", f'the value of "{name}" holds a line break')
        if needs not in kinds:
            raise linux.error("sysctl", hosts_sysctl(name, needs))
    return tuple(found.items())


def namespace_of(sysctl: str) -> str:
    """The kind of namespace that has a value of its own for it, "" for one of the whole machine."""
    parts = sysctl.replace("/", ".").split(".")
    if parts[0] in ("net", "user"):
        return {"net": "network", "user": "user"}[parts[0]]
    if parts[:1] == ["kernel"] and len(parts) == 2 and parts[1] in _IPC_SYSCTLS or parts[:2] == ["fs", "mqueue"]:
        return "ipc"
    return "uts" if parts == ["kernel", "domainname"] else ""


def hosts_sysctl(name: str, kind: str) -> str:
    """Why it is refused where the container has the host's namespace, in runc's words."""
    return f'sysctl "{name}" not allowed in host {kind} namespace: it needs a {kind} namespace of its own'


def _absolute(linux: Fields, key: str) -> tuple[str, ...]:
    paths = linux.strs(key)
    for index, path in enumerate(paths):
        if not path.startswith("/"):
            raise linux.error(f"{key}[{index}]", f'expected an absolute path, got "{path:.80}"')
    return paths


def _propagation(linux: Fields) -> tuple[int, bool] | None:
    name = linux.str("rootfsPropagation")
    if not name:
        return None
    if name not in mounts.PROPAGATION:
        raise linux.error("rootfsPropagation", f"rootfsPropagation={name:.40} is not supported")
    return mounts.PROPAGATION[name]


def _net_devices(linux: Fields, kinds: set[str]) -> tuple[NetDevice, ...]:
    if not linux.has("netDevices"):
        return ()
    from runtime import net_devices  # few containers have any

    found = net_devices.parse(linux)
    if found and "network" not in kinds:
        raise linux.error("netDevices", "unable to move network devices without a network namespace")
    return found


def _personality(linux: Fields) -> int | None:
    fields = linux.object("personality")
    if fields is None:
        return None
    fields.refuse("flags")
    return {"LINUX": 0x0000, "LINUX32": 0x0008}[fields.str("domain", required=True, choices=("LINUX", "LINUX32"))]


def _intel_rdt(fields: Fields | None) -> IntelRdt | None:
    if fields is None:
        return None
    from runtime import intel_rdt  # for machines that have it

    return intel_rdt.parse(fields)


def _memory_policy(fields: Fields | None) -> MemoryPolicy | None:
    if fields is None:
        return None
    from runtime import memory_policy  # few ask for one

    return memory_policy.parse(fields)


def _hostname(fields: Fields, key: str, kinds: set[str]) -> str:
    name = fields.str(key)
    if name and "uts" not in kinds:
        raise fields.error(key, "unable to set it without a uts namespace in linux.namespaces")
    if len(name.encode("utf-8", "surrogateescape")) > 64:  # __NEW_UTS_LEN
        raise fields.error(key, "longer than 64 bytes")
    return name


__all__ = ["FieldError", "Spec", "parse"]
