"""Credentials that lie on this machine: docker's config.json, podman's auth.json, credential helpers, and the exec
providers of a kubelet (imagestore.providers).

    for registry.example:5000/team/app:
    auths/credHelpers "registry.example:5000/team/app", then ".../team", then "registry.example:5000",
    then keys that name the host some other way: https://HOST/v1/, *.example:5000, docker's own index.docker.io

Blocking, for worker threads. Refuses what is malformed in the one entry that is asked for, by file and key, and never
says what stands in it. Invariant: an entry goes to the host that its key names, and to no other (threats R9, S27);
nothing is kept between two questions but what a provider's cache allows, and nothing is written to disk.
"""

from __future__ import annotations

import base64
import binascii
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from fnmatch import fnmatchcase
from pathlib import Path

from imagestore.errands import Errand
from imagestore.model import ContentInvalid, Credentials, ImageError
from imagestore.programs import ProgramRefused, ask, find
from imagestore.reference import DEFAULT_DOMAIN
from imagestore.strict_json import Fields, parse_object
from runtime.linux.dataclass import dataclass
from runtime.linux.files import AT_FDCWD, read_bounded
from runtime.linux.libc import KernelError

_FILE_LIMIT = 4 << 20
_VALUES = 100_000
_TEXT_LIMIT = 64 << 10
AUTH_FILES = "containers-auth.json"
_HUB = "https://index.docker.io/v1/"
_HUB_NAMES = frozenset({DEFAULT_DOMAIN, "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"})
# What a helper puts in the user's place when the secret is an identity token, and what it says when it has nothing.
_TOKEN_USER = "<token>"
_NOTHING = b"credentials not found"
_HELPER_S = 30.0


@dataclass(frozen=True, slots=True)
class KeyringConfig:
    """Where to look. `files` in this order, the first that has an entry wins; None: where docker and podman put them.
    `providers` is a kubelet's CredentialProviderConfig, `provider_directory` where its programs lie."""

    files: tuple[Path, ...] | None = ()
    providers: Path | None = None
    provider_directory: Path | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)


