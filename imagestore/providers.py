"""A kubelet's credential providers (CredentialProviderConfig, credentialprovider.kubelet.k8s.io/v1) without a kubelet:
the programs that a cloud's nodes have for its registries.

Blocking, for worker threads. Refuses a file it cannot understand in full, by field. Invariant: a provider is asked for
images that its `matchImages` fit only, what it answered is used for hosts that the answer's own keys fit only, and it
is kept in memory no longer than its cacheDuration, never on disk.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from imagestore import durations
from imagestore.errands import Errand
from imagestore.keyring import matches
from imagestore.model import ContentInvalid, Credentials, ImageError
from imagestore.programs import ask, find
from imagestore.strict_json import Fields, parse_object
from runtime.linux.dataclass import dataclass
from runtime.linux.files import AT_FDCWD, read_bounded
from runtime.linux.libc import KernelError

_FILE_LIMIT = 1 << 20
_VALUES = 10_000
_PROVIDER_S = 60.0
_CACHED = 1000
_VERSIONS = ("credentialprovider.kubelet.k8s.io/v1", "credentialprovider.kubelet.k8s.io/v1beta1")


@dataclass(frozen=True, slots=True)
class Provider:
    """One entry of the file."""

    name: str
    images: tuple[str, ...]
    api_version: str
    cache_s: float
    arguments: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Kept:
    until: float
    found: Mapping[str, Credentials]


class Providers:
    """The providers of one file, which is read once."""

    def __init__(self, file: Path, directory: Path, environment: Mapping[str, str]) -> None:
        self._directory = directory
        self._environment = environment
        self._providers = read_providers(file)
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._lock = threading.Lock()

    def find(self, domain: str, path: str, errand: Errand) -> Credentials | None:
        """For the repository, from the first provider that has some. Raises ImageError."""
        for provider in self._providers:
            if any(matches(pattern, domain, path) for pattern in provider.images):
                found = self._ask(provider, domain, path, errand)
                fitting = [key for key in found if matches(key, domain, path)]
                if fitting:
                    return found[max(fitting, key=len)]
        return None

    def _ask(self, provider: Provider, domain: str, path: str, errand: Errand) -> Mapping[str, Credentials]:
        now = time.monotonic()
        image = f"{domain}/{path}"
        with self._lock:
            for scope in (image, domain, ""):
                kept = self._kept.get((provider.name, scope))
                if kept is not None and kept.until > now:
                    return kept.found
        what = f"credential program {provider.name}"
        request = {"apiVersion": provider.api_version, "kind": "CredentialProviderRequest", "image": image}
        program = find(provider.name, (str(self._directory),))
        environment = {**self._environment, **provider.environment}
        answer = ask(program, provider.arguments, environment, json.dumps(request).encode(), _PROVIDER_S, errand)
        try:
            fields = parse_object(answer, what, _VALUES)
            found, scope, cache_s = _parse_answer(fields, provider)
        except ContentInvalid:
            raise ImageError(f"{what}: its answer is no {provider.api_version} CredentialProviderResponse") from None
        if cache_s > 0:
            with self._lock:
                if len(self._kept) >= _CACHED:
                    self._kept.clear()
                key = {"Image": image, "Registry": domain, "Global": ""}[scope]
                self._kept[(provider.name, key)] = _Kept(now + cache_s, found)
        return found


def _parse_answer(fields: Fields, provider: Provider) -> tuple[dict[str, Credentials], str, float]:
    kind, version = fields.string("kind"), fields.string("apiVersion")
    scope = fields.string("cacheKeyType")
    if kind != "CredentialProviderResponse" or version != provider.api_version:
        raise ContentInvalid("not the answer that was asked for")
    if scope not in ("Image", "Registry", "Global"):
        raise ContentInvalid("cacheKeyType: expected Image, Registry or Global")
    found = {}
    auth = fields.object("auth")
    for key in auth.names() if auth is not None else ():
        entry = auth.object(key) if auth is not None else None
        if entry is not None and entry.string("username"):
            found[key] = Credentials(entry.string("username"), entry.string("password"))
    text = fields.string("cacheDuration")
    cache_s = durations.seconds(text) if text else provider.cache_s
    if cache_s is None:
        raise ContentInvalid("cacheDuration: expected a duration")
    return found, scope, cache_s


def read_providers(file: Path) -> tuple[Provider, ...]:
    """The entries of a CredentialProviderConfig. Raises ImageError."""
    import yaml  # only on nodes that have such a file

    try:
        document = yaml.safe_load(read_bounded(AT_FDCWD, str(file), _FILE_LIMIT))
        # Through JSON into the same strict reader as everything else; YAML's dates and sets end here.
        fields = parse_object(json.dumps(document).encode(), f"credential providers {file}", _VALUES)
        return tuple(_provider(item) for item in fields.objects("providers", 100))
    except KernelError as error:
        raise ImageError(f"credential providers: {error}") from error
    except (yaml.YAMLError, TypeError, ValueError, RecursionError):
        raise ImageError(f"credential providers {file}: not valid YAML of plain values") from None
    except ContentInvalid as error:
        raise ImageError(str(error)) from None


def _provider(fields: Fields) -> Provider:
    name, version = fields.string("name"), fields.string("apiVersion")
    if not name or "/" in name:
        raise ContentInvalid(f"{fields.path}.name: expected a program's name")
    if version not in _VERSIONS:
        raise ContentInvalid(f"{fields.path}.apiVersion: expected {' or '.join(_VERSIONS)}")
    images = fields.strings("matchImages")
    if not images:
        raise ContentInvalid(f"{fields.path}.matchImages: expected at least one pattern")
    cache_s = durations.seconds(fields.string("defaultCacheDuration"))
    if cache_s is None:
        raise ContentInvalid(f"{fields.path}.defaultCacheDuration: expected a duration such as 10m")
    environment = {item.string("name"): item.string("value") for item in fields.objects("env", 1000)}
    return Provider(name, images, version, cache_s, fields.strings("args"), environment)
