"""One repository on one registry host (OCI distribution-spec, pull): manifests as bytes, blobs into an `Ingest`.

    open ──401──> Login.answer ──> open again, once
         ──429, 5xx, connection lost──> wait (Retry-After, or backoff with jitter) ──> open again, `retries` times

Refuses answers beyond their cap (threats S31), partial content that is not what was asked for, content encodings, and
connections that move less than `stall_bytes` in `stall_timeout_s` (O48). Invariant: every failure is an ImageError of
one sentence that names the host and holds no secret; what was written to an `Ingest` is a true prefix or will fail its
digest.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from imagestore.auth import Login, parse_challenges
from imagestore.config import StoreConfig
from imagestore.content import Ingest
from imagestore.download import Download
from imagestore.hosts import Host
from imagestore.manifest import ACCEPT, digest_of
from imagestore.model import (
    AccessDenied,
    ContentInvalid,
    Credentials,
    Descriptor,
    ImageError,
    ImageNotFound,
    RegistryUnavailable,
)
from imagestore.rate import Rate
from imagestore.reference import Reference, is_digest
from imagestore.threads import Threads
from imagestore.transport import (
    Answer,
    Request,
    SendBody,
    Tls,
    Transient,
    Transport,
    following,
    origin_of,
    place,
    worded,
)
from imagestore.wording import registry_words
from runtime.linux.dataclass import dataclass

T = TypeVar("T")
Report = Callable[[int], None]

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)", re.ASCII)
# A connection that was cut after moving this much was worth continuing: it does not use up a retry.
_WORTHWHILE = 1 << 20
_ATTEMPTS = 200
_NEXT = re.compile(r'<([^<>]{1,4096})>\s*;\s*rel\s*=\s*"?next"?', re.ASCII | re.IGNORECASE)
_DELETED = frozenset({200, 202, 204})
_SPEAKS = frozenset({200, 401, 403})


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or index as a registry served it; `digest` is that of the bytes themselves."""

    data: bytes
    content_type: str
    digest: str


