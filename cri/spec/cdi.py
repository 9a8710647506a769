"""CDI devices of a container: the edits that spec files ask for, made in config.json.

Asked for by name, in `CDI_devices` and in annotations `cdi.k8s.io/…` (device plugins use either). Refuses a name that
no file has, and an edit that is not what SPEC.md says, by file and field. Invariant: a file's common edits are made
once however many of its devices are asked for, and before theirs; a node has a rule in the cgroup, and no rule is wider
than its node.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cri.api import api_pb2 as pb
from cri.spec.cdi_files import Registry, known
from cri.spec.mounts import destination
from cri.spec.validate import InvalidRequest
from runtime.errors import RuntimeFailure
from runtime.fields import Fields

ANNOTATION = "cdi.k8s.io/"
MAX_REQUESTED = 1024
MAX_GID = 2**31 - 1
_HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
_EDITS = {"env", "deviceNodes", "hooks", "mounts", "intelRdt", "additionalGids"}
_NODE = {"path", "hostPath", "type", "major", "minor", "fileMode", "permissions", "uid", "gid"}
_HOOK = {"hookName", "path", "args", "env", "timeout"}
_MOUNT = {"hostPath", "containerPath", "options", "type"}
_RDT = {"closID", "l3CacheSchema", "memBwSchema", "schemata", "enableMonitoring", "enableCMT", "enableMBM"}
_TYPES = {"b": stat.S_ISBLK, "c": stat.S_ISCHR, "u": stat.S_ISCHR, "p": stat.S_ISFIFO}


def requested(config: pb.ContainerConfig) -> list[str]:
    """The names of the devices that `config` asks for, each once. Raises InvalidRequest."""
    names = [device.name for device in config.CDI_devices]
    for key, value in sorted(config.annotations.items()):
        if key.startswith(ANNOTATION):
            names += value.split(",")
    found = list(dict.fromkeys(names))
    if len(found) > MAX_REQUESTED:
        raise InvalidRequest(f"CDI_devices: {len(found)} of them, at most {MAX_REQUESTED}")
    return found


def apply(spec: dict[str, Any], names: Sequence[str], directories: Sequence[Path]) -> None:
    """Makes the edits of the devices `names` in `spec`. Raises InvalidRequest."""
    if not names:
        return
    registry = Registry(directories)
    done: set[str] = set()
    wanted: list[tuple[str, Fields]] = []
    for name in names:
        file, edits = registry.find(name)
        if file.path not in done:
            done.add(file.path)
            wanted.append((file.path, file.common))
        wanted.append((file.path, edits))
    mounts: list[dict[str, Any]] = []
    for path, edits in wanted:
        try:
            _edit(spec, edits, mounts)
        except RuntimeFailure as error:
            raise InvalidRequest(f"CDI_devices: {path}: {error}") from None
    spec["mounts"] += sorted(mounts, key=lambda mount: str(mount["destination"]).count("/"))


def _edit(spec: dict[str, Any], edits: Fields, mounts: list[dict[str, Any]]) -> None:
    known(edits, _EDITS)
    _env(spec["process"], edits)
    for node in edits.objects("deviceNodes"):
        _node(spec, node)
    for mount in edits.objects("mounts"):
        mounts.append(_mount(mount))
    for hook in edits.objects("hooks"):
        known(hook, _HOOK)
        kind = hook.str("hookName", required=True, choices=_HOOKS)
        spec.setdefault("hooks", {}).setdefault(kind, []).append(_hook(hook))
    user = spec["process"]["user"]
    gids = edits.ints("additionalGids", 0, MAX_GID)
    user["additionalGids"] += [gid for gid in dict.fromkeys(gids) if gid and gid not in user["additionalGids"]]
    rdt = edits.object("intelRdt")
    if rdt is not None:
        known(rdt, _RDT)
        given: Mapping[str, object] = {name: rdt.raw(name) for name in rdt.names()}
        spec["linux"].setdefault("intelRdt", {}).update(given)


def _env(process: dict[str, Any], edits: Fields) -> None:
    for index, entry in enumerate(edits.strs("env")):
        name, equals, _ = entry.partition("=")
        if not name or not equals:
            raise edits.error(f"env[{index}]", f"{entry[:80]!r} is not NAME=VALUE")
        process["env"] = [old for old in process["env"] if not old.startswith(f"{name}=")] + [entry]


def _node(spec: dict[str, Any], node: Fields) -> None:
    """One device node and its rule. What the file leaves out is as on the host; the owner, then, who runs."""
    known(node, _NODE)
    path = _target(node, "path")
    kind = node.str("type", choices=("", *_TYPES))
    access = node.str("permissions") or "rwm"
    if set(access) - set("rwm"):
        raise node.error("permissions", f"{access[:20]!r} is not made of r, w and m")
    mode, major, minor = node.optional_int("fileMode", 0, 0o7777), node.int("major", 0), node.int("minor", 0)
    if not kind or (kind != "p" and not node.has("major") and not node.has("minor")) or mode is None:
        found = _host_node(node, kind)
        kind = kind or ("b" if stat.S_ISBLK(found.st_mode) else "c" if stat.S_ISCHR(found.st_mode) else "p")
        if not node.has("major") and not node.has("minor"):
            major, minor = os.major(found.st_rdev), os.minor(found.st_rdev)
        mode = stat.S_IMODE(found.st_mode) if mode is None else mode
    user = spec["process"]["user"]
    made: dict[str, Any] = {"path": path, "type": kind, "fileMode": mode}
    if kind != "p":
        made |= {"major": major, "minor": minor}
    for key in ("uid", "gid"):
        made[key] = node.int(key, 0, MAX_GID, default=user[key])
    devices = spec["linux"]["devices"]
    devices[:] = [other for other in devices if other["path"] != path] + [made]
    if kind != "p":
        rule = {"allow": True, "type": kind.replace("u", "c"), "major": major, "minor": minor, "access": access}
        spec["linux"]["resources"]["devices"].append(rule)


def _host_node(node: Fields, kind: str) -> os.stat_result:
    path = node.str("hostPath") or node.str("path")
    key = "hostPath" if node.has("hostPath") else "path"
    if not path.startswith("/"):
        raise node.error(key, f"{path[:80]!r} must be an absolute path")
    try:
        found = os.stat(path)
    except OSError as error:
        raise node.error(key, f"{path[:200]}: {(error.strerror or '').lower()}") from None
    if not any(is_kind(found.st_mode) for is_kind in ([_TYPES[kind]] if kind else _TYPES.values())):
        raise node.error(key, f"{path[:200]} is no device" + (f" of type {kind}" if kind else ""))
    return found


def _mount(mount: Fields) -> dict[str, Any]:
    known(mount, _MOUNT)
    source = mount.str("hostPath", required=True)
    kind = mount.str("type") or "bind"
    options = list(mount.strs("options"))
    if kind == "bind" and not {"bind", "rbind"} & set(options):
        options.append("bind")
    if kind == "bind" and not source.startswith("/"):
        raise mount.error("hostPath", f"{source[:80]!r} must be an absolute path")
    target = _target(mount, "containerPath")
    if target in ("/proc", "/sys"):
        raise mount.error("containerPath", f"nothing may be mounted on {target}")
    return {"destination": target, "type": kind, "source": source, "options": options}


def _target(fields: Fields, key: str) -> str:
    try:
        return destination("", fields.str(key, required=True))
    except InvalidRequest as error:
        raise fields.error(key, str(error).partition(": ")[2]) from None


def _hook(hook: Fields) -> dict[str, Any]:
    made: dict[str, Any] = {"path": hook.str("path", required=True), "args": list(hook.strs("args"))}
    if not made["path"].startswith("/"):
        raise hook.error("path", f"{made['path'][:80]!r} must be an absolute path")
    for index, entry in enumerate(hook.strs("env")):
        if not entry.partition("=")[0] or "=" not in entry:
            raise hook.error(f"env[{index}]", f"{entry[:80]!r} is not NAME=VALUE")
    if hook.has("env"):
        made["env"] = list(hook.strs("env"))
    if hook.has("timeout"):
        made["timeout"] = hook.int("timeout", 1, 3600)
    return made
