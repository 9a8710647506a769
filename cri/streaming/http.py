"""The heads of HTTP/1.1 requests that ask for an upgrade, and of the answers to them.

Refuses whatever is no such request: bodies, other methods, heads over MAX_HEAD. Never redirects (threats S56).
Invariant: an answer that is no upgrade closes the connection.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from runtime.linux.dataclass import dataclass

MAX_HEAD = 32 << 10
MAX_FIELDS = 100
_REASONS = {
    101: "Switching Protocols",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    503: "Service Unavailable",
}


class BadRequest(Exception):
    """What the client sent is answered with this status and sentence."""

    def __init__(self, status: int, message: str, fields: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.fields = tuple(fields)


@dataclass(frozen=True, slots=True)
class Head:
    """Method, path without its query, and fields by their names in lower case."""

    method: str
    path: str
    fields: dict[str, list[str]]

    def words(self, name: str) -> list[str]:
        """All comma-separated words of the fields called `name`."""
        return [word.strip() for value in self.fields.get(name, ()) for word in value.split(",") if word.strip()]

    def upgrade(self) -> str:
        """What the client wants to speak, in lower case; "" for plain HTTP."""
        if "upgrade" not in (word.lower() for word in self.words("connection")):
            return ""
        return next((word.lower() for word in self.words("upgrade")), "")


def parse(raw: bytes) -> Head:
    """The head in `raw`, its empty line included. Raises BadRequest."""
    lines = raw.decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or words[2] not in ("HTTP/1.1", "HTTP/1.0"):
        raise BadRequest(400, "expected a request line of HTTP/1.1")
    if len(lines) > MAX_FIELDS:
        raise BadRequest(400, f"more than {MAX_FIELDS} header fields")
    fields: dict[str, list[str]] = {}
    for line in lines[1:]:
        if not line:
            continue
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise BadRequest(400, "expected NAME: VALUE in each header field")
        fields.setdefault(name.lower(), []).append(value.strip())
    if words[0] not in ("GET", "POST"):
        raise BadRequest(405, "expected GET or POST")
    if fields.get("content-length", ["0"]) != ["0"] or "transfer-encoding" in fields:
        raise BadRequest(400, "expected a request without a body")
    return Head(words[0], words[1].partition("?")[0], fields)


def answer(status: int, fields: Iterable[tuple[str, str]] = (), body: str = "") -> bytes:
    """A response; one that switches protocols has no body."""
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}", *(f"{name}: {value}" for name, value in fields)]
    if status != 101:
        lines += ["Connection: close", "Content-Type: text/plain; charset=utf-8", f"Content-Length: {len(body) + 1}"]
        body += "\n"
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode("utf-8", "replace")


def negotiate(offered: Sequence[str], known: Sequence[str]) -> str | None:
    """The first of what the client offers, in its order, that we know; "" where it offers nothing; None for none."""
    if not offered:
        return ""
    return next((word for word in offered if word in known), None)
