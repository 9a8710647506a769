"""Plugins that are programs, called as CNI 1.1 says: environment in, configuration on stdin, JSON on stdout.

Refuses names with a slash, programs outside the configured directories, answers over a mebibyte, and waiting beyond
the deadline: then the whole process group is killed. Invariant: the daemon is never forked (posix_spawn(3) shares its
memory until execve); whatever a program prints or does, the call ends with a result or one sentence.
See the CNI specification 1.1, sections 2 and 5.
"""

from __future__ import annotations

import functools
import json
import os
import re
import select
import signal
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cri.network.conflist import ConfigError, Conflist, Plugin, field, is_name, parse_json
from cri.network.values import Call, Cancel, CancelledError, PluginError, Result, parse_result
from runtime.linux.dataclass import dataclass
from runtime.linux.process import CLOSE_RANGE_CLOEXEC, close_range, pidfd_open

OUTPUT_LIMIT = 1 << 20
_STDERR_LIMIT = 4096
_REAP_S = 5.0
_UNPRINTABLE = re.compile(r"[^\x20-\x7e\u00a0-\uffff]+")
_ARGUMENT = re.compile(r"[^;=\x00-\x1f\x7f]*\Z")
# NetworkError's code for what a plugin says or does: every runtime passes it on as it is.
_ITS_OWN = "unknown"
# CNI spec 1.1, "Error": 11 asks to try again; 50 and 51 are a plugin's STATUS saying that it cannot add pods now.
_AGAIN, _NOT_AVAILABLE = 11, (50, 51)


@dataclass(frozen=True, slots=True)
class Binaries:
    """Where plugin programs are found: the directories in order."""

    directories: tuple[Path, ...]

    def find(self, name: str) -> Path:
        """The program of plugin type `name`. Raises PluginError."""
        if not is_name(name):
            raise PluginError(f"{name[:60]!r} is not a plugin's name", code="failed_precondition")
        for directory in self.directories:
            path = directory / name
            try:
                mode = path.stat().st_mode
            except OSError:
                continue
            if stat.S_ISREG(mode) and mode & 0o111:
                return path
        places = ", ".join(map(str, self.directories))
        raise PluginError(f"no program {name} in {places}; install it there", code="failed_precondition")


def _printable(data: bytes, limit: int = 1024) -> str:
    return _UNPRINTABLE.sub(" ", data[: limit * 4].decode("utf-8", "replace")).strip()[:limit]


# ----------------------------------------------------------------------------------------------------- one process


