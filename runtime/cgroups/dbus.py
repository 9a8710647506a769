"""A D-Bus client of the few hundred lines that talking to systemd takes: calls, replies, signals, in time.

    bus = connect("/run/dbus/system_bus_socket", "the system bus", timeout_s=10)
    (job,) = bus.call(DESTINATION, PATH, INTERFACE, "StopUnit", "ss", unit, "replace")
    bus.signal("JobRemoved", lambda body: body[1] == job, timeout_s=30, what="the end of the job")

Values are Python's own by signature (https://dbus.freedesktop.org/doc/dbus-specification.html): integers, str, bytes
for `ay`, list, tuple for a struct, dict, and Variant. Refuses messages above _MAX_MESSAGE, nesting above _MAX_DEPTH,
fds, and every wait without an end: a bus that is stopped is a failure after `timeout_s` (threats O36). Invariant: what
arrives is checked against its own length before it is believed.
"""

from __future__ import annotations

import os
import socket
import struct
import time

from runtime.errors import RuntimeFailure
from runtime.linux.record import Record
from runtime.linux.sockets import connect_unix

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_MESSAGE = 1 << 20
_MAX_DEPTH = 16
_MAX_SIGNALS = 4096
_CALL, _RETURN, _ERROR, _SIGNAL = 1, 2, 3, 4
_PATH, _INTERFACE, _MEMBER, _ERROR_NAME, _REPLY_SERIAL, _DESTINATION, _SENDER, _SIGNATURE = range(1, 9)
_FIXED = {"y": "B", "b": "I", "n": "h", "q": "H", "i": "i", "u": "I", "x": "q", "t": "Q", "d": "d"}
_ALIGN = {"y": 1, "b": 4, "n": 2, "q": 2, "i": 4, "u": 4, "x": 8, "t": 8, "d": 8}
_ALIGN |= {"s": 4, "o": 4, "g": 1, "v": 1, "a": 4, "(": 8, "{": 8}


class Variant(Record):
    """A value with its signature."""

    signature: str
    value: object


