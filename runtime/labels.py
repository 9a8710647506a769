"""AppArmor profile and SELinux label: what this machine can be asked, before anything is made, and the asking itself.

Refuses a profile or label that the kernel would not know what to do with: a container that was to be confined must not
run without. Invariant: looks at sysfs only, which no container has a hand in, and writes through `procfs`.
"""

from __future__ import annotations

import errno
import os

from runtime.errors import RuntimeFailure
from runtime.linux.files import AT_FDCWD, read_bounded
from runtime.procfs import write_proc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.spec_process import Process

_APPARMOR = "/sys/module/apparmor/parameters/enabled"
_SELINUX = "/sys/fs/selinux/enforce"


def check(process: Process) -> None:
    """Raises RuntimeFailure when the process asks for what this kernel does not have."""
    if process.apparmor_profile and not has_apparmor():
        raise RuntimeFailure(
            f"process.apparmorProfile: apply {process.apparmor_profile:.80}: apparmor failed to apply profile: "
            "config provided but apparmor not supported",
            hint="AppArmor is not on in this kernel",
            code="failed_precondition",
        )
    if process.selinux_label and not has_selinux():
        raise RuntimeFailure(
            "process.selinuxLabel: selinux label is specified in config, but selinux is disabled or not supported",
            code="failed_precondition",
        )


def has_apparmor() -> bool:
    """True where profiles can be applied."""
    return _says(_APPARMOR, b"Y")


def has_selinux() -> bool:
    """True where selinuxfs is mounted, which it is where a policy is loaded."""
    return _says(_SELINUX, b"")


def _says(path: str, words: bytes) -> bool:
    try:
        return read_bounded(AT_FDCWD, path, 4096).startswith(words)
    except OSError:
        return False


def write(proc_fd: int, attributes: str, asked: Process) -> None:
    """What execve is to give the process; `attributes` is its own attr directory below `proc_fd`."""
    if asked.apparmor_profile:
        _label(proc_fd, f"{attributes}/apparmor/exec", f"exec {asked.apparmor_profile}", "process.apparmorProfile")
    if asked.selinux_label:
        _label(proc_fd, f"{attributes}/exec", asked.selinux_label, "process.selinuxLabel")


def _label(proc_fd: int, file: str, value: str, field: str) -> None:
    try:
        write_proc(proc_fd, file, value.encode(), f"{field}: apply {value.removeprefix('exec ')}")
    except RuntimeFailure as failure:
        if failure.errno in (errno.ENOENT, errno.EINVAL):
            # A kernel without AppArmor has no such file (or takes nothing there); one with it knows no such profile.
            loaded = failure.errno == errno.ENOENT and _exists(proc_fd, file)
            module = "AppArmor" if field == "process.apparmorProfile" else "SELinux"
            failure.hint = "no such profile is loaded" if loaded else f"{module} is not on in this kernel"
            failure.code = "failed_precondition"
        raise


def _exists(proc_fd: int, file: str) -> bool:
    try:
        os.stat(file, dir_fd=proc_fd, follow_symlinks=False)
    except OSError:
        return False
    return True
