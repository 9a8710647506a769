"""A whole CRI server on fakes: real store, verbs, recovery, service; no kernel, no root.

`Rig.call` makes a call as gRPC would and raises CallFailed; `restart` is a kill -9 of the daemon and its next start on
the same parts; `leftovers` lists everything that a node without pods must not have.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from cri.api import api_pb2 as pb
from cri.config import Config, LimitSection
from cri.daemon import _server
from cri.events import Events
from cri.feed import Feed
from cri.intercept import Intercept
from cri.node import Node, Parts
from cri.patience import Patience
from cri.recovery import lost, recover
from cri.service import Metadata, Service
from cri.stats import Statistics
from cri.store import Store, open_sound
from cri.streaming.server import Server
from cri.streaming.sessions import Sessions
from imagestore.model import Image, ImageConfig
from tests.fakes.containers import MemoryContainers
from tests.fakes.images import MemoryImages, make_image
from tests.fakes.network import FakeNetwork
from tests.fakes.snapshots import Blob, MemorySnapshots, blob, file
from tests.support import SOON_S

IMAGE = "registry.test/busybox:1"
PASSWD = b"root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1001:web:/home/web:/bin/sh\n"
GROUP = b"root:x:0:\nweb:x:1001:\nextra:x:1002:web\n"


class Rig:
    """The server and what it stands on. `open` before use, `close` after it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        limits = LimitSection(stop_s=0.5, recovery_s=1.0)
        self.config = replace(Config(), root=directory / "root", state=directory / "state", limits=limits)
        self.logs = directory / "logs"
        for path in (self.config.root, self.config.state, self.config.state / "pods", self.config.state / "bundles"):
            path.mkdir()
        (directory / "layers").mkdir()
        self.images = MemoryImages()
        self.snapshots = MemorySnapshots(directory / "layers")
        self.shims = MemoryContainers()
        self.network = FakeNetwork(self.config.state / "netns")
        self.image = self._pull()
        self.open(ready=True)

    def _pull(self) -> Image:
        layer: Blob = blob(self.directory, [file("etc/passwd", PASSWD), file("etc/group", GROUP)])
        self.snapshots.unpack_layer(*layer.arguments())
        config = ImageConfig(env=("PATH=/bin",), cmd=("sh", "-c", "sleep 1000"), architecture="amd64")
        image = make_image("busybox", layers=1, config=config)
        whole = replace(image, layers=(replace(image.layers[0], chain_id=layer.chain_id),))
        self.images.offer(IMAGE, whole)
        return whole

    def open(self, *, ready: bool) -> None:
        """The daemon's start, up to its recovery."""
        self.node = Node(
            self.config,
            Store(open_sound(self.config.root / "ocid.db")),
            Parts(self.images, self.snapshots, self.shims, self.shims, self.network, self.shims),
        )
        node = self.node
        self.events = Events(node, lambda pod_id: _spawn(node, pod_id))
        node.events = self.events
        node.statistics = self.statistics = Statistics(node)
        node.feed = self.feed = Feed(node.store)
        node.streams = self.streams = Server(self.config.stream, Sessions(self.shims, node.exec_threads))
        self.service = Service(node, Intercept("" if ready else "recovering"))

    async def restart(self) -> None:
        """As after a kill -9: nothing is said goodbye to, and what was under way is gone."""
        await self.kill()
        await self.restart_only()

    async def restart_only(self) -> None:
        """The start after `kill`."""
        self.open(ready=False)
        await recover(self.node, self.events)
        self.service.intercept.why_not = ""

    async def kill(self) -> None:
        """The daemon is gone; shims, files and the database are as they were."""
        await self.node.store.settle()
        self.events.close()
        self.node.store._db.close()

    async def close(self) -> None:
        await self.node.tasks.drain(2)
        self.events.close()
        await self.node.store.close()
        self.node.exec_threads.close()

    async def call(self, name: str, request: Any, metadata: Metadata = (), left_s: float | None = None) -> Any:
        """Raises cri.errors.CallFailed."""
        return await self.service.call(name, request, metadata, left_s)

    # ---------------------------------------------------------------------------------------------------- shorthands

    async def pull(self) -> str:
        request = pb.PullImageRequest(image=pb.ImageSpec(image=IMAGE))
        return str((await self.call("PullImage", request)).image_ref)

    def pod_config(self, name: str = "web", **fields: Any) -> pb.PodSandboxConfig:
        metadata = pb.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="default", attempt=0)
        config = pb.PodSandboxConfig(metadata=metadata, log_directory=str(self.logs / name), **fields)
        if not config.linux.security_context.HasField("namespace_options"):
            config.linux.security_context.namespace_options.pid = pb.CONTAINER
        return config

    async def run_pod(self, name: str = "web", metadata: Metadata = (), **fields: Any) -> str:
        request = pb.RunPodSandboxRequest(config=self.pod_config(name, **fields))
        return str((await self.call("RunPodSandbox", request, metadata)).pod_sandbox_id)

    def container_config(self, name: str = "main", script: str = "", **fields: Any) -> pb.ContainerConfig:
        command = ["sh", "-c", script] if script else []
        return pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name),
            image=pb.ImageSpec(image=IMAGE),
            command=command,
            log_path=f"{name}.log",
            **fields,
        )

    async def create(self, pod_id: str, name: str = "main", script: str = "", **fields: Any) -> str:
        request = pb.CreateContainerRequest(
            pod_sandbox_id=pod_id, config=self.container_config(name, script, **fields), sandbox_config=None
        )
        return str((await self.call("CreateContainer", request)).container_id)

    async def start(self, container_id: str) -> None:
        await self.call("StartContainer", pb.StartContainerRequest(container_id=container_id))

    async def run(self, pod_id: str, name: str = "main", script: str = "", **fields: Any) -> str:
        container_id = await self.create(pod_id, name, script, **fields)
        await self.start(container_id)
        return container_id

    async def stop(self, container_id: str, timeout: int = 0) -> None:
        await self.call("StopContainer", pb.StopContainerRequest(container_id=container_id, timeout=timeout))

    async def remove(self, container_id: str) -> None:
        await self.call("RemoveContainer", pb.RemoveContainerRequest(container_id=container_id))

    async def stop_pod(self, pod_id: str) -> None:
        await self.call("StopPodSandbox", pb.StopPodSandboxRequest(pod_sandbox_id=pod_id))

    async def remove_pod(self, pod_id: str) -> None:
        await self.call("RemovePodSandbox", pb.RemovePodSandboxRequest(pod_sandbox_id=pod_id))

    async def status(self, container_id: str) -> pb.ContainerStatus:
        request = pb.ContainerStatusRequest(container_id=container_id)
        status: pb.ContainerStatus = (await self.call("ContainerStatus", request)).status
        return status

    async def pod_status(self, pod_id: str) -> pb.PodSandboxStatus:
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod_id)
        status: pb.PodSandboxStatus = (await self.call("PodSandboxStatus", request)).status
        return status

    async def ended(self, container_id: str) -> pb.ContainerStatus:
        """The status once the server knows that the container has ended."""
        async with asyncio.timeout(SOON_S):
            while (status := await self.status(container_id)).state != pb.CONTAINER_EXITED:
                await asyncio.sleep(0.002)
        return status

    def sandbox(self, pod_id: str) -> Any:
        return self.node.sandbox(self.node.store.pods[pod_id])

    def leftovers(self) -> list[str]:
        """What there is of pods and containers, in memory, on disk, with the parts and in the database."""
        found = [f"record {id_}" for id_ in (*self.node.store.pods, *self.node.store.containers)]
        for directory in ("pods", "bundles", "netns"):
            path = self.config.state / directory
            found += [f"{directory}/{entry.name}" for entry in path.iterdir()] if path.exists() else []
        found += [f"snapshot {item.key}" for item in self.snapshots.list()]
        found += [f"addresses of {pod_id}" for pod_id in self.network.pods]
        found += [f"shim {pod_id}" for pod_id in self.shims.pods]
        db = open_sound(self.config.root / "ocid.db")
        for table in ("pods", "containers"):
            found += [f"{table} row {row[0]}" for row in db.execute(f"SELECT id FROM {table}")]
        db.close()
        return found


