"""Manifests, indexes and image configs: bytes from a registry become values, or a ContentInvalid that says why not.

Pure. Reads OCI image-spec 1.1, artifacts among it, and Docker schema 2; refuses schema 1, foreign layers, documents
that are both index and manifest, and media types that contradict one another (CVE-2021-41190, threats S25). Invariant:
a descriptor behind this module has a strict digest and a size within limits.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from imagestore.artifacts import artifact_layers, file_of
from imagestore.config import StoreConfig
from imagestore.encryption.layers import is_encrypted, own_annotations, plain_type, seal
from imagestore.model import ContentInvalid, Descriptor, ImageConfig, ImageNotFound, Layer
from imagestore.platforms import Platform
from imagestore.reference import is_digest
from imagestore.strict_json import Fields, parse_object
from runtime.linux.dataclass import dataclass

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
ACCEPT = ", ".join((OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST))

_MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
_INDEXES = frozenset({OCI_INDEX, DOCKER_LIST})
_CONFIGS = frozenset({OCI_CONFIG, DOCKER_CONFIG})
_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+"
_LAYERS = frozenset(
    {
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.oci.image.layer.v1.tar+zstd",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.docker.image.rootfs.diff.tar.zstd",
    }
)
_FOREIGN = ("application/vnd.oci.image.layer.nondistributable.", "application/vnd.docker.image.rootfs.foreign.")
_ATTESTATION = "vnd.docker.reference.type"
_MAX_SIZE = (1 << 63) - 1
_TYPE_CHARACTERS = 255


@dataclass(frozen=True, slots=True)
class Manifest:
    """One platform's image: its config and its layers, base first. `artifact` is the type of one that is no container
    image, whose layers are files."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    artifact: str = ""

    def image_id(self, digest: str) -> str:
        """What the image is known by; `digest` is the manifest's. Artifacts often share an empty config."""
        return digest if self.artifact else self.config.digest


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A manifest an index offers; `platform` is None where the index does not say."""

    descriptor: Descriptor
    platform: Platform | None


@dataclass(frozen=True, slots=True)
class Index:
    """A list of manifests to choose one from."""

    media_type: str
    entries: tuple[IndexEntry, ...]


def digest_of(data: bytes) -> str:
    """The sha256 digest of `data` in the form of the image-spec."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def parse_document(data: bytes, announced: str, expected: str, what: str, config: StoreConfig) -> Manifest | Index:
    """What a manifest request was answered with.

    `announced` is the Content-Type, `expected` the media type of the descriptor that led here; "" where there is none.
    Raises ContentInvalid.
    """
    announced = announced.partition(";")[0].strip().lower()
    document = parse_object(data, what, config.json_values)
    version = document.integer("schemaVersion", 0, 1 << 31, 0)
    if version == 1 or announced.startswith(_SCHEMA1) or expected.startswith(_SCHEMA1):
        raise ContentInvalid(f"{what}: Docker schema 1 manifests are not supported; push the image again with schema 2")
    if version != 2:
        raise ContentInvalid(f"{what}: schemaVersion is {version}, expected 2")
    media_type = _agree(document, announced, expected, what)
    if media_type in _INDEXES:
        return _index(document, media_type, config)
    return _manifest(document, media_type, config)


def _agree(document: Fields, announced: str, expected: str, what: str) -> str:
    """The one media type that document, Content-Type and descriptor tell of."""
    is_index = document.has("manifests")
    is_manifest = document.has("layers") or document.has("config")
    if is_index and is_manifest:
        raise ContentInvalid(f"{what}: the document is both an index and a manifest")
    if document.has("fsLayers") or document.has("blobs"):
        raise ContentInvalid(f"{what}: the document is no image manifest")
    own = document.string("mediaType")
    told = {kind: name for kind, name in ((own, "mediaType"), (expected, "descriptor")) if kind}
    # A registry that does not know says application/json or octet-stream: that contradicts nothing.
    if announced in _MANIFESTS | _INDEXES or announced.startswith("application/vnd."):
        told.setdefault(announced, "Content-Type")
    if len(told) > 1:
        listed = ", ".join(f"{name} {kind[:100]}" for kind, name in told.items())
        raise ContentInvalid(f"{what}: media types contradict one another ({listed})")
    media_type = next(iter(told), OCI_INDEX if is_index else OCI_MANIFEST)
    if media_type not in _MANIFESTS | _INDEXES:
        raise ContentInvalid(f"{what}: media type {media_type[:100]} is no image manifest or index")
    if (media_type in _INDEXES) != is_index:
        raise ContentInvalid(f"{what}: media type {media_type} does not fit the document's fields")
    return media_type


