"""PID 1 of a pod whose containers share a PID namespace: it reaps, and does nothing else until it is killed.

It is a fork of the shim, so it costs a few pages and no start. Since every container of the pod can see it, it gives
up all that could be of use to one that reaches into it (threats S1, S17): all fds, all capabilities, its user, its
groups, the host's file system (an empty read-only tmpfs is its root), and being dumpable. Refuses signals but SIGKILL
from outside, as PID 1 without handlers does (pid_namespaces(7)).
"""

from __future__ import annotations

import os

from runtime.linux import signals
from runtime.linux.mount import (
    MNT_DETACH,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    mount,
    pivot_root,
    umount2,
)
from runtime.linux.process import (
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_PARENT,
    cap_ambient_clear,
    capbset_drop,
    capset,
    clone3,
    close_range,
    reset_all_signals,
    set_comm,
    set_dumpable,
    set_no_new_privs,
    setns,
    unshare,
)

_NOBODY = 65534
_READY = b"ready"


def start_pause(directory: str, user_namespace: str = "") -> int:
    """Starts it in a new PID namespace; `directory` is an empty one that its root is mounted on in its own mount
    namespace. `user_namespace`: where that is pinned that the PID namespace shall belong to, "" for ours. Its pid, a
    child of ours. Raises OSError."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        if user_namespace:
            pid = _start_inside(user_namespace, directory, writer)
        else:
            pid, pidfd = clone3(CLONE_NEWPID)
            if pid == 0:
                _become_pause(directory, writer)
            os.close(pidfd)
    finally:
        os.close(writer)
    try:
        said = os.read(reader, 4096)
    finally:
        os.close(reader)
    if said != _READY:
        os.kill(pid, signals.SIGKILL)
        os.waitpid(pid, 0)
        raise OSError(0, f"start the pause process: {said.decode('utf-8', 'replace') or 'it died'}")
    return pid


def _start_inside(user_namespace: str, directory: str, ready: int) -> int:
    """By a process between, which joins the user namespace and clones pause as its own sibling (CLONE_PARENT)."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    between, between_fd = clone3(0)
    if between == 0:
        try:
            fd = os.open(user_namespace, os.O_RDONLY | os.O_CLOEXEC)
            setns(fd, CLONE_NEWUSER)
            pid, _ = clone3(CLONE_NEWPID | CLONE_PARENT)
            if pid == 0:
                _become_pause(directory, ready)
            os.write(writer, str(pid).encode())
        finally:
            os._exit(0)
    os.close(between_fd)
    os.close(writer)
    try:
        told = os.read(reader, 32)
    finally:
        os.close(reader)
        os.waitpid(between, 0)
    if not told:
        raise OSError(0, f"start the pause process: cannot join the user namespace {user_namespace}")
    return int(told)


def _become_pause(directory: str, ready: int) -> None:
    try:
        try:
            _give_up_everything(directory)
            os.write(ready, _READY)
            close_range(0)
        except BaseException as error:
            os.write(ready, f"{type(error).__name__}: {error}".encode()[:4000])
            raise
        _reap_for_ever()
    finally:
        os._exit(1)


def _give_up_everything(directory: str) -> None:
    signals.wake_up(-1)
    set_comm("ocid-pause")
    os.setsid()
    reset_all_signals()
    unshare(CLONE_NEWNS)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    mount("pause", directory, "tmpfs", flags | MS_RDONLY, "size=4k,mode=0555")
    os.chdir(directory)
    pivot_root(".", ".")
    umount2(".", MNT_DETACH)
    os.chdir("/")
    _drop_privileges()


def _drop_privileges() -> None:
    for capability in range(64):
        try:
            capbset_drop(capability)
        except OSError:  # EINVAL: past the last one of this kernel
            break
    set_no_new_privs()
    os.setgroups([])
    for become in (os.setresgid, os.setresuid):
        try:
            become(_NOBODY, _NOBODY, _NOBODY)
        except OSError:  # EINVAL: a user namespace that is too small to have it
            become(0, 0, 0)
    cap_ambient_clear()
    capset(0, 0, 0)
    set_dumpable(False)


def _reap_for_ever() -> None:
    signals.block(signals.SIGCHLD)
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        signals.wait_for(signals.SIGCHLD)
