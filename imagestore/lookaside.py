"""Where signatures lie that are in no registry: `registries.d` (containers-registries.d(5)), and reading them.

    DIRECTORY/*.yaml   default-docker: {lookaside: URL}, docker: {SCOPE: {lookaside: URL, use-sigstore-attachments: …}}
    URL/PATH@sha256=HEX/signature-1, -2, …                       file, http and https

The scope that fits best decides, as in a policy. Refuses files with fields of the wrong type, unknown keys, and one
scope in two files. Invariant: what is read here is bounded in number and size, and believed by nobody yet.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from imagestore.content import errno_text
from imagestore.model import ImageError, PolicyInvalid
from imagestore.reference import Reference
from imagestore.scopes import in_registry
from imagestore.signatures import Signature, from_blob
from runtime.linux.dataclass import dataclass
from runtime.linux.files import AT_FDCWD, read_bounded

# Where containers/image looks when no file says anything.
DEFAULT_STORE = "file:///var/lib/containers/sigstore"
_FILE_LIMIT = 1 << 20
_FILES = 512
_KEYS = frozenset({"lookaside", "lookaside-staging", "sigstore", "sigstore-staging", "use-sigstore-attachments"})


@dataclass(frozen=True, slots=True)
class Place:
    """What registries.d says of one scope; "" and None where it does not say."""

    read: str = ""
    write: str = ""
    attachments: bool | None = None


@dataclass(frozen=True, slots=True)
class Lookaside:
    """All that registries.d says."""

    default: Place
    scopes: dict[str, Place]

    def place(self, reference: Reference) -> Place:
        """Each answer from the narrowest scope that gives one."""
        found = [self.scopes[scope] for scope in in_registry(reference).scopes if scope in self.scopes]
        found.append(self.default)
        read = next((place.read for place in found if place.read), DEFAULT_STORE)
        write = next((place.write or place.read for place in found if place.write or place.read), DEFAULT_STORE)
        said = next((place.attachments for place in found if place.attachments is not None), None)
        return Place(read, write, said)


def read_lookaside(directories: tuple[Path, ...]) -> Lookaside:
    """The first directory that exists. Raises PolicyInvalid."""
    for directory in directories:
        try:
            names = sorted(entry.name for entry in os.scandir(directory) if entry.name.endswith(".yaml"))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise PolicyInvalid(f"registries.d {directory}: {errno_text(error)}") from None
        if len(names) > _FILES:
            raise PolicyInvalid(f"registries.d {directory}: {len(names)} files, the limit is {_FILES}")
        return _merged([_File(directory / name) for name in names])
    return Lookaside(Place(), {})


def _merged(files: list[_File]) -> Lookaside:
    default: Place | None = None
    scopes: dict[str, Place] = {}
    for file in files:
        if file.default is not None and default is not None:
            raise PolicyInvalid(f"registries.d {file.path}: default-docker is in another file, too")
        default = file.default or default
        for scope, place in file.scopes.items():
            if scope in scopes:
                raise PolicyInvalid(f"registries.d {file.path}: docker.{scope} is in another file, too")
            scopes[scope] = place
    return Lookaside(default or Place(), scopes)


class _File:
    """One file, for messages with its path."""

    def __init__(self, path: Path) -> None:
        import yaml  # only where somebody has such a file

        self.path = path
        try:
            document = yaml.safe_load(read_bounded(AT_FDCWD, str(path), _FILE_LIMIT))
        except OSError as error:
            raise PolicyInvalid(f"registries.d: {error}") from None
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError):
            raise self._wrong("", "YAML") from None
        table = self._table(document, "", {"default-docker", "docker"})
        default = table.get("default-docker")
        self.default = None if default is None else self._place(default, "default-docker")
        docker = self._table(table.get("docker"), "docker", None)
        self.scopes = {scope: self._place(value, f"docker.{scope}") for scope, value in docker.items()}

    def _wrong(self, key: str, expected: str) -> PolicyInvalid:
        return PolicyInvalid(f"registries.d {self.path}: {key}{': ' if key else ''}expected {expected}")

    def _table(self, value: object, key: str, known: set[str] | frozenset[str] | None) -> dict[str, object]:
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise self._wrong(key, "a mapping")
        unknown = set(value) - known if known is not None else set()
        if unknown:
            raise self._wrong(key, f"none but {', '.join(sorted(known or ()))}, got {sorted(unknown)[0][:60]!r}")
        return value

    def _place(self, value: object, key: str) -> Place:
        table = self._table(value, key, _KEYS)
        attachments = table.get("use-sigstore-attachments")
        if attachments is not None and not isinstance(attachments, bool):
            raise self._wrong(f"{key}.use-sigstore-attachments", "true or false")
        return Place(
            self._url(table, key, "lookaside") or self._url(table, key, "sigstore"),
            self._url(table, key, "lookaside-staging") or self._url(table, key, "sigstore-staging"),
            attachments,
        )

    def _url(self, table: dict[str, object], key: str, name: str) -> str:
        value = table.get(name)
        if value is None:
            return ""
        parts = urlsplit(value) if isinstance(value, str) else None
        if not isinstance(value, str) or parts is None or parts.scheme not in ("file", "http", "https"):
            raise self._wrong(f"{key}.{name}", "a file, http or https URL")
        if "@" in parts.netloc or parts.query or parts.fragment or (parts.scheme == "file" and parts.netloc):
            raise self._wrong(f"{key}.{name}", "a URL of scheme, host and path only")
        return value.rstrip("/")


def url_of(base: str, path: str, digest: str, number: int) -> str:
    """Where signature `number`, from 1, of that manifest of the repository `path` (without its host) lies."""
    return f"{base}/{path}@{digest.replace(':', '=', 1)}/signature-{number}"


async def read_signatures(
    base: str, path: str, digest: str, limit: int, get: Callable[[str], Awaitable[bytes | None]]
) -> list[Signature]:
    """All that the store has, in order, until one is missing. `get` gives None for what is not there. Raises
    ImageError."""
    found: list[Signature] = []
    for number in range(1, limit + 1):
        url = url_of(base, path, digest, number)
        data = await get(url)
        if data is None:
            return found
        found.append(from_blob(data, f"lookaside {url}"))
    raise ImageError(f"lookaside {base}: more than {limit} signatures of {digest}")


def read_file(url: str, limit: int) -> bytes | None:
    """What a file URL points at, None where there is nothing. Raises ImageError."""
    path = unquote(urlsplit(url).path)
    try:
        return read_bounded(AT_FDCWD, path, limit)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise ImageError(f"lookaside {path}: {errno_text(error)}") from None
