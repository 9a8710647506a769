"""systemd-logind as a kubelet asks it for time before a shutdown: the real one, on a bus of its own. What is not real
is the systemd behind it, which here is told to power off, notes when, and does nothing else.

    kubelet ── Inhibit("shutdown", "delay") ─▶ logind       keeps the lock's other end
    lane ───── PowerOff ─────────────────────▶ logind ── PrepareForShutdown ─▶ kubelet, which ends its pods
    kubelet ── closes the lock ──────────────▶ logind ── StartUnit("poweroff.target") ─▶ Systemd of this module

Speaks of D-Bus what these messages take: strings, numbers, object paths. Needs a mount namespace of its own with a
fresh /run. Invariant: no program of the machine hears of the power being off; a bus of this machine is not touched.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from conformance.clients.steps import eventually
from conformance.kubelet.service import Service

PROGRAM = Path("/lib/systemd/systemd-logind")
BUS = Path("/run/dbus/system_bus_socket")
# Where logind and kubelet have files, whatever the machine has there.
SETTINGS = Path("/etc/systemd")
_CONFIGURATION = """<busconfig>
  <type>system</type><listen>unix:path={bus}</listen><auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/>
  </policy>
</busconfig>
"""
_DBUS = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
_CALL, _RETURN, _ERROR = 1, 2, 3
_PATH, _INTERFACE, _MEMBER, _ERROR_NAME, _REPLY_SERIAL, _DESTINATION, _SENDER, _SIGNATURE = range(1, 9)


@contextlib.contextmanager
def logind(base: Path) -> Iterator[Systemd]:
    """logind at the system's bus, with the systemd that it believes to talk to, for as long as the block lasts."""
    base.mkdir()
    (base / "bus.conf").write_text(_CONFIGURATION.format(bus=BUS))
    for directory in (BUS.parent, Path("/run/systemd")):
        directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "settings", SETTINGS], check=True)
    words = ["dbus-daemon", f"--config-file={base}/bus.conf", "--nofork", "--nopidfile"]
    bus = Service("dbus-daemon", words, base / "dbus-daemon.log", BUS.exists)
    daemon = Service("systemd-logind", [str(PROGRAM)], base / "logind.log", lambda: _owned("org.freedesktop.login1"))
    systemd = Systemd(daemon)
    try:
        bus.start()
        systemd.start()
        daemon.start()
        yield systemd
    finally:
        daemon.stop()
        bus.stop()
        systemd.join()
        subprocess.run(["umount", SETTINGS], check=True)


def _owned(name: str) -> bool:
    return "boolean true" in _send(*_DBUS, "NameHasOwner", f"string:{name}")


def power_off() -> None:
    """As `systemctl poweroff` asks for it."""
    manager = ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager")
    _send(*manager, "SetWallMessage", "string:", "boolean:false")  # nobody's terminal is written to
    _send(*manager, "PowerOff", "boolean:false")


def inhibitors() -> str:
    """Who wants time before what, as logind lists it."""
    return _send(
        "org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager", "ListInhibitors"
    )


