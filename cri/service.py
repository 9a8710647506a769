"""The CRI's calls by name, each to its verb; the same table serves gRPC and this process.

Only translates. Refuses by name what this version does not have. Invariant: every call of the proto has an answer,
since the table is checked against the descriptor when it is built.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc

from cri.api import api_pb2 as pb
from cri.errors import CallFailed
from cri.intercept import Call, Intercept
from cri.node import Begun, Node
from cri.patience import Patience
from cri.verbs import (
    attach,
    checkpoint,
    container_events,
    container_stats,
    create_container,
    exec,
    exec_sync,
    images,
    pod_metrics,
    pod_stats,
    port_forward,
    query,
    remove_container,
    remove_pod,
    reopen_log,
    restore_pod,
    run_pod,
    start_container,
    stop_container,
    stop_pod,
    streams,
    update_container,
    update_pod,
)

if TYPE_CHECKING:
    from imagestore.model import KeyFile

# gRPC metadata that our own command line sends: with RunPodSandbox a network's name, or "none"; with PullImage and
# CreateContainer the private keys that open the image's layers, as imagestore.encryption.keys.pack writes them; with
# PullImage that what an index has for other platforms is kept, too, or another platform than this machine's.
NETWORK_KEY = "ocid-network"
KEYS_KEY = "ocid-decryption-keys-bin"
ALL_PLATFORMS_KEY = "ocid-all-platforms"
PLATFORM_KEY = "ocid-platform"
_CARRYING = frozenset({"RunPodSandbox", "PullImage", "CreateContainer"})
# Calls that must be over when their caller's deadline passes, with everything as it was.
_TIMED = frozenset({"CheckpointPod", "RestorePod"})

Verb = Callable[..., Awaitable[Any]]
Stream = Callable[[Node, Any, Begun], AsyncGenerator[bytes, None]]
Metadata = Sequence[tuple[str, Any]]

VERBS: dict[str, Verb] = {
    "Version": query.version,
    "Status": query.node_status,
    "RuntimeConfig": query.runtime_config,
    "UpdateRuntimeConfig": query.update_runtime_config,
    "RunPodSandbox": run_pod.run_pod,
    "StopPodSandbox": stop_pod.stop_pod,
    "RemovePodSandbox": remove_pod.remove_pod,
    "PodSandboxStatus": query.pod_status,
    "ListPodSandbox": query.list_pods,
    "CreateContainer": create_container.create_container,
    "StartContainer": start_container.start_container,
    "StopContainer": stop_container.stop_container,
    "RemoveContainer": remove_container.remove_container,
    "ContainerStatus": query.container_status,
    "ListContainers": query.list_containers,
    "UpdateContainerResources": update_container.update_container,
    "UpdatePodSandboxResources": update_pod.update_pod,
    "CheckpointContainer": checkpoint.checkpoint_container,
    "CheckpointPod": checkpoint.checkpoint_pod,
    "RestorePod": restore_pod.restore_pod,
    "ReopenContainerLog": reopen_log.reopen_log,
    "ExecSync": exec_sync.exec_sync,
    "Exec": exec.exec_stream,
    "Attach": attach.attach,
    "PortForward": port_forward.port_forward,
    "ContainerStats": container_stats.container_stats,
    "ListContainerStats": container_stats.list_container_stats,
    "PodSandboxStats": pod_stats.pod_stats,
    "ListPodSandboxStats": pod_stats.list_pod_stats,
    "ListMetricDescriptors": pod_metrics.list_metric_descriptors,
    "ListPodSandboxMetrics": pod_metrics.list_pod_metrics,
    "ListImages": images.list_images,
    "ImageStatus": images.image_status,
    "PullImage": images.pull_image,
    "RemoveImage": images.remove_image,
    "ImageFsInfo": images.image_fs_info,
}

STREAMS: dict[str, Stream] = {
    "GetContainerEvents": container_events.container_events,
    "StreamPodSandboxes": streams.stream_pods,
    "StreamContainers": streams.stream_containers,
    "StreamImages": streams.stream_images,
    "StreamContainerStats": streams.stream_container_stats,
    "StreamPodSandboxStats": streams.stream_pod_stats,
    "StreamPodSandboxMetrics": streams.stream_pod_metrics,
}

_METHODS = {method.name: method for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods}
if unlike := (VERBS.keys() | STREAMS.keys()) ^ _METHODS.keys():
    raise AssertionError(f"here or in the proto alone: {unlike}")


def _service(name: str) -> str:
    """The full name of the service that has the call."""
    full: str = _METHODS[name].containing_service.full_name if name in _METHODS else ""
    return full


def _keys(metadata: Metadata) -> tuple[KeyFile, ...]:
    packed = next((value for key, value in metadata if key == KEYS_KEY), None)
    if packed is None:
        return ()
    from imagestore.encryption.keys import unpack

    return unpack(packed)


class Service:
    """The calls of one node."""

    def __init__(self, node: Node, intercept: Intercept) -> None:
        self.node = node
        self.intercept = intercept

    async def call(self, name: str, request: Any, metadata: Metadata = (), left_s: float | None = None) -> Any:
        """The answer to a call, whose caller waits for so long. Raises CallFailed."""
        call = Call(_service(name), name, request, metadata)
        return await self.intercept.run(call, self._dispatch(name, request, metadata, left_s))

    async def _dispatch(self, name: str, request: Any, metadata: Metadata, left_s: float | None) -> Any:
        verb = VERBS[name]
        if name in _TIMED:
            return await verb(self.node, request, Patience(left_s))
        if name == "RunPodSandbox":
            network = next((str(value) for key, value in metadata if key == NETWORK_KEY), "")
            return await run_pod.run_pod(self.node, request, network)
        if not metadata or name not in ("PullImage", "CreateContainer"):
            return await verb(self.node, request)
        keys = _keys(metadata)
        if name == "PullImage":
            everything = any(key == ALL_PLATFORMS_KEY for key, _ in metadata)
            platform = next((str(value) for key, value in metadata if key == PLATFORM_KEY), "")
            return await images.pull_image(self.node, request, keys, all_platforms=everything, platform=platform)
        return await verb(self.node, request, keys)

    def stream(self, name: str, request: Any, begun: Begun, metadata: Metadata = ()) -> AsyncGenerator[bytes, None]:
        """The encoded messages that answer a streaming call. Raises CallFailed."""
        answers = STREAMS[name](self.node, request, begun)
        return self.intercept.stream(Call(_service(name), name, request, metadata, True), answers)

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """RuntimeService and ImageService for a grpc.aio server."""
        return tuple(
            grpc.method_handlers_generic_handler(
                service.full_name, {method.name: self._handler(method) for method in service.methods}
            )
            for service in pb.DESCRIPTOR.services_by_name.values()
        )

    def _handler(self, method: Any) -> grpc.RpcMethodHandler:
        name = method.name
        parse = getattr(pb, method.input_type.name).FromString

        async def unary(request: Any, context: grpc.aio.ServicerContext) -> bytes:
            try:
                wanted = name in _CARRYING or self.intercept.watched
                metadata = context.invocation_metadata() or () if wanted else ()
                left_s = context.time_remaining() if name in _TIMED else None
                answer: bytes = (await self.call(name, request, metadata, left_s)).SerializeToString()
                return answer
            except CallFailed as error:
                await context.abort(error.code, str(error))
                raise AssertionError("abort returned") from None

        async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            async def begun() -> None:
                await context.send_initial_metadata(())

            try:
                metadata = context.invocation_metadata() or () if self.intercept.watched else ()
                async with aclosing(self.stream(name, request, begun, metadata)) as messages:
                    async for message in messages:
                        yield message
            except CallFailed as error:
                await context.abort(error.code, str(error))

        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, request_deserializer=parse)
        return grpc.unary_unary_rpc_method_handler(unary, request_deserializer=parse)
