"""The image store's values: what an image is, how a layer reaches the unpacker, how a pull can fail.

No I/O here. Invariant: an `Image` that exists is whole: its manifest, config and every layer's snapshot are durable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

from runtime.linux.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Descriptor:
    """OCI image-spec descriptor; `digest` has passed the strict pattern, `size` is 0..2^63-1."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an image: the blob it came from, the digest of its tar, and the chain up to it (image-spec). One of
    an artifact is a file called `title`, and its `diff_id` is the blob's digest; or a directory called so, of a tar."""

    blob: Descriptor
    diff_id: str
    chain_id: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The parts of an image config that running it needs (image-spec config.md), checked and bounded."""

    user: str = ""
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    stop_signal: str = ""
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    os: str = "linux"
    architecture: str = ""
    variant: str = ""
    created: str = ""


@dataclass(frozen=True, slots=True)
class Image:
    """A whole image. `id` is the config digest, `manifest_digest` the platform's manifest.

    `repo_tags` are "host/path:tag", `repo_digests` "host/path@sha256:…" (of the index where one was pulled),
    `size` is the sum of the compressed layers and the config in bytes, `layers` run from the base up,
    `indexes` are those of which every platform is kept, the newest at the end.
    `artifact` is the type of what is no container image: its id is the manifest's digest, its layers are files.
    """

    id: str
    manifest_digest: str
    repo_tags: tuple[str, ...]
    repo_digests: tuple[str, ...]
    size: int
    config: ImageConfig
    layers: tuple[Layer, ...]
    pinned: bool = False
    indexes: tuple[str, ...] = ()
    artifact: str = ""

    @property
    def chain_id(self) -> str:
        """The topmost layer's chain id: what a container's snapshot is prepared from."""
        return self.layers[-1].chain_id


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a caller gave to log in with. `repr` shows nothing of it (threats S30)."""

    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)
    server_address: str = ""


@dataclass(frozen=True, slots=True)
class KeyFile:
    """A private key for encrypted layers, as its file was read; `name` is for messages."""

    name: str
    data: bytes = field(repr=False)
    password: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one blob is; `total` in bytes, `phase` one of "waiting", "download", "unpack", "done", "exists"."""

    digest: str
    phase: str
    done: int
    total: int


LayerKey: TypeAlias = tuple[bytes, bytes, bytes]
"""What opens an encrypted layer: the AES-256 key, the nonce, and the HMAC that the encrypted bytes have."""

ProgressFunction = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Usage:
    """Disk space in bytes (allocated blocks) and inodes."""

    bytes: int
    inodes: int


class Unpacker(Protocol):
    """What the store needs of a snapshotter; blocking calls, made from worker threads. Safe from several threads."""

    def has_layer(self, chain_id: str) -> bool:
        """True when the layer is committed and durable."""
        ...

    def unpack_layer(
        self,
        blob: Path,
        media_type: str,
        diff_id: str,
        chain_id: str,
        parent: str | None,
        key: LayerKey | None = None,
    ) -> None:
        """Unpacks the verified `blob` as `chain_id` on `parent`; returns once it is durable and visible. With `key` the
        blob is encrypted (AES-256-CTR), and `media_type` that of its plain text. The type
        "application/vnd.ocid.file;name=NAME" makes one file of the blob, whose digest is the diff id;
        "application/vnd.ocid.directory+KIND;name=NAME" (KIND is tar, gzip, zstd) refuses entries outside of NAME.

        Layers of one image may be unpacked at once: commit waits for the parent's. Idempotent; equal calls at once
        are one. After a failure or a crash nothing is visible and the rest is garbage for the next `collect`.
        Raises snapshotter.model.UnpackError (bad layer: names the entry and why) or OSError (ENOSPC, …).
        """
        ...

    def remove_layers_except(self, keep: frozenset[str]) -> int:
        """Removes the committed layers outside `keep` that no active snapshot stands on; returns how many."""
        ...

    def removable_layers(self, keep: frozenset[str]) -> Sequence[tuple[str, int]]:
        """What `remove_layers_except` would remove now: chain ids, and the bytes that they take."""
        ...

    def layer_sizes(self) -> Mapping[str, int]:
        """What each committed layer takes on disk, in bytes by chain id."""
        ...

    def damaged_layers(self) -> Sequence[tuple[str, str]]:
        """Committed layers whose files are not what was recorded: chain ids, and what is wrong."""
        ...

    def damaged_snapshots(self) -> Sequence[tuple[str, str]]:
        """Containers' snapshots that lack a directory or a layer: keys, and what is wrong."""
        ...

    def forget_layers(self, chain_ids: frozenset[str]) -> Sequence[str]:
        """Removes these layers and those above them, so that they can be unpacked again; returns those that an active
        snapshot stands on, which stay."""
        ...


class Arriving(Protocol):
    """A blob while it is being written."""

    size: int
    """As announced."""

    def open(self) -> tuple[int, int]:
        """The file, and the eventfd(2) that counts the bytes of it which are there, each once; both become the
        caller's. What will not be whole adds 2^62. Raises ContentInvalid when nobody writes it any more, OSError."""
        ...

    def verified(self, seconds: float) -> bool:
        """Waits at most so long; True once all of it is there with the announced digest. Raises ContentInvalid when
        that will not be."""
        ...


@runtime_checkable
class Early(Unpacker, Protocol):
    """An unpacker that begins before it has all of a blob."""

    def unpack_arriving(
        self,
        blob: Arriving,
        media_type: str,
        diff_id: str,
        chain_id: str,
        parent: str | None,
        key: LayerKey | None = None,
    ) -> None:
        """As `unpack_layer`; the layer is visible only once `blob` was verified. Whatever `verified` raises ends it,
        and then nothing of it stays."""
        ...

    def cancel(self, chain_id: str) -> None:
        """Ends the unpacking of `chain_id`, be it at work or waiting. Unknown: no-op."""
        ...


class ImageError(Exception):
    """Any failure of the image store. `str()` is one sentence with the cause and never holds a secret."""


class ReferenceInvalid(ImageError):
    """The text is no image reference, digest or platform."""


class ImageNotFound(ImageError):
    """Registry or store has no such image (404, manifest unknown, no platform match)."""


class AccessDenied(ImageError):
    """401/403: wrong, missing or insufficient credentials, as the registry words it."""


class RegistryUnavailable(ImageError):
    """Connect failed, timed out, stalled, 429 or 5xx after the retries: the same call may work later."""


class ContentInvalid(ImageError):
    """What came is not what was announced: digest, size, media type, JSON or limits."""


class DecryptionRefused(ImageError):
    """The layers are encrypted, and no key that was given or that this node has opens them; or such a key is none."""


class PolicyInvalid(ImageError):
    """The signature policy, or a key or certificate that it names, cannot be used: nothing is accepted by it."""


class SignatureRefused(ImageError):
    """The signature policy does not accept the image. `str()` begins with the word by which a kubelet knows this."""

    WORD = "SignatureValidationFailed"
