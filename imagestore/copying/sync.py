"""What `ocid sync` copies: all images of a source, each with the name that it gets at the target.

    docker://   one image, or every tag of a repository
    dir:        every directory below that holds a manifest.json
    yaml        registries with their repositories, tags, logins (skopeo-sync(1)):

        registry.example.com:
          images: {app: [], tools: ["1.0", "sha256:…"]}       [] stands for every tag
          images-by-tag-regex: {nginx: "^1[.]13"}
          credentials: {username: …, password: …}
          tls-verify: true

Refuses keys that it does not know, by name, and a list in which nothing is wanted. Invariant: nothing is copied here,
and no name leads out of the target: it is the image's own, or its last part.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from imagestore.copying.inspect import tags
from imagestore.copying.places import Place
from imagestore.copying.session import Access, Session
from imagestore.model import Credentials, ImageError, ReferenceInvalid
from imagestore.reference import is_digest, parse
from imagestore.strict_json import Fields
from runtime.linux.dataclass import dataclass
from runtime.linux.files import AT_FDCWD, read_bounded

_LIST_BYTES = 4 << 20
_DIRECTORIES = 100_000
_KEYS = ("images", "images-by-tag-regex", "credentials", "tls-verify")


@dataclass(frozen=True, slots=True)
class Wanted:
    """An image to copy, how its registry is reached, and its whole name."""

    place: Place
    access: Access
    name: str

    def target(self, kind: str, where: str, *, scoped: bool) -> Place:
        """Below `where`: by the whole name with `scoped`, else by its last part. Raises ReferenceInvalid."""
        name = self.name if scoped else self.name.rpartition("/")[2]
        if kind == "dir":
            return Place("dir", Path(where) / name, "")
        parse(f"{where}/{name}")
        return Place("docker", Path(), f"{where}/{name}")


@dataclass(frozen=True, slots=True)
class Asked:
    """Some images of one registry: a reference, or a repository of which every tag is meant that `pattern` matches."""

    name: str
    access: Access
    pattern: re.Pattern[str] | None = None


async def images_of(session: Session, asked: Asked) -> list[Wanted]:
    """Raises ImageError and its kinds."""
    reference = parse(asked.name)
    if asked.name.partition("@")[2] or ":" in asked.name.rpartition("/")[2]:
        return [Wanted(Place("docker", Path(), asked.name), asked.access, str(reference))]
    repository = await session.repository(Place("docker", Path(), asked.name), asked.access, "pull")
    found = [
        tag for tag in await tags(repository, session.config) if asked.pattern is None or asked.pattern.search(tag)
    ]
    names = [f"{reference.repository}:{tag}" for tag in found]
    return [Wanted(Place("docker", Path(), name), asked.access, str(parse(name))) for name in names]


def directories(base: Path) -> list[Wanted]:
    """Every image below `base`; `base` itself is called by its own name. Raises ImageError."""
    found, seen = [], 0

    def failed(error: OSError) -> None:
        raise error

    try:
        for directory, below, files in os.walk(base, onerror=failed):
            seen += 1
            if seen > _DIRECTORIES:
                raise ImageError(f"sync {base}: more than {_DIRECTORIES} directories")
            below.sort()
            if "manifest.json" in files:
                below.clear()
                name = str(PurePosixPath(directory).relative_to(PurePosixPath(base)))
                name = base.absolute().name if name == "." else name
                found.append(Wanted(Place("dir", Path(directory), ""), Access(), name))
    except OSError as error:
        raise ImageError(f"sync {base}: {(error.strerror or str(error)).lower()}") from error
    if not found:
        raise ImageError(f"sync {base}: there is no image in it")
    return found


def listed(path: Path, access: Access) -> list[Asked]:
    """What a YAML file asks for, where it says nothing else reached as `access` says. Raises ImageError."""
    import yaml

    what = f"sync {path}"
    try:
        document = yaml.safe_load(read_bounded(AT_FDCWD, str(path), _LIST_BYTES))
    except OSError as error:
        raise ImageError(f"{what}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError):
        raise ImageError(f"{what}: expected YAML") from None
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise ImageError(f"{what}: expected registries by their names")
    fields = Fields(document, what)
    found = [one for registry in document for one in _registry(registry, fields.object(registry), access)]
    if not found:
        raise ImageError(f"{what}: it asks for no images")
    return found


def _registry(name: str, fields: Fields | None, access: Access) -> Iterator[Asked]:
    if fields is None:
        return
    fields.only(*_KEYS)
    login = fields.object("credentials")
    if login is not None:
        login.only("username", "password")
        access = replace(access, credentials=Credentials(login.string("username"), login.string("password")))
    access = replace(access, verify=fields.boolean("tls-verify", access.verify))
    images = fields.object("images")
    for repository in images.names() if images is not None else ():
        assert images is not None
        wanted = images.strings(repository)
        if not wanted:
            yield Asked(f"{name}/{repository}", access)
        for tag in wanted:
            yield Asked(f"{name}/{repository}{'@' if is_digest(tag) else ':'}{tag}", access)
    for repository, text in fields.string_map("images-by-tag-regex").items():
        try:
            yield Asked(f"{name}/{repository}", access, re.compile(text))
        except re.error as error:
            raise ReferenceInvalid(f"{fields.path}.images-by-tag-regex.{repository}: {error}") from None
