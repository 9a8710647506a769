"""The CRI to talk to: the daemon that serves this state directory, or the same verbs in this process.

Refuses nothing and decides nothing. Invariant: an error is an `ApiError` with a gRPC code's name and one sentence,
whichever way it came.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import stat
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from cri.cli.main import CommandError
from cri.config import Config
from cri.config import ConfigError as _ConfigError
from cri.config_read import load
from cri.marks import RECOVERING

_READY_S, _DYING_S, _AGAIN_S = 30.0, 1.0, 0.05
# gRPC's words for a connection that broke.
_BROKEN = ("Stream removed", "Socket closed", "sendmsg", "recvmsg", "Connection reset")
_IMAGE_CALLS = frozenset({"ListImages", "ImageStatus", "PullImage", "RemoveImage", "ImageFsInfo"})


class ApiError(CommandError):
    """A call failed; `status` is the gRPC code's name, such as "NOT_FOUND"."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message, 125)
        self.status = status


class Api:
    """Calls by name. `local` is the parts in this process, None when a daemon does the work."""

    def __init__(self, config: Config, local: Any = None, channel: Any = None) -> None:
        self.config = config
        self.local = local
        self._channel = channel
        self._stubs: tuple[Any, Any] | None = None
        if channel is not None:
            from cri.api import api_pb2_grpc

            self._stubs = (api_pb2_grpc.RuntimeServiceStub(channel), api_pb2_grpc.ImageServiceStub(channel))

    async def call(
        self,
        name: str,
        request: Any,
        *,
        network: str = "",
        keys: bytes = b"",
        all_platforms: bool = False,
        platform: str = "",
    ) -> Any:
        """One unary call; cri.service says what goes along with which. Raises ApiError."""
        carried = (
            ("ocid-network", network),
            ("ocid-decryption-keys-bin", keys),
            ("ocid-all-platforms", "1" if all_platforms else ""),
            ("ocid-platform", platform),
        )
        metadata = tuple((key, value) for key, value in carried if value)
        if self._stubs is None:
            from cri.errors import CallFailed

            try:
                return await self.local.call(name, request, metadata)
            except CallFailed as error:
                raise ApiError(error.code.name, str(error)) from None
        import grpc

        stub = self._stubs[1 if name in _IMAGE_CALLS else 0]
        try:
            return await _once_ready(lambda: getattr(stub, name)(request, metadata=metadata))
        except grpc.aio.AioRpcError as error:
            raise self._failed(error) from None

    def _failed(self, error: Any) -> ApiError:
        """An error of gRPC's in our words. Those for a connection that broke are gRPC's own, and no sentence."""
        code, said = error.code().name, error.details() or ""
        if code in ("UNAVAILABLE", "UNKNOWN") and self._has_ended(broken=any(word in said for word in _BROKEN)):
            path = socket_path(self.config)
            return ApiError(code, f"the daemon at {path} has ended; once it is started again, see what was done")
        return ApiError(code, error.details() or code)

    def _has_ended(self, *, broken: bool) -> bool:
        """True when nobody serves any more. Of a process that is killed the `broken` connection ends a moment before
        the socket that it listens on."""
        until = time.monotonic() + (_DYING_S if broken else 0)
        while is_served(self.config):
            if time.monotonic() >= until:
                return False
            time.sleep(_AGAIN_S)
        return True

    async def stream(self, name: str, request: Any) -> AsyncIterator[Any]:
        """The answers of a streaming call of a daemon. Raises ApiError."""
        import grpc

        assert self._stubs is not None
        try:
            async for message in getattr(self._stubs[1 if name == "StreamImages" else 0], name)(request):
                yield message
        except grpc.aio.AioRpcError as error:
            raise self._failed(error) from None

    async def own(self, name: str, request: dict[str, Any]) -> Any:
        """One of our own calls (cri.own). Raises ApiError."""
        if self._channel is None:
            from cri.errors import CallFailed

            try:
                return await self.local.own.call(name, request)
            except CallFailed as error:
                raise ApiError(error.code.name, str(error)) from None
        import json

        import grpc

        call, sent = self._channel.unary_unary(f"/ocid.v1.Node/{name}"), json.dumps(request).encode()
        try:
            return json.loads(await _once_ready(lambda: call(sent)))
        except grpc.aio.AioRpcError as error:
            raise self._failed(error) from None

    async def load(self, fd: int, request: dict[str, Any]) -> Any:
        """Our own Load, of a file or a directory that is open here and stays the caller's. Raises ApiError."""
        if self._channel is None:
            from cri.errors import CallFailed

            try:
                return await self.local.own.load(request, fd)
            except CallFailed as error:
                raise ApiError(error.code.name, str(error)) from None
        from cri.handover import handed_over

        try:
            with handed_over(self.config.state, fd) as ticket:
                return await self.own("Load", {**request, "file": ticket})
        except OSError as error:
            raise CommandError(f"hand {request['path']} to the daemon: {error}") from None

    @contextlib.asynccontextmanager
    async def launching(self, uid: str) -> AsyncIterator[None]:
        """While a pod of this uid is made: a daemon takes it away if this process is gone before that is over. Without
        a daemon the next command does (cri.interrupted)."""
        if self._channel is None:
            yield
            return
        import json

        held = self._channel.unary_stream("/ocid.v1.Node/Launch")(json.dumps({"uid": uid}).encode())
        try:
            await held.initial_metadata()
            yield
            await self.own("Launched", {"uid": uid})
        finally:
            held.cancel()

    async def pulls(self) -> AsyncIterator[Any]:
        """The steps of all pulls from now on. Raises ApiError."""
        import json

        import grpc

        if self._channel is None:
            raise CommandError("no daemon serves this state directory, so there is nobody who pulls")
        try:
            async for step in self._channel.unary_stream("/ocid.v1.Node/Pulls")(b"{}"):
                yield json.loads(step)
        except grpc.aio.AioRpcError as error:
            raise self._failed(error) from None


