"""Calls that the CRI has no words for, for our own command line: a gRPC service whose messages are JSON objects.

    ocid.v1.Node/Tag      {"name", "new"}                                   {}
    ocid.v1.Node/Untag    {"name"}                                          {}
    ocid.v1.Node/Load     {"kind", "file", "path", "tag", "name"}           {"id", "names"}
    ocid.v1.Node/Garbage  {}                                                {"garbage": [{"kind", "name", …}]}
    ocid.v1.Node/Collect  {}                                                {}
    ocid.v1.Node/Check    {"repair"}                                        {"problems": [...], "left": [...]}
    ocid.v1.Node/Sharing  {}                                                {"images": [{"image", …}], "bytes"}
    ocid.v1.Node/Pulls    {}                                                a stream of {"image", "digest", "phase", …}
    ocid.v1.Node/Launch   {"uid"}                                           a stream of nothing, see below
    ocid.v1.Node/Launched {"uid"}                                           {}

`file` is a ticket of cri.handover: what is read is what the command has opened. `path` is what it is called, in
messages and in the signature policy. Who makes a pod holds Launch open meanwhile, and says Launched before letting go:
if it is gone without a word, so is what it had made. Whoever may connect to the daemon's socket is root and may do all
of it. Refuses fields of the wrong type by name. Invariant: the same functions serve a daemon's socket and a command's
own process.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import grpc

from cri.errors import CallFailed, InvalidArgument, Unimplemented
from cri.handover import Handover
from cri.intercept import Call, Intercept
from cri.threads import to_thread
from imagestore.collector import Garbage
from imagestore.doctor import Problem
from imagestore.model import Image, Progress
from imagestore.sharing import Share

SERVICE = "ocid.v1.Node"
_MESSAGE = 1 << 20
# What a reader of pulls may lag behind before it loses steps; the last one of each blob is sent again anyway.
_LAG = 1000
_OTHER = "has other files than its diff id stands for"

Document = Mapping[str, Any]


class Images(Protocol):
    """What of imagestore.store.Store these calls need; its docstrings hold."""

    def tag(self, name: str, new: str) -> None: ...

    def remove(self, name: str) -> None: ...

    async def import_layout(self, directory: Path, tag: str = "", name: str = "", *, fd: int = -1) -> Image: ...

    async def import_archive(
        self, path: Path, tag: str = "", name: str = "", *, docker: bool = False, fd: int = -1
    ) -> Image: ...

    def garbage(self) -> Sequence[Garbage]: ...

    def collect(self) -> None: ...

    def check(self) -> Sequence[Problem]: ...

    async def repair(self, problems: Sequence[Problem]) -> Sequence[Problem]: ...

    def sharing(self) -> tuple[Sequence[Share], int]: ...

    def watched(self, listener: Callable[[str, Progress], None]) -> AbstractContextManager[None]: ...


class Own:
    """Our own calls over one store."""

    def __init__(
        self, images: Images, intercept: Intercept, files: Handover, forsaken: Callable[[str], None] = lambda _uid: None
    ) -> None:
        """`forsaken` is called with the uid of a pod whose maker has gone."""
        self._images = images
        self._forsaken = forsaken
        self._whole: set[str] = set()
        self._files = files
        self._intercept = intercept
        self._calls: dict[str, Callable[[Document], Awaitable[Document]]] = {
            "Tag": self._tag,
            "Untag": self._untag,
            "Load": self._load,
            "Garbage": self._garbage,
            "Collect": self._collect,
            "Check": self._check,
            "Sharing": self._sharing,
            "Launched": self._launched,
        }

    async def call(self, name: str, request: Document) -> Document:
        """The answer. Raises CallFailed."""
        return await self._intercept.run(Call(SERVICE, name), self._dispatch(name, request))

    async def _dispatch(self, name: str, request: Document) -> Document:
        call = self._calls.get(name)
        if call is None:
            raise Unimplemented(f"{name}: ocid does not have this call")
        return await call(request)

    # ------------------------------------------------------------------------------------------------------- calls

    async def _tag(self, request: Document) -> Document:
        await to_thread(self._images.tag, _text(request, "name"), _text(request, "new"))
        return {}

    async def _untag(self, request: Document) -> Document:
        await to_thread(self._images.remove, _text(request, "name"))
        return {}

    async def _load(self, request: Document) -> Document:
        fd = self._files.take(_text(request, "file"))
        try:
            return await self._import(request, fd)
        finally:
            os.close(fd)

    async def load(self, request: Document, fd: int) -> Document:
        """Load in this very process, of an open file, which stays the caller's. Raises CallFailed."""
        return await self._intercept.run(Call(SERVICE, "Load"), self._import(request, fd))

    async def _import(self, request: Document, fd: int) -> Document:
        kind, path = _text(request, "kind"), Path(_text(request, "path"))
        tag, name = _text(request, "tag", ""), _text(request, "name", "")
        if not path.is_absolute():
            raise InvalidArgument("path: expected an absolute path")
        if kind == "oci":
            image = await self._images.import_layout(path, tag, name, fd=fd)
        elif kind in ("oci-archive", "docker-archive"):
            image = await self._images.import_archive(path, tag, name, docker=kind == "docker-archive", fd=fd)
        else:
            raise InvalidArgument("kind: expected oci, oci-archive or docker-archive")
        return {"id": image.id, "names": list(image.repo_tags)}

    async def _garbage(self, request: Document) -> Document:
        return {"garbage": [asdict(item) for item in await to_thread(self._images.garbage)]}

    async def _collect(self, request: Document) -> Document:
        await to_thread(self._images.collect)
        return {}

    async def _check(self, request: Document) -> Document:
        problems = await to_thread(self._images.check)
        # What the caller has found in unpacked files: {chain id: an image that has the layer}.
        layers = request.get("layers", {})
        if not isinstance(layers, dict) or not all(isinstance(value, str) for value in layers.values()):
            raise InvalidArgument("layers: expected an object of image ids")
        problems = [*problems, *(Problem("layer", name, _OTHER, image) for name, image in layers.items())]
        left = await self._images.repair(problems) if request.get("repair") and problems else problems
        return {"problems": [asdict(one) for one in problems], "left": [asdict(one) for one in left]}

    async def _sharing(self, request: Document) -> Document:
        shares, together = await to_thread(self._images.sharing)
        return {"images": [asdict(one) for one in shares], "bytes": together}

    async def _launched(self, request: Document) -> Document:
        self._whole.add(_text(request, "uid"))
        return {}

    async def launch(self, request: Document) -> AsyncGenerator[Document, None]:
        """Nothing, until the caller leaves."""
        uid = _text(request, "uid")
        if not uid.isalnum():  # it is the name of directories
            raise InvalidArgument("uid: expected letters and digits")
        self._whole.discard(uid)
        try:
            await asyncio.Event().wait()
            yield {}
        finally:
            # A daemon that stops ends these, too: then the next start looks (cri.interrupted).
            if uid not in self._whole and not self._intercept.why_not:
                self._forsaken(uid)
            self._whole.discard(uid)

    async def pulls(self) -> AsyncGenerator[Document, None]:
        """Every step of every pull from now on, until the caller leaves."""
        steps: asyncio.Queue[Document] = asyncio.Queue(_LAG)

        def tell(image: str, step: Progress) -> None:
            if not steps.full():
                steps.put_nowait({"image": image, **asdict(step)})

        with self._images.watched(tell):
            while True:
                yield await steps.get()

    # -------------------------------------------------------------------------------------------------------- gRPC

    def handler(self) -> grpc.GenericRpcHandler:
        """The service for a grpc.aio server."""
        methods = {name: self._method(name) for name in self._calls}
        methods["Pulls"] = self._streaming("Pulls", lambda _request: self.pulls())
        methods["Launch"] = self._streaming("Launch", self.launch)
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _method(self, name: str) -> grpc.RpcMethodHandler:
        async def unary(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            try:
                return json.dumps(await self.call(name, _parse(request))).encode()
            except CallFailed as error:
                await context.abort(error.code, str(error))
                raise AssertionError("abort returned") from None

        return grpc.unary_unary_rpc_method_handler(unary)

    def _streaming(
        self, name: str, begin: Callable[[Document], AsyncGenerator[Document, None]]
    ) -> grpc.RpcMethodHandler:
        async def stream(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            try:
                items = begin(_parse(request))
                async with aclosing(self._intercept.stream(Call(SERVICE, name, streaming=True), items)) as steps:
                    await context.send_initial_metadata(())
                    async for step in steps:
                        yield json.dumps(step).encode()
            except CallFailed as error:
                await context.abort(error.code, str(error))

        return grpc.unary_stream_rpc_method_handler(stream)


def _parse(data: bytes) -> Document:
    try:
        found = json.loads(data[:_MESSAGE])
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _text(request: Document, key: str, default: str | None = None) -> str:
    value = request.get(key, default)
    if not isinstance(value, str) or len(value) > 4096 or "\0" in value:
        raise InvalidArgument(f"{key}: expected a text")
    return value
