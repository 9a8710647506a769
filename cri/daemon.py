"""The one place that constructs parts: `serve` for a daemon, `local` for a command that does the same work itself.

Refuses to share a root: whoever works in one holds its lock, since the parts assume to be alone. Invariant: starting
is recovering; until that is done calls answer UNAVAILABLE; ending ends no container.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import gc
import logging
import os
import signal
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc

from cri import trace
from cri.apparmor import ensure_default, load_default
from cri.config import Config
from cri.discovery import Discovery
from cri.events import Events
from cri.feed import Feed
from cri.handover import FILES_SOCKET, Handover
from cri.image_config import store_config
from cri.intercept import Intercept
from cri.interrupted import forsaken
from cri.marks import RECOVERING
from cri.network.cni import Cni
from cri.network.config import NetworkConfig
from cri.node import Node, Parts
from cri.observe.setup import set_up_logs, watched
from cri.own import Own
from cri.recovery import check_networks, lost, recover
from cri.renewal import renew_if_stale
from cri.room import PASSING, STAYING, Room
from cri.service import Metadata, Service
from cri.stats import Statistics
from cri.store import Store as Records
from cri.store import open_database, open_sound
from cri.streaming.server import Server as StreamServer
from cri.streaming.sessions import Sessions
from cri.threads import to_thread
from imagestore.model import Usage
from imagestore.store import Store
from runtime.linux.dataclass import dataclass
from runtime.linux.sockets import connect_unix
from runtime.shim.client import Shims
from snapshotter.model import Config as SnapshotConfig
from snapshotter.overlay import Overlay

log = logging.getLogger(__name__)

STOPPING = "ocid is stopping"
# How long calls under way may take once the daemon is to end; what they work on is recovered at the next start.
GRACE_S = 10.0
_PLUGIN_GRACE_S = 2.0
# How long one waits for who works in the root: a command for another, whose call may be a pull, and a daemon for a
# command. Nobody waits for a daemon that answers.
_LOCK_WAIT_S = 60.0
_START_WAIT_S = 10.0
_PATH_MAX, _LOCK_SIZE = 4096, 1024
# New objects between two looks of the collector, once those of the start are frozen.
_OBJECTS = 50_000


class AlreadyServed(OSError):
    """Another process works in this root."""


@dataclass(slots=True)
class Built:
    """Everything that was constructed, and how it is taken apart."""

    node: Node
    events: Events
    feed: Feed
    statistics: Statistics
    service: Service
    own: Own
    files: Handover
    streams: StreamServer
    network: Cni
    snapshots: Overlay
    images: Store
    databases: tuple[sqlite3.Connection, ...]
    room: Room

    async def close(self) -> None:
        """Lets go of everything. Pods run on."""
        left = await self.node.tasks.drain(GRACE_S)
        if left:
            log.warning("%d calls are not done; the next start finishes or undoes them", left)
        self.events.close()
        await self.node.store.close()
        self.network.close()
        await asyncio.get_running_loop().run_in_executor(None, self.snapshots.close)
        self.node.exec_threads.close()
        self.node.create_threads.close()
        for database in self.databases:
            database.close()
        self.room.closed()


@contextlib.contextmanager
def owned(config: Config, *, wait_s: float, serving: bool = False) -> Iterator[None]:
    """Holds the lock of the root and of the state directory, both made 0700 whatever they were and whatever the
    umask is: images hold set-uid programs of strangers (CVE-2021-41103). A daemon's says where it is `serving`. Raises
    AlreadyServed."""
    os.umask(0o022)
    with contextlib.ExitStack() as held:
        for directory in (config.root, config.state):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
            fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            held.callback(os.close, fd)
            _lock(fd, directory, config.socket, wait_s)
            _write(fd, os.fsencode(f"{config.socket}\n{config.state}") if serving else b"")
        yield


def _write(fd: int, text: bytes) -> None:
    """In place: a disk that is full has no block for a file that was made empty first. A new file gets one at once."""
    size = max(os.fstat(fd).st_size, _LOCK_SIZE)
    with contextlib.suppress(OSError):  # without it who waits here is told less
        os.pwrite(fd, text.ljust(size, b"\0"), 0)


def _lock(fd: int, directory: Path, served: Path, wait_s: float) -> None:
    # flock(2) has no timeout; an alarm would be the process's, and a thread could not be ended.
    loop_until = os.times().elapsed + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if _answers(served):
                raise AlreadyServed(f"another ocid serves {served}; end it, or choose another directory") from None
            other, _, state = os.fsdecode(os.pread(fd, 2 * _PATH_MAX, 0).rstrip(b"\0")).partition("\n")
            if other and _answers(Path(other)):  # a daemon with another state directory
                raise AlreadyServed(
                    f"a daemon works in {directory} and serves {other}: say --state {state}, or another --root"
                ) from None
            if os.times().elapsed > loop_until:
                raise AlreadyServed(f"another ocid works in {directory} for {wait_s:g} s already") from None
        signal.sigtimedwait([], 0.01)


def build(config: Config, *, direct: bool) -> Built:
    """All parts of `config`, wired; the caller holds the lock. `direct`: no zygote and no spare namespaces."""
    for directory in (config.state / "pods", config.state / "bundles"):
        directory.mkdir(mode=0o700, exist_ok=True)
        directory.chmod(0o700)
    path = config.root / "ocid.db"
    room = Room(path, PASSING if direct else STAYING)
    try:
        records = Records(room.opened(lambda: open_sound(path)))
        databases = (open_database(path, durable=True), open_database(path, durable=True))
    except sqlite3.Error as error:
        raise OSError(f"open database {path}: {error}") from error
    snapshots = Overlay(
        config.root / "snapshots",
        databases[0],
        SnapshotConfig(
            workers=config.image.unpack_processes or min(os.cpu_count() or 1, 4),
            arriving=config.image.early_unpacks,
            worker_idle_s=config.image.unpack_idle_s,
        ),
    )
    images = Store(config.root / "images", databases[1], snapshots, store_config(config, _layers_usage(snapshots)))
    shims = Shims(config.state, direct=direct, tell=trace.phases if config.tracing.endpoint else None)
    network = Cni(
        NetworkConfig(
            conf_dir=config.network.conf_dir,
            bin_dirs=config.network.bin_dirs,
            state_dir=config.state,
            lease_dir=config.network.lease_dir,
            pool_size=0 if direct else config.network.netns_pool,
            default_bridge=config.network.default_bridge,
            default_subnets=config.network.default_subnets,
        )
    )
    parts = Parts(images, snapshots, shims, shims, network, shims)
    if config.tracing.endpoint:
        from cri.observe.parts import traced

        parts = traced(parts)
    node = Node(config, records, parts, default_apparmor=functools.cache(ensure_default if direct else load_default))
    events = Events(node, lambda pod_id: _lost(node, pod_id))
    node.events = events
    statistics = Statistics(node)
    node.statistics = statistics
    node.feed = feed = Feed(records)
    intercept = Intercept(RECOVERING)
    files = Handover(config.state / FILES_SOCKET)
    service, own = Service(node, intercept), Own(images, intercept, files, functools.partial(_forsaken, node))
    streams = StreamServer(config.stream, Sessions(shims, node.exec_threads))
    return Built(
        node, events, feed, statistics, service, own, files, streams, network, snapshots, images, databases, room
    )


def _layers_usage(snapshots: Overlay) -> Callable[[], Usage]:
    def measure() -> Usage:
        usage = snapshots.layers_usage()
        return Usage(usage.bytes, usage.inodes)

    return measure


def _forsaken(node: Node, uid: str) -> None:
    node.tasks.background(forsaken(node, uid), f"take away what the maker of {uid[:13]} has left")


def _lost(node: Node, pod_id: str) -> None:
    node.tasks.spawn(lost(node, pod_id), f"lost {pod_id[:13]}")


# ------------------------------------------------------------------------------------------------------- the daemon


async def serve(config: Config) -> None:
    """Serves the CRI until SIGTERM or SIGINT. Raises AlreadyServed, and OSError when the socket cannot be made."""
    set_up_logs(config)
    with owned(config, wait_s=_START_WAIT_S, serving=True):
        built = build(config, direct=False)
        async with watched(config, built.service.intercept, built.node.store):
            await _serve(config, built)


async def _serve(config: Config, built: Built) -> None:
    discovery = Discovery(built.service.intercept)
    server = _server(config, built.service, built.own.handler(), *discovery.handlers())
    ended = _ending(built.node)
    await to_thread(built.node.default_apparmor)
    await built.streams.start()
    built.node.streams = built.streams
    built.files.start()
    await server.start()
    config.socket.chmod(0o600)
    log.info("serving the CRI on %s", config.listen)
    background = [asyncio.create_task(_become_ready(built), name="recovery")]
    background.append(asyncio.create_task(built.statistics.measure(), name="measure"))
    background.append(asyncio.create_task(built.statistics.watch.run(), name="watch tasks"))
    try:
        done, _ = await asyncio.wait({ended, background[0]}, return_when=asyncio.FIRST_COMPLETED)
        if background[0] in done:
            background[0].result()
            await ended
    finally:
        built.service.intercept.why_not = STOPPING
        log.info("stopping; pods run on")
        # Or one that hangs would be waited for, by its call or by the interpreter's end.
        asyncio.get_running_loop().call_later(_PLUGIN_GRACE_S, built.network.interrupt)
        built.feed.close()
        discovery.close()
        built.files.close()
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await server.stop(GRACE_S)
        await built.streams.close()
        await built.close()


async def _become_ready(built: Built) -> None:
    await recover(built.node, built.events)
    await built.network.warm()
    # What is there now stays: the collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS)
    built.service.intercept.why_not = ""
    built.node.tasks.background(check_networks(built.node), "check networks")
    built.node.tasks.background(renew_if_stale(), "renew commands")
    log.info("ready")


def _ending(node: Node) -> asyncio.Future[None]:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def end() -> None:
        if not ended.done():
            ended.set_result(None)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    # A service manager's reload, or a terminal that goes away, ends no node (threats O20).
    loop.add_signal_handler(signal.SIGHUP, lambda: log.info("SIGHUP: the configuration is read at start only"))
    loop.add_signal_handler(signal.SIGUSR1, lambda: _dump(node))
    return ended


def _dump(node: Node) -> None:
    """For whoever looks for what hangs: what is under way and where, and the shims."""
    for task in asyncio.all_tasks():
        stack = "; ".join(f"{frame.f_code.co_name}:{frame.f_lineno}" for frame in task.get_stack())
        log.warning("task %s: %s", task.get_name(), stack)
    for pod in node.store.pods.values():
        states = [f"{one.name}={one.pid}{'' if one.running else '!'}" for one in node.store.containers_of(pod.id)]
        log.warning("pod %s (%s): shim %d, ready %s: %s", pod.label, pod.id[:13], pod.pid, pod.ready, " ".join(states))
    log.warning("%d fds, %d threads", len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))


def _server(config: Config, service: Service, *more: grpc.GenericRpcHandler) -> grpc.aio.Server:
    path = config.socket
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if _answers(path):
        raise AlreadyServed(f"{path} is served by another process")
    path.unlink(missing_ok=True)
    server = grpc.aio.server(
        maximum_concurrent_rpcs=config.limits.concurrent_calls,
        options=(
            ("grpc.max_receive_message_length", config.limits.message_bytes),
            ("grpc.max_send_message_length", 64 << 20),
            ("grpc.so_reuseport", 0),
            ("grpc.http2.bdp_probe", 0),
        ),
    )
    server.add_generic_rpc_handlers((*service.handlers(), *more))
    before = os.umask(0o177)  # never a moment in which another user could connect
    try:
        server.add_insecure_port(config.listen)
    finally:
        os.umask(before)
    return server


def _answers(path: Path) -> bool:
    try:
        connect_unix(path, 2.0).close()
    except OSError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------- without daemon


class Local:
    """The calls of the CRI in this process, as `cri.cli.connect` makes them."""

    def __init__(self, built: Built) -> None:
        self._service = built.service
        self.own = built.own
        self.images = built.images

    async def call(self, name: str, request: Any, metadata: Metadata = ()) -> Any:
        """The answer. Raises cri.errors.CallFailed."""
        return await self._service.call(name, request, metadata)


@contextlib.asynccontextmanager
async def local(config: Config) -> AsyncIterator[Local]:
    """The parts of `config` for the length of a command; waits for another command that works in the root."""
    with owned(config, wait_s=_LOCK_WAIT_S):
        built = build(config, direct=True)
        try:
            await recover(built.node, built.events)
            built.service.intercept.why_not = ""
            yield Local(built)
        finally:
            await built.close()
