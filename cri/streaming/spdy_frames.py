"""SPDY/3.1 on the wire: frames and header blocks, both directions side by side. No I/O.

    control   1 | version 15 | type 16 │ flags 8 | length 24 │ payload
    data      0 | stream 31            │ flags 8 | length 24 │ payload

Header blocks of one direction share one zlib context, begun with the dictionary that both sides know (SPDY/3,
2.6.10.1), so every block has to be inflated, wanted or not. Refuses blocks that inflate to more than MAX_HEADERS, and
pairs without end (threats S54). Invariant: no length is believed before it was compared with what is there.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

from cri.streaming.wire import ProtocolError

VERSION = 3
SYN_STREAM, SYN_REPLY, RST_STREAM, SETTINGS, PING, GOAWAY, HEADERS, WINDOW_UPDATE = 1, 2, 3, 4, 6, 7, 8, 9
FIN = 0x01
PROTOCOL_ERROR, REFUSED_STREAM, CANCEL = 1, 3, 5  # of RST_STREAM
INITIAL_WINDOW_SIZE = 7  # of SETTINGS
MAX_CONTROL = 64 << 10
MAX_HEADERS = 64 << 10
MAX_PAIRS = 64
MAX_SETTINGS = 64

_WORDS = (
    "options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow "
    "authorization cache-control connection content-base content-encoding content-language content-length "
    "content-location content-md5 content-range content-type date etag expect expires from host if-match "
    "if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma "
    "proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade "
    "user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie "
    "keep-alive origin"
)
_TAIL = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden"
    "404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,"
    "publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)


def _dictionary() -> bytes:
    words = [word.replace("_", " ").encode() for word in _WORDS.split()]
    return b"".join(struct.pack(">I", len(word)) + word for word in words) + _TAIL.encode()


DICTIONARY = _dictionary()
_COUNT = struct.Struct(">I")


class Deflater:
    """The header blocks of one direction, as they leave. They are short: a window of 1 KiB is enough for them, where
    zlib's usual one would cost 256 KiB for each connection."""

    def __init__(self) -> None:
        self._zlib = zlib.compressobj(wbits=10, memLevel=1, zdict=DICTIONARY)

    def block(self, headers: Mapping[str, str]) -> bytes:
        """The block of `headers`, names in lower case."""
        parts = [_COUNT.pack(len(headers))]
        for name, value in headers.items():
            for text in (name.lower().encode(), value.encode()):
                parts += [_COUNT.pack(len(text)), text]
        return self._zlib.compress(b"".join(parts)) + self._zlib.flush(zlib.Z_SYNC_FLUSH)


class Inflater:
    """The header blocks of one direction, as they come."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(zdict=DICTIONARY)

    def headers(self, block: bytes) -> dict[str, str]:
        """Names in lower case, a value with several parts is cut after the first. Raises ProtocolError."""
        try:
            plain = self._zlib.decompress(block, MAX_HEADERS)
        except zlib.error as error:
            raise ProtocolError(f"read a header block: {error}") from None
        if self._zlib.unconsumed_tail:
            raise ProtocolError(f"read a header block: more than {MAX_HEADERS} bytes of headers")
        if not plain:
            return {}
        at, headers = 4, {}
        count = _number(plain, 0)
        if count > MAX_PAIRS:
            raise ProtocolError(f"read a header block: {count} headers, at most {MAX_PAIRS}")
        for _ in range(count):
            name, at = _text(plain, at)
            value, at = _text(plain, at)
            headers[name.lower()] = value.split("\0", 1)[0]
        return headers


def _number(plain: bytes, at: int) -> int:
    if at + 4 > len(plain):
        raise ProtocolError("read a header block: it ends early")
    return int(_COUNT.unpack_from(plain, at)[0])


def _text(plain: bytes, at: int) -> tuple[str, int]:
    length = _number(plain, at)
    at += 4
    if at + length > len(plain):
        raise ProtocolError("read a header block: it ends early")
    return plain[at : at + length].decode("latin-1"), at + length


def data(stream: int, payload: bytes, *, fin: bool = False) -> bytes:
    """A DATA frame."""
    return struct.pack(">II", stream & 0x7FFFFFFF, (FIN if fin else 0) << 24 | len(payload)) + payload


def _control(kind: int, payload: bytes, flags: int = 0) -> bytes:
    return struct.pack(">HHI", 0x8000 | VERSION, kind, flags << 24 | len(payload)) + payload


def syn_stream(stream: int, block: bytes, *, fin: bool = False) -> bytes:
    """Opens a stream; priority and slot are 0."""
    return _control(SYN_STREAM, struct.pack(">IIBB", stream, 0, 0, 0) + block, FIN if fin else 0)


def syn_reply(stream: int, block: bytes) -> bytes:
    """Accepts a stream."""
    return _control(SYN_REPLY, struct.pack(">I", stream) + block)


def rst_stream(stream: int, status: int) -> bytes:
    """Ends a stream at once, both directions."""
    return _control(RST_STREAM, struct.pack(">II", stream, status))


def ping(number: int) -> bytes:
    """A question from whoever's parity the number has, or its answer."""
    return _control(PING, struct.pack(">I", number))


def goaway(last: int, status: int = 0) -> bytes:
    """No streams after `last` are taken."""
    return _control(GOAWAY, struct.pack(">II", last, status))


def window_update(stream: int, size: int) -> bytes:
    """The receiver has taken so much of a stream, or, as stream 0, of all."""
    return _control(WINDOW_UPDATE, struct.pack(">II", stream, size))


def numbers(kind: int, payload: bytes, *, least: int) -> tuple[int, ...]:
    """The fixed 32-bit fields a frame of `kind` begins with. Raises ProtocolError."""
    if len(payload) < least * 4:
        raise ProtocolError(f"read a frame of type {kind}: {len(payload)} bytes, at least {least * 4}")
    return struct.unpack_from(f">{least}I", payload)


def settings(payload: bytes) -> dict[int, int]:
    """The values of a SETTINGS frame by their ids. Raises ProtocolError when it does not hold what it counts."""
    (count,) = numbers(SETTINGS, payload, least=1)
    if count > MAX_SETTINGS or len(payload) != 4 + 8 * count:
        raise ProtocolError(f"read SETTINGS: {count} of them in {len(payload)} bytes, at most {MAX_SETTINGS}")
    # Eight bits of flags, about what a client is to remember, are before the id.
    return {head & 0xFFFFFF: value for head, value in struct.iter_unpack(">II", payload[4:])}