def _manifest(document: Fields, media_type: str, config: StoreConfig) -> Manifest:
    fields = document.object("config")
    if fields is None:
        raise ContentInvalid(f"{document.path}.config: missing")
    config_descriptor = descriptor(fields, config.config_bytes)
    artifact = ""
    if config_descriptor.media_type not in _CONFIGS:
        artifact = (document.string("artifactType") or config_descriptor.media_type)[:_TYPE_CHARACTERS]
        if media_type != OCI_MANIFEST or not artifact:
            raise ContentInvalid(f"{document.path}: the config is of type {artifact!r}, which no image has")
    layers = tuple(_layer(item, config, artifact) for item in document.objects("layers", config.layers))
    if artifact and not layers:  # an image may do without: it starts from an empty directory and what is mounted there
        raise ContentInvalid(f"{document.path}.layers: the artifact has no layers, so no files")
    total = sum(layer.size for layer in layers)
    if total > config.image_bytes:
        raise ContentInvalid(f"{document.path}.layers: {total} bytes, the limit is {config.image_bytes}")
    return Manifest(media_type, config_descriptor, layers, artifact)


def _layer(fields: Fields, config: StoreConfig, artifact: str) -> Descriptor:
    found = descriptor(fields, config.blob_bytes)
    if found.media_type.startswith(_FOREIGN):
        raise ContentInvalid(
            f"{fields.path}: a foreign layer ({found.media_type}), which must not be fetched from a registry"
        )
    if artifact:
        return file_of(found, fields.path)
    # Nobody may act on others than those that open it (threats S47).
    found = replace(found, annotations=own_annotations(found.annotations) if is_encrypted(found) else {})
    if plain_type(found) not in _LAYERS:
        raise ContentInvalid(f"{fields.path}.mediaType: {found.media_type[:100]!r} is no layer type we unpack")
    return found


def _index(document: Fields, media_type: str, config: StoreConfig) -> Index:
    entries = []
    for fields in document.objects("manifests", config.index_manifests):
        found = descriptor(fields, _MAX_SIZE)
        platform = fields.object("platform")
        if found.media_type not in _MANIFESTS | _INDEXES or _ATTESTATION in found.annotations:
            continue  # attestations, artifacts, schema 1: never what somebody runs
        if found.size > config.manifest_bytes:
            raise ContentInvalid(f"{fields.path}.size: {found.size} bytes, the limit is {config.manifest_bytes}")
        entries.append(IndexEntry(found, _platform(platform) if platform else None))
    return Index(media_type, tuple(entries))


def _platform(fields: Fields) -> Platform:
    return Platform(fields.string("os"), fields.string("architecture"), fields.string("variant"))


def descriptor(fields: Fields, size_limit: int) -> Descriptor:
    """An OCI descriptor. `urls` and `data` are never used (threats S26). Raises ContentInvalid."""
    digest = fields.string("digest")
    if not is_digest(digest):
        raise ContentInvalid(f"{fields.path}.digest: {digest[:100]!r} is not sha256: and 64 lower-case hex digits")
    size = fields.integer("size", 0, _MAX_SIZE)
    if size > size_limit:
        raise ContentInvalid(f"{fields.path}.size: {size} bytes, the limit is {size_limit}")
    return Descriptor(fields.string("mediaType"), digest, size, fields.string_map("annotations"))


