"""Named places where a test may make the code fail, stop or die. Without OCID_FAILPOINTS they cost one dict look-up.

Refuses to be armed by anything but the environment of the process. Invariant: an unarmed failpoint does nothing.
OCID_FAILPOINTS="name=error,name=kill,name=pause:/path/of/fifo": error raises FailpointError, kill is SIGKILL to
this process, pause blocks until the fifo can be opened for reading by it (the test opens it for writing).
"""

from __future__ import annotations

import os


class FailpointError(RuntimeError):
    """Raised at a failpoint that a test armed with `error`."""


def _armed() -> dict[str, str]:
    pairs = (item.partition("=") for item in os.environ.get("OCID_FAILPOINTS", "").split(",") if item)
    return {name: action for name, _, action in pairs}


_ARMED = _armed()


def rearm() -> None:
    """For a process whose environment became another's since this was imported."""
    global _ARMED
    _ARMED = _armed()


def failpoint(name: str) -> None:
    """Does what the environment asks for at `name`; nothing otherwise."""
    action = _ARMED.get(name)
    if action is None:
        return
    if action == "kill":
        os.kill(os.getpid(), 9)
        os._exit(137)  # the first process of a PID namespace takes no SIGKILL from within (pid_namespaces(7))
    if action.startswith("pause:"):
        with open(action[6:], "rb"):
            return
    raise FailpointError(f"failpoint {name}: {action}")