def _send(destination: str, path: str, interface: str, member: str, *arguments: str) -> str:
    words = ["dbus-send", f"--bus=unix:path={BUS}", "--print-reply", f"--dest={destination}", path]
    done = subprocess.run([*words, f"{interface}.{member}", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{member}: {done.stderr.strip()}")
    return done.stdout


@dataclass(slots=True)
class Systemd:
    """org.freedesktop.systemd1 as far as logind and kubelet ask it: `started` are the units that were to be started; a
    signal for a unit goes to the logind of here."""

    daemon: Service
    started: list[str] = field(default_factory=list)
    failure: str = ""
    _bus: socket.socket = field(init=False, default_factory=lambda: socket.socket(socket.AF_UNIX))
    _thread: threading.Thread | None = None
    _serial: int = 0

    def start(self) -> None:
        self._bus.connect(str(BUS))
        self._bus.sendall(b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\n")
        if not self._bus.recv(512).startswith(b"OK "):
            raise RuntimeError("the bus of this lane refuses us")
        self._bus.sendall(b"BEGIN\r\n")
        self._call("Hello", "")
        self._call("RequestName", "su", "org.freedesktop.systemd1", 0)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        eventually(lambda: _owned("org.freedesktop.systemd1"), "systemd's name is ours", 20)

    def join(self) -> None:
        """The bus has ended, and so does this."""
        if self._thread is not None:
            self._thread.join(20)
        self._bus.close()

    def _serve(self) -> None:
        try:
            while message := self._next():
                kind, serial, fields, body = message
                if kind == _CALL:
                    self._answer(serial, fields, body)
        except (OSError, ValueError, struct.error) as error:
            self.failure = repr(error)

    def _answer(self, serial: int, fields: dict[int, str | int], body: list[str | int]) -> None:
        to = {_DESTINATION: fields[_SENDER], _REPLY_SERIAL: serial}
        member = fields[_MEMBER]
        if member == "StartUnit":
            self.started.append(str(body[0]))
            self._put(_RETURN, to, "o", "/org/freedesktop/systemd1/job/1")
        elif member == "KillUnit" and body[0] == "systemd-logind.service" and self.daemon.process:
            self.daemon.process.send_signal(int(body[2]))
            self._put(_RETURN, to, "")
        elif member == "Get" and body[1:] == ["LoadState"]:
            self._put(_RETURN, to, "v", "loaded")
        elif member == "Subscribe":
            self._put(_RETURN, to, "")
        else:
            unknown = "org.freedesktop.DBus.Error.UnknownMethod"
            self._put(_ERROR, to | {_ERROR_NAME: unknown}, "s", f"no {member} here")

    def _call(self, member: str, signature: str, *values: str | int) -> None:
        destination, path, interface = _DBUS
        to: dict[int, str | int] = {_DESTINATION: destination, _PATH: path, _INTERFACE: interface, _MEMBER: member}
        self._put(_CALL, to, signature, *values)

    def _put(self, kind: int, fields: dict[int, str | int], signature: str, *values: str | int) -> None:
        self._serial += 1
        body = b""
        for letter, value in zip(signature, values, strict=True):
            body = with_value(body, letter, value)
        head = b""
        for number, value in (fields | ({_SIGNATURE: signature} if signature else {})).items():
            head = _padded(head, 8) + bytes((number,))
            letter = {_PATH: "o", _SIGNATURE: "g", _REPLY_SERIAL: "u"}.get(number, "s")
            head = with_value(with_value(head, "g", letter), letter, value)
        begin = struct.pack("<cBBBIII", b"l", kind, 0, 1, len(body), self._serial, len(head))
        self._bus.sendall(_padded(begin + head, 8) + body)

    def _next(self) -> tuple[int, int, dict[int, str | int], list[str | int]] | None:
        begin = self._exactly(16)
        if not begin:
            return None
        _, kind, _, _, body_size, serial, head_size = struct.unpack("<cBBBIII", begin)
        rest = self._exactly(head_size + -head_size % 8 + body_size)
        fields: dict[int, str | int] = {}
        at = 0
        while at < head_size:
            at += -at % 8
            number = rest[at]
            letter, at = read_value(rest, at + 1, "g")
            fields[number], at = read_value(rest, at, str(letter))
        body, at = [], head_size + -head_size % 8
        if kind == _CALL:  # what we are asked; the answers to our own questions say nothing
            for letter in str(fields.get(_SIGNATURE, "")):
                value, at = read_value(rest, at, letter)
                body.append(value)
        return kind, serial, fields, body

    def _exactly(self, count: int) -> bytes:
        """b"" once the bus has ended."""
        data = b""
        while len(data) < count:
            piece = self._bus.recv(count - len(data))
            if not piece:
                return b""
            data += piece
        return data


def _padded(data: bytes, size: int) -> bytes:
    return data + bytes(-len(data) % size)


def with_value(data: bytes, letter: str, value: str | int) -> bytes:
    """`data` with the value after it. A variant is one of a string."""
    if letter == "v":
        return with_value(with_value(data, "g", "s"), "s", value)
    if letter in "uib":
        return _padded(data, 4) + struct.pack("<i" if letter == "i" else "<I", value)
    raw = str(value).encode()
    if letter == "g":
        return data + bytes((len(raw),)) + raw + b"\0"
    return _padded(data, 4) + struct.pack("<I", len(raw)) + raw + b"\0"


def read_value(data: bytes, at: int, letter: str) -> tuple[str | int, int]:
    """The value at that place, and the place after it."""
    if letter == "g":
        end = at + 1 + data[at]
        return data[at + 1 : end].decode(), end + 1
    at += -at % 4
    (number,) = struct.unpack_from("<i" if letter == "i" else "<I", data, at)
    if letter in "uib":
        return number, at + 4
    if letter not in "so":
        raise ValueError(f"a value of type {letter!r}")
    return data[at + 4 : at + 4 + number].decode(), at + 5 + number
