"""containers-registries.conf(5), version 2, read only: what podman and CRI-O know of registries.

    [[registry]] prefix location insecure blocked mirror-by-digest-only [[registry.mirror]]     which host has what
    unqualified-search-registries short-name-mode [aliases]                                     what a short name means
    credential-helpers                                                                          who has logins

Blocking, for worker threads; a file is read again when it has changed. Refuses the old format (version 1) by name,
and wrong types by key. Invariant: the longest prefix decides; a blocked one is never asked for, whatever else says so;
plain http and unverified TLS only where a file says `insecure`, and never for a registry that has no such entry.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imagestore.hosts import DOCKER_HUB, Host, default_scheme, unverified
from imagestore.model import AccessDenied, ImageError, ReferenceInvalid
from imagestore.reference import DEFAULT_DOMAIN, Reference, is_qualified, parse, split_port
from runtime.linux.dataclass import dataclass
from runtime.linux.files import AT_FDCWD, read_bounded
from runtime.linux.libc import KernelError

_FILE_LIMIT = 1 << 20
_FILES = 256
_PULLS = {"": "all", "all": "all", "digest-only": "digest-only", "tag-only": "tag-only"}
_MODES = ("", "enforcing", "permissive", "disabled")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A place that has what a prefix names: its host with, maybe, the beginning of a path."""

    location: str
    insecure: bool
    pulls: str = "all"

    def serves(self, reference: Reference) -> bool:
        return self.pulls == "all" or (self.pulls == "digest-only") == bool(reference.digest)


@dataclass(frozen=True, slots=True)
class Rule:
    """One [[registry]]."""

    prefix: str
    source: Endpoint
    mirrors: tuple[Endpoint, ...]
    blocked: bool
    file: Path

    def rest(self, repository: str) -> str | None:
        """What of `repository` is not of the prefix ("" or "/path"); None when the prefix does not fit."""
        if self.prefix.startswith("*."):
            domain, slash, path = repository.partition("/")
            fits = split_port(domain)[0].endswith(self.prefix[1:]) or domain.endswith(self.prefix[1:])
            return f"{slash}{path}" if fits else None
        rest = repository.removeprefix(self.prefix)
        return rest if rest != repository and rest[:1] in ("", "/") else None


@dataclass(frozen=True, slots=True)
class Registries:
    """All files, merged."""

    rules: tuple[Rule, ...] = ()
    search: tuple[str, ...] = ()
    mode: str = ""
    aliases: tuple[tuple[str, str], ...] = ()
    helpers: tuple[str, ...] = ()
    """Whom to ask for logins, in this order; nobody in particular where there are none."""

    def hosts(self, reference: Reference) -> tuple[Host, ...] | None:
        """Where to ask for the reference, its own registry last; None where no rule fits. Raises AccessDenied for a
        blocked one."""
        best: tuple[Rule, str] | None = None
        for rule in self.rules:
            rest = rule.rest(reference.repository)
            # The longest prefix; "*.example.com" is shorter than anything that it stands for.
            if rest is not None and (best is None or _weight(rule.prefix) > _weight(best[0].prefix)):
                best = rule, rest
        if best is None:
            return None
        rule, rest = best
        if rule.blocked:
            raise AccessDenied(f"registry {rule.prefix} is blocked by {rule.file}")
        if rule.prefix.startswith("*.") and not rule.source.location:
            source = Endpoint(reference.domain, rule.source.insecure)
        else:
            source = rule.source
        found: list[Host] = []
        for mirror in rule.mirrors:
            if mirror.serves(reference):
                found += _hosts(mirror, rest, own=False)
        return (*found, *_hosts(source, rest, own=True))

    def candidates(self, text: str) -> tuple[Reference, ...]:
        """What a name as somebody typed it may mean, in the order in which to try. Raises ReferenceInvalid."""
        if is_qualified(text):
            return (parse(text),)
        name, rest = _apart(text)
        for alias, full in self.aliases:
            if alias == name:
                return (parse(full + rest),)
        if not self.search:
            return (parse(text),)
        if len(self.search) > 1 and self.mode == "enforcing":
            raise ReferenceInvalid(
                f"image reference {text[:120]!r}: a short name with {len(self.search)} registries to search, and "
                "short-name-mode is enforcing; say which registry, or add an alias"
            )
        return tuple(parse(f"{registry}/{text}") for registry in self.search)


def _weight(prefix: str) -> int:
    return len(prefix) - (1 << 16 if prefix.startswith("*.") else 0)


def _apart(text: str) -> tuple[str, str]:
    """A short name, and its tag or digest with what is before it."""
    for mark in ("@", ":"):
        name, found, rest = text.partition(mark)
        if found:
            return name, mark + rest
    return text, ""


def _hosts(endpoint: Endpoint, rest: str, *, own: bool) -> list[Host]:
    authority, _, prefix = endpoint.location.partition("/")
    path = f"{prefix}{rest}".strip("/")
    if authority == DEFAULT_DOMAIN:
        if "/" not in path:
            path = f"library/{path}"
        authority = DOCKER_HUB

    base = f"{default_scheme(authority)}://{authority}/v2"
    host = Host(base, upstream=own, push=own, path=path, asks_namespace=False)
    return [*unverified(host)] if endpoint.insecure else [host]


# ---------------------------------------------------------------------------------------------------------------- files


