"""Pods and containers in memory: Sandboxes and Containers without a kernel, for tests of what drives them.

A container's script is understood as far as echo, sleep and exit; `sleep 1000` runs until it is signalled. `failures`
arms an error for the next call of a method, `crash` makes a shim disappear, `log` keeps the calls in order. Passes
tests/contract/test_containers.py as the real one does.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from runtime.linux.sockets import send_frame
from runtime.shim.model import (
    ContainerError,
    ContainerFacts,
    ContainerSpec,
    ExecResult,
    ExecSpec,
    ExecStream,
    Sandbox,
    SandboxSpec,
)


@dataclass
class Outcome:
    """What a script of echo, sleep and exit comes to; `runs_on`: until it is signalled."""

    stdout: bytes = b""
    stderr: bytes = b""
    code: int = 0
    runs_on: bool = False


def interpret(process: Mapping[str, object]) -> Outcome:
    """The outcome of a process object, read as `sh -c SCRIPT` or as a plain command."""
    args = [str(word) for word in process.get("args", ())]  # type: ignore[attr-defined]
    script = args[2] if args[:2] == ["sh", "-c"] else " ".join(args)
    outcome = Outcome()
    for part in script.split(";"):
        words = part.split()
        target = "stderr" if ">&2" in words else "stdout"
        words = [word for word in words if word != ">&2"]
        if not words or words[0] == "true":
            continue
        if words[0] == "echo":
            setattr(outcome, target, getattr(outcome, target) + " ".join(words[1:]).encode() + b"\n")
        elif words[0] == "exit":
            outcome.code = int(words[1])
            return outcome
        elif words[0] == "sleep" and float(words[1]) >= 1:
            outcome.runs_on = True
            return outcome
        elif words[0] == "false":
            outcome.code = 1
    return outcome


@dataclass
class _Container:
    spec: ContainerSpec
    facts: ContainerFacts
    outcome: Outcome
    attached: list[tuple[list[int], socket.socket]] = field(default_factory=list)
    resources: list[Mapping[str, object]] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)
    frozen: bool = False


@dataclass
class _Pod:
    spec: SandboxSpec
    sandbox: Sandbox
    containers: dict[str, _Container] = field(default_factory=dict)
    subscribers: list[socket.socket] = field(default_factory=list)


class MemoryContainers:
    """The fake. Thread-safe as the real one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pids = itertools.count(100_000)
        self.pods: dict[str, _Pod] = {}
        self.failures: dict[str, ContainerError] = {}
        self.log: list[str] = []
        self.restored: dict[str, dict[str, bytes]] = {}

    def _called(self, name: str, what: str) -> None:
        self.log.append(f"{name} {what}")
        failure = self.failures.pop(name, None)
        if failure is not None:
            raise failure

    def _pod(self, sandbox: Sandbox) -> _Pod:
        pod = self.pods.get(sandbox.id)
        if pod is None or pod.sandbox != sandbox:
            raise ContainerError(f"the shim of pod {sandbox.id} is gone", code="unavailable")
        return pod

    def _container(self, sandbox: Sandbox, container_id: str) -> tuple[_Pod, _Container]:
        pod = self._pod(sandbox)
        if container_id not in pod.containers:
            raise ContainerError(f"container {container_id} is unknown", code="not_found")
        return pod, pod.containers[container_id]

    # -------------------------------------------------------------------------------------------------------- pods

    def start(self, spec: SandboxSpec) -> Sandbox:
        with self._lock:
            self._called("start", spec.id)
            pid = next(self._pids)
            sandbox = Sandbox(spec.id, spec.directory, pid, pid * 10, next(self._pids) if spec.shared_pid else 0)
            self.pods[spec.id] = _Pod(spec, sandbox)
            return sandbox

    def reconnect(self, sandbox: Sandbox) -> Sequence[ContainerFacts] | None:
        with self._lock:
            self._called("reconnect", sandbox.id)
            pod = self.pods.get(sandbox.id)
            if pod is None or pod.sandbox != sandbox:
                return None
            return [container.facts for container in pod.containers.values()]

    def stop(self, sandbox: Sandbox) -> None:
        with self._lock:
            self._called("stop", sandbox.id)
            pod = self.pods.get(sandbox.id)
            # Without a pid, whoever answers in the directory is meant.
            if pod is not None and (pod.sandbox == sandbox or not sandbox.pid):
                for container in list(pod.containers.values()):
                    self._end(pod, container, 137, 9)
                self.crash(sandbox)

    def crash(self, sandbox: Sandbox) -> None:
        """The shim is gone, as by SIGKILL: event streams end, `reconnect` is None."""
        with self._lock:
            pod = self.pods.pop(sandbox.id)
            for stream in pod.subscribers:
                stream.close()

    def events(self, sandbox: Sandbox) -> int:
        with self._lock:
            self._called("events", sandbox.id)
            ours, theirs = socket.socketpair()
            self._pod(sandbox).subscribers.append(ours)
            return theirs.detach()

    def rejoin(self, sandbox: Sandbox) -> tuple[int, Sequence[ContainerFacts]] | None:
        facts = self.reconnect(sandbox)
        return None if facts is None else (self.events(sandbox), facts)

    def lost(self, sandbox: Sandbox) -> Sequence[ContainerFacts]:
        with self._lock:
            self._called("lost", sandbox.id)
            return []

    @staticmethod
    def recorded(bundle: Path) -> ContainerFacts | None:
        try:
            return ContainerFacts(**json.loads((bundle / "exit.json").read_bytes()))
        except FileNotFoundError:
            return None

    # -------------------------------------------------------------------------------------------------- containers

    def create(self, sandbox: Sandbox, spec: ContainerSpec) -> ContainerFacts:
        with self._lock:
            self._called("create", spec.id)
            pod = self._pod(sandbox)
            if spec.id in pod.containers:
                raise ContainerError(f"container {spec.id} exists", code="already_exists")
            config = json.loads((spec.bundle / "config.json").read_bytes())
            pid = next(self._pids)
            facts = ContainerFacts(spec.id, pid, pid * 10, time.time_ns(), 0, 0, -1, 0, False)
            pod.containers[spec.id] = _Container(spec, facts, interpret(config["process"]))
            if spec.log_path is not None:
                spec.log_path.touch()
            return facts

    def start_container(self, sandbox: Sandbox, container_id: str) -> ContainerFacts:
        with self._lock:
            self._called("start_container", container_id)
            pod, container = self._container(sandbox, container_id)
            if container.facts.started_ns or container.facts.finished_ns:
                raise ContainerError(f"container {container_id} was started already", code="failed_precondition")
            container.facts = started = replace(container.facts, started_ns=time.time_ns())
            self._write(container)
            if not container.outcome.runs_on:
                self._end(pod, container, container.outcome.code, 0)
            return started

    def _write(self, container: _Container) -> None:
        outcome, path = container.outcome, container.spec.log_path
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000000000Z", time.gmtime())
        for stream, data in (("stdout", outcome.stdout), ("stderr", outcome.stderr)):
            if path is not None and data:
                with open(path, "ab") as log:
                    log.writelines(f"{stamp} {stream} F ".encode() + line + b"\n" for line in data.splitlines())
        for fds, _control in container.attached:
            for fd, data in zip(fds, (outcome.stdout, outcome.stderr), strict=False):
                os.write(fd, data)

    def _end(self, pod: _Pod, container: _Container, code: int, number: int) -> None:
        if container.facts.finished_ns:
            return
        container.facts = replace(container.facts, exit_code=code, signal=number, finished_ns=time.time_ns())
        (container.spec.bundle / "exit.json").write_text(json.dumps(asdict(container.facts)))
        for stream in pod.subscribers:
            with contextlib.suppress(BrokenPipeError):  # who listened has gone
                send_frame(stream, json.dumps({"event": "exit", "facts": asdict(container.facts)}).encode())
        for fds, control in container.attached:
            for fd in fds:
                os.close(fd)
            control.close()
        container.attached.clear()

    def finish(self, sandbox: Sandbox, container_id: str, code: int, *, oom_killed: bool = False) -> None:
        """Ends a running container from outside."""
        with self._lock:
            pod, container = self._container(sandbox, container_id)
            container.facts = replace(container.facts, oom_killed=oom_killed)
            self._end(pod, container, code, 9 if code == 137 else 0)

    def signal(self, sandbox: Sandbox, container_id: str, number: int, *, everyone: bool = False) -> None:
        with self._lock:
            self._called("signal", f"{container_id} {number}{' everyone' if everyone else ''}")
            pod = self.pods.get(sandbox.id)
            container = pod.containers.get(container_id) if pod is not None else None
            if pod is not None and container is not None and not container.facts.finished_ns:
                container.signals.append(number)
                self._end(pod, container, 128 + number, number)

    def retire(self, sandbox: Sandbox, container_id: str) -> None:
        with self._lock:
            self._called("retire", container_id)  # nothing is ever started again here

    def delete(self, sandbox: Sandbox, container_id: str) -> None:
        with self._lock:
            self._called("delete", container_id)
            pod = self.pods.get(sandbox.id)
            container = pod.containers.pop(container_id, None) if pod is not None else None
            if pod is not None and container is not None:
                self._end(pod, container, 137, 9)

    def exec_sync(self, sandbox: Sandbox, container_id: str, spec: ExecSpec) -> ExecResult:
        with self._lock:
            self._called("exec_sync", container_id)
            _, container = self._container(sandbox, container_id)
            if not container.facts.started_ns or container.facts.finished_ns:
                raise ContainerError(f"container {container_id} is not running", code="failed_precondition")
            outcome = interpret(spec.process)
            stdout, stderr = outcome.stdout[: spec.output_limit], outcome.stderr[: spec.output_limit]
            truncated = (stdout, stderr) != (outcome.stdout, outcome.stderr)
            if outcome.runs_on:
                return ExecResult(137, stdout, stderr, True, truncated)
            return ExecResult(outcome.code, stdout, stderr, False, truncated)

    def exec_stream(
        self,
        sandbox: Sandbox,
        container_id: str,
        process: Mapping[str, object],
        fds: Sequence[int] = (),
        *,
        terminal: bool = False,
    ) -> ExecStream:
        with self._lock:
            self._called("exec_stream", container_id)
            _, container = self._container(sandbox, container_id)
            if not container.facts.started_ns or container.facts.finished_ns:
                raise ContainerError(f"container {container_id} is not running", code="failed_precondition")
            if not terminal and len(fds) != 3:
                raise ContainerError("expected stdin, stdout and stderr", code="invalid_argument")
            outcome = interpret(process)
            master, slave = os.openpty() if terminal else (-1, -1)
            for fd, data in zip((slave, slave) if terminal else fds[1:], (outcome.stdout, outcome.stderr), strict=True):
                os.write(fd, data)
            ours, theirs = socket.socketpair()
            if outcome.runs_on:
                container.attached.append(([slave] if terminal else [], ours))
            else:
                send_frame(ours, json.dumps({"ok": {"exit_code": outcome.code}}).encode())
                ours.close()
                if terminal:
                    os.close(slave)
            return ExecStream(next(self._pids), theirs.detach(), master)

    def connect(self, sandbox: Sandbox, port: int) -> int:
        with self._lock:
            self._called("connect", f"{sandbox.id} {port}")
            self._pod(sandbox)
        try:
            return socket.create_connection(("127.0.0.1", port), 5).detach()
        except OSError as error:
            raise ContainerError(f"connect to port {port}: {error}", code="unavailable") from error

    def update(self, sandbox: Sandbox, container_id: str, resources: Mapping[str, object]) -> None:
        with self._lock:
            self._called("update", container_id)
            _, container = self._container(sandbox, container_id)
            if container.facts.finished_ns:
                raise ContainerError(f"container {container_id} has ended", code="failed_precondition")
            container.resources.append(resources)

    def pause(self, sandbox: Sandbox, container_id: str) -> None:
        with self._lock:
            self._called("pause", container_id)
            _, container = self._container(sandbox, container_id)
            if container.frozen or container.facts.finished_ns or not container.facts.started_ns:
                raise ContainerError(f"pause container {container_id}: not running", code="failed_precondition")
            container.frozen = True

    def resume(self, sandbox: Sandbox, container_id: str) -> None:
        with self._lock:
            self._called("resume", container_id)
            pod = self.pods.get(sandbox.id)
            if pod is not None and container_id in pod.containers:
                pod.containers[container_id].frozen = False

    def frozen(self) -> list[str]:
        """The ids of containers that stand still."""
        return [id_ for pod in self.pods.values() for id_, one in pod.containers.items() if one.frozen]

    def checkpoint(
        self, sandbox: Sandbox, container_id: str, images: Path, work: Path, program: str, seconds: float
    ) -> None:
        with self._lock:
            self._called("checkpoint", f"{container_id} frozen {sorted(self.frozen())}")
            self._container(sandbox, container_id)
            (images / "pages-1.img").write_bytes(f"memory of {container_id}".encode())
            (images / "descriptors.json").write_text('["/dev/null", "pipe:[1]", "pipe:[2]"]')
            (work / "dump.log").write_text(f"{program}, at most {seconds:g} s\n")

    def restore(
        self, sandbox: Sandbox, spec: ContainerSpec, images: Path, work: Path, program: str, seconds: float
    ) -> ContainerFacts:
        with self._lock:
            self._called("restore", spec.id)
            if not (images / "descriptors.json").exists():
                raise ContainerError(f"restore container {spec.id}: no images", code="invalid_argument")
            self.restored[spec.id] = {path.name: path.read_bytes() for path in images.iterdir()}
            return self.create(sandbox, spec)

    def reopen_log(self, sandbox: Sandbox, container_id: str) -> None:
        with self._lock:
            self._called("reopen_log", container_id)
            _, container = self._container(sandbox, container_id)
            if container.spec.log_path is not None:
                container.spec.log_path.touch()

    def attach(self, sandbox: Sandbox, container_id: str, fds: Sequence[int], *, stdin: bool, terminal: bool) -> int:
        with self._lock:
            self._called("attach", container_id)
            _, container = self._container(sandbox, container_id)
            ours, theirs = socket.socketpair()
            if container.facts.finished_ns:
                ours.close()
            else:
                container.attached.append(([os.dup(fd) for fd in fds[1 if stdin else 0 :]], ours))
            return theirs.detach()
