"""Where a registry's content may be fetched from: `hosts.toml` directories as containerd documents them.

    DIRECTORY/registry.example:5000/hosts.toml      also `registry.example_5000_` and `_default`; first directory wins

Refuses files with a field of the wrong type, naming it; leaves fields it does not know to other readers of the file.
Invariant: plain HTTP only where the reference itself names a loopback host literally, or where a file says `http://`
(threats S28); headers from a file go to the host they stand under and to no other (R9).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import field, replace
from pathlib import Path
from urllib.parse import urlsplit

from imagestore import durations
from imagestore.model import ImageError, ReferenceInvalid
from imagestore.reference import DEFAULT_DOMAIN, is_loopback, split_port
from runtime.linux.dataclass import dataclass
from runtime.linux.files import AT_FDCWD, read_bounded
from runtime.linux.libc import KernelError

_FILE_LIMIT = 1 << 20
DOCKER_HUB = "registry-1.docker.io"
_LONGEST_S = 3600.0
_CAPABILITIES = frozenset({"pull", "resolve", "push", "referrers"})


@dataclass(frozen=True, slots=True)
class Host:
    """One place to ask. `base` is "scheme://host[:port]/path" without a slash at its end; `upstream` is the registry
    that the reference names, and the only host which gets the caller's credentials."""

    base: str
    upstream: bool
    resolve: bool = True
    pull: bool = True
    skip_verify: bool = False
    ca: tuple[Path, ...] = ()
    client: tuple[tuple[Path, Path | None], ...] = ()
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    push: bool = False
    dial_s: float | None = None
    """How long connecting may take, where the file says."""
    path: str = ""
    """The repository's path there, where it is another than the reference's (registries.conf)."""
    asks_namespace: bool = True
    """Whether a mirror is told which registry is meant (`ns=`), as containerd's mirrors are."""

    def repository(self, path: str) -> str:
        """What this host calls the repository `path`: its own prefix, and a path of its own, are before it."""
        prefix = urlsplit(self.base).path.rpartition("/v2/")[2] if "/v2/" in self.base else ""
        own = self.path or path
        return f"{prefix}/{own}" if prefix else own

    @property
    def origin(self) -> str:
        """ "scheme://host[:port]": how messages name the host."""
        parts = urlsplit(self.base)
        return f"{parts.scheme}://{parts.netloc}"

    def is_twin(self, other: Host) -> bool:
        """True when `other` is the same registry, spoken to in the other way: with TLS or without."""
        place, theirs = self.base.partition(":")[2], other.base.partition(":")[2]
        alike = replace(self, base=other.base, skip_verify=other.skip_verify)
        return self.base != other.base and place == theirs and alike == other


def hosts_for(domain: str, directories: tuple[Path, ...], limit: int) -> tuple[Host, ...]:
    """The hosts for a registry, in the order in which to ask; the registry itself comes last.

    Raises ImageError when a hosts.toml cannot be read or says something that cannot be meant.
    """
    return configured(domain, directories, limit) or (upstream_host(domain),)


def configured(domain: str, directories: tuple[Path, ...], limit: int) -> tuple[Host, ...] | None:
    """As `hosts_for`; None where no directory says anything of this registry."""
    for directory in directories_of(domain, directories):
        document = _read(directory / "hosts.toml")
        if document is not None:
            return _File(directory / "hosts.toml", domain).hosts(document, limit)
    return None


def directories_of(authority: str, directories: Sequence[Path]) -> Iterator[Path]:
    """Where a registry's files may lie; the first that has some decides."""
    for directory in directories:
        for name in _names(authority):
            yield directory / name


def _names(domain: str) -> tuple[str, ...]:
    host, port = split_port(domain)
    spellings = (f"{host}_{port}_", domain) if port is not None else (domain,)
    return (*spellings, "_default")


def _read(path: Path) -> dict[str, object] | None:
    try:
        data = read_bounded(AT_FDCWD, str(path), _FILE_LIMIT)
    except KernelError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise ImageError(f"registry hosts: {error}") from error
    import tomllib  # only where somebody has such a file

    try:
        return tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ImageError(f"registry hosts {path}: not valid TOML ({error})") from None


def default_scheme(authority: str) -> str:
    """How a registry is spoken to where nobody says so."""
    return "http" if is_loopback(split_port(authority)[0]) else "https"


def upstream_host(domain: str) -> Host:
    """The registry itself, as its name alone says."""
    authority = DOCKER_HUB if domain == DEFAULT_DOMAIN else domain
    return Host(f"{default_scheme(authority)}://{authority}/v2", upstream=True, push=True)


def unverified(host: Host) -> tuple[Host, ...]:
    """A host that need not prove who it is: over TLS all the same, or without; first as it is likely to speak."""
    rest = host.base.partition("://")[2]
    found = (replace(host, base=f"https://{rest}", skip_verify=True), replace(host, base=f"http://{rest}"))
    return found[::-1] if is_loopback(split_port(rest.partition("/")[0])[0]) else found


