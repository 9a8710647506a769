"""What AppArmor and SELinux of this machine can be asked: looked at before anything is made.

Refuses a profile or label that the kernel would not know what to do with: a container that was to be confined must not
run without. Invariant: asks sysfs only, which no container has a hand in.
"""

from __future__ import annotations

from runtime.errors import RuntimeFailure
from runtime.linux.files import AT_FDCWD, read_bounded

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
