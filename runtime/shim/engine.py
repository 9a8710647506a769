"""What a helper asks of a runtime, and the native answer: runtime.create, lifecycle and exec in this very process.

A helper is made for one request and ends with it, so it may block, and a runtime may use it up. Refuses to keep state
of its own: that is in state.json under the runtime's root, where `ocirun --root` and a cleaner find it after the shim
is gone. Invariant: what `create` fails at, it has undone.
"""

from __future__ import annotations

import os

from runtime import create as _create
from runtime import exec as _exec
from runtime import hooks, lifecycle, rootfs_cgroup, seccomp, seccomp_load, spec, spec_process
from runtime.cgroups import killer, limits
from runtime.errors import RuntimeFailure
from runtime.fields import decode
from runtime.linux.mount import FsMount
from runtime.shim.protocol import CheckpointMessage, ContainerMessage, RestoreMessage

# Imported on demand, and nearly every container demands them: once for all pods, before the zygote forks.
_USUAL = (hooks, killer, limits, rootfs_cgroup, seccomp, seccomp_load)

SILENT = (-1, b"")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Protocol

    from runtime.entering import Caller

    LastWords = tuple[int, bytes]  # for an fd

    class Engine(Protocol):
        """A runtime. All of it may raise RuntimeFailure."""

        def create(self, message: ContainerMessage, stdio: Sequence[int], last_words: LastWords = SILENT) -> Made:
            """The process, set up and waiting before execve. `stdio` stays the caller's. It may take this process
            along if it is killed on its way: then `last_words` are written, and undoing is somebody else's."""
            ...

        def start(self, container_id: str) -> None:
            """Releases execve, or what was restored; its failure is raised."""
            ...

        def kill(self, container_id: str, number: int, everyone: bool) -> None:
            """Signals the init or everybody in the container. Nobody there: nothing happens."""
            ...

        def delete(self, container_id: str) -> None:
            """Kills what is left and removes cgroup and state. Unknown: nothing happens."""
            ...

        def execute(self, container_id: str, process: dict[str, Any], stdio: Sequence[int], caller: Caller) -> Made:
            """A further process in the container, after its execve. `stdio` stays the caller's, who may be in the
            container's namespaces from then on. Or it does not return: then this process has ended, and `caller` was
            told what there is to tell."""
            ...

        def update(self, container_id: str, resources: dict[str, Any]) -> None:
            """New limits."""
            ...

        def pause(self, container_id: str) -> None:
            """Freezes it. Frozen already: that is an error."""
            ...

        def resume(self, container_id: str) -> None:
            """Thaws it. Not frozen: nothing happens."""
            ...

        def checkpoint(self, message: CheckpointMessage) -> None:
            """criu's images of it; it stays as it is, running or frozen."""
            ...

        def restore(self, message: ContainerMessage, images: RestoreMessage, stdio: Sequence[int]) -> Made:
            """The container out of criu's images, as after `create`: `start` lets it go on. `stdio` stays the
            caller's."""
            ...


class Made:
    """A process that an engine made. `console`, the master of a pty, is the taker's; -1 for none."""

    __slots__ = ("console", "pid")

    def __init__(self, pid: int, console: int) -> None:
        self.pid = pid
        self.console = console


