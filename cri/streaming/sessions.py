"""Sessions: what happens between a client's streams and a container, whatever protocol the streams travel by.

    exec          pipes or a terminal of the command, its exit code from the shim's control fd
    attach        pipes that the shim copies the container's streams to
    port-forward  a socket that was connected inside the pod's network namespace, for each pair of streams

Refuses to know SPDY or WebSocket. Invariant: however a session ends, its fds are closed and its tasks are gone; what a
client leaves behind by hanging up is a command whose input has ended and whose output nobody takes, as at a terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import termios
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import field
from typing import Any, ParamSpec, TypeVar

from cri.errors import sentence
from cri.interfaces import ContainerError, ExecStream, Sandbox, Streams
from cri.streaming.pumps import Copies, copy_in, copy_out, pipe
from cri.streaming.resize import follow_sizes
from cri.streaming.status import Status
from cri.streaming.wire import Stream
from cri.threads import Threads
from runtime.linux.dataclass import dataclass

_MAX_ANSWER = 64 << 10
_CHUNK = 64 << 10
_LAST_WORD_S = 2.0
_HEADER = struct.Struct("=I")

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Exec:
    """A command to run, and which streams its client wants."""

    sandbox: Sandbox
    container_id: str
    process: Mapping[str, object]
    stdin: bool
    stdout: bool
    stderr: bool
    terminal: bool


@dataclass(frozen=True, slots=True)
class Attach:
    """A container to attach to."""

    sandbox: Sandbox
    container_id: str
    stdin: bool
    stdout: bool
    stderr: bool
    terminal: bool


@dataclass(frozen=True, slots=True)
class PortForward:
    """Ports of a pod; `ports` are those of the request, which only channels need. `label` names the pod."""

    sandbox: Sandbox
    label: str
    ports: tuple[int, ...] = ()


Request = Exec | Attach | PortForward


@dataclass(slots=True)
class Peer:
    """The client's streams of an exec or attach, as far as it wants them."""

    stdin: Stream | None = None
    stdout: Stream | None = None
    stderr: Stream | None = None
    resize: Stream | None = None


@dataclass(slots=True)
class _Ends:
    """The daemon's ends of the pipes, and those for the other side. All are closed at the end, whatever happens; those
    that a call has been lent, not before that has ended: their numbers are somebody else's once they are closed."""

    ours: dict[str, int] = field(default_factory=dict)
    theirs: list[int] = field(default_factory=list)

    def lend(self, call: asyncio.Future[Any]) -> None:
        """The other side's are closed once `call` is done, however it ends and whoever waits for it."""
        lent, self.theirs = _Ends(theirs=self.theirs), []
        call.add_done_callback(lambda _: lent.close())

    def close_one(self, name: str) -> None:
        fd = self.ours.pop(name, -1)
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        while self.theirs:
            os.close(self.theirs.pop())
        for name in list(self.ours):
            self.close_one(name)


@contextlib.contextmanager
def _ends() -> Iterator[_Ends]:
    ends = _Ends()
    try:
        yield ends
    finally:
        ends.close()