async def _once_ready(call: Callable[[], Awaitable[Any]]) -> Any:
    """The answer of a daemon, which may have begun to serve just now. Raises grpc.aio.AioRpcError."""
    import grpc

    loop = asyncio.get_running_loop()
    until = loop.time() + _READY_S
    while True:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            if RECOVERING not in (error.details() or "") or loop.time() > until:
                raise
        await asyncio.sleep(_AGAIN_S)


def configuration(args: argparse.Namespace) -> Config:
    """The configuration file with the command line over it."""
    try:
        return load(Path(args.config) if args.config else None, root=args.root, state=args.state)
    except _ConfigError as error:
        raise CommandError(str(error)) from None


def socket_path(config: Config) -> Path:
    """The daemon's socket as a path."""
    return Path(config.listen.removeprefix("unix://"))


def is_served(config: Config) -> bool:
    """True when a daemon accepts connections on the socket of this configuration."""
    from runtime.linux.sockets import connect_unix

    path = socket_path(config)
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return False
        connect_unix(path, 2.0).close()
    except OSError:
        return False
    return True


@contextlib.asynccontextmanager
async def connect(args: argparse.Namespace) -> AsyncIterator[Api]:
    """The Api for `args`: closes the channel, or the parts, at the end."""
    config = configuration(args)
    async with contextlib.AsyncExitStack() as held:
        parts = None if is_served(config) else await _parts(config, held)
        if parts is not None:
            yield Api(config, local=parts)
            return
        import grpc

        options: Sequence[tuple[str, int]] = (("grpc.max_receive_message_length", 64 << 20),)
        channel = grpc.aio.insecure_channel(f"unix://{socket_path(config)}", options=options)
        yield Api(config, channel=await held.enter_async_context(channel))


async def _parts(config: Config, held: contextlib.AsyncExitStack) -> Any:
    """The parts in this process; None where a daemon has begun to serve while they were waited for."""
    import logging

    from cri.daemon import AlreadyServed, local

    # What went wrong is the command's to say, once: without a handler logging would print it, with a traceback, too.
    logging.getLogger().addHandler(logging.NullHandler())
    # But that records were lost is no failure of the command, and nobody else is there to say it.
    told = logging.StreamHandler(sys.stderr)
    told.setFormatter(logging.Formatter("ocid: %(message)s"))
    logging.getLogger("cri.store").addHandler(told)
    try:
        return await held.enter_async_context(local(config))
    except AlreadyServed as error:
        if is_served(config):
            return None
        raise CommandError(str(error)) from None
