"""Network namespaces: made ahead by short-lived threads, kept as fds, pinned under a pod's name when one is needed.

Refuses to let a thread go on that did not come back from a pod's namespace. Invariant: a namespace of the
pool exists only as an fd of this process, so a killed daemon leaves none; a pinned one is a bind mount of nsfs on
`directory`/NAME. Where the directory lies on a shared mount it becomes a private one of its own
(mount_namespaces(7)): without that, each pin would be copied into every mount namespace that shares /run.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cri.network.conflist import is_name
from cri.network.netlink import Netlink, set_link
from runtime.linux.files import NSFS_MAGIC, fstatfs_type
from runtime.linux.libc import KernelError
from runtime.linux.mount import MNT_DETACH, MS_BIND, MS_PRIVATE, UMOUNT_NOFOLLOW, mount, mountinfo, umount2
from runtime.linux.process import CLONE_NEWNET, setns, unshare

T = TypeVar("T")
log = logging.getLogger(__name__)

_LOOPBACK_INDEX = 1  # the kernel makes lo first in every namespace


def in_own_thread(function: Callable[[], T]) -> T:
    """Calls `function` in a thread that ends with it: whatever namespaces it joined, no other work sees them."""
    results: list[T] = []
    failures: list[BaseException] = []

    def body() -> None:
        try:
            results.append(function())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=body, name="netns", daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def inside(netns_fd: int, function: Callable[[], T]) -> T:
    """Calls `function` with this thread inside the namespace, and comes back. No thread of its own: with both
    processors busy that costs up to a millisecond, which is more than the work done in there.

    A thread that cannot come back must do no other pod's work. setns(2) of a namespace we hold can only fail for want
    of kernel memory; then the daemon aborts, as a start is a recovery."""
    home = _current()
    try:
        setns(netns_fd, CLONE_NEWNET)
        try:
            return function()
        finally:
            try:
                setns(home, CLONE_NEWNET)
            except OSError as error:
                log.critical("cannot leave a pod's network namespace: %s", error)
                os.abort()
    finally:
        os.close(home)


def _current() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def make(count: int) -> list[int]:
    """`count` new network namespaces with lo up, as CLOEXEC fds. A failure after the first shortens the list."""

    def body() -> list[int]:
        made: list[int] = []
        for _ in range(count):
            fd = -1
            try:
                unshare(CLONE_NEWNET)
                fd = _current()
                with Netlink() as netlink:
                    netlink.run([set_link(_LOOPBACK_INDEX, "lo", up=True)])
            except OSError:
                if fd >= 0:
                    os.close(fd)
                if made:
                    return made
                raise
            made.append(fd)
        return made

    return in_own_thread(body)


def open_netns(path: Path) -> int | None:
    """The namespace pinned at `path`, as an fd the caller owns; None when there is none. Never one by pid: a pid may
    be another process by now (threats O5)."""
    if path.is_relative_to("/proc"):
        return None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    if fstatfs_type(fd) == NSFS_MAGIC:
        return fd
    os.close(fd)
    return None


def _existing(source: Path) -> int:
    fd = open_netns(source)
    if fd is None:
        raise ValueError(f"{source} is no pinned network namespace")
    return fd


class Namespaces:
    """The pinned namespaces in `directory` and a pool of `size` spare ones, which `warm` fills. Thread-safe."""

    def __init__(self, directory: Path, size: int) -> None:
        self._directory = directory
        self._size = size
        self._spare: collections.deque[int] = collections.deque()
        self._lock = threading.Lock()
        self._ready = self._refilling = self._closed = False

    def create(self, name: str, source: Path | None = None) -> Path:
        """A fresh namespace pinned as `name`, or the one at `source`; one that a crashed attempt left there is let go
        first. Raises OSError, ValueError (name, or a source that is no namespace)."""
        if not is_name(name):
            raise ValueError(f"{name[:60]!r} cannot name a network namespace")
        self._prepare()
        path = self._directory / name
        self.remove(path)
        fd = self._take() if source is None else _existing(source)
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
            try:
                mount(f"/proc/self/fd/{fd}", str(path), None, MS_BIND)
            except BaseException:
                os.unlink(path)
                raise
        finally:
            os.close(fd)
        return path

    def remove(self, path: Path) -> None:
        """Unpins `path`. Idempotent; a process that is still inside keeps the namespace, not the pin (threats O10).
        Raises KernelError, ValueError (a path of somebody else's)."""
        if path.parent != self._directory or not is_name(path.name):
            raise ValueError(f"{path} is no network namespace in {self._directory}")
        with contextlib.suppress(FileNotFoundError):
            while True:  # a crashed attempt may have stacked two
                try:
                    umount2(str(path), MNT_DETACH | UMOUNT_NOFOLLOW)
                except KernelError as error:
                    if error.errno == errno.ENOENT:
                        return
                    if error.errno != errno.EINVAL:
                        raise
                    break  # no mount point (any more)
            os.unlink(path)

    def names(self) -> list[str]:
        """What is pinned, or what a crash left half-pinned."""
        try:
            return sorted(name for name in os.listdir(self._directory) if is_name(name))
        except FileNotFoundError:
            return []

    def path(self, name: str) -> Path:
        return self._directory / name

    def warm(self) -> None:
        """Fills the pool in the background."""
        with self._lock:
            if self._refilling or self._closed or len(self._spare) >= self._size:
                return
            self._refilling = True
        threading.Thread(target=self._refill, name="netns-pool", daemon=True).start()

    def close(self) -> None:
        """Lets the spare namespaces go. Pins stay: pods outlive the daemon."""
        with self._lock:
            self._closed = True
            spare, self._spare = list(self._spare), collections.deque()
        for fd in spare:
            os.close(fd)
        self._unprepare()

    def _take(self) -> int:
        try:
            return self._spare.popleft()
        except IndexError:
            return make(1)[0]

    def _refill(self) -> None:
        try:
            while True:
                with self._lock:
                    if self._closed or len(self._spare) >= self._size:
                        self._refilling = False
                        return
                made = make(1)
                with self._lock:
                    if self._closed:
                        os.close(made[0])
                    else:
                        self._spare.append(made[0])
        except OSError as error:  # the next pod makes its own, and reports what fails
            log.warning("cannot make network namespaces ahead: %s", error)
            with self._lock:
                self._refilling = False

    def _prepare(self) -> None:
        """The directory, as a private mount on itself where it would lie on a shared one."""
        with self._lock:
            if self._ready:
                return
            self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            target = str(self._directory)
            if "shared:" in _propagation_at(target):
                mount(target, target, None, MS_BIND)
                mount(None, target, None, MS_PRIVATE)
            self._ready = True

    def _unprepare(self) -> None:
        """Takes the mount away again when nothing is pinned in it."""
        with self._lock:
            if self.names():
                return
            self._ready = False
            if any(point.target == str(self._directory) for point in mountinfo()):
                umount2(str(self._directory), MNT_DETACH | UMOUNT_NOFOLLOW)


def _propagation_at(path: str) -> str:
    """The propagation of the mount that `path` lies on."""
    best, found = "", ""
    for point in mountinfo():
        inside = path == point.target or path.startswith(point.target.rstrip("/") + "/")
        if inside and len(point.target) >= len(best):
            best, found = point.target, point.propagation
    return found
