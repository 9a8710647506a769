"""Into a repository on a registry (OCI distribution-spec, push): blobs by mount or upload, manifests by tag or digest.

    HEAD blob ──there──> done
    POST uploads/?mount=…&from=…  ──201──> done, without a byte sent
                                  ──202, Location──> PATCH the bytes, PUT ?digest=…  ──201──> done

Refuses upload locations that lead from https to http; sends secrets to the registry's own origin only (threats R9).
Invariant: a manifest is put after everything that it names, and a registry that answers with another digest than what
was sent is an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import quote, urlsplit

from imagestore.config import StoreConfig
from imagestore.model import AccessDenied, ContentInvalid, Descriptor, ImageNotFound
from imagestore.registry import Document, Repository
from imagestore.threads import Threads
from imagestore.transport import Answer, following

_PIECE = 1 << 20
_HAS = frozenset({200, 404})
_BEGUN = frozenset({201, 202})
_DONE = frozenset({200, 201, 202, 204})


class Pusher:
    """Pushes into one repository, whose tokens allow it ("pull,push")."""

    def __init__(self, repository: Repository, threads: Threads, config: StoreConfig) -> None:
        self._repository = repository
        self._threads = threads
        self._config = config

    async def has(self, blob: Descriptor) -> bool:
        """True when the registry has the blob in this repository."""
        what = f"blob {blob.digest}"

        async def head() -> bool:
            async with self._repository.open("HEAD", f"/blobs/{blob.digest}", {}, what, accept=_HAS) as answer:
                return answer.response.status == 200

        return await self._repository.retrying(head, what)

    async def mount(self, blob: Descriptor, origin: str) -> bool:
        """Takes the blob over from the repository `origin` of the same registry; False where it would not."""
        self._repository.also_pull(origin)
        what = f"blob {blob.digest}"
        path = f"/blobs/uploads/?mount={quote(blob.digest)}&from={quote(origin, safe='')}"

        async def ask() -> bool:
            async with self._repository.open("POST", path, {}, what, accept=_BEGUN, body=b"") as answer:
                if answer.response.status == 202:
                    await self._give_up(answer)
                return answer.response.status == 201

        try:
            return await self._repository.retrying(ask, what)
        except (AccessDenied, ImageNotFound, ContentInvalid):
            return False  # it may be uploaded all the same

    async def _give_up(self, answer: Answer) -> None:
        """A mount that became an upload: that is not going to be, since the bytes are not here yet."""
        location = self._location(answer)
        try:
            async with self._repository.open("DELETE", location, {}, "upload", accept=_DONE):
                pass
        except Exception:  # whatever it says: the registry forgets uploads by itself
            return

    async def upload(self, blob: Descriptor, path: Path, report: Callable[[int], None]) -> None:
        """Sends the file `path`, whose content was verified to be the blob."""
        what = f"blob {blob.digest}"

        async def send() -> None:
            async with self._repository.open("POST", "/blobs/uploads/", {}, what, accept=_BEGUN, body=b"") as answer:
                location = self._location(answer)
            async with asyncio.timeout(self._config.stall_timeout_s) as limit:
                body = _FileBody(path, self._threads, report, limit, self._config.stall_timeout_s)
                headers = {"Content-Type": "application/octet-stream", "Content-Length": str(blob.size)}
                async with self._repository.open(
                    "PATCH", location, headers, what, accept=_DONE, body=body if blob.size else b""
                ) as answer:
                    location = self._location(answer)
            mark = "&" if urlsplit(location).query else "?"
            final = f"{location}{mark}digest={quote(blob.digest)}"
            async with asyncio.timeout(self._config.answer_timeout_s):
                async with self._repository.open("PUT", final, {}, what, accept=_DONE, body=b"") as answer:
                    self._check(answer, blob.digest, what)

        await self._repository.retrying(send, what)

    async def manifest(self, document: Document, target: str) -> None:
        """Puts a manifest under a tag or under its digest."""
        what = f"manifest {target}"

        async def put() -> None:
            async with asyncio.timeout(self._config.answer_timeout_s):
                async with self._repository.open(
                    "PUT",
                    f"/manifests/{target}",
                    {"Content-Type": document.content_type},
                    what,
                    accept=_DONE,
                    body=document.data,
                ) as answer:
                    self._check(answer, document.digest, what)

        await self._repository.retrying(put, what)

    def _location(self, answer: Answer) -> str:
        location = answer.header("Location")
        try:
            return following(str(answer.response.url), location)
        except ContentInvalid as error:
            raise ContentInvalid(f"{error} (of an upload)") from None

    def _check(self, answer: Answer, digest: str, what: str) -> None:
        told = answer.header("Docker-Content-Digest")
        if told and told != digest:
            raise ContentInvalid(f"{self._repository.host.origin}: {what}: it stored {told[:80]} instead of {digest}")


class _FileBody:
    """A file as a request's body. Each piece that the connection takes moves the time limit on."""

    def __init__(
        self, path: Path, threads: Threads, report: Callable[[int], None], limit: asyncio.Timeout, stall_s: float
    ) -> None:
        self._path, self._threads, self._report = path, threads, report
        self._limit, self._stall_s = limit, stall_s

    def __call__(self) -> AsyncIterator[bytes]:
        return self._pieces()

    async def _pieces(self) -> AsyncIterator[bytes]:
        sent = 0
        with open(self._path, "rb", buffering=0) as file:
            while piece := await self._threads.io(file.read, _PIECE):
                self._limit.reschedule(asyncio.get_running_loop().time() + self._stall_s)
                yield piece
                sent += len(piece)
                self._report(sent)
        # What remains is the answer, which may take its time: the registry hashes what it got.
        self._limit.reschedule(asyncio.get_running_loop().time() + self._stall_s)
