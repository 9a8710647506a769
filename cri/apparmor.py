"""AppArmor's RuntimeDefault: one profile of ours, loaded by apparmor_parser(8) when the daemon starts, and for a
container without a daemon when it is not loaded yet.

Refuses to do without: where it cannot be loaded, a container that asks for RuntimeDefault is refused by the kernel's
answer; one that names no profile runs without, as with the peers where they find no parser. Invariant: nothing is
looked at or started where the kernel has no AppArmor.
"""

from __future__ import annotations

import logging
import os
import select
import shutil
import signal

from cri.spec.confine import APPARMOR_DEFAULT
from cri.spec.security import apparmor_enabled
from runtime.linux.process import pidfd_open, pidfd_send_signal

log = logging.getLogger(__name__)

_DEADLINE_S = 20.0
_PROFILES = "/sys/kernel/security/apparmor/profiles"
# Without includes and variables, so that the parser alone is enough. Files, networks and capabilities are the business
# of namespaces, masks and seccomp; what those leave open of the host is closed here once more.
PROFILE = f"""\
profile {APPARMOR_DEFAULT} flags=(attach_disconnected,mediate_deleted) {{
  file,
  network,
  capability,
  umount,
  deny mount,
  signal (receive) peer=unconfined,
  signal (send, receive) peer={APPARMOR_DEFAULT},
  ptrace (trace, read, tracedby, readby) peer={APPARMOR_DEFAULT},
  deny /proc/sysrq-trigger rwklx,
  deny /proc/kcore rwklx,
  deny /proc/kmem rwklx,
  deny /proc/mem rwklx,
  deny /proc/sys/kernel/core_pattern w,
  deny /proc/sys/kernel/modprobe w,
  deny /proc/sys/vm/** w,
  deny /proc/sys/fs/binfmt_misc/** w,
  deny /sys/firmware/** rwklx,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/kernel/security/** rwklx,
  deny /sys/kernel/uevent_helper w,
}}
"""


def ensure_default(parser: str = "apparmor_parser", profiles: str = _PROFILES) -> bool:
    """As `load_default`, which is asked only where the kernel has no profile of this name; blocks."""
    if not apparmor_enabled():
        return False
    try:
        with open(profiles, encoding="utf-8", errors="replace") as file:
            if any(line.startswith(f"{APPARMOR_DEFAULT} (") for line in file):
                return True
    except OSError:  # no securityfs here: loading it anew is right, too
        pass
    return load_default(parser)


def load_default(parser: str = "apparmor_parser") -> bool:
    """Loads the profile, anew if it is loaded. False where that is not possible, with a warning; blocks."""
    if not apparmor_enabled():
        return False
    path = shutil.which(parser)
    if path is None:
        log.warning("AppArmor is on, but there is no %s: containers with RuntimeDefault are refused", parser)
        return False
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        os.write(writer, PROFILE.encode())  # less than a pipe holds
        actions = [(os.POSIX_SPAWN_DUP2, reader, 0)]
        pid = os.posix_spawn(path, [path, "-K", "-r"], {"PATH": os.defpath}, file_actions=actions)
    finally:
        os.close(writer)
        os.close(reader)
    pidfd = pidfd_open(pid)
    try:
        if not select.select([pidfd], [], [], _DEADLINE_S)[0]:
            pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        log.warning("load AppArmor profile %s: %s ended with %d", APPARMOR_DEFAULT, path, status)
    return status == 0
