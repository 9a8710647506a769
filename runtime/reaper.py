"""A container whose command is not PID 1: its init forks the command, and becomes PID 1 for it (linux/tiny_init).

Asked for by the annotation `ocid.init` of config.json, which `ocid run --init` sets. The command's own group is in the
foreground of its terminal, so that ^C comes once. Refuses a container that shares its PID namespace: there somebody
else is PID 1. Invariant: the command runs only once its PID 1 is there; if it cannot be, the start fails, and if the
command cannot be executed, whoever starts it hears that in the same words as without.
"""

from __future__ import annotations

import os

from runtime.errors import RuntimeFailure
from runtime.linux import signals, tiny_init

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.spec import Spec

ANNOTATION = "ocid.init"


def is_wanted(spec: Spec) -> bool:
    """True when the container is to have one. Raises RuntimeFailure where it cannot."""
    value = next((value for key, value in spec.annotations if key == ANNOTATION), "false")
    if value not in ("true", "false"):
        raise RuntimeFailure(f'annotations[{ANNOTATION}]: expected "true" or "false"', code="invalid_argument")
    if value == "false":
        return False
    if not spec.has_new("pid"):
        raise RuntimeFailure(
            f"annotations[{ANNOTATION}]: the container has no PID namespace of its own, so it can have no PID 1",
            code="invalid_argument",
        )
    if not tiny_init.can_be():
        raise RuntimeFailure(
            f"annotations[{ANNOTATION}]: there is none for {os.uname().machine}", code="failed_precondition"
        )
    return True


def stay_behind(*, terminal: bool) -> None:
    """Returns in a child of this process, which has become its PID 1 by then. Raises RuntimeFailure in this one."""
    pid = -1
    try:
        gone, held = os.pipe2(os.O_CLOEXEC)
        signals.block_all()
        pid = os.fork()
        if pid:
            tiny_init.become(pid)
    except OSError as error:
        if pid > 0:  # before the end of this process, which it would take for the execve
            os.kill(pid, signals.SIGKILL)
        raise RuntimeFailure.of(error, step="init", what="put an init before the command") from None
    os.close(held)
    os.read(gone, 1)  # nothing comes, but its end: by the execve, or by a death that takes this process along
    os.close(gone)
    os.setpgid(0, 0)
    if terminal:
        os.tcsetpgrp(0, os.getpid())  # not of the foreground yet, which SIGTTOU forbids unless it is blocked
    signals.set_mask(set())
