"""What a policy may call an image: the scopes of containers-policy.json(5), from the exact one to the widest.

    docker   docker.io/library/app:1   docker.io/library/app   docker.io/library   docker.io   *.io
    oci      /srv/images/app           /srv/images             /srv

Pure. Refuses scopes that could never fit. Invariant: two references of one image in a registry have the same scopes but
for the first.
"""

from __future__ import annotations

import os
from pathlib import Path

from imagestore.reference import Reference
from runtime.linux.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to be decided about: where it comes from, what it may be called, most exact first."""

    transport: str
    name: str
    scopes: tuple[str, ...]
    reference: Reference | None = None

    def __str__(self) -> str:
        return self.name if self.transport == "docker" else f"{self.transport}:{self.name}"


def in_registry(reference: Reference) -> Subject:
    """An image that a registry calls so."""
    return Subject("docker", str(reference), (str(reference), *namespaces(reference)), reference)


def namespaces(reference: Reference) -> tuple[str, ...]:
    """The repository, what it lies in, its host, and wildcards for the host's domains. A port counts for none of the
    latter: example.com:5000 is in *.com as example.com is."""
    name, found = reference.repository, []
    while True:
        found.append(name)
        name, slash, _ = name.rpartition("/")
        if not slash:
            break
    host = found[-1].partition(":")[0]
    while "." in host:
        host = host.partition(".")[2]
        found.append(f"*.{host}")
    return tuple(found)


def in_file(transport: str, path: Path) -> Subject:
    """An image in a layout or an archive: known by the path, links resolved, and the directories above. A docker
    archive says itself what is in it: nothing but the transport can be told by its path."""
    # A name, not a place: nothing is opened by it.
    resolved = os.path.realpath(path)  # noqa: TID251
    if transport == "docker-archive":
        return Subject(transport, resolved, ())
    above = [str(parent) for parent in Path(resolved).parents if str(parent) != "/"]
    return Subject(transport, resolved, (resolved, *above))


def check_scope(transport: str, scope: str) -> str:
    """ "" or what is wrong with it."""
    if scope == "":
        return ""
    if transport in ("oci", "oci-archive", "dir"):
        if not scope.startswith("/") or scope == "/":
            return 'expected an absolute path below /; "" stands for all'
        if os.path.normpath(scope) != scope or scope.startswith("//"):
            return "the path is not in its shortest form, so it would never fit"
    if transport in ("docker-archive", "tarball"):
        return 'this transport has no scope but ""'
    return ""
