"""A node that is watched: spans of a pod's start down to the steps of its init, metrics, JSON logs, and what a gRPC
client finds on the socket without knowing what is served there."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from conformance.cri_client import container
from conformance.leaks import Machine
from cri.api import api_pb2 as pb
from tests.e2e import Node, retired, stocked
from tests.fakes.collector import Collector, attributes, collecting
from tests.streaming import Ws
from tests.support import SOON_S, eventually, needs

SERVICE = "runtime.v1.RuntimeService"


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Watched:
    """The node, and those who watch it."""

    def __init__(self, node: Node, collector: Collector, metrics: int) -> None:
        self.node = node
        self.collector = collector
        self._metrics = f"http://127.0.0.1:{metrics}/metrics"
        self.image = ""
        # The first of everything, by the fixture: trace, pod, container.
        self.first = ("", "", "")

    def scrape(self) -> dict[str, float]:
        """Each series with its value."""
        with urllib.request.urlopen(self._metrics, timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def log(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.node.log.read_text().splitlines()]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    needs("root", "overlay", "busybox")
    directory = tmp_path_factory.mktemp("n")
    port = _free_port()
    with stocked() as registry, collecting() as collector:
        before = Machine.now()
        node = Node(directory)
        extra = f'log_format = "json"\n[metrics]\nenabled = true\nport = {port}\n[tracing]\n'
        (directory / "conf.d").mkdir()
        (directory / "conf.d/watch.toml").write_text(f'{extra}endpoint = "{collector.endpoint}"\n')
        found = Watched(node, collector, port)
        found.image = f"{registry.name}/busybox:1"
        try:
            node.start()
            trace_id = secrets.token_hex(16)
            found.first = (trace_id, *_start_a_pod(found, trace_id))
            node.drop(found.first[1])
            yield found
        finally:
            node.client.clear()
            node.end()
            retired(node, before)


def _start_a_pod(watched: Watched, trace_id: str) -> tuple[str, str]:
    """Pulls, and runs a pod with a container, as somebody would whose own span is in `trace_id`."""
    node = watched.node
    with grpc.insecure_channel(f"unix://{node.socket}") as channel:
        metadata = (("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01"),)

        def call(service: str, name: str, request: object, reply: type) -> object:
            method = channel.unary_unary(
                f"/runtime.v1.{service}/{name}",
                request_serializer=lambda message: message.SerializeToString(),  # type: ignore[attr-defined]
                response_deserializer=reply.FromString,  # type: ignore[attr-defined]
            )
            return method(request, metadata=metadata, timeout=60)

        pull = pb.PullImageRequest(image=pb.ImageSpec(image=watched.image))
        call("ImageService", "PullImage", pull, pb.PullImageResponse)
        config = node.pod_config(network=True)
        pod = call("RuntimeService", "RunPodSandbox", pb.RunPodSandboxRequest(config=config), pb.RunPodSandboxResponse)
        pod_id = str(pod.pod_sandbox_id)  # type: ignore[attr-defined]
        create = pb.CreateContainerRequest(
            pod_sandbox_id=pod_id, config=container("main", watched.image, ["sleep", "1000"]), sandbox_config=config
        )
        made = call("RuntimeService", "CreateContainer", create, pb.CreateContainerResponse)
        one = str(made.container_id)  # type: ignore[attr-defined]
        call("RuntimeService", "StartContainer", pb.StartContainerRequest(container_id=one), pb.StartContainerResponse)
    return pod_id, one


def test_a_collector_receives_the_spans_of_a_pods_start_in_the_callers_trace(watched: Watched) -> None:
    trace_id, pod, one = watched.first
    last = f"{SERVICE}/StartContainer"
    eventually(lambda: any(span.name == last for span in watched.collector.of(trace_id)), 20, "spans to come")
    paths = watched.collector.paths(trace_id)
    pull = "runtime.v1.ImageService/PullImage"
    run, create = f"{SERVICE}/RunPodSandbox", f"{SERVICE}/CreateContainer"
    expected = {
        pull,
        f"{pull} > image.pull",
        run,
        f"{run} > network.new_netns",
        f"{run} > network.add > cni.add plugin bridge (native)",
        f"{run} > network.add > cni.add plugin portmap (native)",
        f"{run} > shim.start > namespaces",
        f"{run} > shim.start > shm",
        create,
        f"{create} > snapshot.prepare",
        f"{create} > shim.create > cgroup",
        f"{create} > shim.create > init > mounts",
        f"{create} > shim.create > init > pivot",
        f"{create} > shim.create > init > command",
        f"{last} > shim.start_container",
    }
    assert not expected - paths, "\n".join(sorted(paths))
    assert any(path.startswith(f"{pull} > download sha256:") for path in paths)
    assert any(path.startswith(f"{pull} > unpack sha256:") for path in paths)
    roots = {span.name: span for span in watched.collector.of(trace_id) if "/" in span.name}
    for name in (pull, run, create, last):
        assert roots[name].parent_span_id.hex() == "00f067aa0ba902b7"
        assert attributes(roots[name])["rpc.grpc.status_code"] == 0
    assert attributes(roots[run])["pod.id"] == pod
    assert attributes(roots[create]) | {"pod.id": pod, "container.id": one} == attributes(roots[create])
    assert all(resource["service.name"] == "ocid" for resource in watched.collector.resources)


def test_calls_that_stream_and_what_goes_on_after_an_answer_are_in_the_callers_trace(watched: Watched) -> None:
    node, trace_id = watched.node, secrets.token_hex(16)
    metadata = (("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01"),)
    pod, one, _ = node.run(watched.image, ["sleep", "1000"])
    runtime = node.client.runtime
    assert list(runtime.StreamContainers(pb.StreamContainersRequest(), metadata=metadata, timeout=60))
    events = runtime.GetContainerEvents(pb.GetEventsRequest(), metadata=metadata, timeout=60)
    events.initial_metadata()
    events.cancel()
    request = pb.ExecRequest(container_id=one, cmd=["true"], stdout=True)
    url = runtime.Exec(request, metadata=metadata, timeout=60).url
    with pytest.raises(urllib.error.HTTPError, match="400"):  # a client that speaks neither of the protocols
        urllib.request.urlopen(url, timeout=60)
    wanted = {f"{SERVICE}/StreamContainers", f"{SERVICE}/GetContainerEvents", f"{SERVICE}/Exec > stream.exec"}
    eventually(lambda: wanted <= watched.collector.paths(trace_id), 20, "the spans to come")
    codes = {span.name: attributes(span).get("rpc.grpc.status_code") for span in watched.collector.of(trace_id)}
    assert (codes[f"{SERVICE}/StreamContainers"], codes[f"{SERVICE}/GetContainerEvents"]) == (0, 1)
    node.drop(pod)


def test_commands_have_the_steps_of_their_process_below_them(watched: Watched) -> None:
    """ExecSync, and Exec once somebody comes for it."""
    node, trace_id = watched.node, secrets.token_hex(16)
    metadata = (("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01"),)
    pod, one, _ = node.run(watched.image, ["sleep", "1000"])
    runtime = node.client.runtime
    sync = pb.ExecSyncRequest(container_id=one, cmd=["true"], timeout=60)
    assert runtime.ExecSync(sync, metadata=metadata, timeout=60).exit_code == 0
    asked = pb.ExecRequest(container_id=one, cmd=["true"], stdout=True)
    url = runtime.Exec(asked, metadata=metadata, timeout=60).url

    async def come_for_it() -> bytes:
        async with Ws.open(url) as client:
            return (await client.channels())[3]

    assert json.loads(asyncio.run(come_for_it()))["status"] == "Success"
    steps = ("look up", "join", "process > session", "process > command", "process > wait")
    wanted = {f"{SERVICE}/ExecSync > shim.exec_sync > {step}" for step in (*steps, "run")}
    wanted |= {f"{SERVICE}/Exec > stream.exec > {step}" for step in steps}
    eventually(lambda: wanted <= watched.collector.paths(trace_id), 20, "the spans to come")
    node.drop(pod)


def test_a_call_that_fails_has_a_span_that_says_so_and_the_daemons_own_work_has_none(watched: Watched) -> None:
    with pytest.raises(grpc.RpcError):
        watched.node.client.start("f" * 64)

    def failed() -> list[object]:
        spans = [span for span in watched.collector.spans if attributes(span).get("rpc.grpc.status_code") == 5]
        return [span for span in spans if span.name == f"{SERVICE}/StartContainer"]

    (span,) = eventually(failed, 20, "the span of the call that failed")
    assert span.status.code == 2 and "not found" in span.status.message  # type: ignore[attr-defined]
    lonely = [span.name for span in watched.collector.spans if not span.parent_span_id and "/" not in span.name]
    assert not lonely, "work that nobody called for has spans"


def test_metrics_count_calls_errors_pulls_pods_and_memory(watched: Watched) -> None:
    before = watched.scrape()
    pod, one = _start_a_pod(watched, secrets.token_hex(16))
    with pytest.raises(grpc.RpcError):
        watched.node.client.start(one)
    now = watched.scrape()

    def more(series: str) -> float:
        return now[series] - before.get(series, 0)

    assert more('ocid_operations_total{operation="RunPodSandbox"}') == 1
    assert more('ocid_operations_total{operation="StartContainer"}') == 2
    assert more('ocid_operations_errors_total{code="FAILED_PRECONDITION",operation="StartContainer"}') == 1
    assert more('ocid_operations_seconds_count{operation="CreateContainer"}') == 1
    assert more('ocid_operations_seconds_sum{operation="CreateContainer"}') > 0
    assert more('ocid_image_pulls_total{result="ok"}') == 1
    assert now["ocid_image_pull_bytes_total"] > 100_000, "busybox is larger"
    assert more("ocid_shims") == 1 and more('ocid_containers{state="running"}') == 1
    assert now["ocid_shims_memory_bytes"] > 100_000
    assert now["process_resident_memory_bytes"] > 1 << 20
    assert 'ocid_pods{state="ready"}' in now and 'ocid_build_info{version="0.1.0"}' in now
    watched.node.drop(pod)
    assert "ocid_shims 0.0" in [f"{name} {value}" for name, value in watched.scrape().items()]


def test_nothing_but_metrics_is_served_there(watched: Watched) -> None:
    base = watched._metrics.removesuffix("/metrics")
    for path in ("/", "/debug/pprof", "/metrics/", "/..%2fetc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(base + path, timeout=10)
        assert caught.value.code == 404
    request = urllib.request.Request(base + "/metrics", method="PUT")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    assert caught.value.code == 405


def test_log_lines_are_json_and_say_what_they_are_about(watched: Watched) -> None:
    trace_id = secrets.token_hex(16)
    pod, one = _start_a_pod(watched, trace_id)
    watched.node.client.stop(one)
    eventually(lambda: any("ended: code" in line["msg"] and line.get("container") == one for line in watched.log()))
    watched.node.drop(pod)
    lines = watched.log()
    for words, about in (("is ready", {"pod": pod}), ("is created in pod", {"pod": pod, "container": one})):
        found = [
            line for line in lines if words in line["msg"] and pod[:13] + one[:13] and about.items() <= line.items()
        ]
        assert len(found) == 1 and found[0]["trace_id"] == trace_id and found[0]["level"] == "info"
    assert all(line["time"].endswith("Z") and line["logger"].startswith("cri") for line in lines)


def test_health_and_reflection_by_their_own_clients(watched: Watched) -> None:
    with grpc.insecure_channel(f"unix://{watched.node.socket}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "runtime.v1.RuntimeService", "runtime.v1.ImageService", "grpc.health.v1.Health"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, name
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(health_pb2.HealthCheckRequest(service="nosuch"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"runtime.v1.RuntimeService", "runtime.v1.ImageService"} <= set(database.get_services())
        pool = DescriptorPool(database)
        service = pool.FindServiceByName("runtime.v1.RuntimeService")
        assert len(service.methods) == len(pb.DESCRIPTOR.services_by_name["RuntimeService"].methods)
        assert pool.FindServiceByName("grpc.health.v1.Health").methods_by_name["Check"]


def test_neither_a_collector_that_is_away_nor_a_client_that_watches_keeps_a_daemon_from_ending(tmp_path: Path) -> None:
    needs("root", "overlay")
    before = Machine.now()
    node = Node(tmp_path, limits=f'[tracing]\nendpoint = "http://127.0.0.1:{_free_port()}"')
    over = threading.Event()
    try:
        node.start()
        for _ in range(50):
            node.client.version()
        with grpc.insecure_channel(f"unix://{node.socket}") as channel:
            seen = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
            states = [next(seen).status]
            if states[-1] == health_pb2.HealthCheckResponse.NOT_SERVING:  # it recovers still
                states.append(next(seen).status)
            assert states[-1] == health_pb2.HealthCheckResponse.SERVING
            reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
            kept = reflection.ServerReflectionInfo(_and_then_nothing(over), timeout=60)
            assert next(kept).HasField("list_services_response")
            assert node.process is not None
            node.process.send_signal(signal.SIGTERM)
            assert [answer.status for answer in seen] == [health_pb2.HealthCheckResponse.NOT_SERVING]
            assert list(kept) == []
        assert node.process.wait(SOON_S) == 0
        assert "Traceback" not in node.log.read_text()
    finally:
        over.set()
        node.end()
        retired(node, before)


def _and_then_nothing(over: threading.Event) -> Iterator[object]:
    """A client that asks for the services and keeps the line open."""
    yield reflection_pb2.ServerReflectionRequest(list_services="")
    over.wait(SOON_S)
