"""Certificates for registries as docker, podman and containerd find them where no hosts.toml says anything.

    DIRECTORY/registry.example:5000/NAME.crt    an authority that the registry's certificate may be from
                                    NAME.cert   ours, for registries that ask who we are, with
                                    NAME.key    its key

Blocking. Refuses a certificate without its key, and a key without its certificate, by name: one of them is lost.
Invariant: what lies under a host's name is for that host alone; `_default` is for those that have no directory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from imagestore.content import errno_text
from imagestore.hosts import Host, directories_of
from imagestore.model import ImageError

_MANY = 1000


def with_certificates(hosts: Sequence[Host], domain: str, directories: Sequence[Path]) -> tuple[Host, ...]:
    """The hosts of the registry `domain`, each with what lies under its name; the registry itself may have it under
    `domain` as well, where that is another (docker.io). Raises ImageError."""
    authorities = [urlsplit(host.base).netloc for host in hosts]
    made = []
    for host, authority in zip(hosts, authorities, strict=True):
        names = (authority, domain) if host.upstream else (authority,)
        found = next(filter(None, (_found(name, directories) for name in names)), None)
        if found is not None:
            ca, client = found
            # Whoever put them there means TLS, also on this machine; `insecure` of registries.conf has both already.
            base = host.base.replace("http://", "https://", 1) if authorities.count(authority) == 1 else host.base
            host = replace(host, base=base, ca=ca, client=client)
        made.append(host)
    return tuple(made)


def _found(
    authority: str, directories: Sequence[Path]
) -> tuple[tuple[Path, ...], tuple[tuple[Path, Path], ...]] | None:
    for directory in directories_of(authority, directories):
        names = _names(directory)
        ca = tuple(directory / name for name in names if name.endswith(".crt"))
        client = tuple(_pair(directory, name.removesuffix(".cert"), names) for name in names if name.endswith(".cert"))
        for name in names:
            if name.endswith(".key"):
                _pair(directory, name.removesuffix(".key"), names)
        if ca or client:
            return ca, client
    return None


def _pair(directory: Path, stem: str, names: Sequence[str]) -> tuple[Path, Path]:
    for suffix, what in ((".cert", "certificate"), (".key", "key")):
        if stem + suffix not in names:
            raise ImageError(f"registry certificates {directory}: {stem}{suffix} is missing: the {what} of a client")
    return directory / f"{stem}.cert", directory / f"{stem}.key"


def _names(directory: Path) -> list[str]:
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ImageError(f"registry certificates {directory}: {errno_text(error)}") from None
    if len(names) > _MANY:
        raise ImageError(f"registry certificates {directory}: more than {_MANY} files")
    return sorted(names)