class RegistriesFiles:
    """`file` with the *.conf of `file`.d; read again when one of them has another time, size or name."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._seen: object = None
        self._registries = Registries()

    def now(self) -> Registries:
        """Raises ImageError."""
        if self._file is None:
            return self._registries
        files = self._files()
        seen = tuple((str(file), *_identity(file)) for file in files)
        if seen != self._seen:
            self._registries = _merged([_File(file) for file in files])
            self._seen = seen
        return self._registries

    def _files(self) -> list[Path]:
        assert self._file is not None
        directory = self._file.with_name(self._file.name + ".d")
        try:
            drops = sorted(path for path in directory.iterdir() if path.suffix == ".conf")
        except (FileNotFoundError, NotADirectoryError):
            drops = []
        if len(drops) > _FILES:
            raise ImageError(f"registries {directory}: more than {_FILES} files")
        return [path for path in (self._file, *drops) if path.is_file()]


def _identity(file: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(file)
    except FileNotFoundError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_size, found.st_ino


def _merged(files: Sequence[_File]) -> Registries:
    """Later files win: a prefix as a whole, search and mode where they say something, aliases one by one."""
    rules: dict[str, Rule] = {}
    aliases: dict[str, str] = {}
    search: tuple[str, ...] = ()
    mode = ""
    helpers: tuple[str, ...] = ()
    for file in files:
        rules.update({rule.prefix: rule for rule in file.rules()})
        aliases.update(file.aliases())
        search = search if file.search() is None else file.search() or ()
        helpers = file.helpers() or helpers
        mode = file.mode() or mode
    # An alias with an empty value takes an earlier one away.
    kept = tuple((name, full) for name, full in aliases.items() if full)
    return Registries(tuple(rules.values()), search, mode, kept, helpers)


class _File:
    """One file, for messages with its name."""

    def __init__(self, path: Path) -> None:
        import tomllib  # only where there is such a file

        self._path = path
        try:
            self._document = tomllib.loads(read_bounded(AT_FDCWD, str(path), _FILE_LIMIT).decode())
        except KernelError as error:
            raise ImageError(f"registries: {error}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ImageError(f"registries {path}: not valid TOML ({error})") from None
        if isinstance(self._document.get("registries"), dict):
            raise ImageError(f"registries {path}: version 1 of the format; write [[registry]] tables (version 2)")

    def rules(self) -> list[Rule]:
        return [self._rule(table, f"registry[{n}]") for n, table in enumerate(self._tables(self._document, "registry"))]

    def search(self) -> tuple[str, ...] | None:
        return self._listed("unqualified-search-registries", "a list of hosts")

    def helpers(self) -> tuple[str, ...] | None:
        return self._listed("credential-helpers", "a list of names")

    def _listed(self, key: str, expected: str) -> tuple[str, ...] | None:
        value = self._document.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise self._wrong(key, expected)
        return tuple(value)

    def mode(self) -> str:
        mode = self._document.get("short-name-mode", "")
        if mode not in _MODES:
            raise self._wrong("short-name-mode", "enforcing, permissive or disabled")
        return str(mode)

    def aliases(self) -> dict[str, str]:
        table = self._document.get("aliases", {})
        if not isinstance(table, dict) or not all(isinstance(full, str) for full in table.values()):
            raise self._wrong("aliases", "a table of names")
        return {str(name): str(full) for name, full in table.items()}

    def _rule(self, table: Mapping[str, Any], where: str) -> Rule:
        location = self._string(table, "location", where)
        prefix = self._string(table, "prefix", where) or location
        if not prefix or (not location and not prefix.startswith("*.")):
            raise self._wrong(f"{where}.location", "a host, with a path maybe")
        by_digest = self._boolean(table, "mirror-by-digest-only", where)
        mirrors = []
        for number, mirror in enumerate(self._tables(table, "mirror")):
            inner = f"{where}.mirror[{number}]"
            pulls = _PULLS.get(self._string(mirror, "pull-from-mirror", inner))
            if pulls is None:
                raise self._wrong(f"{inner}.pull-from-mirror", "all, digest-only or tag-only")
            place = self._place(self._string(mirror, "location", inner), f"{inner}.location")
            insecure = self._boolean(mirror, "insecure", inner)
            mirrors.append(Endpoint(place, insecure, "digest-only" if by_digest else pulls))
        source = self._place(location, f"{where}.location") if location else ""
        return Rule(
            prefix.rstrip("/"),
            Endpoint(source, self._boolean(table, "insecure", where)),
            tuple(mirrors),
            self._boolean(table, "blocked", where),
            self._path,
        )

    def _place(self, location: str, where: str) -> str:
        location = location.rstrip("/")
        try:
            split_port(location.partition("/")[0])
        except ReferenceInvalid:
            raise self._wrong(where, "a host, with a path maybe, without https://") from None
        return location

    def _tables(self, table: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
        value = table.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._wrong(key, "tables")
        return value

    def _string(self, table: Mapping[str, Any], key: str, where: str) -> str:
        value = table.get(key, "")
        if not isinstance(value, str):
            raise self._wrong(f"{where}.{key}", "a string")
        return value

    def _boolean(self, table: Mapping[str, Any], key: str, where: str) -> bool:
        value = table.get(key, False)
        if not isinstance(value, bool):
            raise self._wrong(f"{where}.{key}", "true or false")
        return value

    def _wrong(self, key: str, expected: str) -> ImageError:
        return ImageError(f"registries {self._path}: {key}: expected {expected}")
