"""What the caller of create does to a new init from outside: id mappings, and its place in the order of OOM kills.

Refuses to leave either to the init: it may not write its own mappings, and the /proc that it sees is not trusted.
Invariant: uid_map and gid_map say exactly what config.json says, or the container is not made.
"""

from __future__ import annotations

import errno
import os

from runtime.errors import RuntimeFailure
from runtime.linux.process import capget
from runtime.spec_namespaces import IdMapping, map_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.spec import Spec

_STEP = "user namespace"
_CAP_SETGID, _CAP_SETUID = 1 << 6, 1 << 7  # linux/capability.h


def write_mappings(pid: int, uids: tuple[IdMapping, ...], gids: tuple[IdMapping, ...]) -> None:
    """uid_map and gid_map of a new user namespace (user_namespaces(7)).

    Whoever may set any id writes any mapping; everybody may map his own uid and gid, the latter once setgroups(2) is
    denied, lest somebody drops a group that locks him out of something; for the rest there are newuidmap and newgidmap.
    """
    capabilities = capget()[0]
    if capabilities & _CAP_SETUID or _is_only(uids, os.geteuid()):
        _write(pid, "uid_map", map_text(uids))
    else:
        _by_tool("newuidmap", pid, uids)
    if capabilities & _CAP_SETGID:
        _write(pid, "gid_map", map_text(gids))
    elif _is_only(gids, os.getegid()):
        _write(pid, "setgroups", "deny")
        _write(pid, "gid_map", map_text(gids))
    else:
        _by_tool("newgidmap", pid, gids)


def _is_only(mappings: tuple[IdMapping, ...], number: int) -> bool:
    return [(mapping.host, mapping.size) for mapping in mappings] == [(number, 1)]


def _by_tool(tool: str, pid: int, mappings: tuple[IdMapping, ...]) -> None:
    from runtime import rootless  # few callers are no root

    rootless.map_by_tool(tool, pid, mappings)


def _write(pid: int, name: str, text: str) -> None:
    """One write(2), as the kernel wants it."""
    try:
        fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        failure = RuntimeFailure.of(error, step=_STEP, what=f"write {name}", code="invalid_argument")
        if error.errno == errno.EPERM:
            failure.hint = "linux.uidMappings and linux.gidMappings may hold only ids that the caller has itself"
        raise failure from None


def check_mappings(pid: int, uids: tuple[IdMapping, ...], gids: tuple[IdMapping, ...]) -> None:
    """A config may give the mappings of a user namespace that it joins, if it knows them right."""
    for key, name, wanted in (("uidMappings", "uid_map", uids), ("gidMappings", "gid_map", gids)):
        with open(f"/proc/{pid}/{name}", encoding="ascii") as lines:
            found = sorted(tuple(map(int, line.split())) for line in lines)
        if found != sorted((mapping.container, mapping.host, mapping.size) for mapping in wanted):
            there = ", ".join(" ".join(map(str, entry)) for entry in found)
            raise RuntimeFailure(
                f"linux.{key}: user namespaces enabled, but both namespace path and mapping specified, and that one "
                f"has other mappings: {there[:200] or 'none'}",
                step=_STEP,
                code="invalid_argument",
            )


def adjust_oom_score(pid: int, spec: Spec) -> list[str]:
    """oom_score_adj of the init, by the caller: a container's own /proc is not trusted with it (CVE-2025-52881).
    Where lowering it is forbidden, it stays as low as it is, with a warning (restrict_oom_score_adj of the peers)."""
    wanted = spec.process.oom_score_adj if spec.process is not None else None
    if wanted is None:
        return []
    path = f"/proc/{pid}/oom_score_adj"
    fd = -1
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if int(os.read(fd, 16)) == wanted:
            return []
        os.write(fd, str(wanted).encode())
    except PermissionError:
        return [f"oom_score_adj {wanted} is lower than this process may set: it stays {_current_oom_score(path)}"]
    except OSError as error:
        raise RuntimeFailure.of(error, step="oom_score_adj", what=f"write {wanted} to {path}") from None
    finally:
        if fd >= 0:
            os.close(fd)
    return []


def _current_oom_score(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().strip()
