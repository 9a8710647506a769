"""The daemon's side: pods and containers as method calls, each a connection to a shim's socket.

`Shims` has the methods of cri.interfaces.Sandboxes and Containers, and may be called from several threads at once. It
starts the zygote when nobody answers at STATE/zygote.sock, by posix_spawn, as the daemon itself never forks; with
`direct` each pod gets an interpreter of its own and there is no zygote. Refuses to be wrong about the dead: a shim is
its pid *and* start time, and what a dead one leaves is cleaned up from its records. Invariant: the daemon may die at
any line here and the same call, made again, ends the same way.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from runtime.errors import RuntimeFailure
from runtime.fields import decode
from runtime.linux.files import AT_FDCWD, read_bounded
from runtime.linux.libc import KernelError
from runtime.linux.process import has_ended, is_running, pidfd_open, signal_running
from runtime.linux.record import Record
from runtime.linux.sockets import FrameError, connect_unix, recv_frame, send_frame
from runtime.shim import protocol
from runtime.shim.cgroup import remove_if_empty
from runtime.shim.commands import run_to_end
from runtime.shim.launcher import Launcher
from runtime.shim.messages import container_message, pod_message
from runtime.shim.model import (
    ContainerError,
    ContainerFacts,
    ContainerSpec,
    ExecResult,
    ExecSpec,
    ExecStream,
    Sandbox,
    SandboxSpec,
    ShimUnresponsive,
)
from runtime.shim.wire import ask, sentences, unresponsive

if TYPE_CHECKING:
    from runtime.linux.progress import Phase

RECONNECT_TIMEOUT = 2.0
_CALL_TIMEOUT = 120.0
_SIGKILL = 9
_R = TypeVar("_R")


class _ShimGone(Exception):
    """Nobody answers and the process is dead."""


class Shims:
    """Pods and containers of one state directory (/run/ocid)."""

    def __init__(self, state: Path, *, direct: bool = False, tell: Callable[[list[Phase]], None] | None = None) -> None:
        """`tell` hears, in the caller's thread, where the time of pods' starts, containers' creates and execs went."""
        self._state = state
        self._tell = tell
        self._launcher = Launcher(state, direct=direct)

    # -------------------------------------------------------------------------------------------------------- pods

    def start(self, spec: SandboxSpec) -> Sandbox:
        """Sandboxes.start."""
        pod = pod_message(spec, self._state)
        with sentences(f"start pod {spec.id}"):
            value = self._timed(
                lambda timed: self._told(self._launcher.ask("start", pod, _CALL_TIMEOUT, timed=timed), timed)
            )
        return Sandbox(spec.id, spec.directory, value["pid"], value["started_ticks"], value["pause_pid"])

    def reconnect(self, sandbox: Sandbox) -> Sequence[ContainerFacts] | None:
        """Sandboxes.reconnect."""
        try:
            value = self._call(sandbox, "list", None, RECONNECT_TIMEOUT)
        except _ShimGone:
            return None
        return [ContainerFacts(**facts) for facts in value]

    def stop(self, sandbox: Sandbox) -> None:
        """Sandboxes.stop. A shim that hangs is killed, and cleaned up after as a dead one."""
        with sentences(f"stop pod {sandbox.id}"):
            try:
                self._call(sandbox, "stop", None, _CALL_TIMEOUT)
                self._end(sandbox, kill=False)
            except (_ShimGone, ShimUnresponsive):
                self._end(sandbox, kill=True)
                self._sweep(sandbox, "stop")
        remove_if_empty()

    def events(self, sandbox: Sandbox) -> int:
        """Sandboxes.events."""
        with self._living(sandbox):
            connection = self._open(sandbox, "events", None, _CALL_TIMEOUT)
            connection.settimeout(None)
            return connection.detach()

    def rejoin(self, sandbox: Sandbox) -> tuple[int, Sequence[ContainerFacts]] | None:
        """Sandboxes.rejoin."""
        try:
            with contextlib.ExitStack() as undo:
                connection = undo.enter_context(self._connect(sandbox, RECONNECT_TIMEOUT))
                try:
                    facts = ask(connection, "rejoin", None, RECONNECT_TIMEOUT)
                except (OSError, FrameError, RuntimeFailure) as error:
                    self._raise_if_gone(sandbox, error)
                    if "unknown operation" not in str(error):
                        raise
                    return self._rejoin_in_steps(sandbox)  # a shim of before there was this
                if facts is None:  # too many for one answer
                    return self._rejoin_in_steps(sandbox)
                undo.pop_all()
        except _ShimGone:
            return None
        connection.settimeout(None)
        return connection.detach(), [ContainerFacts(**one) for one in facts]

    def _rejoin_in_steps(self, sandbox: Sandbox) -> tuple[int, Sequence[ContainerFacts]] | None:
        """Asked once the stream is open: an exit in between is told twice rather than never (threats O14)."""
        connection = self._open(sandbox, "events", None, RECONNECT_TIMEOUT)
        with contextlib.ExitStack() as undo:
            undo.callback(connection.close)
            facts = self.reconnect(sandbox)
            if facts is None:
                return None
            undo.pop_all()
        connection.settimeout(None)
        return connection.detach(), facts

    def lost(self, sandbox: Sandbox) -> Sequence[ContainerFacts]:
        """For a pod of which `reconnect` is None: kills what is left of its containers and tells how each ended: as
        the shim recorded it, or exit code 255 with a message. Idempotent; records stay until `delete` or `stop`."""
        with sentences(f"clean up after the shim of pod {sandbox.id}"):
            return [ContainerFacts(**facts) for facts in self._sweep(sandbox, "lost")]

    @staticmethod
    def recorded(bundle: Path) -> ContainerFacts | None:
        """What exit.json of a bundle says, or None: the exit of a container whose shim is gone."""
        try:
            value = decode(read_bounded(AT_FDCWD, str(bundle / "exit.json"), 1 << 20))
        except (OSError, RuntimeFailure):
            return None
        facts = protocol.Facts.from_json(value).to_json()
        return ContainerFacts(**facts)  # type: ignore[arg-type]  # from_json keeps only fields of their types

    def prepare(self) -> None:
        """Starts the zygote where none serves (0.1 to 0.3 s), so that the first pod need not wait for it."""
        with sentences("start the zygote"):
            self._launcher.prepare()

    def end_zygote(self) -> None:
        """Ends the zygote; shims stay. The next `start` makes a new one. Idempotent."""
        self._launcher.end()

    # -------------------------------------------------------------------------------------------------- containers

    def create(self, sandbox: Sandbox, spec: ContainerSpec) -> ContainerFacts:
        """Containers.create."""
        message = container_message(spec)
        with sentences(f"create container {spec.id}"), self._living(sandbox):
            create = self._timed(lambda timed: self._told(self._call(sandbox, "create", message, timed=timed), timed))
            return ContainerFacts(**create)

    def start_container(self, sandbox: Sandbox, container_id: str) -> ContainerFacts:
        """Containers.start_container."""
        with sentences(f"start container {container_id}"), self._living(sandbox):
            return ContainerFacts(**self._call(sandbox, "start", protocol.IdMessage(container_id)))

    def signal(self, sandbox: Sandbox, container_id: str, number: int, *, everyone: bool = False) -> None:
        """Containers.signal; also for a dead shim."""
        with sentences(f"signal container {container_id}"):
            try:
                self._call(sandbox, "signal", protocol.SignalMessage(container_id, int(number), everyone))
            except _ShimGone:
                self._sweep(sandbox, "signal", container_id, number, everyone)

    def delete(self, sandbox: Sandbox, container_id: str) -> None:
        """Containers.delete."""
        with sentences(f"delete container {container_id}"):
            try:
                self._call(sandbox, "delete", protocol.IdMessage(container_id))
            except _ShimGone:
                self._sweep(sandbox, "delete", container_id)

    def retire(self, sandbox: Sandbox, container_id: str) -> None:
        """Containers.retire."""
        with sentences(f"retire container {container_id}"):
            try:
                self._call(sandbox, "retire", protocol.IdMessage(container_id))
            except _ShimGone:
                return  # then nobody starts anything again

    def exec_sync(self, sandbox: Sandbox, container_id: str, spec: ExecSpec) -> ExecResult:
        """Containers.exec_sync."""
        with sentences(f"exec in container {container_id}"), self._living(sandbox):
            return self._timed(lambda timed: self._run(sandbox, container_id, spec, timed))

    def _run(self, sandbox: Sandbox, container_id: str, spec: ExecSpec, timed: bool) -> ExecResult:
        with contextlib.closing(self._connect(sandbox, _CALL_TIMEOUT)) as connection:
            return run_to_end(connection, container_id, spec, self._tell if timed else None)

    def exec_stream(
        self,
        sandbox: Sandbox,
        container_id: str,
        process: Mapping[str, object],
        fds: Sequence[int] = (),
        *,
        terminal: bool = False,
    ) -> ExecStream:
        """Runs a command on the caller's own stdin, stdout and stderr (`fds`, which stay the caller's), or on a
        terminal whose master comes back. Bytes never pass through the shim. Raises ContainerError."""
        message = protocol.StreamMessage(container_id, dict(process), terminal)
        with sentences(f"exec in container {container_id}"), self._living(sandbox):
            return self._timed(lambda timed: self._stream(sandbox, message, tuple(fds), timed))

    def _stream(
        self, sandbox: Sandbox, message: protocol.StreamMessage, fds: tuple[int, ...], timed: bool
    ) -> ExecStream:
        connection = self._connect(sandbox, _CALL_TIMEOUT)
        try:
            send_frame(connection, protocol.request("stream", message, timed=timed), fds)
            received = recv_frame(connection, want_fds=True)
            if received is None:
                raise FrameError("the shim closed the connection")
            value = self._told(protocol.parse_reply(received[0]), timed)
            connection.settimeout(None)
            return ExecStream(value["pid"], connection.detach(), received[1][0] if received[1] else -1)
        except BaseException:
            connection.close()
            raise

    def update(self, sandbox: Sandbox, container_id: str, resources: Mapping[str, object]) -> None:
        """Containers.update."""
        with sentences(f"update container {container_id}"), self._living(sandbox):
            self._call(sandbox, "update", protocol.UpdateMessage(container_id, dict(resources)))

    def pause(self, sandbox: Sandbox, container_id: str) -> None:
        """Checkpoints.pause."""
        with sentences(f"pause container {container_id}"), self._living(sandbox):
            self._call(sandbox, "pause", protocol.IdMessage(container_id))

    def resume(self, sandbox: Sandbox, container_id: str) -> None:
        """Checkpoints.resume."""
        with sentences(f"resume container {container_id}"):
            try:
                self._call(sandbox, "resume", protocol.IdMessage(container_id))
            except _ShimGone:
                return  # whoever cleans up after it kills what is left, frozen or not

    def checkpoint(
        self, sandbox: Sandbox, container_id: str, images: Path, work: Path, program: str, seconds: float
    ) -> None:
        """Checkpoints.checkpoint."""
        message = protocol.CheckpointMessage(container_id, str(images), str(work), program, seconds)
        with sentences(f"checkpoint container {container_id}"), self._living(sandbox):
            self._call(sandbox, "checkpoint", message, seconds + _CALL_TIMEOUT)

    def restore(
        self, sandbox: Sandbox, spec: ContainerSpec, images: Path, work: Path, program: str, seconds: float
    ) -> ContainerFacts:
        """Checkpoints.restore."""
        container = container_message(spec)
        fields = {name: getattr(container, name) for name in container._fields}
        message = protocol.RestoreMessage(fields, str(images), str(work), program, seconds)
        with sentences(f"restore container {spec.id}"), self._living(sandbox):
            return ContainerFacts(**self._call(sandbox, "restore", message, seconds + _CALL_TIMEOUT))

    def reopen_log(self, sandbox: Sandbox, container_id: str) -> None:
        """Containers.reopen_log."""
        with sentences(f"reopen the log of container {container_id}"), self._living(sandbox):
            self._call(sandbox, "reopen_log", protocol.IdMessage(container_id))

    def attach(self, sandbox: Sandbox, container_id: str, fds: Sequence[int], *, stdin: bool, terminal: bool) -> int:
        """Containers.attach: with `stdin` the first of `fds` is read from; then come stdout and stderr."""
        message = protocol.AttachMessage(container_id, stdin, terminal)
        with sentences(f"attach to container {container_id}"), self._living(sandbox):
            connection = self._open(sandbox, "attach", message, _CALL_TIMEOUT, tuple(fds))
            connection.settimeout(None)
            return connection.detach()

    def connect(self, sandbox: Sandbox, port: int) -> int:
        """Streams.connect."""
        message = protocol.ConnectMessage(port)
        with sentences(f"connect to port {port} of pod {sandbox.id}"), self._living(sandbox):
            with contextlib.closing(self._connect(sandbox, _CALL_TIMEOUT)) as connection:
                send_frame(connection, protocol.request("connect", message))
                received = recv_frame(connection, want_fds=True)
                if received is None:
                    raise FrameError("the shim closed the connection")
                protocol.parse_reply(received[0])
                return received[1][0]

    # ------------------------------------------------------------------------------------------------------ the wire

    def _connect(self, sandbox: Sandbox, timeout: float | None) -> socket.socket:
        """Raises _ShimGone when the shim's process is dead, ShimUnresponsive when it lives but does not listen."""
        try:
            return connect_unix(sandbox.directory / "shim.sock", timeout)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            # A shim that is just ending has closed its socket already: its process decides.
            if self._is_alive(sandbox, patience=RECONNECT_TIMEOUT):
                raise unresponsive(sandbox) from error
            raise _ShimGone from None
        except (TimeoutError, BlockingIOError) as error:
            raise unresponsive(sandbox) from error

    def _open(
        self, sandbox: Sandbox, name: str, message: Record | None, timeout: float | None, fds: tuple[int, ...] = ()
    ) -> socket.socket:
        """A connection whose request was answered with success; it goes on from there."""
        connection = self._connect(sandbox, timeout)
        try:
            ask(connection, name, message, timeout, fds)
        except BaseException as error:
            connection.close()
            self._raise_if_gone(sandbox, error)
            raise
        return connection

    def _timed(self, call: Callable[[bool], _R]) -> _R:
        """`call(True)`, where somebody wants to hear of its phases and the shim keeps them; else `call(False)`."""
        if self._tell is None:
            return call(False)
        try:
            return call(True)
        except RuntimeFailure as error:
            if "unknown operation 'timed'" not in str(error) and protocol.CAN_BE_TIMED not in str(error):
                raise
            return call(False)  # a shim of before there were these phases: shims outlive the daemon that started them

    def _told(self, answer: Any, timed: bool) -> Any:
        """The answer itself; the phases that came with it are told."""
        if not timed or self._tell is None:
            return answer
        self._tell([(name, of, since, end) for name, of, since, end in answer["phases"]])
        return answer["value"]

    def _call(
        self,
        sandbox: Sandbox,
        name: str,
        message: Record | None = None,
        timeout: float = _CALL_TIMEOUT,
        *,
        timed: bool = False,
    ) -> Any:
        with contextlib.closing(self._connect(sandbox, timeout)) as connection:
            try:
                return ask(connection, name, message, timeout, timed=timed)
            except (OSError, FrameError, RuntimeFailure) as error:
                self._raise_if_gone(sandbox, error)
                raise

    def _raise_if_gone(self, sandbox: Sandbox, error: BaseException) -> None:
        if isinstance(error, TimeoutError):
            raise unresponsive(sandbox) from error
        # A helper outlives its shim, and answers that it is gone: a pod's end does not wait for other calls on it.
        told = isinstance(error, RuntimeFailure) and error.code == "unavailable"
        if (told or isinstance(error, OSError | FrameError)) and not self._is_alive(
            sandbox, patience=RECONNECT_TIMEOUT
        ):
            raise _ShimGone from None

    @contextlib.contextmanager
    def _living(self, sandbox: Sandbox) -> Any:
        """Turns "nobody there" into an error of calls that need a shim."""
        try:
            yield
        except _ShimGone:
            raise ContainerError(
                f"the shim of pod {sandbox.id}, process {sandbox.pid}, is gone",
                code="unavailable",
                hint="the pod has to be stopped and made anew",
            ) from None
        except (OSError, FrameError) as error:
            if not self._is_alive(sandbox, patience=RECONNECT_TIMEOUT):
                raise ContainerError(
                    f"the shim of pod {sandbox.id} died during the call", code="unavailable"
                ) from error
            raise

    @staticmethod
    def _is_alive(sandbox: Sandbox, *, patience: float) -> bool:
        """Whether that very process runs; one that is about to end gets `patience` seconds for it."""
        try:
            pidfd = pidfd_open(sandbox.pid)
        except KernelError:
            return False
        try:
            if not is_running(sandbox.pid, sandbox.started_ticks):
                return False
            return not has_ended(pidfd, patience)
        finally:
            os.close(pidfd)

    def _end(self, sandbox: Sandbox, *, kill: bool) -> None:
        """Waits for the end of the shim's process, after SIGKILL if so asked."""
        try:
            pidfd = pidfd_open(sandbox.pid)
        except KernelError:
            return
        try:
            if not is_running(sandbox.pid, sandbox.started_ticks):
                return
            if kill:
                signal_running(pidfd, _SIGKILL)
            if not has_ended(pidfd, _CALL_TIMEOUT):
                raise unresponsive(sandbox)
        finally:
            os.close(pidfd)

    def _sweep(
        self, sandbox: Sandbox, action: str, container_id: str = "", number: int = 0, everyone: bool = False
    ) -> Any:
        message = protocol.SweepMessage(
            action, str(sandbox.directory), str(self._state), container_id, int(number), everyone
        )
        return self._launcher.ask("sweep", message, _CALL_TIMEOUT)