class _File:
    """One hosts.toml, for error messages with its path."""

    def __init__(self, path: Path, domain: str) -> None:
        self._path = path
        self._domain = domain

    def hosts(self, document: dict[str, object], limit: int) -> tuple[Host, ...]:
        server = document.get("server")
        if server is None or server == "":
            server = upstream_host(self._domain).origin
        table = document.get("host", {})
        if not isinstance(table, dict):
            raise self._wrong("host", "a table for each host")
        if len(table) > limit:
            raise ImageError(f"registry hosts {self._path}: {len(table)} hosts, the limit is {limit}")
        found = []
        for url, options in table.items():
            if not isinstance(options, dict):
                raise self._wrong(f'host."{url}"', "a table")
            found.append(self._host(url, options, f'host."{url}".', upstream=False))
        if not isinstance(server, str):
            raise self._wrong("server", "a URL")
        found.append(self._host(server, document, "", upstream=True))
        return tuple(found)

    def _wrong(self, key: str, expected: str) -> ImageError:
        return ImageError(f"registry hosts {self._path}: {key}: expected {expected}")

    def _host(self, url: str, options: dict[str, object], where: str, *, upstream: bool) -> Host:
        # A mirror is pushed to only where the file says so by name; the registry itself may be.
        capabilities = self._strings(options, "capabilities", where) or (
            ("pull", "resolve", "push") if upstream else ("pull", "resolve")
        )
        unknown = set(capabilities) - _CAPABILITIES
        if unknown:
            raise self._wrong(f"{where}capabilities", f"some of {', '.join(sorted(_CAPABILITIES))}")
        return Host(
            base=self._base(url, where, override=self._boolean(options, "override_path", where)),
            upstream=upstream,
            resolve="resolve" in capabilities,
            pull="pull" in capabilities,
            skip_verify=self._boolean(options, "skip_verify", where),
            ca=tuple(self._path.parent / name for name in self._strings(options, "ca", where)),
            client=self._client(options, where),
            headers=self._headers(options, where),
            push="push" in capabilities,
            dial_s=self._duration(options, "dial_timeout", where),
        )

    def _base(self, url: str, where: str, *, override: bool) -> str:
        key = where.rstrip(".") or "server"
        try:
            full = url if "://" in url else f"{default_scheme(url.partition('/')[0])}://{url}"
            parts = urlsplit(full)
        except (ReferenceInvalid, ValueError) as error:
            raise self._wrong(key, f"a host ({error})") from None
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
            raise self._wrong(key, "http://host[:port][/path] or https://host[:port][/path]")
        if "@" in parts.netloc:
            raise self._wrong(key, "a URL without user and password: put them into [host.….header]")
        authority = DOCKER_HUB if parts.netloc == DEFAULT_DOMAIN else parts.netloc
        try:
            split_port(authority)  # the same strict pattern as in references
        except ReferenceInvalid as error:
            raise self._wrong(key, f"a host ({error})") from None
        path = parts.path.rstrip("/")
        if not override and not path.endswith("/v2"):
            path += "/v2"
        return f"{parts.scheme}://{authority}{path}"

    def _boolean(self, options: dict[str, object], key: str, where: str) -> bool:
        value = options.get(key, False)
        if not isinstance(value, bool):
            raise self._wrong(where + key, "true or false")
        return value

    def _duration(self, options: dict[str, object], key: str, where: str) -> float | None:
        """Go's spelling ("500ms", "1m30s"), or a number of seconds."""
        value = options.get(key)
        if value is None:
            return None
        found: float | None = None
        if isinstance(value, str):
            found = durations.seconds(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found = float(value)
        if found is None or not 0 < found <= _LONGEST_S:
            raise self._wrong(where + key, 'a duration such as "5s" or "500ms"')
        return found

    def _strings(self, options: dict[str, object], key: str, where: str) -> tuple[str, ...]:
        value = options.get(key, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise self._wrong(where + key, "a string or a list of strings")
        return tuple(values)

    def _client(self, options: dict[str, object], where: str) -> tuple[tuple[Path, Path | None], ...]:
        value = options.get("client", [])
        pairs = []
        for item in [value] if isinstance(value, str) else value if isinstance(value, list) else [None]:
            pair = [item] if isinstance(item, str) else item
            if not isinstance(pair, list) or not 1 <= len(pair) <= 2 or not all(isinstance(x, str) for x in pair):
                raise self._wrong(f"{where}client", "a file, a list of files, or a list of [certificate, key]")
            key = self._path.parent / pair[1] if len(pair) == 2 and pair[1] else None
            pairs.append((self._path.parent / pair[0], key))
        return tuple(pairs)

    def _headers(self, options: dict[str, object], where: str) -> tuple[tuple[str, str], ...]:
        table = options.get("header", {})
        if not isinstance(table, dict):
            raise self._wrong(f"{where}header", "a table")
        headers = []
        for name in table:
            for value in self._strings(table, name, f"{where}header."):
                if not name.isascii() or not name.replace("-", "").replace("_", "").isalnum():
                    raise self._wrong(f"{where}header", "names of letters, digits and dashes")
                if any(ord(char) < 32 or ord(char) == 127 for char in value):
                    raise self._wrong(f"{where}header.{name}", "one line of text")
                headers.append((name, value))
        return tuple(headers)
