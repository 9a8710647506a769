"""The mounts of a container: what every container has, what the pod brings, what the request asks for.

Refuses targets on /proc and /sys that are not those very filesystems (CVE-2019-16884), sources that are not there,
and propagation that the source cannot give. Invariant: the list is in the order in which it is mounted, parents first.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from cri.api import api_pb2 as pb
from cri.spec import images, userns
from cri.spec.images import ImageMount
from cri.spec.validate import InvalidRequest
from runtime import labels
from runtime.linux.dataclass import dataclass
from runtime.linux.files import PROC_SUPER_MAGIC, SYSFS_MAGIC, fstatfs_type
from runtime.linux.mount import MountPoint, mountinfo

MAX_MOUNTS = 1024
_PASSED_OPTIONS = frozenset(
    {
        "nosuid",
        "nodev",
        "noexec",
        "noatime",
        "nodiratime",
        "relatime",
        "nosymfollow",
        "suid",
        "dev",
        "exec",
        "strictatime",
        "atime",
    }
)
_PROPAGATION = {
    pb.PROPAGATION_PRIVATE: "rprivate",
    pb.PROPAGATION_HOST_TO_CONTAINER: "rslave",
    pb.PROPAGATION_BIDIRECTIONAL: "rshared",
}


@dataclass(frozen=True, slots=True)
class PodFiles:
    """Host paths of what the pod shares: `shm` is a directory, the others are files. "" leaves one out."""

    shm: str = ""
    hosts: str = ""
    hostname: str = ""
    resolv_conf: str = ""


def _default_mounts(*, privileged: bool, private_ipc: bool, host_sysfs: bool) -> list[dict[str, Any]]:
    sys_mode = "rw" if privileged else "ro"
    mounts: list[dict[str, Any]] = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
        },
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        },
    ]
    if private_ipc:
        mounts.append(
            {
                "destination": "/dev/mqueue",
                "type": "mqueue",
                "source": "mqueue",
                "options": ["nosuid", "noexec", "nodev"],
            }
        )
    else:
        mounts.append(
            {
                "destination": "/dev/mqueue",
                "type": "bind",
                "source": "/dev/mqueue",
                "options": ["rbind", "nosuid", "noexec", "nodev"],
            }
        )
    how = ["nosuid", "noexec", "nodev", sys_mode]
    if host_sysfs:
        # sysfs shows a network namespace, and only who owns that may mount it (sysfs_init_fs_context()).
        mounts.append({"destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind", *how, "rro"]})
    else:
        mounts.append({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": how})
    mounts.append(
        {
            "destination": "/sys/fs/cgroup",
            "type": "cgroup",
            "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime", sys_mode],
        }
    )
    return [mount for mount in mounts if mount["type"] != "bind" or os.path.exists(mount["source"])]


def build(
    requested: Sequence[pb.Mount],
    files: PodFiles,
    *,
    privileged: bool,
    private_ipc: bool,
    readonly_rootfs: bool,
    host_sysfs: bool = False,
    image_mounts: Mapping[int, ImageMount] | None = None,
    more: Sequence[dict[str, Any]] = (),
) -> tuple[list[dict[str, Any]], str]:
    """runtime-spec `mounts` and `linux.rootfsPropagation` ("" for the default). `host_sysfs`: the container may mount
    no sysfs of its own; `more` are put among the requested ones. Raises InvalidRequest."""
    if len(requested) + len(more) > MAX_MOUNTS:
        raise InvalidRequest(f"mounts: {len(requested) + len(more)} of them, at most {MAX_MOUNTS}")
    layers = image_mounts or {}
    asked = [*more, *(_requested(index, mount, layers.get(index)) for index, mount in enumerate(requested))]
    targets = {mount["destination"] for mount in asked}
    # A bind that is not "ro" says nothing: with "rw" it would lift what the host forbids of its source, and nosuid,
    # nodev and noexec with it (docs/decisions/0007).
    mode = ["ro"] if readonly_rootfs else []
    shared = {
        "/dev/shm": files.shm,
        "/etc/hosts": files.hosts,
        "/etc/hostname": files.hostname,
        "/etc/resolv.conf": files.resolv_conf,
    }
    brought = [
        {
            "destination": target,
            "type": "bind",
            "source": source,
            "options": ["rbind", "rprivate", *([] if target == "/dev/shm" else mode)],
        }
        for target, source in shared.items()
        if source and target not in targets
    ]
    defaults = [
        mount
        for mount in _default_mounts(privileged=privileged, private_ipc=private_ipc, host_sysfs=host_sysfs)
        if mount["destination"] not in targets
    ]
    # Stable, so that equal depths keep the order of the request, as the kubelet relies on.
    asked.sort(key=lambda mount: mount["destination"].count("/") if mount["destination"] != "/" else 0)
    kinds = {mount.propagation for mount in requested}
    propagation = ""
    if pb.PROPAGATION_BIDIRECTIONAL in kinds:
        propagation = "rshared"
    elif pb.PROPAGATION_HOST_TO_CONTAINER in kinds:
        propagation = "rslave"
    return defaults + brought + asked, propagation


def _requested(index: int, mount: pb.Mount, layers: ImageMount | None) -> dict[str, Any]:
    field = f"mounts[{index}]"
    if layers is not None:
        images.check(field, mount)
        options = _passed_options(field, mount)
        return images.build(field, mount, destination(field, mount.container_path), options, layers)
    if mount.HasField("image"):
        raise InvalidRequest(f"{field}.image: not with this runtime handler; the native one mounts images")
    if mount.image_sub_path:
        raise InvalidRequest(f"{field}.image_sub_path: needs an image mount")
    if mount.selinux_relabel and labels.has_selinux():
        raise InvalidRequest(f"{field}.selinux_relabel: not supported; label {mount.host_path[:80]} beforehand")
    target = destination(field, mount.container_path)
    source = _source(field, mount.host_path, target)
    options = ["rbind", _propagation(field, mount, source), *(["ro"] if mount.readonly else [])]
    if mount.recursive_read_only:
        if not mount.readonly or mount.propagation != pb.PROPAGATION_PRIVATE:
            raise InvalidRequest(f"{field}.recursive_read_only: needs readonly and private propagation")
        options.append("rro")
    options += _passed_options(field, mount)
    made: dict[str, Any] = {"destination": target, "type": "bind", "source": source, "options": options}
    ids = userns.of_mount(field, mount)
    if ids is not None:
        made |= {"uidMappings": userns.as_oci(ids.uids), "gidMappings": userns.as_oci(ids.gids)}
    return made


def _passed_options(field: str, mount: pb.Mount) -> list[str]:
    for option in mount.mount_options:
        if option not in _PASSED_OPTIONS:
            raise InvalidRequest(
                f"{field}.mount_options: {option[:40]!r} is not one of {', '.join(sorted(_PASSED_OPTIONS))}"
            )
    return list(mount.mount_options)


def destination(field: str, path: str) -> str:
    """A clean absolute target. Raises InvalidRequest for relative paths, NUL, and "/" itself."""
    if not path or "\0" in path or len(path) > 4095:
        raise InvalidRequest(f"{field}.container_path: {path[:80]!r} is no path")
    # Docker and the peers take a relative target as one below the root.
    clean = posixpath.normpath("/" + path.lstrip("/"))
    if clean == "/":
        raise InvalidRequest(f"{field}.container_path: nothing may be mounted over the root filesystem")
    return clean


def _source(field: str, path: str, target: str) -> str:
    """The host path with its links followed, as the CRI asks; it must exist."""
    if not path.startswith("/") or "\0" in path:
        raise InvalidRequest(f"{field}.host_path: {path[:80]!r} must be an absolute path")
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidRequest(f"{field}.host_path: {path}: {(error.strerror or '').lower()}") from error
    try:
        _check_pseudo(field, target, fd, path)
        return os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _check_pseudo(field: str, target: str, fd: int, path: str) -> None:
    for root, magic in (("/proc", PROC_SUPER_MAGIC), ("/sys", SYSFS_MAGIC)):
        if target == root and fstatfs_type(fd) != magic:
            raise InvalidRequest(
                f"{field}.container_path: only the host's {root} itself may be mounted on {root}, not {path}"
            )
    if target.startswith("/proc/"):
        raise InvalidRequest(f"{field}.container_path: {target} lies in /proc, where nothing may be mounted")


def _propagation(field: str, mount: pb.Mount, source: str) -> str:
    if mount.propagation not in _PROPAGATION:
        raise InvalidRequest(f"{field}.propagation: unknown value {mount.propagation}")
    if mount.propagation != pb.PROPAGATION_PRIVATE:
        under = _mount_of(source)
        words = under.propagation if under else ""
        wanted = ("shared:",) if mount.propagation == pb.PROPAGATION_BIDIRECTIONAL else ("shared:", "master:")
        if not any(word in words for word in wanted):
            kind = "shared" if mount.propagation == pb.PROPAGATION_BIDIRECTIONAL else "shared or slave"
            raise InvalidRequest(
                f"{field}.propagation: {source} is on the mount {under.target if under else '?'}, "
                f"which is not {kind}; see mount --make-rshared"
            )
    return _PROPAGATION[mount.propagation]


def check_inside_user_namespace(requested: Sequence[pb.Mount]) -> None:
    """The mounts of a user namespace get what the host mounts, and never give it any: see mount_namespaces(7)."""
    for index, mount in enumerate(requested):
        if mount.propagation == pb.PROPAGATION_BIDIRECTIONAL:
            words = "bidirectional is not possible in a pod with a user namespace"
            raise InvalidRequest(f"mounts[{index}].propagation: {words}")


def _mount_of(path: str) -> MountPoint | None:
    best: MountPoint | None = None
    for point in mountinfo():
        inside = path == point.target or path.startswith(point.target.rstrip("/") + "/")
        if inside and (best is None or len(point.target) >= len(best.target)):
            best = point
    return best


def check_volumes(volumes: Mapping[str, object] | Sequence[str]) -> None:
    """Image VOLUME paths: data in the writable layer, but never on /proc or /sys or outside (CVE-2019-16884,
    CVE-2022-23648)."""
    for volume in volumes:
        clean = posixpath.normpath("/" + volume.lstrip("/"))
        if ".." in volume.split("/") or clean == "/" or clean.split("/")[1] in ("proc", "sys"):
            raise InvalidRequest(f"image: VOLUME {volume[:80]!r} is not allowed there")
