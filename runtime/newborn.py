"""What the caller of create does to a new init from outside: id mappings, and its place in the order of OOM kills.

Refuses to leave either to the init: it may not write its own mappings, and the /proc that it sees is not trusted.
"""

from __future__ import annotations

import os

from runtime.errors import RuntimeFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.spec import IdMapping, Spec


def write_mappings(pid: int, uids: tuple[IdMapping, ...], gids: tuple[IdMapping, ...]) -> None:
    """uid_map and gid_map of a new user namespace (user_namespaces(7)); one write(2) each, as the kernel wants."""
    for name, mappings in (("uid_map", uids), ("gid_map", gids)):
        text = "".join(f"{m.container} {m.host} {m.size}\n" for m in mappings)
        try:
            fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
        except OSError as error:
            what = f"write {name}"
            raise RuntimeFailure.of(error, step="user namespace", what=what, code="invalid_argument") from None


def adjust_oom_score(pid: int, spec: Spec) -> list[str]:
    """oom_score_adj of the init, by the caller: a container's own /proc is not trusted with it (CVE-2025-52881).
    Where lowering it is forbidden, it stays as low as it is, with a warning (restrict_oom_score_adj of the peers)."""
    wanted = spec.process.oom_score_adj if spec.process is not None else None
    if wanted is None:
        return []
    path = f"/proc/{pid}/oom_score_adj"
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if int(os.read(fd, 16)) == wanted:
            return []
        os.write(fd, str(wanted).encode())
    except PermissionError:
        return [f"oom_score_adj {wanted} is lower than this process may set: it stays {_current_oom_score(path)}"]
    except OSError as error:
        raise RuntimeFailure.of(error, step="oom_score_adj", what=f"write {wanted} to {path}") from None
    finally:
        os.close(fd)
    return []


def _current_oom_score(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().strip()
