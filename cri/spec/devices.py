"""Host devices of a container: nodes to make and cgroup rules to allow them.

Refuses what is no device: a link is followed once, and what it leads to is looked at through the fd (threats S76).
Invariant: every node listed has a rule, and no rule is wider than its node, but for `privileged`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from typing import Any

from cri.api import api_pb2 as pb
from cri.spec.mounts import destination
from cri.spec.validate import InvalidRequest

MAX_DEVICES = 4096
# What the runtime makes itself, and what belongs to one terminal or to a mount of its own.
_NOT_SHARED = frozenset(
    {
        "/dev/pts",
        "/dev/shm",
        "/dev/fd",
        "/dev/mqueue",
        "/dev/console",
        "/dev/ptmx",
        "/dev/tty",
        "/dev/null",
        "/dev/zero",
        "/dev/full",
        "/dev/random",
        "/dev/urandom",
        "/dev/.lxc",
        "/dev/.lxd-mounts",
        "/dev/.udev",
    }
)


def _node(field: str, host_path: str, path: str, access: str) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        fd = os.open(host_path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidRequest(f"{field}.host_path: {host_path[:80]}: {(error.strerror or '').lower()}") from error
    try:
        found = os.fstat(fd)
    finally:
        os.close(fd)
    if stat.S_ISCHR(found.st_mode):
        kind = "c"
    elif stat.S_ISBLK(found.st_mode):
        kind = "b"
    else:
        raise InvalidRequest(f"{field}.host_path: {host_path[:80]} is no device")
    major, minor = os.major(found.st_rdev), os.minor(found.st_rdev)
    node = {
        "path": path,
        "type": kind,
        "major": major,
        "minor": minor,
        "fileMode": stat.S_IMODE(found.st_mode),
        "uid": found.st_uid,
        "gid": found.st_gid,
    }
    rule = {"allow": True, "type": kind, "major": major, "minor": minor, "access": access}
    return node, rule


def _requested(field: str, device: pb.Device) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    access = device.permissions or "rwm"
    if set(access) - set("rwm"):
        raise InvalidRequest(f"{field}.permissions: {access[:20]!r} is not made of r, w and m")
    if not device.host_path.startswith("/") or "\0" in device.host_path:
        raise InvalidRequest(f"{field}.host_path: {device.host_path[:80]!r} must be an absolute path")
    target = destination(field, device.container_path or device.host_path)
    if os.path.isdir(device.host_path):
        for path in _device_files(device.host_path):
            yield _node(field, path, target + path[len(device.host_path.rstrip("/")) :], access)
        return
    yield _node(field, device.host_path, target, access)


def _device_files(directory: str) -> Iterable[str]:
    for here, directories, files in os.walk(directory, followlinks=False):
        directories[:] = [name for name in sorted(directories) if os.path.join(here, name) not in _NOT_SHARED]
        for name in sorted(files):
            path = os.path.join(here, name)
            if path not in _NOT_SHARED and stat.S_IFMT(os.lstat(path).st_mode) in (stat.S_IFCHR, stat.S_IFBLK):
                yield path


def build(requested: Sequence[pb.Device], *, privileged: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """runtime-spec `linux.devices` and `linux.resources.devices`. Raises InvalidRequest."""
    nodes: dict[str, dict[str, Any]] = {}
    rules: list[dict[str, Any]] = [{"allow": privileged, "access": "rwm"}]
    if privileged:
        for path in _device_files("/dev"):
            node, _ = _node("privileged", path, path, "rwm")
            nodes[path] = node
    for index, device in enumerate(requested):
        for node, rule in _requested(f"devices[{index}]", device):
            nodes[node["path"]] = node
            if not privileged:
                rules.append(rule)
            if len(nodes) > MAX_DEVICES:
                raise InvalidRequest(f"devices: more than {MAX_DEVICES}")
    return list(nodes.values()), rules
