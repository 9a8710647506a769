"""Groups, gid and uid of the calling process, also where a user namespace lacks some ids or denies setgroups(2).

Refuses ids that do not exist there, in runc's words. Invariant: what is swallowed is one case only: no groups are asked
for, and the namespace keeps those of its caller because an ordinary user wrote its gid_map (user_namespaces(7)).
"""

from __future__ import annotations

import errno
import os

from runtime.errors import RuntimeFailure
from runtime.linux.process import capget

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.spec_process import User

_CAP_SETGID = 1 << 6  # linux/capability.h


def be_root() -> None:
    """Root of a user namespace that the process has just come into, with all capabilities in it."""
    _drop_groups()
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def become(user: User) -> None:
    """The groups, gid and uid of `user`. Takes CAP_SETGID and CAP_SETUID."""
    if user.additional_gids:
        _set_groups(user.additional_gids)
    else:
        _drop_groups()
    try:
        os.setresgid(user.gid, user.gid, user.gid)
    except OSError as error:
        raise _unmapped(error, "gid", user.gid) from None
    try:
        os.setresuid(user.uid, user.uid, user.uid)
    except OSError as error:
        raise _unmapped(error, "uid", user.uid) from None


def _drop_groups() -> None:
    if not os.getgroups():
        return
    try:
        os.setgroups([])
    except PermissionError:
        if not _denied():
            raise


def _set_groups(wanted: tuple[int, ...]) -> None:
    try:
        os.setgroups(list(dict.fromkeys(wanted)))
    except OSError as error:
        what = f"set additional groups {', '.join(map(str, wanted))}"
        failure = RuntimeFailure.of(error, what=what, code="invalid_argument")
        if error.errno == errno.EINVAL:
            failure.hint = "linux.gidMappings must map every one of process.user.additionalGids"
        elif error.errno == errno.EPERM and _denied():
            failure.message = f"cannot set any additional groups in a rootless container: {failure.message}"
            failure.hint = "with a gid range of /etc/subgid in linux.gidMappings, newgidmap allows them"
        raise failure from None


def _denied() -> bool:
    """True when it is the user namespace that forbids setgroups(2), not a lack of CAP_SETGID."""
    return bool(capget()[0] & _CAP_SETGID)


def _unmapped(error: OSError, kind: str, number: int) -> RuntimeFailure:
    if error.errno != errno.EINVAL:
        return RuntimeFailure.of(error, what=f"set {kind} {number}")
    return RuntimeFailure(
        f"cannot set {kind} to unmapped user in user namespace: {kind} {number} is in none of linux.{kind}Mappings",
        errno=errno.EINVAL,
        code="invalid_argument",
    )
