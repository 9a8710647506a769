"""A registry inside the test process, over HTTP or HTTPS, that misbehaves on request; and images to put into it.

It serves what `add` was given as the distribution spec says, records every request with its headers, and applies the
first `rule` that matches: `registry.rule("GET", "/blobs/", Cut(1000), times=2)`. It runs in its own thread and loop, so
that plain functions can use it; leaving the `with` block ends both.
"""

from __future__ import annotations

import asyncio
import datetime
import gzip
import hashlib
import io
import ipaddress
import json
import re
import ssl
import tarfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import zstandard
from aiohttp import web

from tests.fakes.uploads import Uploads
from tests.support import SOON_S

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def as_json(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


# ------------------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class BuiltImage:
    """An image as bytes: its manifest, and every blob by digest."""

    manifest: bytes
    media_type: str
    blobs: Mapping[str, bytes]
    config_digest: str
    layer_digests: tuple[str, ...]
    diff_ids: tuple[str, ...]
    platform: Mapping[str, str]

    @property
    def digest(self) -> str:
        return sha256(self.manifest)

    def descriptor(self) -> dict[str, object]:
        return {
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": len(self.manifest),
            "platform": dict(self.platform),
        }


def layer_tar(files: Mapping[str, bytes]) -> bytes:
    """A deterministic tar with these files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in sorted(files.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o755
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def compress(data: bytes, how: str) -> bytes:
    if how == "gzip":
        return gzip.compress(data, 1, mtime=0)
    if how == "zstd":
        return zstandard.ZstdCompressor().compress(data)
    return data


def build_image(
    layers: Sequence[Mapping[str, bytes] | bytes] = ({"bin/hello": b"hello"},),
    *,
    compression: str = "gzip",
    docker: bool = False,
    architecture: str = "amd64",
    variant: str = "",
    config: Mapping[str, object] | None = None,
    edit_config: Callable[[dict[str, object]], None] | None = None,
    edit_manifest: Callable[[dict[str, object]], None] | None = None,
) -> BuiltImage:
    """Assembles an image. `edit_*` may spoil the documents before they are encoded; bytes as a layer are a tar."""
    blobs: dict[str, bytes] = {}
    descriptors, diff_ids = [], []
    suffix = {"gzip": "+gzip", "zstd": "+zstd", "": ""}[compression]
    for layer in layers:
        tar = layer if isinstance(layer, bytes) else layer_tar(layer)
        blob = compress(tar, compression)
        blobs[sha256(blob)] = blob
        diff_ids.append(sha256(tar))
        media_type = DOCKER_LAYER if docker else OCI_LAYER + suffix
        descriptors.append({"mediaType": media_type, "digest": sha256(blob), "size": len(blob)})
    platform = {"os": "linux", "architecture": architecture, **({"variant": variant} if variant else {})}
    config_document: dict[str, object] = {
        **platform,
        "config": dict(config or {"Env": ["PATH=/bin"], "Cmd": ["/bin/hello"]}),
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [],
    }
    if edit_config:
        edit_config(config_document)
    config_blob = as_json(config_document)
    blobs[sha256(config_blob)] = config_blob
    media_type = DOCKER_MANIFEST if docker else OCI_MANIFEST
    manifest: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": {
            "mediaType": DOCKER_CONFIG if docker else OCI_CONFIG,
            "digest": sha256(config_blob),
            "size": len(config_blob),
        },
        "layers": descriptors,
    }
    if edit_manifest:
        edit_manifest(manifest)
    return BuiltImage(
        as_json(manifest),
        media_type,
        blobs,
        sha256(config_blob),
        tuple(str(item["digest"]) for item in descriptors),
        tuple(diff_ids),
        platform,
    )


def build_index(images: Sequence[BuiltImage], *, docker: bool = False, extra: Sequence[object] = ()) -> bytes:
    return as_json(
        {
            "schemaVersion": 2,
            "mediaType": DOCKER_LIST if docker else OCI_INDEX,
            "manifests": [*(image.descriptor() for image in images), *extra],
        }
    )


def write_layout(directory: Path, images: Mapping[str, BuiltImage]) -> None:
    """An OCI layout directory with these images by ref name."""
    (directory / "blobs/sha256").mkdir(parents=True)
    entries = []
    for name, image in images.items():
        for digest, blob in {**image.blobs, image.digest: image.manifest}.items():
            (directory / "blobs/sha256" / digest[7:]).write_bytes(blob)
        entries.append({**image.descriptor(), "annotations": {"org.opencontainers.image.ref.name": name}})
    (directory / "oci-layout").write_bytes(b'{"imageLayoutVersion":"1.0.0"}')
    (directory / "index.json").write_bytes(as_json({"schemaVersion": 2, "manifests": entries}))


# ------------------------------------------------------------------------------------------------------- misbehaviour


@dataclass(frozen=True)
class Reply:
    """Answers with this status, these headers and this body."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True)
class Hang:
    """Sends nothing until the client or the test goes away."""


@dataclass(frozen=True)
class Cut:
    """Sends the first `after` bytes of the right answer, then cuts the connection."""

    after: int


@dataclass(frozen=True)
class Stall:
    """Sends the first `after` bytes of the right answer, then nothing; or `drip` bytes every 10 ms."""

    after: int
    drip: int = 0


@dataclass(frozen=True)
class Hold:
    """The right answer, but nothing of it before `until` says so."""

    until: Callable[[], bool]


@dataclass(frozen=True)
class Endless:
    """Sends `body` over and over without end, as 200 or as `status`."""

    body: bytes = b"\x00" * 65536
    status: int = 200
    content_type: str = "application/octet-stream"


@dataclass(frozen=True)
class NoRange:
    """Serves the whole blob with 200 whatever range was asked for."""


@dataclass(frozen=True)
class WrongRange:
    """Answers a range request with 206 from another offset."""

    shift: int = -7


@dataclass(frozen=True)
class Spoil:
    """Serves the right number of wrong bytes."""


Action = Reply | Hang | Cut | Stall | Hold | Endless | NoRange | WrongRange | Spoil


@dataclass
class Rule:
    method: str
    path: re.Pattern[str]
    action: Action
    times: int
    hits: int = 0


@dataclass(frozen=True)
class Seen:
    """A request as it arrived."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def authorization(self) -> str:
        return self.headers.get("Authorization", "")


@dataclass
class Tokens:
    """A token server's behaviour: who may have a token, and what it looks like. `realm` "" is this very registry."""

    username: str = ""
    password: str = ""
    token: str = "token-for-you"
    realm: str = ""
    refresh_token: str = ""
    answer: bytes | None = None


class FakeRegistry:
    """`with FakeRegistry() as registry:` serves on a port of `host`. `name` is what references begin with."""

    def __init__(self, *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        self.manifests: dict[tuple[str, str], tuple[bytes, str]] = {}
        self.blobs: dict[str, bytes] = {}
        self.seen: list[Seen] = []
        self.rules: list[Rule] = []
        self.basic: tuple[str, str] | None = None
        self.tokens: Tokens | None = None
        self.uploads = Uploads()
        self.strict_repositories = False
        """Whether a blob is only in the repositories that it was added or pushed to, as in a real registry."""
        self.digest_header = True
        self.concurrent = 0
        self.most_concurrent = 0
        self._tls = tls
        self._host = host
        self._port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="fake-registry", daemon=True)
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None

    # ------------------------------------------------------------------------------------------------------- lifetime

    def __enter__(self) -> FakeRegistry:
        self._thread.start()
        assert self._ready.wait(SOON_S)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(SOON_S)
        self._loop.close()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._run())

    async def _run(self) -> None:
        self._stop = asyncio.Event()
        runner = web.ServerRunner(web.Server(self._handle, access_log=None), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, self._host, 0, ssl_context=self._tls)
        await site.start()
        self._port = runner.addresses[0][1]
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()
        hanging = asyncio.all_tasks() - {asyncio.current_task()}
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)

    @property
    def name(self) -> str:
        return f"{self._host}:{self._port}"

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.name}"

    @property
    def port(self) -> int:
        return self._port

    # ------------------------------------------------------------------------------------------------------- contents

    def add(self, repository: str, tag: str, image: BuiltImage) -> str:
        """Puts an image into a repository; returns its reference by tag."""
        self.blobs.update(image.blobs)
        self.uploads.has.update((repository, digest) for digest in image.blobs)
        self.put(repository, tag, image.manifest, image.media_type)
        return f"{self.name}/{repository}:{tag}"

    def put(self, repository: str, tag: str, manifest: bytes, media_type: str) -> str:
        """Puts any manifest, by tag and by digest."""
        for target in (tag, sha256(manifest)):
            self.manifests[(repository, target)] = (manifest, media_type)
        return f"{self.name}/{repository}:{tag}"

    def rule(self, method: str, path: str, action: Action, times: int = 1 << 30) -> Rule:
        """From now on the first `times` requests with this method ("" for any) and path pattern get `action`."""
        rule = Rule(method, re.compile(path), action, times)
        self.rules.append(rule)
        return rule

    def heal(self) -> None:
        """The registry behaves again."""
        self.rules.clear()

    def count(self, method: str, path: str) -> int:
        """How many requests with this method and path pattern arrived."""
        return sum(1 for seen in list(self.seen) if seen.method == method and re.search(path, seen.path))

    # -------------------------------------------------------------------------------------------------------- serving

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        query = request.rel_url.raw_query_string
        self.seen.append(Seen(request.method, request.path, query, request.headers.copy(), body))
        self.concurrent += 1
        self.most_concurrent = max(self.most_concurrent, self.concurrent)
        try:
            for rule in self.rules:
                if rule.method in ("", request.method) and rule.path.search(request.path) and rule.hits < rule.times:
                    rule.hits += 1
                    return await self._misbehave(rule.action, request)
            return await self._answer(request)
        finally:
            self.concurrent -= 1

    def _right(self, request: web.BaseRequest) -> Reply:
        if request.path == "/token" and self.tokens:
            return self._token(request)
        refused = self._refused(request)
        if refused:
            return refused
        if request.method in ("POST", "PUT", "PATCH", "DELETE"):
            query, kind = request.rel_url.raw_query_string, request.headers.get("Content-Type", "")
            body = self.seen[-1].body
            status, headers = self.uploads.answer(
                request.method, request.path, query, body, self.blobs, self.manifests, kind
            )
            return Reply(status, headers)
        manifest = re.fullmatch(r"/(?:[^/]+/)?v2/(.+)/manifests/([^/]+)", request.path)
        if manifest:
            found = self.manifests.get((manifest[1], manifest[2]))
            if not found:
                return _error(404, "MANIFEST_UNKNOWN", "manifest unknown")
            headers = {"Content-Type": found[1], "Content-Length": str(len(found[0]))}
            if self.digest_header:
                headers["Docker-Content-Digest"] = sha256(found[0])
            return Reply(200, headers, found[0])
        tags = re.fullmatch(r"/v2/(.+)/tags/list", request.path)
        if tags:
            found_tags = sorted(tag for path, tag in self.manifests if path == tags[1] and ":" not in tag)
            return Reply(200, body=as_json({"name": tags[1], "tags": found_tags}))
        blob = re.search(r"/blobs/([^/]+)$", request.path)
        if blob and self.strict_repositories and (_repository(request.path), blob[1]) not in self.uploads.has:
            return _error(404, "BLOB_UNKNOWN", "blob unknown to registry")
        if blob and blob[1] in self.blobs:
            return self._blob(request, self.blobs[blob[1]])
        return _error(404, "BLOB_UNKNOWN", "blob unknown to registry") if blob else Reply(200)

    def _blob(self, request: web.BaseRequest, data: bytes) -> Reply:
        asked = re.fullmatch(r"bytes=([0-9]+)-([0-9]*)", request.headers.get("Range", ""))
        if not asked:
            return Reply(200, {"Content-Type": "application/octet-stream"}, data)
        start = int(asked[1])
        if start >= len(data):
            return Reply(416, {"Content-Range": f"bytes */{len(data)}"})
        end = min(int(asked[2]) + 1, len(data)) if asked[2] else len(data)
        return Reply(206, {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}, data[start:end])

    def _refused(self, request: web.BaseRequest) -> Reply | None:
        given = request.headers.get("Authorization", "")
        if self.basic and given != _basic(*self.basic):
            return Reply(401, {"WWW-Authenticate": 'Basic realm="fake"'}, _errors("UNAUTHORIZED", "no such user"))
        if self.tokens and given != f"Bearer {self.tokens.token}":
            realm = self.tokens.realm or f"{self.url}/token"
            challenge = f'Bearer realm="{realm}",service="fake",scope="registry:catalog:*"'
            return Reply(401, {"WWW-Authenticate": challenge}, _errors("UNAUTHORIZED", "authentication required"))
        return None

    def _token(self, request: web.BaseRequest) -> Reply:
        tokens = self.tokens
        assert tokens is not None
        if tokens.answer is not None:
            return Reply(200, {}, tokens.answer)
        if tokens.refresh_token and request.method == "POST":
            if f"refresh_token={tokens.refresh_token}" not in self.seen[-1].body.decode():
                return _error(401, "UNAUTHORIZED", "bad refresh token")
        elif tokens.username and request.headers.get("Authorization") != _basic(tokens.username, tokens.password):
            return _error(401, "UNAUTHORIZED", "incorrect username or password")
        return Reply(200, {"Content-Type": "application/json"}, as_json({"token": tokens.token, "expires_in": 300}))

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        right = self._right(request)
        return web.Response(status=right.status, headers=right.headers, body=right.body)

    async def _misbehave(self, action: Action, request: web.BaseRequest) -> web.StreamResponse:
        right = self._right(request)
        if isinstance(action, Reply):
            return web.Response(status=action.status, headers=action.headers, body=action.body)
        if isinstance(action, NoRange):
            blob = self.blobs[request.path.rpartition("/")[2]]
            return web.Response(status=200, body=blob)
        if isinstance(action, Spoil):
            return web.Response(status=right.status, headers=right.headers, body=b"x" * len(right.body))
        if isinstance(action, WrongRange):
            return self._wrong_range(action, request, right)
        if isinstance(action, Endless):
            response = web.StreamResponse(status=action.status, headers={"Content-Type": action.content_type})
            await response.prepare(request)
            while True:
                await response.write(action.body)
        if isinstance(action, Hold):
            while not action.until():
                await asyncio.sleep(0.005)
            return web.Response(status=right.status, headers=right.headers, body=right.body)
        if isinstance(action, Hang):
            await asyncio.sleep(3600)
        response = web.StreamResponse(status=right.status, headers=right.headers)
        response.content_length = len(right.body)
        await response.prepare(request)
        assert isinstance(action, Cut | Stall)
        await response.write(right.body[: action.after])
        if isinstance(action, Stall):
            position = action.after
            while action.drip:
                await asyncio.sleep(0.01)
                await response.write(right.body[position : position + action.drip])
                position += action.drip
            await asyncio.sleep(3600)
        assert request.transport is not None
        request.transport.close()
        return response

    def _wrong_range(self, action: WrongRange, request: web.BaseRequest, right: Reply) -> web.StreamResponse:
        if right.status != 206:
            return web.Response(status=right.status, headers=right.headers, body=right.body)
        data = self.blobs[request.path.rpartition("/")[2]]
        start = max(0, len(data) - len(right.body) + action.shift)
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        return web.Response(status=206, headers=headers, body=data[start:])


def _repository(path: str) -> str:
    return path.removeprefix("/v2/").rpartition("/blobs/")[0]


def _basic(username: str, password: str) -> str:
    import base64

    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


def _errors(code: str, message: str) -> bytes:
    return as_json({"errors": [{"code": code, "message": message}]})


def _error(status: int, code: str, message: str) -> Reply:
    return Reply(status, {"Content-Type": "application/json"}, _errors(code, message))


# ---------------------------------------------------------------------------------------------------------------- TLS


def make_tls(directory: Path, *names: str) -> tuple[ssl.SSLContext, Path]:
    """A server context with a fresh self-signed certificate for `names`, and the certificate's file for clients."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    now = datetime.datetime.now(datetime.UTC)
    alternatives: list[x509.GeneralName] = []
    for name in names:
        try:
            alternatives.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            alternatives.append(x509.DNSName(name))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_path, key_path = directory / "server.crt", directory / "server.key"
    certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_path, key_path)
    return context, certificate_path