class Repository:
    """`reference`'s repository on `host`, which is logged in to with the first of `credentials` that it takes."""

    def __init__(
        self,
        host: Host,
        reference: Reference,
        credentials: Sequence[Credentials],
        transport: Transport,
        threads: Threads,
        config: StoreConfig,
        actions: str = "pull",
        rate: Rate | None = None,
    ) -> None:
        self.host = host
        self._transport = transport
        self._threads = threads
        self._config = config
        path = host.path or reference.path
        self._rates = [limit for limit in (rate, transport.rate) if limit is not None]
        self._login = Login(host, host.repository(reference.path), credentials, actions)
        self._base = f"{host.base}/{path}"
        # A mirror of many registries must know which one is meant (as containerd asks its mirrors).
        self._query = "" if host.upstream or not host.asks_namespace else f"?ns={reference.domain}"
        # A mirror is only a shortcut: it is not waited for as patiently as the registry itself.
        self.retries = config.retries if host.upstream else min(1, config.retries)

    async def manifest(self, target: str) -> Document:
        """The manifest called `target`, a tag or a digest that was checked before; a digest is verified.
        Raises ImageNotFound, AccessDenied, RegistryUnavailable, ContentInvalid."""
        what = f"manifest {target}"

        async def get() -> Document:
            async with asyncio.timeout(self._config.answer_timeout_s):
                async with self.open("GET", f"/manifests/{target}", {"Accept": ACCEPT}, what) as answer:
                    data = await self.read(answer, self._config.manifest_bytes, what)
                    content_type = answer.header("Content-Type")
                    told = answer.header("Docker-Content-Digest")
            return self._document(data, content_type, told, target, what)

        return await self.retrying(get, what)

    def _document(self, data: bytes, content_type: str, told: str, target: str, what: str) -> Document:
        digest = digest_of(data)
        if told and not is_digest(told):
            raise ContentInvalid(f"{self.host.origin}: {what}: Docker-Content-Digest is not sha256: and 64 hex digits")
        if (told or digest) != digest or (is_digest(target) and target != digest):
            announced = target if is_digest(target) else told
            raise ContentInvalid(f"{self.host.origin}: {what}: the content is {digest}, announced was {announced}")
        return Document(data, content_type, digest)

    async def digest(self, tag: str) -> str | None:
        """The digest that `tag` has now, or None when the registry tells it only with the manifest."""
        what = f"manifest {tag}"

        async def head() -> str | None:
            async with asyncio.timeout(self._config.answer_timeout_s):
                async with self.open("HEAD", f"/manifests/{tag}", {"Accept": ACCEPT}, what) as answer:
                    told = answer.header("Docker-Content-Digest")
            return told if is_digest(told) else None

        return await self.retrying(head, what)

    async def small(self, path: str, what: str, limit: int, accept: str = "*/*") -> bytes:
        """What `path` of the repository answers, at most `limit` bytes, unverified: signatures, referrers.
        Raises as `manifest` does."""

        async def get() -> bytes:
            async with asyncio.timeout(self._config.answer_timeout_s):
                async with self.open("GET", path, {"Accept": accept}, what) as answer:
                    return await self.read(answer, limit, what)

        return await self.retrying(get, what)

    async def pages(self, path: str, what: str, accept: str = "*/*") -> list[bytes]:
        """What `path` of the repository answers, and the pages that each says come next (distribution-spec, Link), all
        of them within `list_bytes`. Raises as `manifest` does; ContentInvalid for pages without end, and for a page
        that is to be had from elsewhere."""
        found: list[bytes] = []
        at, left = path, self._config.list_bytes

        async def get() -> tuple[bytes, str]:
            async with asyncio.timeout(self._config.answer_timeout_s):
                async with self.open("GET", at, {"Accept": accept}, what) as answer:
                    data = await self.read(answer, left, what)
                    link = _NEXT.search(answer.header("Link"))
                    return data, following(str(answer.response.url), link[1]) if link else ""

        while at:
            if len(found) == self._config.pages:
                raise ContentInvalid(f"{self.host.origin}: {what}: more than {self._config.pages} pages")
            data, at = await self.retrying(get, what)
            found.append(data)
            left -= len(data)
            if at and origin_of(at) != origin_of(self._base):
                raise ContentInvalid(f"{self.host.origin}: {what}: its next page is said to be at {place(at)}")
        return found

    async def delete(self, digest: str) -> None:
        """Takes a manifest out of the repository, with all its tags. Raises as `manifest` does."""
        what = f"deletion of manifest {digest}"

        async def ask() -> None:
            async with asyncio.timeout(self._config.answer_timeout_s):
                async with self.open("DELETE", f"/manifests/{digest}", {}, what, accept=_DELETED):
                    pass

        await self.retrying(ask, what)

    async def answers(self) -> bool:
        """True when a registry speaks there the way that its host is spoken to."""
        request = Request("GET", f"{self.host.base}/", tls=Tls(self.host), connect_s=self.host.dial_s)
        try:
            async with self._transport.send(request) as answer:
                return answer.response.status in _SPEAKS
        except (RegistryUnavailable, ContentInvalid):
            return False

    async def blob(self, blob: Descriptor, ingest: Ingest, report: Report) -> None:
        """All of `blob` into `ingest`, which was loaded and may hold its beginning; verified, not yet finished.
        Raises as `manifest` does, and ImageError when the disk refuses."""
        await Download(self, blob, ingest, report, self._threads, self._config).run()

    # ------------------------------------------------------------------------------------------------------ requests

    @asynccontextmanager
    async def open(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        what: str,
        *,
        accept: frozenset[int] = frozenset({200, 206, 416}),
        body: bytes | SendBody | None = None,
    ) -> AsyncIterator[Answer]:
        """The answer with a status of `accept`, after logging in where that was asked for. `path` is below the
        repository, or a whole URL that this registry gave us: it gets our secrets where it is the registry's own."""
        url = path if "://" in path else f"{self._base}{path}{self._query}"
        own = origin_of(url) == origin_of(self._base)
        for attempt in (1, 2):
            secret = self._login.headers() if own else {}
            tls = Tls(self.host) if own else Tls()
            request = Request(method, url, headers, secret, body=body, tls=tls, connect_s=self.host.dial_s)
            async with self._transport.send(request) as answer:
                if answer.response.status == 401 and answer.home and own and attempt == 1:
                    challenges = parse_challenges(answer.response.headers.getall("WWW-Authenticate", []))
                    answer.response.release()
                    if await self._login.answer(challenges, secret.get("Authorization", ""), self._token):
                        continue
                if answer.response.status not in accept:
                    raise await self._refusal(answer, what, self.host.origin, self._login.secrets())
                yield answer
                return

    async def paced(self, count: int) -> None:
        """Waits until the limits on bytes per second allow what came just now."""
        for rate in self._rates:
            await rate.take(count)

    def also_pull(self, path: str) -> None:
        """Blobs of the repository `path` of this registry are going to be mounted: tokens must allow it."""
        self._login.also_pull(self.host.repository(path))

    async def _token(self, request: Request, secrets: list[str]) -> bytes:
        where = f"token server {place(request.url)}"
        async with self._transport.send(request) as answer:
            if answer.response.status != 200:
                raise await self._refusal(answer, "token", where, secrets)
            return await self.read(answer, self._config.token_bytes, where)

    async def read(self, answer: Answer, limit: int, what: str) -> bytes:
        """A small body. Raises ContentInvalid beyond `limit`."""
        import aiohttp

        origin = self.host.origin
        if (answer.response.content_length or 0) > limit:
            raise ContentInvalid(f"{origin}: {what}: {answer.response.content_length} bytes, the limit is {limit}")
        pieces, size = [], 0
        try:
            while piece := await answer.response.content.readany():
                size += len(piece)
                if size > limit:
                    raise ContentInvalid(f"{origin}: {what}: more than {limit} bytes")
                pieces.append(piece)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise worded(error, self.host.base) from None
        return b"".join(pieces)

    async def _refusal(self, answer: Answer, what: str, where: str, secrets: list[str]) -> ImageError:
        """The error for an answer that is none of what was asked for, in the registry's words where it has some."""
        status = answer.response.status
        try:
            words = registry_words(await self.read(answer, self._config.error_bytes, "error body"), secrets)
        except ImageError:
            words = ""
        text = f"{where} answered {status} for {what}" + (f" ({words})" if words else "")
        if status == 401:
            return AccessDenied(f"{text}: log in with valid credentials")
        if status == 403:
            return AccessDenied(f"{text}: the credentials do not allow it")
        if status in (404, 410):
            return ImageNotFound(text)
        if status == 407:
            return RegistryUnavailable(f"{text}: that is the proxy, which wants a login, or another")
        if status == 429 or status in (408, 425) or status >= 500:
            return self._later(text, answer.header("Retry-After"))
        if status == 400 and self.host.base.startswith("http:"):
            text += ": if this registry speaks TLS, say so with https:// in its hosts.toml"
        return ContentInvalid(text)

    def _later(self, text: str, retry_after: str) -> RegistryUnavailable:
        delay = _seconds(retry_after)
        if delay is not None and delay > self._config.retry_after_limit_s:
            return RegistryUnavailable(f"{text}: it asks to come back in {delay:.0f} s")
        return Transient(text, delay)

    # ------------------------------------------------------------------------------------------------------- patience

    async def retrying(self, ask: Callable[[], Awaitable[T]], what: str) -> T:
        """What `ask` answers, asked again after failures that may pass. Raises what it raised last."""
        for failures in range(1, self.retries + 2):
            try:
                return await ask()
            except (Transient, TimeoutError) as error:
                if failures > self.retries:
                    raise self.final(error, what) from None
                await self.pause(failures, error)
        raise AssertionError("unreachable")

    def final(self, error: BaseException, what: str) -> RegistryUnavailable:
        if isinstance(error, Transient):
            return error
        return RegistryUnavailable(
            f"{self.host.origin}: {what}: no whole answer in {self._config.answer_timeout_s:g} s"
        )

    async def pause(self, failures: int, error: BaseException) -> None:
        asked = error.delay if isinstance(error, Transient) else None
        if asked is None:
            longest = min(self._config.backoff_s * 2 ** max(failures - 1, 0), self._config.backoff_limit_s)
            asked = longest * random.uniform(0.5, 1.0)  # callers that failed together must not come back together
        await asyncio.sleep(asked)


def _seconds(retry_after: str) -> float | None:
    """Retry-After as seconds from now: a number of them, or a date (RFC 9110 10.2.3)."""
    text = retry_after.strip()
    if text.isascii() and text.isdecimal() and len(text) <= 9:
        return float(text)
    from email.utils import parsedate_to_datetime  # a rare need that would cost every idle daemon its memory

    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
