"""Spans, ids and log lines without a node: what is kept when nobody asked, and what is told when somebody did."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cri import trace
from cri.config import Config, ConfigError
from cri.config_read import load
from cri.config_write import as_toml
from cri.daemon import RECOVERING, _server
from cri.discovery import Discovery
from cri.intercept import Call, Intercept
from cri.observe import tracing
from cri.observe.logs import JsonFormatter
from cri.observe.pulls import PullTimes
from cri.threads import to_thread
from imagestore.model import Progress
from tests.fakes.collector import collecting
from tests.fakes.node import Rig, on_rig

ROOT = Path(__file__).parents[2]


class Recorder:
    """A tracer that keeps the names."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def span(self, name: str, attributes: Mapping[str, str | int]) -> AbstractContextManager[object]:
        self.names.append(f"{name} {dict(attributes)}")
        return nullcontext()

    def phases(self, phases: Sequence[trace.Phase]) -> None:
        self.names += [name for name, *_ in phases]

    def ids(self) -> tuple[str, str]:
        return "ab" * 16, "cd" * 8

    def present(self) -> object:
        return "a call"

    def span_of(self, above: object, name: str, attributes: Mapping[str, str | int]) -> AbstractContextManager[object]:
        self.names.append(f"{name} of {above} {dict(attributes)}")
        return nullcontext()


def _line(message: str, *arguments: object, **more: object) -> dict[str, object]:
    record = logging.LogRecord("cri.x", logging.WARNING, __file__, 1, message, arguments, None)
    record.__dict__.update(more)
    text = JsonFormatter().format(record)
    assert "\n" not in text
    found: dict[str, object] = json.loads(text)
    return found


def test_without_a_tracer_a_span_is_one_that_is_always_there() -> None:
    assert trace.tracer() is None
    assert trace.span("a") is trace.span("b", key=1)
    assert trace.present() is None
    assert trace.span_of(None, "a") is trace.span_of("what was present", "b", key=1) is trace.span("c")
    trace.phases([("a", "", 1, 2)])
    with trace.pull_watched() as progress:
        assert progress is None


def test_a_tracer_hears_of_spans_and_phases() -> None:
    recorder = Recorder()
    trace.configure(recorder, None)
    try:
        with trace.span("pull", image_name="x"):
            trace.phases([("step", "", 1, 2)])
        with trace.span_of(trace.present(), "stream.exec", pod_id="p"):
            pass
        assert trace.span_of(None, "of nothing") is trace.span_of(None, "of nothing else")
    finally:
        trace.configure(None, None)
    assert recorder.names == ["pull {'image.name': 'x'}", "step", "stream.exec of a call {'pod.id': 'p'}"]


def test_threads_and_tasks_know_what_a_call_is_about_and_tell_it_more() -> None:
    async def work() -> None:
        trace.about(container="c")
        await to_thread(trace.about, image="i")

    async def call() -> dict[str, str]:
        with trace.scope(pod="p", container=""):
            await asyncio.create_task(work())
            return dict(trace.subject())

    assert asyncio.run(call()) == {"pod": "p", "container": "c", "image": "i"}
    trace.about(pod="x")  # in no call
    assert trace.subject() == {}


def test_a_full_queue_and_a_collector_that_answers_nothing_delay_the_end_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_LAST_S", 0.1)
    monkeypatch.setattr(tracing, "_EXPORT_S", 0.5)
    with collecting() as collector:
        collector.stuck = True
        spans = tracing.open_tracing(replace(Config().tracing, endpoint=collector.endpoint))
        for _ in range(tracing._QUEUE):
            with spans.call(Call("s", "c", None)):
                pass
        before = collector.calls
        spans.close()
        assert collector.calls - before <= 1  # not one for each batch that waits


def test_a_log_line_is_one_object_whatever_is_in_it() -> None:
    with trace.scope(pod="p" * 64, container="c" * 64):
        found = _line('two\nlines, "quotes", \udcff and %s', "\x00")
    assert found["msg"] == 'two\nlines, "quotes", \udcff and \x00'
    assert (found["level"], found["logger"], found["pod"], found["container"]) == ("warn", "cri.x", "p" * 64, "c" * 64)
    assert "trace_id" not in found and "pod" not in _line("nothing")


def test_a_traceback_stays_inside_and_what_cannot_be_formatted_is_told() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        assert "ValueError: why" in str(_line("failed", exc_info=sys.exc_info())["error"])
    assert "cannot be formatted" in str(_line("%d", "no number")["msg"])