class Sessions:
    """All kinds; `threads` is the pool for calls to shims."""

    def __init__(self, streams: Streams, threads: Threads) -> None:
        self._streams = streams
        self._threads = threads

    # -------------------------------------------------------------------------------------------------------- exec

    async def exec(self, request: Exec, peer: Peer) -> Status:
        """Runs the command; its output has been sent when this returns. Raises ConnectionError when the client has
        gone."""
        with _ends() as ends:
            try:
                control = await self._start(request, ends)
            except (ContainerError, OSError) as error:
                return Status(failure=f"error executing command in container: {sentence(error)}")
            try:
                return await self._running(request, peer, ends, control)
            finally:
                control.close()

    async def _start(self, request: Exec, ends: _Ends) -> socket.socket:
        """The command runs; `ends.ours` has its stdin, stdout and stderr, or its terminal. Its control socket."""
        fds: Sequence[int] = ()
        if not request.terminal:
            fds = _three_pipes(request, ends)
        stream: ExecStream = await self._taken(
            self._threads.run(
                self._streams.exec_stream,
                request.sandbox,
                request.container_id,
                request.process,
                fds,
                terminal=request.terminal,
            ),
            _drop_exec,
            ends,
        )
        if stream.console >= 0:
            ends.ours["terminal"] = stream.console
        for fd in (*ends.ours.values(), stream.control):
            os.set_blocking(fd, False)
        return socket.socket(fileno=stream.control)

    async def _running(self, request: Exec, peer: Peer, ends: _Ends, control: socket.socket) -> Status:
        over = asyncio.Event()
        console = ends.ours.get("terminal", -1)
        async with Copies() as tasks:
            if peer.stdin is not None and request.stdin:
                tasks.side(_feed(peer.stdin, ends, "terminal" if request.terminal else "stdin", keep=console >= 0))
            if peer.resize is not None and console >= 0:
                tasks.side(follow_sizes(peer.resize, lambda size: termios.tcsetwinsize(console, size)))
            if console >= 0:
                tasks.main(copy_out(console, _sink(peer.stdout), over))
            else:
                for name, stream in (("stdout", peer.stdout), ("stderr", peer.stderr)):
                    if name in ends.ours:
                        tasks.main(copy_out(ends.ours[name], _sink(stream), over))
            code = tasks.main(_exit_code(control, over))
            await tasks.done()
        return code.result()

    async def _taken(self, work: Coroutine[Any, Any, T], drop: Callable[[T], None], ends: _Ends | None = None) -> T:
        """The result of a call in a thread, which cannot be cancelled: if we are, `drop` has what it gives, and what it
        was given of `ends` stays open for it."""
        task = asyncio.ensure_future(work)
        if ends is not None:
            ends.lend(task)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(lambda done: None if done.cancelled() or done.exception() else drop(done.result()))
            raise

    # ------------------------------------------------------------------------------------------------------ attach

    async def attach(self, request: Attach, peer: Peer) -> Status:
        """Until the container's output ends, or the client has gone (ConnectionError)."""
        with _ends() as ends:
            fds = _attach_pipes(request, ends)
            try:
                fd = await self._taken(
                    self._threads.run(
                        self._streams.attach,
                        request.sandbox,
                        request.container_id,
                        fds,
                        stdin=request.stdin,
                        terminal=request.terminal,
                    ),
                    os.close,
                    ends,
                )
            except (ContainerError, OSError) as error:
                return Status(failure=f"error attaching to container: {sentence(error)}")
            for number in (*ends.ours.values(), fd):
                os.set_blocking(number, False)
            with socket.socket(fileno=fd) as control:
                await self._attached(request, peer, ends, control)
                return await _let_go(control)

    async def _attached(self, request: Attach, peer: Peer, ends: _Ends, control: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        over = asyncio.Event()  # never set: the shim ends the pipes itself

        async def resize(size: tuple[int, int]) -> None:
            body = json.dumps({"resize": list(size)}).encode()
            with contextlib.suppress(OSError):
                await loop.sock_sendall(control, _HEADER.pack(len(body)) + body)

        async with Copies() as tasks:
            if peer.stdin is not None and request.stdin:
                tasks.side(_feed(peer.stdin, ends, "stdin", keep=False))
            if peer.resize is not None and request.terminal:
                tasks.side(follow_sizes(peer.resize, resize))
            for name, stream in (("stdout", peer.stdout), ("stderr", peer.stderr)):
                if name in ends.ours:
                    tasks.main(copy_out(ends.ours[name], _sink(stream), over))
            await tasks.done()

    # ------------------------------------------------------------------------------------------------ port-forward

    async def forward(self, request: PortForward, port: int, data: Stream, error: Stream) -> None:
        """One connection to `port` of the pod. Its failure is words on `error`; both streams are finished."""
        try:
            words = await self._forward(request, port, data)
            if words:
                label = f"error forwarding port {port} to pod {request.sandbox.id}, {request.label}: {words}"
                await error.write(label.encode())
        except ConnectionError:
            pass
        finally:
            await data.finish()
            await error.finish()

    async def _forward(self, request: PortForward, port: int, data: Stream) -> str:
        try:
            fd = await self._taken(
                self._threads.run(self._streams.connect, request.sandbox, port),
                os.close,
            )
        except (ContainerError, OSError) as error:
            return sentence(error)
        inside = socket.socket(fileno=fd)
        try:
            inside.setblocking(False)
            async with Copies() as tasks:
                tasks.side(_to_socket(data, inside))
                tasks.main(_from_socket(inside, data))
                await tasks.done()
        finally:
            inside.close()
        return ""


def _three_pipes(request: Exec, ends: _Ends) -> list[int]:
    """stdin, stdout and stderr for the command; /dev/null for what nobody asked for."""
    fds = []
    for name, wanted in (("stdin", request.stdin), ("stdout", request.stdout), ("stderr", request.stderr)):
        if not wanted:
            fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        else:
            read, write = pipe()
            fd, ends.ours[name] = (read, write) if name == "stdin" else (write, read)
        ends.theirs.append(fd)
        fds.append(fd)
    return fds


def _attach_pipes(request: Attach, ends: _Ends) -> list[int]:
    """What `Streams.attach` wants: stdin iff asked for, stdout, and stderr where there is no terminal."""
    names = ["stdout"] if request.terminal else ["stdout", "stderr"]
    fds = []
    if request.stdin:
        read, ends.ours["stdin"] = pipe()
        fds.append(read)
    for name in names:
        read, write = pipe()
        ends.ours[name] = read  # also where the client does not want it: the end of it is the end of the session
        fds.append(write)
    ends.theirs.extend(fds)
    return fds


def _sink(stream: Stream | None) -> Callable[[bytes], Coroutine[Any, Any, None]]:
    """Where a stream's bytes go: to the client, or nowhere."""
    if stream is not None:
        return stream.write

    async def nowhere(_data: bytes) -> None:
        pass

    return nowhere


async def _feed(stream: Stream, ends: _Ends, name: str, *, keep: bool) -> None:
    """Input, and its end; a terminal has none, and stays as it is."""
    await copy_in(stream, ends.ours[name])
    if not keep:
        ends.close_one(name)


async def _let_go(control: socket.socket) -> Status:
    """Success, unless the shim says that its reader was too slow: then output is missing, and its client must know."""
    try:
        async with asyncio.timeout(_LAST_WORD_S):
            answer = await _frame(control)
    except (TimeoutError, OSError, ValueError):
        return Status()
    if answer is None or "error" not in answer:
        return Status()
    return Status(failure=str(answer["error"].get("message", "")))


async def _frame(control: socket.socket) -> dict[str, Any] | None:
    """The next frame; None at the end. Raises OSError, ValueError."""
    loop = asyncio.get_running_loop()
    received = b""
    while len(received) < 4 or len(received) < 4 + _HEADER.unpack_from(received)[0]:
        if len(received) > _MAX_ANSWER:
            raise ValueError("an answer without end")
        piece = await loop.sock_recv(control, 4096)
        if not piece:
            return None
        received += piece
    answer = json.loads(received[4:])
    if not isinstance(answer, dict):
        raise ValueError("an answer that is no object")
    return answer


async def _exit_code(control: socket.socket, over: asyncio.Event) -> Status:
    """What the shim says once the command has ended; sets `over` then."""
    try:
        answer = await _frame(control)
        if answer is None:
            return Status(failure="the exit code is lost: the pod's shim ended before the command did")
        if "error" in answer:
            return Status(failure=str(answer["error"].get("message", answer["error"])))
        return Status(exit_code=int(answer["ok"]["exit_code"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Status(failure=f"the exit code is lost: {type(error).__name__}: {error}")
    finally:
        over.set()


def _drop_exec(stream: ExecStream) -> None:
    """Of a client that has gone meanwhile: the command's terminal hangs up, its pipes are closed already."""
    for fd in (stream.control, stream.console):
        if fd >= 0:
            os.close(fd)


async def _to_socket(data: Stream, inside: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    try:
        while piece := await data.read():
            await loop.sock_sendall(inside, piece)
        inside.shutdown(socket.SHUT_WR)
    except OSError:  # the other side hears of it as the end of what it reads
        pass


async def _from_socket(inside: socket.socket, data: Stream) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            piece = await loop.sock_recv(inside, _CHUNK)
        except OSError:
            return
        if not piece:
            return
        await data.write(piece)