def _spawn(node: Node, pod_id: str) -> None:
    node.tasks.spawn(lost(node, pod_id), "lost")


@contextlib.asynccontextmanager
async def rig(directory: Path) -> AsyncIterator[Rig]:
    """A server with its image pulled."""
    built = Rig(directory)
    try:
        await built.pull()
        yield built
    finally:
        await built.close()


@contextlib.asynccontextmanager
async def connected_to(rig: Rig) -> AsyncIterator[grpc.aio.Channel]:
    """A connection to `rig`, served on a socket as the daemon serves."""
    rig.config = replace(rig.config, listen=f"unix://{rig.config.state}/ocid.sock")
    server = _server(rig.config, rig.service)
    await server.start()
    async with grpc.aio.insecure_channel(rig.config.listen) as channel:
        yield channel
    await server.stop(0)


def on_rig(directory: Path, body: Callable[[Rig], Coroutine[Any, Any, None]], seconds: float = SOON_S) -> None:
    """Runs `body` on a loop of its own, and not for ever."""

    async def bounded() -> None:
        async with asyncio.timeout(seconds), rig(directory) as built:
            await body(built)

    asyncio.run(bounded())


class GoneAt(Patience):
    """That of a caller who has gone when it is looked for the time `looks`."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self._looks = looks

    def check(self) -> None:
        self._looks -= 1
        if self._looks == 0:
            self._until = 0.0
        super().check()
