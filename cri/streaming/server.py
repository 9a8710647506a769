"""The streaming server: one-time URLs out, upgraded connections in.

    verbs/exec ─ offer ─▶ URL ─ gRPC ─▶ kubelet, crictl
                          URL ◀─ HTTP ─ the same client: SPDY/3.1 or WebSocket ─▶ exchange ─▶ sessions

Listens on loopback unless told otherwise, with TLS where a certificate is configured. Refuses a token that is wrong,
used, too old or of another kind, all with the same 404 (threats S56); a head that takes longer than HEAD_S; and more
than stream.sessions at once. Invariant: a session ends with its connection, and its connection with it, also where a
command takes nothing of what its client has sent before it went.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from cri import trace
from cri.config import StreamSection
from cri.errors import LimitExceeded
from cri.streaming import exchange
from cri.streaming.http import MAX_HEAD, BadRequest, Head, answer, negotiate, parse
from cri.streaming.sessions import Attach, Exec, PortForward, Request, Sessions
from cri.streaming.tokens import Tokens
from cri.streaming.websocket import accept_key
from cri.streaming.wire import Connection, ProtocolError

if TYPE_CHECKING:
    import ssl

log = logging.getLogger(__name__)

HEAD_S = 10.0
LINGER_S = 10.0
# How often a session is asked whether its client is still there, and how long what a client sent that is not may still
# be on its way to the command.
LOOK_S, GONE_S = 5.0, 10.0
# Connections that are no sessions yet: one more takes the place of the oldest. More than are accepted in one turn of
# the loop, or some of those that come together would be taken for idlers.
_SPARE = 256
_KINDS: dict[str, type[Request]] = {"exec": Exec, "attach": Attach, "portforward": PortForward}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_VERSION = "X-Stream-Protocol-Version"
_NOT_FOUND = BadRequest(404, "404 page not found")


class Server:
    """`start` before the first `offer`, `close` at the end."""

    def __init__(self, config: StreamSection, sessions: Sessions) -> None:
        self._config = config
        self._sessions = sessions
        # Each with the span of the call that asked for it.
        self._tokens: Tokens[tuple[Request, object]] = Tokens()
        self._server: asyncio.Server | None = None
        self._base = ""
        self._context: ssl.SSLContext | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._waiting: dict[asyncio.Task[None], None] = {}  # those that are no session yet, oldest first
        self._running = 0

    async def start(self) -> None:
        """Listens. Raises OSError that names address and port, or the certificate."""
        section = self._config
        self._context = _tls(section)
        where = f"{section.address} port {section.port or 'any'}"
        try:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(lambda: _Door(self._arrived), section.address, section.port)
        except OSError as error:
            raise OSError(f"listen for streams on {where}: {error.strerror or error}") from error
        host, port = self._server.sockets[0].getsockname()[:2]
        # Whoever listens everywhere is reached at loopback, too, and the kubelet is on this machine.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound to
        self._base = f"{'https' if self._context else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
        log.info("streams are served on %s", self._base)

    def offer(self, request: Request) -> str:
        """A URL at which a client gets what it asked for, once and soon. Raises LimitExceeded."""
        if self._running >= self._config.sessions:
            raise LimitExceeded(f"{self._running} exec, attach and port-forward sessions are open (stream.sessions)")
        return f"{self._base}/{_NAMES[type(request)]}/{self._tokens.offer((request, trace.present()))}"

    async def close(self) -> None:
        """Ends every session; containers run on."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    # -------------------------------------------------------------------------------------------------- connections

    def _arrived(self, transport: asyncio.Transport) -> None:
        """Somebody has connected: counted before a handshake, which costs most of what a silent client can."""
        if len(self._waiting) >= _SPARE:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.cancel()
        task = asyncio.ensure_future(self._connected(transport))
        self._connections.add(task)
        self._waiting[task] = None
        task.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[None]) -> None:
        self._connections.discard(task)
        self._waiting.pop(task, None)

    async def _connected(self, transport: asyncio.Transport) -> None:
        try:
            connection = await _entered(transport, self._context)
        except (OSError, EOFError) as error:
            log.debug("stream: %s", error or type(error).__name__)
            return
        except asyncio.CancelledError:
            transport.abort()
            return
        try:
            await self._answer(connection)
        except (OSError, EOFError, ProtocolError, TimeoutError, asyncio.LimitOverrunError) as error:
            log.debug("stream: %s", error or type(error).__name__)
        except asyncio.CancelledError:
            connection.abort()  # the server ends, or needs the place
        except Exception:
            log.exception("stream: unexpected")
        finally:
            connection.close()

    async def _answer(self, connection: Connection) -> None:
        async with asyncio.timeout(HEAD_S):
            raw = await connection.read_head()
        try:
            head = parse(raw)
            request, above = self._claim(head)
            with trace.span_of(above, f"stream.{_NAMES[type(request)]}", pod_id=request.sandbox.id):
                await self._serve(connection, head, request)
        except BadRequest as error:
            await connection.write(answer(error.status, error.fields, str(error)))
        await connection.linger(LINGER_S)

    def _claim(self, head: Head) -> tuple[Request, object]:
        """The request that the path's token stands for, and its call's span. Raises BadRequest, the same for all that
        is wrong with it."""
        empty, _, rest = head.path.partition("/")
        name, _, token = rest.partition("/")
        found = self._tokens.take(token)
        if empty or found is None or _KINDS.get(name) is not type(found[0]):
            raise _NOT_FOUND
        return found

    async def _serve(self, connection: Connection, head: Head, request: Request) -> None:
        if self._running >= self._config.sessions:
            raise BadRequest(503, f"{self._running} sessions are open (stream.sessions)")
        self._running += 1
        self._waiting.pop(cast("asyncio.Task[None]", asyncio.current_task()), None)
        try:
            session = asyncio.ensure_future(self._upgrade(connection, head, request))
            still = asyncio.ensure_future(self._until_still(connection))
            try:
                await asyncio.wait((session, still), return_when=asyncio.FIRST_COMPLETED)
                if not session.done():
                    raise ProtocolError(still.result())
                session.result()
            finally:
                session.cancel()
                still.cancel()
                await asyncio.gather(session, still, return_exceptions=True)
        finally:
            self._running -= 1

    async def _until_still(self, connection: Connection) -> str:
        """Until nothing moves any more, for which the reason is returned."""
        now = asyncio.get_running_loop().time
        while (left := connection.touched + self._config.idle_s - now()) > 0:
            if connection.touched + GONE_S <= now() and connection.hung_up():
                return "the client has gone, and nobody reads what it has sent"
            await asyncio.sleep(min(left, LOOK_S))
        return f"nothing moved for {self._config.idle_s:g} s (stream.idle_s)"

    async def _upgrade(self, connection: Connection, head: Head, request: Request) -> None:
        wanted = head.upgrade()
        if wanted == "spdy/3.1":
            await self._spdy(connection, head, request)
        elif wanted == "websocket":
            await self._websocket(connection, head, request)
        else:
            raise BadRequest(400, "unable to upgrade: expected Upgrade: SPDY/3.1 or websocket")

    async def _spdy(self, connection: Connection, head: Head, request: Request) -> None:
        known = (exchange.FORWARD,) if isinstance(request, PortForward) else exchange.SPDY_REMOTE
        protocol = _agreed(head.words(_VERSION.lower()), known)
        fields = [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")]
        await connection.write(answer(101, fields + ([(_VERSION, protocol)] if protocol else [])))
        if isinstance(request, PortForward):
            await exchange.forward_over_spdy(self._sessions, request, connection)
        else:
            await exchange.remote_over_spdy(self._sessions, request, connection, protocol)

    async def _websocket(self, connection: Connection, head: Head, request: Request) -> None:
        key = head.fields.get("sec-websocket-key", [""])[0]
        if head.method != "GET" or head.words("sec-websocket-version") != ["13"] or len(key) != 24:
            raise BadRequest(400, "unable to upgrade: expected GET with a WebSocket key and version 13")
        forwards = isinstance(request, PortForward)
        known = exchange.WEBSOCKET_FORWARD if forwards else exchange.WEBSOCKET_REMOTE
        protocol = _agreed(head.words("sec-websocket-protocol"), known)
        if isinstance(request, PortForward) and protocol != exchange.TUNNEL and not request.ports:
            raise BadRequest(400, "port: channels need the ports in the request")
        fields = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Accept", accept_key(key))]
        fields += [("Sec-WebSocket-Protocol", protocol)] if protocol else []
        await connection.write(answer(101, fields))
        if isinstance(request, PortForward):
            await exchange.forward_over_websocket(self._sessions, request, connection, protocol)
        else:
            await exchange.remote_over_websocket(self._sessions, request, connection, protocol)


class _Door(asyncio.Protocol):
    """Who has just connected; nothing is read until it is known how."""

    def __init__(self, arrived: Callable[[asyncio.Transport], None]) -> None:
        self._arrived = arrived

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        taken = cast(asyncio.Transport, transport)
        taken.pause_reading()
        self._arrived(taken)


async def _entered(transport: asyncio.Transport, context: ssl.SSLContext | None) -> Connection:
    """The connection, after the handshake where there is one. Raises OSError."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=MAX_HEAD)
    protocol = asyncio.StreamReaderProtocol(reader)
    inner: asyncio.Transport | None = transport
    if context is None:
        transport.set_protocol(protocol)
    else:
        inner = await loop.start_tls(transport, protocol, context, server_side=True, ssl_handshake_timeout=HEAD_S)
    if inner is None:
        raise ConnectionResetError("the client has gone during the handshake")
    protocol.connection_made(inner)
    if context is None:
        transport.resume_reading()
    return Connection(reader, asyncio.StreamWriter(inner, protocol, reader, loop))


def _agreed(offered: list[str], known: tuple[str, ...]) -> str:
    """The protocol to speak, "" for a client of before there was a choice. Raises BadRequest."""
    protocol = negotiate(offered, known)
    if protocol is None:
        message = f"unable to upgrade: the client speaks {', '.join(offered)}; ocid speaks {', '.join(known)}"
        raise BadRequest(403, message, [("X-Accepted-Stream-Protocol-Versions", word) for word in known])
    return protocol


def _tls(section: StreamSection) -> ssl.SSLContext | None:
    if not section.tls_cert:
        return None
    import ssl  # few nodes want it: the kubelet talks over loopback

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(section.tls_cert, section.tls_key or None)
    except (OSError, ssl.SSLError) as error:
        raise OSError(f"stream.tls_cert {section.tls_cert}: {error}") from error
    with contextlib.suppress(NotImplementedError):
        context.set_alpn_protocols(["http/1.1"])
    return context
