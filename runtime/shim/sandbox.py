"""What a pod has before it has containers: IPC and UTS namespaces, hostname, sysctls, /dev/shm, a PID namespace.

The shim unshares the namespaces in itself and pins them by bind mounts, so that containers join them by path; no pause
process is needed for that. Layout, all below SandboxSpec.directory, all gone after `tear_down`:

    ns/{ipc,uts,pid}    nsfs bind mounts         shm/         the pod's tmpfs
    ns/{user,net}       the same, of a pod with a user namespace (runtime.shim.userns)
    containers/ID.json  what is to be cleaned    shim.json    pids with start times, for a cleaner
    scratch/            pid files, console sockets of runtime binaries
    shim.sock, shim.log

Refuses sysctls outside the pod's own namespaces (threats S59). Invariant: `set_up` is whole, or undone in reverse.
"""

from __future__ import annotations

import errno
import os
import select

from runtime.errors import RuntimeFailure
from runtime.linux import signals
from runtime.linux.files import PROC_SUPER_MAGIC, fstatfs_type, open_beneath, remove_tree
from runtime.linux.libc import KernelError
from runtime.linux.mount import (
    MNT_DETACH,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    UMOUNT_NOFOLLOW,
    FsMount,
    mount,
    umount2,
)
from runtime.linux.process import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWUTS,
    pidfd_open,
    sethostname,
    setns,
    signal_running,
    unshare,
)
from runtime.linux.progress import phase
from runtime.shim.pause import start_pause
from runtime.shim.protocol import PodMessage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_KINDS = ("ipc", "uts", "pid", "net", "user")
_MAX_SYSCTL = 4096
_DEATH = 30.0  # seconds for a killed process to end
_KEY_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.:@")
_IPC_KEYS = ("kernel/shm", "kernel/msg", "kernel/sem", "fs/mqueue/")


class Undo:
    """Inverses of what was done, run in reverse on failure; one that fails becomes a note of the first error."""

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], object]]] = []

    def add(self, name: str, inverse: Callable[[], object]) -> None:
        self._steps.append((name, inverse))

    def run(self, error: BaseException) -> None:
        while self._steps:
            name, inverse = self._steps.pop()
            try:
                inverse()
            except OSError as second:
                error.add_note(f"while undoing, {name}: {second}")


def set_up(pod: PodMessage) -> int:
    """Makes all of it in this process. The pause process's pid, or 0. Raises RuntimeFailure; then nothing is left but
    this process's own namespaces."""
    undo = Undo()
    step = phase("directory")
    try:
        for name in ("ns", "containers", "scratch"):
            os.makedirs(f"{pod.directory}/{name}", mode=0o700, exist_ok=True)
        undo.add("remove directories", lambda: _remove_directories(pod.directory))
        step = phase("namespaces")
        if pod.uids:
            from runtime.shim import userns  # few pods have one

            userns.enter_owned(pod, lambda source, kind: _pin(source, f"{pod.directory}/ns/{kind}", undo))
        else:
            unshare((CLONE_NEWIPC if pod.private_ipc else 0) | (CLONE_NEWUTS if pod.private_uts else 0))
        if pod.private_uts and pod.hostname:
            sethostname(pod.hostname)
        if pod.netns:
            _join_network(pod.netns)
        step = phase("sysctls")
        write_sysctls(pod)
        step = phase("pin")
        for kind, wanted in (("ipc", pod.private_ipc), ("uts", pod.private_uts), ("net", pod.new_netns)):
            if wanted:
                _pin(f"/proc/self/ns/{kind}", f"{pod.directory}/ns/{kind}", undo)
        step = phase("shm")
        if pod.shm_bytes > 0:
            _mount_shm(pod, undo)
        step = phase("pause")
        if not pod.shared_pid:
            return 0
        pid = start_pause(f"{pod.directory}/scratch", f"{pod.directory}/ns/user" if pod.uids else "")
        undo.add("kill pause", lambda: end_child(pid))
        _pin(f"/proc/{pid}/ns/pid", f"{pod.directory}/ns/pid", undo)
        return pid
    except (OSError, RuntimeFailure, ValueError) as error:
        undo.run(error)
        raise RuntimeFailure.of(error, step=step, what=f"set up pod {pod.id}") from error


def tear_down(directory: str) -> None:
    """Unmounts and removes everything that `set_up` made in `directory`; what is not there is done already."""
    for path in (*(f"{directory}/ns/{kind}" for kind in _KINDS), f"{directory}/shm"):
        unmount(path)
    _remove_directories(directory)
    for name in ("shim.sock", "shim.json"):
        try:
            os.unlink(f"{directory}/{name}")
        except FileNotFoundError:
            pass
    try:
        if os.stat(f"{directory}/shim.log").st_size == 0:
            os.unlink(f"{directory}/shim.log")
    except FileNotFoundError:
        pass


