"""Wait statuses, and whose child a pid is. Refuses to wait for anybody."""

from __future__ import annotations

import os


def exit_code(status: int) -> tuple[int, int]:
    """(code, signal) of a wait status; the code of a signalled death is 128 + signal, as shells have it."""
    code = os.waitstatus_to_exitcode(status)
    return (code, 0) if code >= 0 else (128 - code, -code)


def is_child(pid: int) -> bool:
    """True when `pid` is now a child of ours, running or zombie: then an earlier death under that pid was another's."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