class BusError(RuntimeFailure):
    """The other side answered with an error; `name` is D-Bus's ("org.freedesktop.systemd1.NoSuchUnit")."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message, step="cgroup")
        self.name = name


def types(signature: str) -> list[str]:
    """The complete types of a signature, one by one. Raises RuntimeFailure."""
    found, at = [], 0
    while at < len(signature):
        end = _end(signature, at, 0)
        found.append(signature[at:end])
        at = end
    return found


def _end(signature: str, at: int, depth: int) -> int:
    if depth > _MAX_DEPTH or at >= len(signature):
        raise _malformed(f"signature {signature[:40]!r}")
    letter = signature[at]
    if letter == "a":
        return _end(signature, at + 1, depth + 1)
    if letter in "({":
        close = ")" if letter == "(" else "}"
        at += 1
        while at < len(signature) and signature[at] != close:
            at = _end(signature, at, depth + 1)
        if at >= len(signature):
            raise _malformed(f"signature {signature[:40]!r}")
        return at + 1
    if letter not in _ALIGN:
        raise _malformed(f"signature {signature[:40]!r}")
    return at + 1


def _malformed(what: str) -> RuntimeFailure:
    return RuntimeFailure(f"D-Bus: {what} is malformed", step="cgroup")


class Writer:
    """Values into bytes, little-endian, aligned from the beginning of `data`."""

    def __init__(self) -> None:
        self.data = bytearray()

    def pad(self, size: int) -> None:
        self.data += bytes(-len(self.data) % size)

    def put(self, kind: str, value: object) -> None:
        """One value of one complete type."""
        letter = kind[0]
        if letter in _FIXED:
            self.pad(_ALIGN[letter])
            self.data += struct.pack("<" + _FIXED[letter], value)
        elif letter in "so":
            raw = str(value).encode()
            self.put("u", len(raw))
            self.data += raw + b"\0"
        elif letter == "g":
            raw = str(value).encode()
            self.data += bytes((len(raw),)) + raw + b"\0"
        elif letter == "v":
            assert isinstance(value, Variant)
            self.put("g", value.signature)
            self.put(value.signature, value.value)
        elif letter == "a":
            self._array(kind[1:], value)
        else:
            self.pad(8)
            assert isinstance(value, tuple)
            for inner, part in zip(types(kind[1:-1]), value, strict=True):
                self.put(inner, part)

    def _array(self, inner: str, value: object) -> None:
        items = list(value.items()) if isinstance(value, dict) else list(value)  # type: ignore[call-overload]
        self.put("u", 0)
        place = len(self.data) - 4
        self.pad(_ALIGN[inner[0]])
        begin = len(self.data)
        for item in items:
            self.put(inner, item)
        struct.pack_into("<I", self.data, place, len(self.data) - begin)


class Reader:
    """Bytes into values; `order` is "<" or ">"."""

    def __init__(self, data: bytes, order: str) -> None:
        self._data = data
        self._order = order
        self.at = 0

    def pad(self, size: int) -> None:
        self.at += -self.at % size

    def take(self, count: int) -> bytes:
        piece = self._data[self.at : self.at + count]
        if len(piece) != count:
            raise _malformed("a message that ends inside a value")
        self.at += count
        return piece

    def get(self, kind: str, depth: int = 0) -> object:
        """One value of one complete type."""
        if depth > _MAX_DEPTH:
            raise _malformed("a value nested too deeply")
        letter = kind[0]
        if letter in _FIXED:
            self.pad(_ALIGN[letter])
            (number,) = struct.unpack(self._order + _FIXED[letter], self.take(_ALIGN[letter]))
            return bool(number) if letter == "b" else number
        if letter in "sog":
            length = self._number() if letter != "g" else self.take(1)[0]
            text = self.take(length + 1)
            return text[:-1].decode("utf-8", "replace")
        if letter == "v":
            signature = str(self.get("g"))
            if len(types(signature)) != 1:
                raise _malformed("a variant")
            return Variant(signature, self.get(signature, depth + 1))
        if letter == "a":
            return self._array(kind[1:], depth)
        self.pad(8)
        return tuple(self.get(inner, depth + 1) for inner in types(kind[1:-1]))

    def _number(self) -> int:
        self.pad(4)
        return int.from_bytes(self.take(4), "little" if self._order == "<" else "big")

    def _array(self, inner: str, depth: int) -> object:
        length = self._number()
        self.pad(_ALIGN[inner[0]])
        end = self.at + length
        if end > len(self._data):
            raise _malformed("an array longer than its message")
        if inner == "y":
            return self.take(length)
        items = []
        while self.at < end:
            items.append(self.get(inner, depth + 1))
        return dict(items) if inner[0] == "{" else items  # type: ignore[arg-type]


class Message(Record):
    """A received message."""

    type: int
    serial: int
    fields: tuple[tuple[int, object], ...]
    body: tuple[object, ...]

    def field(self, number: int) -> object:
        return dict(self.fields).get(number)


class Bus:
    """A connection: to a bus, or to systemd itself, whose private socket knows no names and no matches."""

    def __init__(self, sock: socket.socket, what: str, timeout_s: float, *, peer: bool) -> None:
        self._sock = sock
        self._what = what
        self._timeout_s = timeout_s
        self._peer = peer
        self.name = ""
        self._serial = 0
        self._signals: list[Message] = []

    def __enter__(self) -> Bus:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def open(self) -> None:
        """Who we are, and on a bus our name there. The kernel vouches for the uid (EXTERNAL), and we name none: in a
        user namespace we may not know by which number the other side knows us. All of it at once: systemd looks at what
        it has read when more comes, so a message that came together with BEGIN would wait there for the next one."""
        end = time.monotonic() + self._timeout_s
        self._send(b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n", end)
        # "DATA" and "OK", or of systemd before 253 "OK" to each of the two lines.
        for expected in (b"DATA\r\n", b"OK "), (b"OK ",):
            answer = self._line(end)
            if not answer.startswith(expected):
                raise RuntimeFailure(f"{self._what} refuses uid {os.geteuid()}: {answer[:80]!r}", step="cgroup")
        if not self._peer:
            (self.name,) = map(str, self.ask_bus("Hello"))

    def _line(self, end: float) -> bytes:
        """Byte by byte: what follows the last line belongs to the first message. It is two lines in a connection's
        life."""
        line = b""
        while not line.endswith(b"\r\n"):
            line += self._receive(1, end)
            if len(line) > 512:
                raise _malformed(f"the greeting of {self._what}")
        return line

    def ask_bus(self, member: str, signature: str = "", *values: object) -> tuple[object, ...]:
        """A call of the bus's own."""
        return self.call(
            "org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", member, signature, *values
        )

    def subscribe(self, sender: str, interface: str, member: str) -> None:
        """From now on signals of that name arrive."""
        if not self._peer:
            rule = f"type='signal',sender='{sender}',interface='{interface}',member='{member}'"
            self.ask_bus("AddMatch", "s", rule)

    def call(
        self, to: str, path: str, interface: str, member: str, signature: str = "", *values: object
    ) -> tuple[object, ...]:
        """The reply's values. Raises BusError when it is an error, RuntimeFailure when there is none in time."""
        end = time.monotonic() + self._timeout_s
        self._serial += 1
        serial = self._serial
        self._send(_encode(serial, to, path, interface, member, signature, values), end)
        while True:
            message = self._next(end, f"an answer to {member}")
            if message.type in (_RETURN, _ERROR) and message.field(_REPLY_SERIAL) == serial:
                break
        if message.type == _ERROR:
            text = str(message.body[0]) if message.body else ""
            raise BusError(str(message.field(_ERROR_NAME)), text)
        return message.body

    def signal(
        self, member: str, wanted: Callable[[tuple[object, ...]], bool], timeout_s: float, what: str
    ) -> tuple[object, ...]:
        """The body of the first signal of that name, arrived since the connection was made, that is `wanted`.
        Raises RuntimeFailure when none comes in time; `what` says what was waited for."""
        end = time.monotonic() + timeout_s
        while True:
            while self._signals:
                message = self._signals.pop(0)
                if message.field(_MEMBER) == member and wanted(message.body):
                    return message.body
            self._next(end, what)

    def _next(self, end: float, what: str) -> Message:
        """The next message; signals are kept as well."""
        try:
            message = self._read(end)
        except TimeoutError:
            raise RuntimeFailure(
                f"{self._what} did not send {what} in time",
                step="cgroup",
                hint="is it stopped, or the machine overloaded? systemctl status dbus",
                code="unavailable",
            ) from None
        if message.type == _SIGNAL:
            self._signals.append(message)
            del self._signals[:-_MAX_SIGNALS]
        return message

    def _read(self, end: float) -> Message:
        head = self._receive(16, end)
        order = {b"l": "<", b"B": ">"}.get(head[:1], "")
        if not order or head[3] != 1:
            raise _malformed(f"what {self._what} sends")
        body_size, serial, fields_size = struct.unpack(order + "III", head[4:])
        rest = fields_size + -fields_size % 8
        if rest + body_size > _MAX_MESSAGE:
            raise RuntimeFailure(f"{self._what} sends a message of {rest + body_size} bytes", step="cgroup")
        data = self._receive(rest + body_size, end)
        fields = _fields(data[:fields_size], order)
        signature = str(dict(fields).get(_SIGNATURE, ""))
        body = Reader(data[rest:], order)
        return Message(head[1], serial, fields, tuple(body.get(kind) for kind in types(signature)))

    def _send(self, data: bytes, end: float) -> None:
        try:
            self._sock.settimeout(max(0.001, end - time.monotonic()))
            self._sock.sendall(data)
        except OSError as error:
            raise self._lost(error) from None

    def _receive(self, count: int, end: float) -> bytes:
        data = b""
        while len(data) < count:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            try:
                self._sock.settimeout(left)
                piece = self._sock.recv(count - len(data))
            except TimeoutError:
                raise
            except OSError as error:
                raise self._lost(error) from None
            if not piece:
                raise RuntimeFailure(f"{self._what} closed the connection", step="cgroup", code="unavailable")
            data += piece
        return data

    def _lost(self, error: OSError) -> RuntimeFailure:
        if isinstance(error, TimeoutError):
            return RuntimeFailure(f"{self._what} takes no message in time", step="cgroup", code="unavailable")
        return RuntimeFailure.of(error, step="cgroup", what=f"talk to {self._what}", code="unavailable")


