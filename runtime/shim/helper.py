"""The helpers of a shim: forks of it that do one thing, may block on whatever they like, and end.

Refuses peers other than root (SO_PEERCRED, threats S50), and to inherit: a helper keeps no fd but what it is given.
Invariant: a helper never returns into the shim's loop.
"""

from __future__ import annotations

import os
import socket

from runtime.errors import RuntimeFailure
from runtime.fields import encode
from runtime.linux import progress, signals
from runtime.linux.files import write_durable
from runtime.linux.process import close_all_but, setns, start_time
from runtime.linux.sockets import FrameError, listen_unix, peer_uid, recv_frame, send_frame
from runtime.shim import protocol
from runtime.shim.channel import Channel
from runtime.shim.lingering import IDLE, linger
from runtime.shim.protocol import PodMessage, SweepMessage
from runtime.shim.records import engine_for
from runtime.shim.report import report
from runtime.shim.sandbox import end_process, set_up, tear_down
from runtime.shim.streams import StreamHandler
from runtime.shim.sweep import Sweeper
from runtime.tree import kill_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from typing import NoReturn

    from runtime.shim.resident import Resident, Work
    from runtime.shim.spare import Spare

_PATIENCE = 10.0  # seconds for a connected peer to say what it wants


def serve(resident: Resident, connection_fd: int, end: Socket) -> NoReturn:
    """In a fork of the shim: never returns."""
    try:
        become_helper(connection_fd, end.fileno(), *(held.stdio.console for held in resident.containers.values()))
        channel = Channel(end)
        _linger(resident, channel, _answer(resident, connection_fd, channel))
    except (OSError, FrameError):  # whoever it was, it did not say what it wanted
        pass
    except BaseException as error:
        report("serve a request", error)
    finally:
        os._exit(0)


def _answer(resident: Resident, take_connection: int, channel: Channel, *, waited: bool = False) -> tuple[str, ...]:
    """The operations that are likely to follow, and that this process may serve."""
    with socket.socket(fileno=take_connection) as connection:
        connection.settimeout(_PATIENCE)
        received = recv_frame(connection, want_fds=True) if peer_uid(connection) == 0 else None
        connection.settimeout(None)
        if received is None:
            return ()
        request, fds = received
        progress.end()  # those of the request before, if this process has served one
        handler = StreamHandler(pod_of(resident), resident, channel, connection, fds, waited=waited)
        handler.run(request)
    return handler.expects


def _linger(resident: Resident, channel: Channel, expected: tuple[str, ...]) -> None:
    """Serves what is expected to follow, if it does, and what is expected after that."""
    while expected:
        ready = resident.make_ready if expected == ("create",) else None
        expected = linger(channel, expected, lambda taken: _answer(resident, taken, channel, waited=True), ready)


def first_helper(state: str, zygote: int, spare: Spare | None = None) -> Work:
    """The first helper of a new shim: reads the request that the shim was forked for, or, of a `spare` one, the next
    that comes, and brings its pod up. The zygote looks at nothing itself, so questions about it come here, too, and
    work on pods whose shim is gone."""

    def work(resident: Resident, fd: int, end: Socket) -> NoReturn:
        try:
            if spare is None:
                become_helper(fd, end.fileno())
                connection_fd = fd
            else:
                become_helper(*spare.filenos(), end.fileno())
                connection_fd = spare.await_request(resident, end.fileno())
            lives = spare is None or spare.zygote_lives
            channel = Channel(end)
            expected: tuple[str, ...] = ()
            with socket.socket(fileno=connection_fd) as connection:
                connection.settimeout(_PATIENCE)
                received = recv_frame(connection) if peer_uid(connection) == 0 else None
                if received is not None:
                    answer, expected = _first_answer(resident, received[0], channel, state, zygote if lives else 0)
                    send_frame(connection, answer)
            _linger(resident, channel, expected)
        except (OSError, FrameError):  # who asked has gone: it finds the shim, or its directory, when it is back
            pass
        except BaseException as error:
            report("start the pod", error)
        finally:
            os._exit(0)

    return work