def usual_files(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Where podman, skopeo and docker keep logins, in the order in which skopeo asks them."""
    if environment.get("REGISTRY_AUTH_FILE"):
        return (Path(environment["REGISTRY_AUTH_FILE"]),)
    home = Path(environment.get("HOME") or "/root")
    runtime = environment.get("XDG_RUNTIME_DIR")
    first = Path(runtime) / "containers" if runtime else Path(f"/run/containers/{os.getuid()}")
    settings = Path(environment.get("XDG_CONFIG_HOME") or home / ".config")
    docker = Path(environment.get("DOCKER_CONFIG") or home / ".docker")
    return (first / "auth.json", settings / "containers/auth.json", docker / "config.json")


class Keyring:
    """What this machine would log in with. `repr` shows nothing."""

    def __init__(self, config: KeyringConfig) -> None:
        self._config = config
        self._providers: object = None

    def find(
        self, domain: str, path: str, errand: Errand | None = None, helpers: Sequence[str] = ()
    ) -> Credentials | None:
        """For the repository `path` on the host `domain`; programs are asked on `errand`, or on one that nobody ends.
        `helpers` are registries.conf's: whom to ask in this order, of whom AUTH_FILES stands for the files. Raises
        ImageError when an entry is there and unusable."""
        errand = errand or Errand()
        if self._config.providers is not None:
            found = self._provided(domain, path, errand)
            if found is not None:
                return found
        for helper in helpers or (AUTH_FILES,):
            if helper == AUTH_FILES:
                found = self._in_files(domain, path, errand)
            else:
                found = _helped(helper, domain, "registries.conf", self._config.environment, errand)
            if found is not None:
                return found
        return None

    def _in_files(self, domain: str, path: str, errand: Errand) -> Credentials | None:
        files = self._config.files
        for file in usual_files(self._config.environment) if files is None else files:
            document = _read(file)
            if document is not None:
                found = _AuthFile(file, document, self._config.environment, errand).find(domain, path)
                if found is not None:
                    return found
        return None

    def _provided(self, domain: str, path: str, errand: Errand) -> Credentials | None:
        from imagestore.providers import Providers  # YAML, for nodes that have such a file

        if not isinstance(self._providers, Providers):
            assert self._config.providers is not None
            directory = self._config.provider_directory or self._config.providers.parent
            self._providers = Providers(self._config.providers, directory, self._config.environment)
        return self._providers.find(domain, path, errand)


def _read(path: Path) -> Fields | None:
    if path == Path(os.devnull):  # how a configuration says: no file at all
        return None
    try:
        data = read_bounded(AT_FDCWD, str(path), _FILE_LIMIT)
    except KernelError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise ImageError(f"credentials: {error}") from error
    if not data.strip():
        return None
    try:
        return parse_object(data, f"credentials {path}", _VALUES)
    except ContentInvalid as error:
        # Where JSON breaks off, an error of the parser could quote what stands there.
        raise ImageError(f"credentials {path}: not valid JSON") from error.__cause__


class _AuthFile:
    """One config.json or auth.json."""

    def __init__(self, path: Path, document: Fields, environment: Mapping[str, str], errand: Errand) -> None:
        self._path = path
        self._errand = errand
        self._environment = environment
        self._auths = document.object("auths")
        self._helpers = document.string_map("credHelpers")
        self._store = document.string("credsStore")

    def find(self, domain: str, path: str) -> Credentials | None:
        for key in _namespaces(domain, path):
            if key in self._helpers:
                return self._ask(self._helpers[key], key)
            if self._auths is not None and key in self._auths.names():
                found = self._entry(key)
                if found is not None:
                    return found
        for key in self._other_keys(domain, path):
            found = self._entry(key)
            if found is not None:
                return found
        return self._stored(domain)

    def _other_keys(self, domain: str, path: str) -> Iterator[str]:
        """Keys that name the host by a URL, by one of its names or by a pattern; those that say most come first."""
        keys = self._auths.names() if self._auths is not None else ()
        fitting = [key for key in keys if matches(key, domain, path)]
        yield from sorted(fitting, key=lambda key: (key.count("*"), -len(key)))

    def _entry(self, key: str) -> Credentials | None:
        """None for an empty one: it only says that a helper has it."""
        assert self._auths is not None
        fields = self._auths.object(key)
        if fields is None:
            return None
        username, password = fields.string("username"), fields.string("password")
        encoded = fields.string("auth")
        if encoded:
            username, password = self._decoded(encoded, key)
        found = Credentials(username, password, fields.string("identitytoken"), fields.string("registrytoken"))
        if not (found.username or found.identity_token or found.registry_token):
            return None
        return found

    def _decoded(self, encoded: str, key: str) -> tuple[str, str]:
        try:
            text = base64.b64decode(encoded.strip(), validate=True).decode()
        except (ValueError, binascii.Error):
            raise ImageError(
                f'credentials {self._path}: auths."{key[:100]}".auth: not base64 of user:password'
            ) from None
        username, colon, password = text.partition(":")
        if not colon or not username:
            raise ImageError(f'credentials {self._path}: auths."{key[:100]}".auth: not base64 of user:password')
        return username, password.strip("\0")

    def _stored(self, domain: str) -> Credentials | None:
        """From the helper that has everything, under the name that docker gave it."""
        if not self._store:
            return None
        for server in (_HUB, DEFAULT_DOMAIN) if domain in _HUB_NAMES else (domain, f"https://{domain}"):
            found = self._ask(self._store, server)
            if found is not None:
                return found
        return None

    def _ask(self, helper: str, server: str) -> Credentials | None:
        return _helped(helper, server, str(self._path), self._environment, self._errand)


def _helped(helper: str, server: str, where: str, environment: Mapping[str, str], errand: Errand) -> Credentials | None:
    """What a credential helper has, of which `where` says that it be asked."""
    directories = environment.get("PATH", "/usr/local/bin:/usr/bin:/bin").split(":")
    program = find(f"docker-credential-{helper}", directories)
    try:
        answer = ask(program, ["get"], environment, server.encode(), _HELPER_S, errand)
    except ProgramRefused as error:
        if _NOTHING in error.answer:
            return None
        raise ImageError(f"credentials {where}: {error} for {server}") from None
    return _answer_of_helper(answer, f"credential program {program.name}")


def _answer_of_helper(answer: bytes, what: str) -> Credentials | None:
    try:
        fields = parse_object(answer, what, 100)
        username, secret = fields.string("Username"), fields.string("Secret")
    except ContentInvalid:
        raise ImageError(f"{what}: its answer is no JSON with Username and Secret") from None
    if not secret or len(secret) > _TEXT_LIMIT:
        return None
    return Credentials(identity_token=secret) if username == _TOKEN_USER else Credentials(username, secret)


def _namespaces(domain: str, path: str) -> Iterator[str]:
    """ "HOST/a/b", "HOST/a", "HOST"."""
    while path:
        yield f"{domain}/{path}"
        path = path.rpartition("/")[0]
    yield domain


def matches(key: str, domain: str, path: str) -> bool:
    """True when the key of an entry, or a kubelet's pattern, names that host and a beginning of that path. A star
    stands for one part of a host name, or for part of it; a port that is named must be the same."""
    bare = key.partition("://")[2] or key
    authority, _, prefix = bare.partition("/")
    prefix = prefix.strip("/")
    if authority in _HUB_NAMES and domain in _HUB_NAMES:
        return prefix in ("", "v1", "v2") or _begins(prefix, path)
    if "://" in key and prefix in ("v1", "v2"):
        prefix = ""  # docker writes the endpoint of its API there
    wanted_host, wanted_port = _split(authority)
    host, port = _split(domain)
    parts, own = wanted_host.lower().split("."), host.lower().split(".")
    if wanted_port != port or len(parts) != len(own):
        return False
    return all(map(fnmatchcase, own, map(_only_stars, parts))) and _begins(prefix, path)


def _only_stars(part: str) -> str:
    """A pattern for fnmatch in which only the star is special."""
    return part.replace("[", "[[]").replace("?", "[?]")


def _begins(prefix: str, path: str) -> bool:
    return not prefix or path == prefix or path.startswith(f"{prefix}/")


def _split(authority: str) -> tuple[str, str]:
    if authority.endswith("]") or ":" not in authority:
        return authority, ""
    host, _, port = authority.rpartition(":")
    return host, port