def unmount(path: str) -> None:
    """Unmounts `path`, as often as it is mounted on; users keep it to their end (MNT_DETACH)."""
    try:
        for _ in range(64):
            umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW)
    except KernelError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise


def _remove_directories(directory: str) -> None:
    # Refuses to enter a mount, so a pin that could not be unmounted stops this and stays visible (R15).
    for name in ("ns", "shm", "containers", "scratch"):
        remove_tree(f"{directory}/{name}")


def _join_network(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(fd, CLONE_NEWNET)
    finally:
        os.close(fd)


def _pin(source: str, target: str, undo: Undo) -> None:
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    mount(source, target, None, MS_BIND)
    undo.add(f"unmount {target}", lambda: unmount(target))


def _mount_shm(pod: PodMessage, undo: Undo) -> None:
    target, options = f"{pod.directory}/shm", f"mode=1777,size={pod.shm_bytes}"
    if pod.uids:
        from runtime.shim import userns

        options += ",uid={},gid={}".format(*userns.root_of(pod))
    os.makedirs(target, mode=0o700, exist_ok=True)
    mount("shm", target, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    undo.add(f"unmount {target}", lambda: unmount(target))


def end_child(pid: int) -> None:
    """Kills and reaps a child of ours."""
    os.kill(pid, signals.SIGKILL)
    os.waitpid(pid, 0)


def end_process(pid: int) -> None:
    """SIGKILL for a child of the shim's, and its end: the shim waits for it as for every child."""
    try:
        pidfd = pidfd_open(pid)
    except KernelError:  # it has ended, and was waited for
        return
    signal_running(pidfd, signals.SIGKILL)
    select.select([pidfd], [], [], _DEATH)
    os.close(pidfd)


def sysctl_path(key: str, *, private_ipc: bool, private_net: bool) -> str:
    """The path below /proc/sys of a sysctl that belongs to the pod alone. Raises RuntimeFailure for every other.

    As in sysctl(8) the separator that comes first is the separator: net.ipv4.conf.eth0/100.forwarding and
    net/ipv4/conf/eth0.100/forwarding are one."""
    slash, dot = key.find("/"), key.find(".")
    path = key if slash >= 0 and (dot < 0 or slash < dot) else key.translate({46: "/", 47: "."})
    parts = path.split("/")
    clean = all(part and part not in (".", "..") and _KEY_CHARACTERS.issuperset(part) for part in parts)
    allowed = (private_net and path.startswith("net/")) or (private_ipc and path.startswith(_IPC_KEYS))
    if not clean or not allowed:
        why = "is no sysctl name" if not clean else "does not belong to a namespace of the pod's own"
        raise RuntimeFailure(
            f"sysctl {key[:200]!r} {why}",
            code="invalid_argument",
            hint="net.* needs a pod network, kernel.shm*, kernel.msg*, kernel.sem and fs.mqueue.* "
            "a private IPC namespace",
        )
    return path


def write_sysctls(pod: PodMessage) -> None:
    """Writes the pod's sysctls through a procfs of our own, which nobody can have mounted anything over (R2)."""
    planned = []
    for key, value in pod.sysctls.items():
        path = sysctl_path(key, private_ipc=pod.private_ipc, private_net=bool(pod.netns) or pod.new_netns)
        if len(value) > _MAX_SYSCTL or not value.isprintable():
            raise RuntimeFailure(f"sysctl {key}: {value[:80]!r} is no printable value", code="invalid_argument")
        planned.append((key, path, value))
    if not planned:
        return
    proc = FsMount("proc", "proc").make()
    try:
        for key, path, value in planned:
            try:
                _write_sysctl(proc, path, value, pod)
            except OSError as error:
                raise RuntimeFailure.of(error, what=f"write sysctl {key}={value}", code="invalid_argument") from error
    finally:
        os.close(proc)


def _write_sysctl(proc: int, path: str, value: str, pod: PodMessage) -> None:
    if pod.uids and not path.startswith("net/"):
        from runtime.shim import userns

        # Those of an IPC namespace are its root's, and no capability makes up for that (ipc_permissions()); those of a
        # network namespace are for who has CAP_NET_ADMIN over it (net_ctl_permissions()).
        os.seteuid(userns.root_of(pod)[0])
    fd = -1
    try:
        fd = open_beneath(proc, f"sys/{path}", os.O_WRONLY)
        if fstatfs_type(fd) != PROC_SUPER_MAGIC:
            raise OSError(errno.EXDEV, "is not on procfs")
        os.write(fd, value.encode())
    finally:
        os.seteuid(os.getuid())
        if fd >= 0:
            os.close(fd)