def choose(index: Index, platform: Platform, what: str) -> IndexEntry:
    """The entry that fits `platform` best; of equals the first, as the spec says. Raises ImageNotFound."""
    best: tuple[int, int] | None = None
    for number, entry in enumerate(index.entries):
        if entry.platform is None:
            rank = 1000  # nobody says: worth a look at its config when nothing better is there
        else:
            fit = platform.rank(entry.platform)
            if fit is None:
                continue
            rank = fit
        best = min(best or (rank, number), (rank, number))
    if best is None:
        offered = sorted({str(entry.platform) for entry in index.entries if entry.platform})
        listed = ", ".join(offered[:12]) or "nothing"
        raise ImageNotFound(f"{what}: no image for {platform}; there is {listed[:300]}")
    return index.entries[best[1]]


def parse_config(
    data: bytes, manifest: Manifest, what: str, config: StoreConfig
) -> tuple[ImageConfig, tuple[Layer, ...]]:
    """The config and the layers with their chain ids; an artifact's config says nothing that we know. Raises
    ContentInvalid (counts that differ: threats S45)."""
    if manifest.artifact:
        return ImageConfig(), artifact_layers(manifest, what)
    document = parse_object(data, what, config.json_values)
    rootfs = document.object("rootfs")
    if (rootfs is None and manifest.layers) or (rootfs is not None and rootfs.string("type") != "layers"):
        raise ContentInvalid(f'{what}.rootfs.type: expected "layers"')
    diff_ids = rootfs.strings("diff_ids") if rootfs is not None else ()
    if len(diff_ids) != len(manifest.layers):
        raise ContentInvalid(
            f"{what}.rootfs.diff_ids: {len(diff_ids)} diff ids for the {len(manifest.layers)} layers of the manifest"
        )
    for diff_id in diff_ids:
        if not is_digest(diff_id):
            raise ContentInvalid(
                f"{what}.rootfs.diff_ids: {diff_id[:100]!r} is not sha256: and 64 lower-case hex digits"
            )
    seals = tuple(map(seal, manifest.layers))
    layers = tuple(
        Layer(blob, diff_id, chain)
        for blob, diff_id, chain in zip(manifest.layers, diff_ids, chain_ids(diff_ids, seals), strict=True)
    )
    return _image_config(document), layers


def _image_config(document: Fields) -> ImageConfig:
    run = document.object("config") or Fields({}, f"{document.path}.config")
    return ImageConfig(
        user=run.string("User"),
        env=run.strings("Env"),
        entrypoint=run.strings("Entrypoint"),
        cmd=run.strings("Cmd"),
        working_dir=run.string("WorkingDir"),
        stop_signal=run.string("StopSignal"),
        volumes=run.keys("Volumes"),
        exposed_ports=run.keys("ExposedPorts"),
        labels=run.string_map("Labels"),
        os=document.string("os", "linux") or "linux",
        architecture=document.string("architecture"),
        variant=document.string("variant"),
        created=document.string("created"),
    )


def platform_of(image: ImageConfig) -> Platform | None:
    """What the config says that it is for; None where it does not say."""
    return Platform(image.os, image.architecture, image.variant) if image.architecture else None


def check_platform(image: ImageConfig, platform: Platform, what: str) -> None:
    """Raises ImageNotFound when the config says that `platform` cannot run it. One that does not say may try."""
    offered = platform_of(image)
    if offered is None:
        offered = Platform(image.os, platform.architecture, image.variant)
    if platform.rank(offered) is None:
        raise ImageNotFound(f"{what}: the image is for {offered}, wanted is one for {platform}")


def chain_ids(diff_ids: tuple[str, ...], seals: tuple[str, ...] = ()) -> tuple[str, ...]:
    """image-spec config.md, "Layer ChainID": each names its layer applied on all those below. Where a layer is
    encrypted, its seal is in the chain as well."""
    chains: list[str] = []
    for diff_id, sealed in zip(diff_ids, seals or ("",) * len(diff_ids), strict=True):
        if sealed:
            chains.append(digest_of(" ".join((*chains[-1:], diff_id, sealed)).encode()))
        else:
            chains.append(digest_of(f"{chains[-1]} {diff_id}".encode()) if chains else diff_id)
    return tuple(chains)
