"""What is fuzzed: a function of bytes for each reader of bytes from strangers, and valid inputs to begin with.

Each may refuse with its own error only, and what it accepts must hold what the reader promises. Plain Python, so that
an input that was found can be run without the fuzzer: `python -m tests.fuzz.run NAME --input FILE`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from imagestore.auth import parse_challenges
from imagestore.config import StoreConfig
from imagestore.copying import contents
from imagestore.keyring import Keyring, KeyringConfig
from imagestore.manifest import Manifest, digest_of, parse_config, parse_document
from imagestore.model import ContentInvalid, Descriptor, ImageError, ReferenceInvalid
from imagestore.reference import is_digest, parse
from imagestore.registries_conf import RegistriesFiles
from imagestore.registry import Document
from imagestore.tarfiles import TarIndex
from snapshotter.model import Limits, UnpackError
from snapshotter.tar import Walker
from snapshotter.tar_feed import Feed
from tests.fakes.registry import OCI_INDEX, OCI_MANIFEST, build_image, build_index, layer_tar
from tests.fuzz import trust_targets

CONFIG = StoreConfig()
LIMITS = Limits(layer_bytes=1 << 20, entries=2000, pax_bytes=1 << 16, sparse_regions=1000)
_IMAGE = build_image([{"a": b"1"}, {"b": b"2"}], config={"Env": ["A=b"], "User": "1:2", "Labels": {"l": "v"}})


def reference(data: bytes) -> None:
    """What is accepted is a fixed point."""
    try:
        text = data.decode()
        found = parse(text)
    except (UnicodeDecodeError, ReferenceInvalid):
        return
    assert parse(str(found)) == found
    assert found.tag or is_digest(found.digest)
    assert not set(str(found)) & set(" \n\0\\?#%")


def manifest(data: bytes) -> None:
    """Both readers of manifests see the same image in the same bytes."""
    document = Document(data, "", digest_of(data))
    for kind in ("", OCI_MANIFEST, OCI_INDEX):
        try:
            parsed = parse_document(data, kind, "", "m", CONFIG)
        except ContentInvalid:
            parsed = None
        try:
            carried = contents.read(document, CONFIG)
        except ContentInvalid:
            # Entries of an index that nobody could run are passed over by one; the other has to carry them.
            assert not isinstance(parsed, Manifest) or kind, "one reader takes an image that the other refuses"
            continue
        if isinstance(parsed, Manifest) and not kind:
            assert carried.config is not None and carried.config.digest == parsed.config.digest
            assert [layer.digest for layer in carried.layers] == [layer.digest for layer in parsed.layers]
            _sound((parsed.config, *parsed.layers))


def _sound(descriptors: Sequence[Descriptor]) -> None:
    for one in descriptors:
        assert is_digest(one.digest) and 0 <= one.size <= CONFIG.blob_bytes


def config(data: bytes) -> None:
    """A config fits its manifest or is refused."""
    parsed = parse_document(_IMAGE.manifest, "", "", "m", CONFIG)
    assert isinstance(parsed, Manifest)
    try:
        found, layers = parse_config(data, parsed, "c", CONFIG)
    except ContentInvalid:
        return
    assert len(layers) == len(parsed.layers)
    assert all("\0" not in text for text in (*found.env, *found.cmd, found.user, found.working_dir))


def tar(data: bytes) -> None:
    """Only UnpackError, and no more entries than bytes can hold."""
    chunks = [data[at : at + 700] for at in range(0, len(data), 700)]
    feed = Feed(lambda: chunks.pop(0) if chunks else b"")
    count = 0
    try:
        walker = Walker(feed, LIMITS)
        for entry in walker:
            count += 1
            assert entry.size >= 0 and b"\0" not in entry.name
            for piece in walker.data():
                assert len(piece)
    except UnpackError as error:
        assert str(error)
    assert count <= len(data) // 512 + 1


def tar_index(data: bytes) -> None:
    """Every member lies wholly within the file."""
    fd = os.memfd_create("archive", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        try:
            index = TarIndex(fd)
            for name in ("index.json", "manifest.json", "a/b", "../x"):
                member = index.find(name)
                assert member is None or 0 <= member.offset <= member.offset + member.size <= len(data)
        except ContentInvalid as error:
            assert str(error)
    finally:
        os.close(fd)


def challenge(data: bytes) -> None:
    """Any header is read to its end."""
    for found in parse_challenges([data.decode("latin-1")]):
        assert found.scheme in ("basic", "bearer")


def _file(data: bytes, name: str) -> Path:
    path = Path(tempfile.gettempdir()) / f"ocid-fuzz-{os.getpid()}-{name}"
    path.write_bytes(data)
    return path


def auth_file(data: bytes) -> None:
    """A login or ImageError, and nothing is started."""
    ring = Keyring(KeyringConfig((_file(data, "auth.json"),), environment={"PATH": "/nonexistent"}))
    try:
        found = ring.find("registry.example:5000", "team/app")
    except ImageError as error:
        assert str(error)
        return
    assert found is None or found.username or found.identity_token or found.registry_token


def registries(data: bytes) -> None:
    """A rule that is understood leads to hosts whose URLs were checked, or ImageError."""
    try:
        found = RegistriesFiles(_file(data, "registries.conf")).now()
        for name in ("r.example/team/app", "docker.io/library/busybox", "a.b.example:5000/x"):
            for host in found.hosts(parse(name)) or ():
                assert host.base.startswith(("http://", "https://")) and "@" not in host.base
        found.candidates("busybox")
    except (ImageError, ReferenceInvalid) as error:
        assert str(error)


@dataclass(frozen=True)
class Target:
    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


_AUTHS = (
    b'{"auths":{"registry.example:5000":{"auth":"YTpi"},"*.example":{"identitytoken":"x"}},"credHelpers":{"x":"y"}}'
)
_REGISTRIES = b"""unqualified-search-registries = ["r.example"]
short-name-mode = "permissive"
[[registry]]
prefix = "*.b.example"
location = "r.example/team"
insecure = true
[[registry.mirror]]
location = "m.example"
pull-from-mirror = "tag-only"
[aliases]
"busybox" = "docker.io/library/busybox"
"""

TARGETS = {
    "reference": Target(reference, (b"docker.io/library/busybox:1", b"[::1]:5000/a/b@sha256:" + b"a" * 64)),
    "manifest": Target(manifest, (_IMAGE.manifest, build_index([_IMAGE]))),
    "config": Target(config, (_IMAGE.blobs[_IMAGE.config_digest],)),
    "tar": Target(tar, (layer_tar({"a": b"1", "n" * 200: b"2" * 600}),)),
    "tar_index": Target(tar_index, (layer_tar({"index.json": b"{}", "n" * 200: b"2"}),)),
    "challenge": Target(challenge, (b'Bearer realm="https://a/b",service="s",scope="x", Basic realm=y',)),
    "auth_file": Target(auth_file, (_AUTHS,)),
    "registries": Target(registries, (_REGISTRIES,)),
    **{name: Target(*target) for name, target in trust_targets.TARGETS.items()},
}
