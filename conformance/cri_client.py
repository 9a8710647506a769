"""A CRI v1 client for whatever serves a socket: the calls that demonstration and measurements make, with plain values
in and out. Refuses to know which runtime answers."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from cri.api import api_pb2, api_pb2_grpc

CALL_S = 120.0


class Cri:
    """One connection. Every method is one RPC of the name it resembles and raises grpc.RpcError as it comes."""

    def __init__(self, socket: Path) -> None:
        # A long unix path needs the three slashes; gRPC's HTTP proxy settings do not apply to unix sockets.
        self._channel = grpc.insecure_channel(f"unix://{socket}")
        self.runtime = api_pb2_grpc.RuntimeServiceStub(self._channel)
        self.images = api_pb2_grpc.ImageServiceStub(self._channel)

    def __enter__(self) -> Cri:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._channel.close()

    def version(self) -> tuple[str, str]:
        reply = self.runtime.Version(api_pb2.VersionRequest(), timeout=CALL_S)
        return reply.runtime_name, reply.runtime_version

    def conditions(self) -> dict[str, bool]:
        reply = self.runtime.Status(api_pb2.StatusRequest(), timeout=CALL_S)
        return {condition.type: condition.status for condition in reply.status.conditions}

    def pull(self, image: str, timeout: float = CALL_S) -> str:
        spec = api_pb2.ImageSpec(image=image)
        return str(self.images.PullImage(api_pb2.PullImageRequest(image=spec), timeout=timeout).image_ref)

    def remove_image(self, image: str) -> None:
        self.images.RemoveImage(api_pb2.RemoveImageRequest(image=api_pb2.ImageSpec(image=image)), timeout=CALL_S)

    def list_images(self) -> list[Any]:
        return list(self.images.ListImages(api_pb2.ListImagesRequest(), timeout=CALL_S).images)

    def run_pod(self, config: Any) -> str:
        request = api_pb2.RunPodSandboxRequest(config=config)
        return str(self.runtime.RunPodSandbox(request, timeout=CALL_S).pod_sandbox_id)

    def create(self, pod: str, config: Any, pod_config: Any) -> str:
        request = api_pb2.CreateContainerRequest(pod_sandbox_id=pod, config=config, sandbox_config=pod_config)
        return str(self.runtime.CreateContainer(request, timeout=CALL_S).container_id)

    def start(self, container: str) -> None:
        self.runtime.StartContainer(api_pb2.StartContainerRequest(container_id=container), timeout=CALL_S)

    def stop(self, container: str, grace_s: int = 0) -> None:
        request = api_pb2.StopContainerRequest(container_id=container, timeout=grace_s)
        self.runtime.StopContainer(request, timeout=CALL_S)

    def remove(self, container: str) -> None:
        self.runtime.RemoveContainer(api_pb2.RemoveContainerRequest(container_id=container), timeout=CALL_S)

    def stop_pod(self, pod: str) -> None:
        self.runtime.StopPodSandbox(api_pb2.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=CALL_S)

    def remove_pod(self, pod: str) -> None:
        self.runtime.RemovePodSandbox(api_pb2.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=CALL_S)

    def exec_sync(self, container: str, command: Sequence[str], timeout_s: int = 60) -> tuple[int, bytes, bytes]:
        request = api_pb2.ExecSyncRequest(container_id=container, cmd=list(command), timeout=timeout_s)
        reply = self.runtime.ExecSync(request, timeout=CALL_S)
        return int(reply.exit_code), bytes(reply.stdout), bytes(reply.stderr)

    def exec_url(self, container: str, command: Sequence[str]) -> str:
        """Where a command's stdout and stderr can be had."""
        request = api_pb2.ExecRequest(container_id=container, cmd=list(command), stdout=True, stderr=True)
        url: str = self.runtime.Exec(request, timeout=CALL_S).url
        return url

    def status(self, container: str) -> Any:
        request = api_pb2.ContainerStatusRequest(container_id=container)
        return self.runtime.ContainerStatus(request, timeout=CALL_S).status

    def info(self, container: str) -> dict[str, Any]:
        """The verbose part of a container's status: pid, the OCI spec and what else a runtime tells."""
        request = api_pb2.ContainerStatusRequest(container_id=container, verbose=True)
        return dict(json.loads(self.runtime.ContainerStatus(request, timeout=CALL_S).info["info"]))

    def pod_status(self, pod: str) -> Any:
        return self.runtime.PodSandboxStatus(api_pb2.PodSandboxStatusRequest(pod_sandbox_id=pod), timeout=CALL_S).status

    def stats(self, container: str) -> Any:
        return self.runtime.ContainerStats(api_pb2.ContainerStatsRequest(container_id=container), timeout=CALL_S).stats

    def list_stats(self) -> list[Any]:
        return list(self.runtime.ListContainerStats(api_pb2.ListContainerStatsRequest(), timeout=CALL_S).stats)

    def list_containers(self) -> list[Any]:
        return list(self.runtime.ListContainers(api_pb2.ListContainersRequest(), timeout=CALL_S).containers)

    def list_pods(self) -> list[Any]:
        return list(self.runtime.ListPodSandbox(api_pb2.ListPodSandboxRequest(), timeout=CALL_S).items)

    def wait_exit(self, container: str, seconds: float = 120.0) -> int:
        """Polls until the container has exited; returns its code."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self.status(container)
            if status.state == api_pb2.CONTAINER_EXITED:
                return int(status.exit_code)
            time.sleep(0.005)
        raise TimeoutError(f"container {container[:12]} still runs after {seconds:.0f} s")

    def clear(self) -> None:
        """Stops and removes every pod there is: for tearing down, so it goes on after what fails."""
        for pod in self.list_pods():
            with contextlib.suppress(grpc.RpcError):
                self.stop_pod(pod.id)
                self.remove_pod(pod.id)


def _namespaces() -> Any:
    """What a kubelet asks for unless the pod says otherwise: a network and ipc namespace for the pod, a pid namespace
    for each container. (Left out, the field would mean one pid namespace for the pod.)"""
    return api_pb2.NamespaceOption(network=api_pb2.POD, ipc=api_pb2.POD, pid=api_pb2.CONTAINER)


@dataclass(frozen=True, slots=True)
class Names:
    """Makes pod configurations that do not collide, with logs below `logs` and cgroups below `cgroup`."""

    prefix: str
    logs: Path
    cgroup: str = ""

    def pod(self, number: int | str) -> Any:
        name = f"{self.prefix}-{number}"
        metadata = api_pb2.PodSandboxMetadata(name=name, namespace="conformance", uid=f"{name}-{os.urandom(4).hex()}")
        directory = self.logs / name
        directory.mkdir(parents=True, exist_ok=True)
        security = api_pb2.LinuxSandboxSecurityContext(namespace_options=_namespaces())
        linux = api_pb2.LinuxPodSandboxConfig(cgroup_parent=self.cgroup, security_context=security)
        return api_pb2.PodSandboxConfig(metadata=metadata, hostname=name, log_directory=str(directory), linux=linux)


def container(name: str, image: str, command: Sequence[str] = (), labels: Mapping[str, str] | None = None) -> Any:
    """A container of `image`; an empty command leaves the image's own."""
    return api_pb2.ContainerConfig(
        metadata=api_pb2.ContainerMetadata(name=name),
        image=api_pb2.ImageSpec(image=image),
        command=list(command),
        labels=dict(labels or {}),
        log_path=f"{name}.log",
        linux=api_pb2.LinuxContainerConfig(
            security_context=api_pb2.LinuxContainerSecurityContext(namespace_options=_namespaces())
        ),
    )


@contextlib.contextmanager
def connected(socket: Path, seconds: float = 30.0) -> Iterator[Cri]:
    """A client once the socket answers Version and reports itself ready."""
    deadline = time.monotonic() + seconds
    with Cri(socket) as client:
        while True:
            try:
                client.version()
                conditions = client.conditions()
                if all(conditions.values()):
                    break
                reason = f"not ready: {conditions}"
            except grpc.RpcError as error:
                reason = str(error.details())
            if time.monotonic() > deadline:
                raise TimeoutError(f"{socket} does not serve CRI within {seconds:.0f} s: {reason}")
            time.sleep(0.01)
        yield client