def test_a_traced_line_says_where_it_belongs() -> None:
    trace.configure(Recorder(), None)
    try:
        assert _line("x")["trace_id"] == "ab" * 16
    finally:
        trace.configure(None, None)


def test_a_pulls_progress_becomes_phases_of_its_blobs() -> None:
    sizes: list[int] = []
    found: list[trace.Phase] = []
    times = PullTimes(sizes.append, found.extend)
    told = times.tell()
    for digest, phase, done in (
        ("a", "waiting", 0),
        ("a", "download", 0),
        ("b", "exists", 7),
        ("a", "download", 10),
        ("a", "download", 10),
        ("a", "unpack", 0),
        ("c", "download", 3),
        ("a", "done", 10),
    ):
        told(Progress(digest, phase, done, 10))
    times.over()  # the pull failed while c was on its way
    assert [name for name, *_ in found] == ["download a", "unpack a", "download c"]
    assert sizes == [10], "what did not come whole, or was there, was not downloaded"
    assert all(since <= end for _, _, since, end in found)


def test_who_watches_sees_failures_and_callers_that_leave(tmp_path: Path) -> None:
    seen: list[str] = []

    class Watcher:
        def call(self, call: Call) -> AbstractContextManager[None]:
            return _noted(call, seen)

    async def body(rig: Rig) -> None:
        rig.service.intercept.observers = (Watcher(),)
        with pytest.raises(Exception, match="not found"):
            await rig.start("f" * 64)
        await rig.run_pod()

    on_rig(tmp_path, body)
    assert seen == ["runtime.v1.RuntimeService/StartContainer CallFailed", "runtime.v1.RuntimeService/RunPodSandbox ok"]


class _noted:
    def __init__(self, call: Call, seen: list[str]) -> None:
        self._name, self._seen = f"{call.service}/{call.name}", seen

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._seen.append(f"{self._name} {kind.__name__ if kind else 'ok'}")


async def _look_at_health(address: str, intercept: Intercept, discovery: Discovery) -> None:
    statuses = health_pb2.HealthCheckResponse
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == statuses.NOT_SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="runtime.v1.RuntimeService"))
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nosuch"))
        assert (await watch.read()).status == statuses.NOT_SERVING
        assert (await unknown.read()).status == statuses.SERVICE_UNKNOWN
        intercept.why_not = ""
        assert (await watch.read()).status == statuses.SERVING
        intercept.why_not = "it stops"
        discovery.close()
        assert (await watch.read()).status == statuses.NOT_SERVING
        assert await watch.read() is grpc.aio.EOF and await unknown.read() is grpc.aio.EOF
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            garbage = channel.unary_unary("/grpc.health.v1.Health/Check")
            await garbage(b"\x0a\xff")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_health_says_not_serving_until_the_daemon_has_recovered(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        from dataclasses import replace

        rig.config = replace(rig.config, listen=f"unix://{rig.config.state}/ocid.sock")
        intercept = Intercept(RECOVERING)
        discovery = Discovery(intercept)
        server = _server(rig.config, rig.service, *discovery.handlers())
        await server.start()
        try:
            await _look_at_health(rig.config.listen, intercept, discovery)
        finally:
            await server.stop(None)

    on_rig(tmp_path, body)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[tracing]\nendpoint = "localhost:4317"', "tracing.endpoint: expected"),
        ('[tracing]\nendpoint = "unix:///x y"', "tracing.endpoint: expected"),
        ("[tracing]\nratio = 1.5", "tracing.ratio: expected a number from 0 to 1"),
        ("[metrics]\nenabled = 1", "metrics.enabled: expected true or false"),
        ("[metrics]\nport = 70000", "metrics.port: expected a port"),
        ('log_format = "xml"', "log_format: expected one of text, json"),
    ],
)
def test_what_is_configured_wrongly_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load(tmp_path / "config.toml")


def test_nobody_watches_unless_told_and_then_from_loopback() -> None:
    config = Config()
    assert not config.metrics.enabled and config.metrics.address == "127.0.0.1" and not config.tracing.endpoint
    assert "enabled = false" in as_toml(config)


def test_what_is_off_is_not_imported() -> None:
    program = """
import asyncio, sys
from cri.config import Config
from cri.intercept import Intercept
from cri.observe.setup import set_up_logs, watched
import cri.daemon
async def main():
    intercept = Intercept()
    set_up_logs(Config())
    async with watched(Config(), intercept, None):
        assert not intercept.watched
asyncio.run(main())
print(*(name for name in sys.modules if name.split(".")[0] in ("opentelemetry", "prometheus_client")))
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
