"""HTTP to registries: one request at a time, each failure one of our errors, and redirects that carry no secret away.

Refuses redirects from https to http, to other schemes, and with user:password in them. Invariant: headers that hold a
secret (Authorization, and those of hosts.toml) go to the exact scheme, host spelling and port that they belong to; once
a redirect has left it they do not come back (threats R9, S26, S27, P2). There is no cookie jar and no netrc.
aiohttp is imported when the first pull begins and its pools live as long as a pull does: idle memory is a budget.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import field
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from imagestore.config import StoreConfig
from imagestore.content import errno_text
from imagestore.hosts import Host
from imagestore.model import ContentInvalid, ImageError, RegistryUnavailable
from imagestore.proxy import proxy_for
from imagestore.rate import Rate
from imagestore.reference import is_loopback
from runtime.linux.dataclass import dataclass

if TYPE_CHECKING:
    import aiohttp
    from aiohttp.abc import ResolveResult

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# The parser's buffer: large enough that the loop wakes up for many packets at once, small enough for many downloads.
_READ_BUFFER = 1 << 20


class Transient(RegistryUnavailable):
    """A failure that may pass by itself. `delay` is what the registry asked us to wait, None when it did not say."""

    def __init__(self, message: str, delay: float | None = None) -> None:
        super().__init__(message)
        self.delay = delay


@dataclass(frozen=True, slots=True)
class Tls:
    """How to verify a server and how to show oneself to it, as hosts.toml says, or files beside where that would be."""

    host: Host | None = None

    def context(self) -> ssl.SSLContext:
        """Raises ImageError when a certificate cannot be used."""
        context = ssl.create_default_context()
        host = self.host
        if host is None:
            return context
        try:
            for path in host.ca:
                context.load_verify_locations(path)
            for certificate, key in host.client:
                context.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as error:
            raise ImageError(f"registry {host.origin}: certificates: {error}") from None
        if host.skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


# A body that is sent as it is read, begun anew for each attempt. Its length stands in the headers.
SendBody = Callable[[], AsyncIterator[bytes]]


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `secret` headers leave with the first change of scheme, host or port."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    secret: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes | SendBody | None = field(default=None, repr=False)
    tls: Tls = Tls()
    redirects: int | None = None
    connect_s: float | None = None
    """How long connecting to the host itself may take, where hosts.toml says."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A final answer; `home` is False when redirects led to another place than was asked."""

    response: aiohttp.ClientResponse
    home: bool

    def header(self, name: str) -> str:
        return self.response.headers.get(name, "")


def origin_of(url: str) -> tuple[str, str, int]:
    """Scheme, host exactly as spelled, port. Spellings that differ are different: `host.`, `HOST` (threats S27)."""
    parts = urlsplit(url)
    spelled = parts.netloc.rpartition("@")[2]
    host = spelled if spelled.endswith("]") or ":" not in spelled else spelled.rpartition(":")[0]
    return parts.scheme, host, parts.port or (443 if parts.scheme == "https" else 80)