@functools.cache
def _keep_inherited_to_ourselves() -> None:
    """What whoever started the daemon left open goes to no plugin: ours are CLOEXEC, theirs are made so, once."""
    close_range(3, flags=CLOSE_RANGE_CLOEXEC)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended. `code` is the exit code, or minus the signal."""

    code: int
    stdout: bytes
    stderr: bytes


def run(
    program: Path, environment: dict[str, str], data: bytes, *, timeout: float, cancel: Cancel | None = None
) -> Outcome:
    """Runs `program` with `data` on stdin. Raises PluginError: not startable, over time, over the output limit."""
    _keep_inherited_to_ourselves()
    ours, theirs = _pipes()
    try:
        # A group of its own, so that what the plugin started can be killed with it; Python ignores SIGPIPE, and an
        # ignored signal stays ignored over execve.
        pid = os.posix_spawn(
            program,
            [os.fspath(program)],
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(theirs)],
            setpgroup=0,
            setsigmask=[],
            setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
        )
    except (OSError, ValueError) as error:
        _close(ours)
        raise PluginError(f"start {program}: {error}", code="failed_precondition") from error
    finally:
        _close(theirs)
    try:
        pidfd = pidfd_open(pid)
    except OSError as error:
        _close(ours)
        _kill(pid, None)
        raise PluginError(f"watch {program}: {error}") from error
    try:
        stdout, stderr = _converse(pid, pidfd, ours, data, time.monotonic() + timeout, timeout, cancel)
        return Outcome(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), stdout, stderr)
    except BaseException:
        _kill(pid, pidfd)
        raise
    finally:
        _close(ours)
        os.close(pidfd)


def _pipes() -> tuple[list[int], list[int]]:
    """Our ends (non-blocking) and the program's, of stdin, stdout and stderr; all CLOEXEC."""
    ours: list[int] = []
    theirs: list[int] = []
    try:
        for number in range(3):
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            mine, other = (write_end, read_end) if number == 0 else (read_end, write_end)
            ours.append(mine)
            theirs.append(other)
            os.set_blocking(mine, False)
    except OSError as error:
        _close(ours + theirs)
        raise PluginError(f"make pipes: {error}") from error
    return ours, theirs


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def _kill(pid: int, pidfd: int | None) -> None:
    """SIGKILL to the group. The pid cannot be another's: nobody has reaped it yet."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    if pidfd is not None and not select.select([pidfd], [], [], _REAP_S)[0]:
        return  # stuck in the kernel: it stays a child of ours, and must not hold this thread
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass


def _converse(
    pid: int, pidfd: int, ours: list[int], data: bytes, deadline: float, timeout: float, cancel: Cancel | None
) -> tuple[bytes, bytes]:
    """Writes stdin and reads stdout and stderr until the process has ended; what a grandchild prints later is not
    waited for."""
    poll = select.poll()
    poll.register(ours[0], select.POLLOUT)
    for fd in (ours[1], ours[2], pidfd):
        poll.register(fd, select.POLLIN)
    if cancel is not None:
        poll.register(cancel.fileno(), select.POLLIN)
    out, err, left = bytearray(), bytearray(), memoryview(data)
    ended = False
    while not ended:
        events = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not events:
            raise PluginError(f"no end after {timeout:.0f} s, killed{_said(err)}", code="deadline")
        for fd, _ in events:
            if cancel is not None and fd == cancel.fileno():
                raise CancelledError("the caller gave up, killed")
            if fd == pidfd:
                ended = True
            elif fd == ours[0]:
                left = _feed(fd, left)
                if not left:
                    poll.unregister(fd)
                    os.close(fd)
                    ours[0] = -1
            elif not _read(fd, out if fd == ours[1] else err, OUTPUT_LIMIT if fd == ours[1] else _STDERR_LIMIT):
                poll.unregister(fd)
        if len(out) > OUTPUT_LIMIT:
            raise PluginError(f"printed more than {OUTPUT_LIMIT} bytes, killed", code=_ITS_OWN)
    for fd, buffer, limit in ((ours[1], out, OUTPUT_LIMIT), (ours[2], err, _STDERR_LIMIT)):
        for _ in range(limit // 65536 + 1):  # what is in the pipe already; a grandchild may go on writing for ever
            if not _read(fd, buffer, limit, final=True):
                break
    if len(out) > OUTPUT_LIMIT:
        raise PluginError(f"printed more than {OUTPUT_LIMIT} bytes", code=_ITS_OWN)
    return bytes(out), bytes(err)


def _feed(fd: int, left: memoryview) -> memoryview:
    try:
        return left[os.write(fd, left) :]
    except BlockingIOError:
        return left
    except BrokenPipeError:  # it does not want its configuration: its own affair
        return left[:0]


def _read(fd: int, buffer: bytearray, limit: int, *, final: bool = False) -> bool:
    """Reads once; keeps at most `limit` bytes and one more. False at the end of the stream."""
    try:
        piece = os.read(fd, 65536)
    except BlockingIOError:
        return not final
    buffer += piece[: max(0, limit + 1 - len(buffer))]
    return bool(piece)


def _said(stderr: bytes | bytearray) -> str:
    words = _printable(bytes(stderr))
    return f"; it said: {words}" if words else ""


# ------------------------------------------------------------------------------------------------------ the protocol


@dataclass(frozen=True, slots=True)
class External:
    """A plugin program, bound to a network's configuration of it."""

    binaries: Binaries
    conflist: Conflist
    plugin: Plugin
    program: str  # the plugin's type, or its IPAM's when a native plugin delegates
    reason: str = ""  # why it is not done in-process, where it could be

    def find(self) -> Path:
        """The program. Raises PluginError."""
        try:
            return self.binaries.find(self.program)
        except PluginError as error:
            raise PluginError(f"{self.reason}{error}", code=error.code) from None

    def add(self, call: Call, previous: Result | None) -> Result:
        """ADD. Raises PluginError."""
        outcome = self._run("ADD", call, previous)
        if not outcome.stdout.strip():
            raise PluginError(f"printed no result{_said(outcome.stderr)}", code=_ITS_OWN)
        try:
            document = parse_json(outcome.stdout, "its result")
            if isinstance(document, dict) and "code" in document and "msg" in document:
                said = _printable(str(document["msg"]).encode())
                raise PluginError(f"ended well and printed an error: {said}", code=_ITS_OWN)
            return parse_result(document, call.version)
        except ConfigError as error:
            words = _printable(str(error).encode())
            raise PluginError(f"printed no valid result: {words}", code=_ITS_OWN) from None

    def delete(self, call: Call, result: Result | None) -> None:
        """DEL. Raises PluginError."""
        self._run("DEL", call, result)

    def check(self, call: Call, result: Result) -> None:
        """CHECK, with the chain's result. A list before 0.4.0 has none. Raises PluginError."""
        if call.version >= "0.4.0" and not self.conflist.disable_check:
            self._run("CHECK", call, result)

    def status(self, timeout: float) -> str | None:
        """STATUS (CNI 1.1): None or why it cannot add pods now."""
        environment = self._environment("STATUS", None)
        outcome = run(self.find(), environment, self._stdin(self.conflist.version, {}), timeout=timeout)
        return None if outcome.code == 0 else str(_failure(outcome))

    def collect(self, valid: Sequence[tuple[str, str]], timeout: float) -> None:
        """GC (CNI 1.1): everything but the `valid` (container id, interface) pairs may go. Raises PluginError."""
        attachments = [{"containerID": container, "ifname": interface} for container, interface in valid]
        # The specification's text once had the second name; libcni sends both.
        extra = {"cni.dev/valid-attachments": attachments, "cni.dev/attachments": attachments}
        data = self._stdin(self.conflist.version, extra)
        outcome = run(self.find(), self._environment("GC", None), data, timeout=timeout)
        if outcome.code != 0:
            raise _failure(outcome)

    def versions(self, timeout: float) -> tuple[str, ...]:
        """VERSION: what the program speaks. Raises PluginError."""
        data = json.dumps({"cniVersion": self.conflist.version}).encode()
        outcome = run(self.find(), self._environment("VERSION", None), data, timeout=timeout)
        if outcome.code != 0:
            raise _failure(outcome)
        try:
            document = parse_json(outcome.stdout, "its versions")
            said = field(document if isinstance(document, dict) else {}, "supportedVersions", list, [])
        except ConfigError as error:
            raise PluginError(f"printed no versions: {error}", code=_ITS_OWN) from None
        return tuple(version for version in said if isinstance(version, str))

    def _run(self, command: str, call: Call, previous: Result | None) -> Outcome:
        program = self.find()
        extra: dict[str, Any] = {}
        if previous is not None:
            extra["prevResult"] = previous.raw
        if offered := _runtime_config(call, self.plugin.capabilities):
            extra["runtimeConfig"] = offered
        environment, data = self._environment(command, call), self._stdin(call.version, extra)
        outcome = run(program, environment, data, timeout=call.left(), cancel=call.cancel)
        if outcome.code != 0:
            raise _failure(outcome)
        return outcome

    def _stdin(self, version: str, extra: dict[str, Any]) -> bytes:
        document = {**self.plugin.config, **extra, "cniVersion": version, "name": self.conflist.name}
        return json.dumps(document).encode()

    def _environment(self, command: str, call: Call | None) -> dict[str, str]:
        found = {key: value for key, value in os.environ.items() if not key.startswith("CNI_")}
        found["CNI_COMMAND"] = command
        found["CNI_PATH"] = ":".join(map(str, self.binaries.directories))
        if call is not None:
            found["CNI_CONTAINERID"] = call.pod.id
            found["CNI_NETNS"] = str(call.netns) if call.netns is not None else ""
            found["CNI_IFNAME"] = call.interface
            found["CNI_ARGS"] = _arguments(call)
        return found


