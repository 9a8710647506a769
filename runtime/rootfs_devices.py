"""Devices and links of /dev inside a root, and the console: operations of the rootfs plan (runtime/rootfs.py).

Refuses to follow a link of the image at the name of a device: what is there is replaced or bound over, in the fd of
its directory. Invariant: in a user namespace, where mknod(2) is forbidden, a node is the host's of the same numbers.
"""

from __future__ import annotations

import os
import stat

from runtime.errors import RuntimeFailure
from runtime.linux.files import mkdir_in_root, open_beneath
from runtime.linux.mount import OPEN_TREE_CLONE, move_mount, open_tree
from runtime.linux.record import Record
from runtime.spec import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.rootfs import Root
    from runtime.spec import Spec

_AT_FDCWD = -100
# runtime-spec config-linux.md "Default Devices"
DEFAULT_DEVICES = (
    Device("/dev/null", "c", 1, 3),
    Device("/dev/zero", "c", 1, 5),
    Device("/dev/full", "c", 1, 7),
    Device("/dev/random", "c", 1, 8),
    Device("/dev/urandom", "c", 1, 9),
    Device("/dev/tty", "c", 5, 0),
)
LINKS = (
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
)


class DeviceOp(Record):
    """One node below /dev, or elsewhere in the root."""

    device: Device

    def describe(self) -> str:
        device = self.device
        return f"device {device.path} {device.kind} {device.major}:{device.minor} mode {device.mode:o}"

    def apply(self, root: Root) -> None:
        directory, name = os.path.split(self.device.path)
        parent = mkdir_in_root(root.fd, directory)
        try:
            # mkfifo needs no right that a user namespace lacks; anything else there is the host's own node.
            if root.user_namespace and self.device.kind != "p":
                self._bind(parent, name)
            else:
                try:
                    self._make(parent, name)
                except PermissionError:  # no CAP_MKNOD, or a device cgroup above that forbids it
                    self._bind(parent, name)
        finally:
            os.close(parent)

    def _make(self, parent: int, name: str) -> None:
        device = self.device
        kind = {"c": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}[device.kind]
        number = os.makedev(device.major, device.minor)
        try:
            os.mknod(name, kind | device.mode, number, dir_fd=parent)
        except FileExistsError:
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if stat.S_IFMT(status.st_mode) == kind and (device.kind == "p" or status.st_rdev == number):
                return
            os.unlink(name, dir_fd=parent)  # of the image, in the container's own layer
            os.mknod(name, kind | device.mode, number, dir_fd=parent)
        if device.uid or device.gid:
            os.chown(name, device.uid, device.gid, dir_fd=parent, follow_symlinks=False)

    def _bind(self, parent: int, name: str) -> None:
        device = self.device
        tree = open_tree(_AT_FDCWD, device.path, OPEN_TREE_CLONE)
        try:
            status = os.fstat(tree)
            kind = {"c": stat.S_ISCHR, "b": stat.S_ISBLK, "p": stat.S_ISFIFO}[device.kind](status.st_mode)
            if not kind or (device.kind != "p" and status.st_rdev != os.makedev(device.major, device.minor)):
                raise RuntimeFailure(
                    f"{device.path} of the host is not {device.kind} {device.major}:{device.minor}: where devices "
                    "may not be made, as in a user namespace, one must be there on the host under the same name",
                    code="invalid_argument",
                )
            target = _empty_file(parent, name)
            try:
                move_mount(tree, target)
            finally:
                os.close(target)
        finally:
            os.close(tree)


def _empty_file(parent: int, name: str) -> int:
    """An O_PATH fd of the file `name` in `parent`, made when missing, following no link."""
    try:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=parent))
    except FileExistsError:
        pass
    return open_beneath(parent, name, os.O_PATH)


def bind_console(root: Root, take_tree: int) -> None:
    """Puts the detached mount of a terminal onto /dev/console."""
    try:
        dev = mkdir_in_root(root.fd, "/dev")
        try:
            target = _empty_file(dev, "console")
            try:
                move_mount(take_tree, target)
            finally:
                os.close(target)
        finally:
            os.close(dev)
    finally:
        os.close(take_tree)


class LinksOp(Record):
    """/dev/fd, /dev/stdin and so on, and /dev/ptmx -> pts/ptmx."""

    def describe(self) -> str:
        return "links in /dev: ptmx, " + ", ".join(name for _, name in LINKS)

    def apply(self, root: Root) -> None:
        dev = mkdir_in_root(root.fd, "/dev")
        try:
            for target, name in LINKS:
                try:
                    os.symlink(target, name, dir_fd=dev)
                except FileExistsError:
                    pass  # the image's own: it only misleads itself
            try:
                os.symlink("pts/ptmx", "ptmx", dir_fd=dev)
            except FileExistsError:
                os.unlink("ptmx", dir_fd=dev)
                os.symlink("pts/ptmx", "ptmx", dir_fd=dev)
        finally:
            os.close(dev)


def plan_devices(spec: Spec) -> list[DeviceOp | LinksOp]:
    """The default devices, those of linux.devices over them, and the links."""
    wanted = {device.path: device for device in DEFAULT_DEVICES}
    wanted.update({os.path.normpath(device.path): device for device in spec.devices})
    # The console is no device of the config's: it is bound from the container's own terminal.
    wanted.pop("/dev/console", None)
    wanted.pop("/dev/ptmx", None)
    return [*(DeviceOp(device) for device in wanted.values()), LinksOp()]
