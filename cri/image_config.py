"""What the configuration says of images, in the image store's words: for the daemon and for commands alike. Pure, but
for the one variable that nodes of ocicrypt's have."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from cri.config import Config
from imagestore.config import StoreConfig
from imagestore.keyring import KeyringConfig
from imagestore.model import Usage

# Where everybody looks who reads such policies: podman, skopeo, CRI-O.
DEFAULT_POLICY = Path("/etc/containers/policy.json")
_PROVIDERS = "OCICRYPT_KEYPROVIDER_CONFIG"


def store_config(config: Config, measure: Callable[[], Usage] | None = None) -> StoreConfig:
    """`measure` tells what the unpacked layers take."""
    section = config.image
    return StoreConfig(
        hosts_directories=section.hosts_dirs,
        registries_conf=section.registries_conf,
        keyring=KeyringConfig(
            section.auth_files or None,
            Path(section.credential_providers) if section.credential_providers else None,
            Path(section.credential_provider_dir) if section.credential_provider_dir else None,
        ),
        pinned=frozenset(section.pinned),
        layers_usage=measure,
        policy=Path(section.signature_policy) if section.signature_policy else None,
        policy_defaults=(DEFAULT_POLICY,),
        policy_directory=Path(section.signature_policy_dir) if section.signature_policy_dir else None,
        registries_d=(section.registries_d,),
        timestamp_authorities=Path(section.timestamp_authorities) if section.timestamp_authorities else None,
        decryption_keys=Path(section.decryption_keys_path) if section.decryption_keys_path else None,
        key_providers=Path(providers) if (providers := section.key_providers or os.environ.get(_PROVIDERS)) else None,
        accept_unnamed_bundles=section.accept_unnamed_bundles,
        concurrent_pulls=section.concurrent_pulls,
        concurrent_downloads=section.concurrent_downloads,
        node_downloads=section.node_downloads,
        pull_bandwidth_bytes=section.pull_bandwidth,
        bandwidth_bytes=section.node_bandwidth,
        ranges=section.ranges,
        concurrent_unpacks=section.concurrent_unpacks,
        early_unpacks=section.early_unpacks,
        stall_timeout_s=section.stall_s,
        retries=section.retries,
        blob_bytes=section.blob_bytes,
        image_bytes=section.image_bytes,
        layers=section.layers,
        keep_blobs=section.keep_blobs,
        fs_verity=section.fs_verity,
    )
