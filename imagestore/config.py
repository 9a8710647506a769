"""Every limit and choice of the image store, by name, with its default.

No I/O. Invariant: nothing that a registry, a layout or a caller sends is read, counted, nested, waited for or kept
beyond a limit that stands here (threats R5).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from imagestore.keyring import KeyringConfig
from imagestore.model import Usage
from imagestore.platforms import Platform, host_platform
from runtime.linux.dataclass import dataclass

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """How a store behaves. Times are seconds on the monotonic clock, sizes bytes."""

    platform: Platform = host_platform()
    hosts_directories: tuple[Path, ...] = (Path("/etc/ocid/certs.d"), Path("/etc/containerd/certs.d"))
    """With a directory for each registry: hosts.toml, or certificates alone."""
    pinned: frozenset[str] = frozenset()
    """References whose images are reported as pinned: the kubelet's image collection leaves those alone."""
    layers_usage: Callable[[], Usage] | None = None
    """Asked by `usage` for what the unpacked layers take: only the snapshotter knows its own directories."""
    registries_conf: Path | None = None
    """containers-registries.conf(5): read after `hosts_directories`, but what it blocks is blocked."""
    keyring: KeyringConfig = KeyringConfig()
    """Logins that lie on this machine, for callers who bring none."""
    policy: Path | None = None
    """The signature policy; it must be there."""
    policy_defaults: tuple[Path, ...] = ()
    """Where one is looked for otherwise; where none is, everything is accepted."""
    policy_directory: Path | None = None
    """Policies of single namespaces, NAMESPACE.json: each takes the place of the one for all."""
    registries_d: tuple[Path, ...] = ()
    accept_unnamed_bundles: bool = False
    """Take sigstore bundles that name no repository, as cosign 3 makes them, for ones of the repository they are in."""
    timestamp_authorities: Path | None = None
    """PEM: the authorities whose RFC 3161 times count for sigstore bundles."""
    decryption_keys: Path | None = None
    """Where the private keys lie that open encrypted layers, for pulls and for every use of what was pulled."""
    key_providers: Path | None = None
    """ocicrypt's file of key providers: programs that open encrypted layers."""
    user_agent: str = "ocid/0.1"

    # how much at once
    concurrent_pulls: int = 16
    concurrent_downloads: int = 4
    """Blobs that one pull downloads at once."""
    node_downloads: int = 16
    """Blobs that all pulls download at once."""
    bandwidth_bytes: int = 0
    pull_bandwidth_bytes: int = 0
    """Most bytes per second that all downloads, and that those of one pull, may take; 0 is no limit."""
    ranges: int = 4
    range_bytes: int = 2 * _MIB
    range_after_s: float = 2.0
    range_below: float = 16.0 * _MIB
    """A download that after `range_after_s` makes less than `range_below` bytes per second goes on in `ranges` parts of
    `range_bytes` at once; twice that is the memory that it may take. On a quick line one stream costs less."""
    concurrent_unpacks: int = 8
    """Layers handed to the unpacker at once. It bounds its own processes, and a layer that waits for its parent holds
    a thread only: with fewer, small layers would stand in line behind a large one that is below them."""

    early_unpacks: int = 2
    early_bytes: int = 4 * _MIB
    """Layers of at least `early_bytes` are unpacked while they are still being downloaded, so many of them at once over
    all pulls; what was made is thrown away unless the digest turns out right. 0 unpacks what was verified only."""

    # what a registry or a layout may send
    manifest_bytes: int = 4 * _MIB
    config_bytes: int = 4 * _MIB
    token_bytes: int = 1 * _MIB
    error_bytes: int = 1 * _MIB
    header_bytes: int = 16 << 10
    blob_bytes: int = 64 << 30
    image_bytes: int = 256 << 30
    layers: int = 500
    index_manifests: int = 2048
    index_depth: int = 4
    json_values: int = 200_000
    signature_bytes: int = 1 * _MIB
    signatures: int = 128
    """Of one manifest, in one place."""
    signatures_bytes: int = 8 * _MIB
    """All that are found for one image: they are in memory at once, and kept with it."""
    pages: int = 1000
    list_bytes: int = 16 * _MIB
    """Of a list of tags or referrers; all its pages are in memory at once."""
    redirects: int = 5
    mirrors: int = 16

    # how long
    connect_timeout_s: float = 15.0
    answer_timeout_s: float = 60.0
    """For a whole small answer: manifest, token, error body."""
    stall_timeout_s: float = 30.0
    """A blob may take as long as it likes, as long as it moves: `stall_bytes` in every such window (threats O48)."""
    stall_bytes: int = 16 << 10
    retries: int = 4
    backoff_s: float = 0.25
    backoff_limit_s: float = 5.0
    retry_after_limit_s: float = 30.0
    """A registry that asks for more patience than this (429, Retry-After) is reported instead of waited for."""
    cancel_wait_s: float = 5.0
    """How long a cancelled caller waits for the worker threads to let go of what they hold."""

    # what stays on disk
    keep_blobs: bool = True
    """Whether layers stay as the registry has them, too, once they are unpacked: for `save`, pushes and repairs."""
    fs_verity: bool = True
    """Whether blobs are sealed by fs-verity, where the filesystem has it."""
    ingest_age_s: float = 86400.0
    batch_bytes: int = 1 * _MIB
    """Downloaded bytes are hashed and written in pieces of about this size, in a worker thread."""
