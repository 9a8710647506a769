"""Which containers are started again after they have ended, and when; their shim does it, with or without a daemon.

    ended ── policy says no, or was retired ──▶ told
      └────── policy says yes ──▶ due: pid 0, "restart" is told ── pause ──▶ a helper: delete, create, start ──▶ running

The policy is the annotation `ocid.restart` of config.json. The first pause is FIRST, each is twice the one before up to
LONGEST, and a run of STEADY begins anew with the first, as docker has it. The same container is started, with its
writable layer, its log and its id. Refuses to start one again whose first start failed, or one in a pod that is being
stopped. Invariant: whoever retires a container (a stop, a delete) hears of its end, and it stays ended.
"""

from __future__ import annotations

import os

from runtime.errors import RuntimeFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from runtime.shim.loop import Loop, Timer

ANNOTATION = "ocid.restart"
FIRST, LONGEST, STEADY = 0.1, 60.0, 10.0  # seconds
NEVER = -1
_MOST = 1 << 31


def most_restarts(policy: str) -> tuple[int, bool]:
    """How often at most, NEVER for without end, and whether a success is a reason, too. Raises RuntimeFailure."""
    if policy in ("", "no"):
        return 0, False
    if policy == "always":
        return NEVER, True
    name, colon, count = policy.partition(":")
    if name == "on-failure" and not colon:
        return NEVER, False
    if name == "on-failure" and count.isascii() and count.isdecimal() and 0 < int(count[:12]) < _MOST:
        return int(count), False
    raise RuntimeFailure(f"{policy[:40]!r} is not no, on-failure, on-failure:N or always", code="invalid_argument")


class Restarts:
    """Those of one container, over all of its runs. `message` is what it was created with."""

    def __init__(self, policy: str, message: dict[str, Any]) -> None:
        self._most, self._always = most_restarts(policy)
        self.message = message
        self.count = 0
        self._pause = 0.0
        self._timer: Timer | None = None

    def retire(self) -> None:
        """None from now on."""
        self._most = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def wanted(self, exit_code: int) -> bool:
        """True when a container that ended like this is to be started again."""
        allowed = self._most == NEVER or self.count < self._most
        return allowed and (self._always or exit_code != 0)

    def begin(self, loop: Loop, lasted: float, then: Callable[[], None]) -> None:
        """Calls back when it is due, after a run of `lasted` seconds."""
        self._pause = FIRST if lasted >= STEADY or not self._pause else min(2 * self._pause, LONGEST)
        self._timer = loop.after(self._pause, then)


def policy_of(config: Any) -> str:
    """The policy in a config.json, "" for none."""
    annotations = config.get("annotations") if isinstance(config, dict) else None
    policy = annotations.get(ANNOTATION, "") if isinstance(annotations, dict) else ""
    return policy if isinstance(policy, str) else ""


def forget_exit(bundle: str) -> None:
    """What the last run has left for who finds no shim: of the next one nothing is known yet."""
    try:
        os.unlink(f"{bundle}/exit.json")
    except FileNotFoundError:
        pass
