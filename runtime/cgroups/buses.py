"""Which systemd a container's cgroup is asked of, and where it listens: the machine's, or the one of a user.

    caller                                        systemd         reached by
    root                                          the machine's   the system bus, or its own socket
    an ordinary user, or root of a user           the user's      DBUS_SESSION_BUS_ADDRESS, else XDG_RUNTIME_DIR/bus, or
    namespace that he made, as rootless podman                    its own socket there
    root of a namespace with its own systemd      that one        the system bus

Refuses addresses that are no unix sockets. Invariant: a unit is asked for where it was made, whatever the rights of who
asks: its cgroup says whose it is (runtime.cgroups.hierarchy.below_service).
"""

from __future__ import annotations

import os

from runtime.cgroups.dbus import connect
from runtime.errors import RuntimeFailure
from runtime.rootless import in_user_namespace

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from runtime.cgroups.dbus import Bus

REPLY_S = 10.0
_HINT = "machinectl shell or ssh log a user in as systemd wants it; loginctl enable-linger keeps his systemd up"


def is_users(asked: bool | None) -> bool:
    """Whether a new unit is to be a user's; `asked` is what --rootless said."""
    if asked is not None:
        return asked
    if os.geteuid() != 0 or not in_user_namespace():
        return os.geteuid() != 0
    try:
        with connect_user(REPLY_S) as bus:
            # A bus outside of this namespace knows us by another number than 0.
            return bool(bus.name) and bus.ask_bus("GetConnectionUnixUser", "s", bus.name) != (0,)
    except RuntimeFailure:
        return False  # as the peers: nobody there who could be asked


def connect_system(timeout_s: float) -> Bus:
    """The system bus; systemd's own socket where there is no bus, which only root may use."""
    address = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS", "")
    path = address.removeprefix("unix:path=") if address.startswith("unix:path=/") else "/run/dbus/system_bus_socket"
    try:
        return connect(path, "the system bus", timeout_s)
    except RuntimeFailure as failure:
        if not failure.errno or os.geteuid() != 0:
            raise
        return connect("/run/systemd/private", "systemd", timeout_s, peer=True)


def connect_user(timeout_s: float) -> Bus:
    """The bus of a user's session; the socket of his systemd where there is no bus. Raises RuntimeFailure."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    named = paths(os.environ.get("DBUS_SESSION_BUS_ADDRESS", ""))
    if not named and not runtime:
        raise RuntimeFailure(
            "--systemd-cgroup: no user's bus is known: neither DBUS_SESSION_BUS_ADDRESS nor XDG_RUNTIME_DIR is set",
            step="cgroup",
            hint=_HINT,
            code="failed_precondition",
        )
    missing: RuntimeFailure | None = None
    for path in named or [f"{runtime}/bus"]:
        try:
            return connect(path, "the user's bus", timeout_s)
        except RuntimeFailure as failure:
            if not failure.errno:
                raise
            missing = missing or failure
    assert missing is not None
    if runtime:
        try:
            return connect(f"{runtime}/systemd/private", "the user's systemd", timeout_s, peer=True)
        except RuntimeFailure as failure:
            if not failure.errno:
                raise
    missing.hint = _HINT
    raise missing


def paths(address: str) -> list[str]:
    """The sockets that a D-Bus address names; an abstract one begins with NUL. Raises RuntimeFailure when it names
    something, but no unix socket."""
    found = []
    for entry in address.split(";"):
        kind, _, rest = entry.partition(":")
        values = dict(pair.partition("=")[::2] for pair in rest.split(","))
        if kind == "unix" and (path := values.get("path")):
            found.append(_plain(path))
        elif kind == "unix" and (name := values.get("abstract")):
            found.append(f"\0{_plain(name)}")
    if address and not found:
        raise RuntimeFailure(
            f"DBUS_SESSION_BUS_ADDRESS: {address[:80]!r} names no unix socket", step="cgroup", code="invalid_argument"
        )
    return found


def _plain(text: str) -> str:
    """%XX is a byte (D-Bus specification, "Server Addresses"). urllib would cost more to import than all of this."""
    first, *rest = os.fsencode(text).split(b"%")
    try:
        return os.fsdecode(
            first + b"".join(bytes((int(part[:2], 16) if part[1:] else -1,)) + part[2:] for part in rest)
        )
    except ValueError:
        raise RuntimeFailure(
            f"DBUS_SESSION_BUS_ADDRESS: {text[:80]!r} is malformed", step="cgroup", code="invalid_argument"
        ) from None