class NativeEngine:
    """The runtime of this package."""

    def __init__(self, root: str) -> None:
        self._root = root

    def create(self, message: ContainerMessage, stdio: Sequence[int], last_words: LastWords = SILENT) -> Made:
        with open(f"{message.bundle}/config.json", "rb") as file:
            config = spec.parse(file.read())
        created = _create.create(
            _create.CreateRequest(
                root=self._root,
                id=message.id,
                bundle=message.bundle,
                spec=config,
                stdio=(stdio[0], stdio[1], stdio[2]),
                rootfs=root_mount(message),
                systemd_cgroup=names_unit(config.cgroups_path),
                sibling=True,  # whatever this helper does next, the shim hears of an exit
                last_words=last_words,
            )
        )
        os.close(created.pidfd)
        return Made(created.state.pid, created.console)

    def start(self, container_id: str) -> None:
        lifecycle.start(self._root, container_id)

    def kill(self, container_id: str, number: int, everyone: bool) -> None:
        try:
            lifecycle.kill(self._root, container_id, number, everyone=everyone)
        except RuntimeFailure as error:
            if error.code not in ("not_found", "failed_precondition"):
                raise

    def delete(self, container_id: str) -> None:
        lifecycle.delete(self._root, container_id, force=True)

    def update(self, container_id: str, resources: dict[str, Any]) -> None:
        lifecycle.update(self._root, container_id, resources)

    def pause(self, container_id: str) -> None:
        lifecycle.pause(self._root, container_id)

    def resume(self, container_id: str) -> None:
        try:
            lifecycle.resume(self._root, container_id)
        except RuntimeFailure as error:
            if "not paused" not in str(error):
                raise

    def checkpoint(self, message: CheckpointMessage) -> None:
        from runtime import checkpoint  # for nodes that allow it

        images = checkpoint.Images(
            message.program,
            message.images,
            message.work,
            tcp_established=True,
            file_locks=True,
            link_remap=True,
            seconds=message.seconds,
        )
        checkpoint.checkpoint(checkpoint.CheckpointRequest(self._root, message.id, images, leave_running=True))

    def restore(self, message: ContainerMessage, images: RestoreMessage, stdio: Sequence[int]) -> Made:
        from runtime import checkpoint, restore  # for nodes that allow it

        with open(f"{message.bundle}/config.json", "rb") as file:
            config = spec.parse(file.read())
        for number, fd in enumerate(stdio):  # by these numbers criu finds what takes the place of the old pipes
            os.dup2(fd, number)
        process = config.process
        profile = f"apparmor:{process.apparmor_profile}" if process and process.apparmor_profile else ""
        made = restore.restore(
            restore.RestoreRequest(
                root=self._root,
                id=message.id,
                bundle=message.bundle,
                spec=config,
                images=checkpoint.Images(
                    images.program,
                    images.images,
                    images.work,
                    tcp_established=True,
                    file_locks=True,
                    seconds=images.seconds,
                ),
                systemd_cgroup=names_unit(config.cgroups_path),
                lsm_profile=profile,
                rootfs=root_mount(message),
                untrusted=True,
                held=True,
            )
        )
        os.close(made.pidfd)
        return Made(made.state.pid, made.console)

    def execute(self, container_id: str, process: dict[str, Any], stdio: Sequence[int], caller: Caller) -> Made:
        wanted = spec_process.parse_process(process, "process")
        request = _exec.ExecRequest(self._root, container_id, wanted, tuple(stdio), disposable=True)
        executed = _exec.succeed(request, caller)
        os.close(executed.pidfd)
        return Made(executed.pid, executed.console)


def root_mount(message: ContainerMessage) -> FsMount | None:
    """The container's root filesystem as data; None where config.json's root.path is there already."""
    if not message.fstype:
        return None
    options = tuple((str(key), value) for key, value in message.options)
    return FsMount(message.fstype, message.source, options, message.attributes)


def names_unit(cgroups_path: str) -> bool:
    """True when linux.cgroupsPath is for systemd: "slice:prefix:name". Whoever wrote config.json meant it to be."""
    return cgroups_path.count(":") == 2 and not cgroups_path.startswith("/")


def config_of(bundle: str) -> Any:
    """A bundle's config.json; None where it cannot be read: the runtime itself will say what is wrong with it."""
    try:
        with open(f"{bundle}/config.json", "rb") as file:
            return decode(file.read())
    except (OSError, RuntimeFailure):
        return None


def cgroups_path_of(config: Any) -> str:
    """linux.cgroupsPath of a config.json, "" for none."""
    try:
        return str(config["linux"]["cgroupsPath"])
    except (KeyError, TypeError):
        return ""


def shares_pids(config: Any) -> bool:
    """True unless config.json asks for a new PID namespace."""
    try:
        namespaces = config["linux"]["namespaces"]
        return not any(item["type"] == "pid" and not item.get("path") for item in namespaces)
    except (KeyError, TypeError, AttributeError):
        return True