def _first_answer(
    resident: Resident, request: bytes, channel: Channel, state: str, zygote: int
) -> tuple[bytes, tuple[str, ...]]:
    """The answer, and what is likely to follow, as `_answer`'s."""
    try:
        name, body = protocol.parse_request(request)
        if name == "timed":
            pod = protocol.parse(PodMessage, protocol.untimed(body, "start")[1])
            progress.begin()
            made, expected = _set_up(resident, pod, channel, protocol.request("start", pod))
            return protocol.reply({"value": made, "phases": progress.phases()}), expected
        if name == "start":
            made, expected = _set_up(resident, protocol.parse(PodMessage, body), channel, request)
            return protocol.reply(made), expected
        if name == "sweep":
            return protocol.reply(Sweeper(protocol.parse(SweepMessage, body)).run()), ()
        if name == "quit" and zygote:
            os.unlink(f"{state}/zygote.sock")
            os.kill(zygote, signals.SIGKILL)  # our shim's maker: it has nothing to lose
        elif name != "hello":
            raise RuntimeFailure(f"unknown operation {name!r:.40}", code="invalid_argument")
        return protocol.reply({"pid": zygote, "version": os.environ.get("OCID_VERSION", "")}), ()
    except (OSError, RuntimeFailure) as error:
        return protocol.failure(error), ()


def _set_up(
    resident: Resident, pod: PodMessage, channel: Channel, request: bytes
) -> tuple[dict[str, object], tuple[str, ...]]:
    """Namespaces, pins, /dev/shm, pause; then the shim listens. Its and pause's pids, and what is likely to follow.
    Raises OSError, RuntimeFailure; then nothing is left."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    log = os.open(f"{pod.directory}/shim.log", flags, 0o600)
    os.dup2(log, 2, inheritable=False)
    home = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in ("ipc", "uts", "net")]
    pause_pid = set_up(pod)
    try:
        record = shim_record(os.getppid(), pause_pid)
        write_durable(f"{pod.directory}/shim.json", encode(record), sync=False)
        if pause_pid:
            channel.ask("pause", pause_pid)
        for fd in home:  # what follows is not about the pod, but about containers
            setns(fd)
            os.close(fd)
        with listen_unix(f"{pod.directory}/shim.sock") as listener:
            listener.setblocking(False)
            channel.ask("listen", f"shim {pod.id}"[:15].encode(), request, fds=[listener.fileno(), log])
    except BaseException:
        if pause_pid:
            end_process(pause_pid)
        tear_down(pod.directory)
        raise
    if pod.uids:  # few pods have a user namespace, and of those this process may be more than it should
        return record, ()
    resident.request = request  # as the shim has it
    channel.tell(IDLE)  # before the answer, which the next request may follow at once
    return record, ("events",)


def pod_of(resident: Resident) -> PodMessage:
    """The pod that the shim was started for."""
    return protocol.parse(protocol.PodMessage, protocol.parse_request(resident.request)[1])


def shim_record(pid: int, pause_pid: int) -> dict[str, object]:
    """shim.json: who the shim and its pause process are, for a cleaner that must not hit others."""
    pause_ticks = start_time(pause_pid) if pause_pid else 0
    return {"pid": pid, "started_ticks": start_time(pid), "pause_pid": pause_pid, "pause_ticks": pause_ticks}


def kill_rest(container_id: str, handler: str) -> Work:
    """Work for a helper: everybody left in a container is killed."""

    def work(resident: Resident, _connection: int, end: Socket) -> NoReturn:
        try:
            become_helper(end.fileno())
            pod = pod_of(resident)
            engine_for(pod.state, pod.directory, handler).kill(container_id, signals.SIGKILL, True)
        except BaseException as error:
            report("kill the rest", error)
        finally:
            os._exit(0)

    return work


def kill_command(pid: int) -> Work:
    """Work for a helper: a command that nobody waits for any more is killed, and its tree."""

    def work(_resident: Resident, _connection: int, end: Socket) -> NoReturn:
        try:
            become_helper(end.fileno())
            kill_tree(pid)
        except BaseException as error:
            report("kill a command", error)
        finally:
            os._exit(0)

    return work


def start_again(container_id: str) -> Work:
    """Work for a helper: the next run of a container that has ended."""

    def work(resident: Resident, _connection: int, end: Socket) -> NoReturn:
        try:
            become_helper(end.fileno(), *(held.stdio.console for held in resident.containers.values()))
            from runtime.shim.next_run import NextRun  # few containers are started again

            with socket.socket(socket.AF_UNIX) as nobody:
                NextRun(pod_of(resident), resident, Channel(end), nobody, []).begin(container_id)
        except BaseException as error:
            report("start a container again", error)
        finally:
            os._exit(0)

    return work


def become_helper(*keep: int) -> None:
    """A fork of the shim as a process of its own: no handlers, no fds but `keep`, and the umask that a runtime is used
    to (the shim's own would make directories in a root filesystem private)."""
    os.umask(0o022)
    signals.wake_up(-1)
    for number in (signals.SIGCHLD, signals.SIGTERM, signals.SIGHUP, signals.SIGINT):
        signals.handle(number, None)
    close_all_but(*keep)
