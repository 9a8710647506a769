"""Network sysctls of the calling thread's namespace, or a pod's, written to nothing but procfs.

Refuses a /proc that is not proc, links and mounts on the way (threats R2). Invariant: a value that is there already is
not written again.
"""

from __future__ import annotations

import errno
import os
from functools import partial

from cri.interfaces import PodNetwork
from cri.network.netns import inside, open_netns
from cri.network.values import PluginError
from runtime.linux.files import (
    PROC_SUPER_MAGIC,
    RESOLVE_BENEATH,
    RESOLVE_NO_SYMLINKS,
    RESOLVE_NO_XDEV,
    fstatfs_type,
    openat2,
)
from runtime.linux.libc import KernelError

_RESOLVE = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV


def set_sysctls(pod: PodNetwork) -> None:
    """What a pod asked for of its interfaces. Raises PluginError."""
    if not pod.sysctls:
        return
    netns = open_netns(pod.netns)
    if netns is None:
        raise PluginError(f"{pod.netns} is no pinned network namespace")
    try:
        for key, value in pod.sysctls.items():
            # In a key of ours the dots separate, and a slash stands for a dot in a name.
            name = key.removeprefix("net.").translate({ord("."): "/", ord("/"): "."})
            inside(netns, partial(write_net, name, value))
    except OSError as error:
        raise PluginError(str(error), code="invalid_argument") from error
    finally:
        os.close(netns)


def write_net(name: str, value: str, *, missing_ok: bool = False) -> None:
    """Sets net/`name` ("ipv4/ip_forward"). `missing_ok`: a kernel without that knob (IPv6 off) is fine.
    Raises KernelError."""
    proc = os.open("/proc/sys", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fd = openat2(proc, f"net/{name}", os.O_RDWR | os.O_NOFOLLOW, 0, _RESOLVE)
        except KernelError as error:
            if error.errno == errno.ENOENT and missing_ok:
                return
            raise KernelError(error.errno or errno.EIO, "open sysctl", f"net/{name}") from error
    finally:
        os.close(proc)
    try:
        if fstatfs_type(fd) != PROC_SUPER_MAGIC:
            raise KernelError(errno.EXDEV, "write sysctl outside procfs", f"net/{name}")
        if os.pread(fd, 64, 0).strip() != value.encode():
            os.write(fd, value.encode())
    except OSError as error:
        if isinstance(error, KernelError):
            raise
        raise KernelError(error.errno or errno.EIO, f"write {value} to sysctl", f"net/{name}") from error
    finally:
        os.close(fd)