def _encode(
    serial: int, to: str, path: str, interface: str, member: str, signature: str, values: tuple[object, ...]
) -> bytes:
    body = Writer()
    for kind, value in zip(types(signature), values, strict=True):
        body.put(kind, value)
    fields: list[tuple[int, Variant]] = [
        (_PATH, Variant("o", path)),
        (_INTERFACE, Variant("s", interface)),
        (_MEMBER, Variant("s", member)),
        (_DESTINATION, Variant("s", to)),
    ]
    if signature:
        fields.append((_SIGNATURE, Variant("g", signature)))
    message = Writer()
    message.put("(yyyyuu)", (ord("l"), _CALL, 0, 1, len(body.data), serial))
    message.put("a(yv)", fields)
    message.pad(8)
    return bytes(message.data + body.data)


def _fields(data: bytes, order: str) -> tuple[tuple[int, object], ...]:
    """Header fields. They begin at byte 16 of the message, so alignment in `data` is that in the message."""
    reader = Reader(data, order)
    found = []
    while reader.at < len(data):
        field = reader.get("(yv)")
        assert isinstance(field, tuple) and isinstance(field[1], Variant)
        found.append((field[0], field[1].value))
    return tuple(found)


def connect(path: str, what: str, timeout_s: float, *, peer: bool = False) -> Bus:
    """A connection to the socket at `path`, which begins with NUL when it is an abstract one; `peer`: systemd itself is
    at the other end, not a bus. Raises RuntimeFailure, with errno where there is nobody."""
    try:
        sock = connect_unix(path, timeout_s)
    except OSError as error:
        raise RuntimeFailure.of(
            error, step="cgroup", what=f"connect to {what} at {path.replace(chr(0), '@')}", code="unavailable"
        ) from None
    bus = Bus(sock, what, timeout_s, peer=peer)
    try:
        bus.open()
    except TimeoutError:
        sock.close()
        raise RuntimeFailure(
            f"{what} did not answer in time", step="cgroup", hint="systemctl status dbus", code="unavailable"
        ) from None
    except BaseException:
        sock.close()
        raise
    return bus