def _arguments(call: Call) -> str:
    pairs = (
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", call.pod.namespace),
        ("K8S_POD_NAME", call.pod.name),
        ("K8S_POD_INFRA_CONTAINER_ID", call.pod.id),
        ("K8S_POD_UID", call.pod.uid),
    )
    for key, value in pairs:
        if not _ARGUMENT.match(value):  # it would become further arguments
            words = f"{key}: {value[:60]!r} holds a character that CNI_ARGS cannot"
            raise PluginError(words, code="invalid_argument")
    return ";".join(f"{key}={value}" for key, value in pairs)


def _runtime_config(call: Call, capabilities: frozenset[str]) -> dict[str, Any]:
    """What the plugin asked for by its capabilities, as far as the pod has it."""
    offered = {name: value for name, value in call.pod.capabilities.items() if name in capabilities}
    if "portMappings" in capabilities and (ports := _port_mappings(call)):
        offered["portMappings"] = ports
    return offered


def _port_mappings(call: Call) -> list[dict[str, Any]]:
    found = []
    for port in call.pod.ports:
        if port.host_port == 0:  # a kubelet lists a container's other ports, too
            continue
        entry: dict[str, Any] = {"hostPort": port.host_port, "containerPort": port.container_port}
        entry["protocol"] = port.protocol
        if port.host_ip:
            entry["hostIP"] = port.host_ip
        found.append(entry)
    return found


def _failure(outcome: Outcome) -> PluginError:
    """What the error object says, in one sentence; where there is none, how the program has ended."""
    how = f"exit code {outcome.code}" if outcome.code >= 0 else f"killed by signal {-outcome.code}"
    try:
        document = parse_json(outcome.stdout, "its error")
        if not isinstance(document, dict):
            raise ConfigError("no object")
        code = field(document, "code", int, 0)
        words = [field(document, key, str, "") for key in ("msg", "details")]
    except ConfigError:
        shown = _printable(outcome.stdout)
        return PluginError(f"{how}{': ' + shown if shown else ''}{_said(outcome.stderr)}", code=_ITS_OWN)
    hint = "; it is not ready for pods" if code in _NOT_AVAILABLE else ""
    said = ": ".join(_printable(word.encode()) for word in words if word)
    blame = "unavailable" if code in (_AGAIN, *_NOT_AVAILABLE) else _ITS_OWN
    return PluginError(f"{said or how} (code {code}){hint}{_said(outcome.stderr)}", code=blame)