def place(url: str) -> str:
    """The part of a URL that may stand in a message."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


class Transport:
    """The HTTP pools of one store, while pulls run."""

    def __init__(self, config: StoreConfig) -> None:
        self._config = config
        self.rate = Rate(config.bandwidth_bytes) if config.bandwidth_bytes else None
        """What all downloads of this store may take together."""
        self._session: aiohttp.ClientSession | None = None
        self._users = 0
        self._contexts: dict[Tls, ssl.SSLContext] = {}

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Transport]:
        """The pools stay while anybody is inside."""
        self._users += 1
        try:
            yield self
        finally:
            self._users -= 1
            if self._users == 0 and self._session is not None:
                session, self._session = self._session, None
                self._contexts.clear()
                await session.close()

    @asynccontextmanager
    async def send(self, request: Request) -> AsyncIterator[Answer]:
        """The answer to `request` after redirects; its connection is given back at the end.
        Raises Transient, ContentInvalid, ImageError."""
        response, home = await self._follow(request)
        try:
            yield Answer(response, home)
        finally:
            # An answer that was not read to its end cannot share its connection: release closes it then.
            response.release()

    async def _follow(self, request: Request) -> tuple[aiohttp.ClientResponse, bool]:
        url, home = request.url, True
        limit = self._config.redirects if request.redirects is None else request.redirects
        for _ in range(limit + 1):
            headers = {**request.headers, **(request.secret if home else {})}
            response = await self._once(request, url, headers, home=home)
            if response.status not in _REDIRECTS:
                return response, home
            location = response.headers.get("Location", "")
            response.release()
            url = following(url, location)
            home = home and origin_of(url) == origin_of(request.url)
        raise ContentInvalid(f"{place(request.url)} redirects more than {limit} times")

    async def _once(
        self, request: Request, url: str, headers: Mapping[str, str], *, home: bool
    ) -> aiohttp.ClientResponse:
        import aiohttp
        import yarl

        proxy = proxy_for(url, os.environ)
        verify: ssl.SSLContext | bool = True
        if url.startswith("https:"):
            verify = await self._context(request.tls if home else Tls())
        timeout = _timeout(self._config, request.connect_s if home else None)
        try:
            # encoded=True: a signed URL must be sent as it was given, byte by byte.
            return await self._pool().request(
                request.method,
                yarl.URL(url, encoded=True),
                headers=headers,
                data=request.body() if callable(request.body) else request.body,
                ssl=verify,
                proxy=proxy,
                timeout=timeout,
                allow_redirects=False,
            )
        except (aiohttp.ClientProxyConnectionError, aiohttp.ClientHttpProxyError) as error:
            raise _proxy_failed(error, url, proxy or "") from None
        except aiohttp.ClientConnectorCertificateError as error:
            reason = getattr(error.certificate_error, "verify_message", "") or "certificate verify failed"
            raise RegistryUnavailable(f"{place(url)}: the server's certificate is not trusted ({reason})") from None
        except aiohttp.ClientConnectorSSLError as error:
            raise RegistryUnavailable(f"{place(url)}: TLS failed ({_ssl_reason(error)})") from None
        except aiohttp.ClientConnectorDNSError:
            raise Transient(f"{place(url)}: the host name does not resolve") from None
        except aiohttp.ClientConnectorError as error:
            raise Transient(f"{place(url)}: connect: {_connect_words(error.os_error)}") from None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise worded(error, url) from None

    async def _context(self, tls: Tls) -> ssl.SSLContext:
        if tls not in self._contexts:
            # Reading the system's certificates takes tens of milliseconds: not on the loop.
            self._contexts[tls] = await asyncio.to_thread(tls.context)
        return self._contexts[tls]

    def _pool(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = _session(self._config)
        return self._session


def _proxy_failed(error: aiohttp.ClientError, url: str, proxy: str) -> RegistryUnavailable:
    import aiohttp

    where = f"{place(url)}: proxy {place(proxy)}"
    if isinstance(error, aiohttp.ClientConnectorError):
        return Transient(f"{where}: connect: {_connect_words(error.os_error)}")
    return RegistryUnavailable(f"{where}: answered {getattr(error, 'status', 0)}")


def _connect_words(error: OSError) -> str:
    """The errno, which hides in the text when several addresses of a host were tried."""
    number = re.search(r"\[Errno ([0-9]{1,5})\]", str(error), re.ASCII)
    return errno_text(OSError(int(number[1]), "") if error.errno is None and number else error)


def _ssl_reason(error: aiohttp.ClientConnectorError) -> str:
    return str(getattr(error.os_error, "reason", "") or "handshake").lower().replace("_", " ")


def worded(error: BaseException, url: str) -> RegistryUnavailable | ContentInvalid:
    """aiohttp's failures as ours. Their own texts may hold the URL or the headers: only their kind is used."""
    import aiohttp

    if isinstance(error, TimeoutError):
        return Transient(f"{place(url)}: no answer in time")
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError):
        return Transient(f"{place(url)}: the connection ended before the answer did")
    if isinstance(error, aiohttp.ClientResponseError | aiohttp.InvalidURL | ValueError):
        return ContentInvalid(f"{place(url)}: the answer is not proper HTTP")
    if isinstance(error, OSError):
        return Transient(f"{place(url)}: {errno_text(error)}")
    return Transient(f"{place(url)}: the connection failed ({type(error).__name__})")


def following(url: str, location: str) -> str:
    """Where a redirect leads. Raises ContentInvalid for one that is not followed; the location is never quoted."""
    try:
        target = urljoin(url, location)
        parts = urlsplit(target)
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        raise ContentInvalid(f"{place(url)}: a redirect without a proper location") from None
    if not location or not parts.hostname or parts.scheme not in ("http", "https") or not port_is_valid:
        raise ContentInvalid(f"{place(url)}: a redirect without a proper location")
    if any(ord(char) <= 32 or ord(char) == 127 for char in target):
        raise ContentInvalid(f"{place(url)}: a redirect without a proper location")
    if "@" in parts.netloc:
        raise ContentInvalid(f"{place(url)}: a redirect with user and password in it is not followed")
    if parts.scheme == "http" and url.startswith("https:"):
        raise ContentInvalid(f"{place(url)}: a redirect from https to http is not followed")
    return target


def _timeout(config: StoreConfig, connect_s: float | None) -> aiohttp.ClientTimeout:
    import aiohttp

    return aiohttp.ClientTimeout(
        total=None, sock_connect=connect_s or config.connect_timeout_s, sock_read=config.stall_timeout_s
    )


def _session(config: StoreConfig) -> aiohttp.ClientSession:
    import aiohttp
    from aiohttp.resolver import ThreadedResolver

    class Resolver(ThreadedResolver):
        """The system's resolver, but `localhost` is this machine whatever a name server says (threats S28)."""

        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
        ) -> list[ResolveResult]:
            if not is_loopback(host):
                return await super().resolve(host, port, family)
            found: list[ResolveResult] = []
            for address, kind in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
                entry: ResolveResult = {
                    "hostname": host,
                    "host": address,
                    "port": port,
                    "family": kind,
                    "proto": 0,
                    "flags": socket.AI_NUMERICHOST,
                }
                found.append(entry)
            return found

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(resolver=Resolver(), limit=64, ttl_dns_cache=10, keepalive_timeout=10),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": config.user_agent, "Accept-Encoding": "identity"},
        auto_decompress=False,
        trust_env=False,
        read_bufsize=_READ_BUFFER,
        max_line_size=config.header_bytes,
        max_field_size=config.header_bytes,
    )


_loading = threading.Lock()


def preload() -> None:
    """Imports aiohttp off the loop: the first import takes long enough to be felt by everybody else on it."""
    with _loading:
        import aiohttp  # noqa: F401
