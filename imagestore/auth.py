"""Logging in to one registry host for one repository: Basic, or the token dance of the distribution spec.

    GET /v2/…        -> 401, WWW-Authenticate: Bearer realm="https://auth.example/token",service="example"
    GET realm?service=…&scope=repository:PATH:pull   [Authorization: Basic …]   -> {"token": …}
    GET /v2/…        Authorization: Bearer …

Refuses realms over plain http of a registry that speaks TLS, realms with a password in them, and redirects of token
requests (CVE-2026-50151, threats S29). Invariant: what a caller gave goes to the registry that the reference names and
to its token server only; a token goes to the host and the repository that it was made for (R9, S27).
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import field
from urllib.parse import urlencode, urlsplit

from imagestore.hosts import Host
from imagestore.model import AccessDenied, Credentials
from imagestore.reference import DEFAULT_DOMAIN, is_loopback
from imagestore.strict_json import parse_object
from imagestore.transport import Request, Tls, origin_of, place
from runtime.linux.dataclass import dataclass

_CHALLENGE_LIMIT = 8 << 10
_TOKEN_LIMIT = 64 << 10
_SCHEME = re.compile(r"\s*,?\s*(Basic|Bearer)(?=\s|$|,)", re.IGNORECASE | re.ASCII)
_PARAMETER = re.compile(r'[\s,]*([A-Za-z_]{1,40})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s",]+))', re.ASCII)
_OFFERED = re.compile(r"repository:([a-z0-9._/-]{1,255}):[a-z,*]{1,40}", re.ASCII)
_TOKEN = re.compile(r"[\x21-\x7e]+", re.ASCII)
_HUB_NAMES = frozenset({DEFAULT_DOMAIN, "index.docker.io", "registry-1.docker.io"})


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to log in that a 401 offers; `scheme` is lower case."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=dict)


def parse_challenges(headers: Sequence[str]) -> list[Challenge]:
    """The Basic and Bearer challenges of WWW-Authenticate headers (RFC 9110 11.6.1); others are left out."""
    found = []
    for header in headers:
        position, header = 0, header[:_CHALLENGE_LIMIT]
        while match := _SCHEME.match(header, position):
            position = match.end()
            parameters = {}
            while pair := _PARAMETER.match(header, position):
                value = pair[3] if pair[2] is None else re.sub(r"\\(.)", r"\1", pair[2])
                parameters[pair[1].lower()] = value
                position = pair.end()
            found.append(Challenge(match[1].lower(), parameters))
    return found


def applicable(credentials: Credentials | None, domain: str) -> Credentials | None:
    """The credentials when they are for the registry `domain`: a server address in them may name another one."""
    if credentials is None or not credentials.server_address:
        return credentials
    address = credentials.server_address
    server = urlsplit(address if "://" in address else f"//{address}").netloc.rpartition("@")[2].lower()
    same = server == domain.lower() or (server in _HUB_NAMES and domain in _HUB_NAMES)
    return credentials if same else None


def basic(username: str, password: str) -> str:
    """The value of a Basic Authorization header."""
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


# How `Login` reaches a token server: a request and the secrets that no message about it may hold -> the small answer.
FetchToken = Callable[[Request, list[str]], Awaitable[bytes]]


class Login:
    """What one host of one pull or push is sent to be let in: the first of `credentials` that it takes, where an empty
    one stands for nobody in particular. `repr` shows none of it."""

    def __init__(self, host: Host, path: str, credentials: Sequence[Credentials], actions: str = "pull") -> None:
        self._host = host
        self._path = path
        self._actions = actions
        self._mounted: tuple[str, ...] = ()
        self._all = tuple(credentials) or (Credentials(),)
        self._credentials, *self._others = self._all
        self._asking = asyncio.Lock()
        token = self._credentials.registry_token
        self._authorization = f"Bearer {token}" if token else ""

    def headers(self) -> dict[str, str]:
        """Headers for the host itself, and for nobody else."""
        headers = dict(self._host.headers)
        if self._authorization:
            headers["Authorization"] = self._authorization
        return headers

    def secrets(self) -> list[str]:
        """Everything that no message may hold."""
        found = [value for _, value in self._host.headers]
        for given in self._all:
            found += [given.password, given.identity_token, given.registry_token]
            if given.username:
                found.append(basic(given.username, given.password).partition(" ")[2])
        found.append(self._authorization.partition(" ")[2])
        return [secret for secret in found if secret]

    def also_pull(self, path: str) -> None:
        """From now on tokens are asked for that may read the repository `path`, too: to mount its blobs."""
        if path not in self._mounted:
            self._mounted = (*self._mounted, path)
            if self._authorization.startswith("Bearer ") and not self._credentials.registry_token:
                self._authorization = ""  # made without it

    async def answer(self, challenges: Sequence[Challenge], used: str, fetch: FetchToken) -> bool:
        """Reacts to a 401 that came for a request with the Authorization `used`; True when it is worth asking again.
        Raises AccessDenied and what `fetch` raises."""
        async with self._asking:
            if self._authorization != used:
                return True  # somebody else's request has been through this meanwhile
            refused: AccessDenied | None = None
            while True:
                try:
                    authorization = await self._offer(challenges, fetch)
                except AccessDenied as error:
                    refused, authorization = refused or error, ""
                if authorization and authorization != used:
                    self._authorization = authorization
                    return True
                if not self._others:
                    if refused is not None:
                        raise refused
                    return False
                # A login that lies on this machine may be stale: what is public can be had without it.
                self._credentials = self._others.pop(0)

    async def _offer(self, challenges: Sequence[Challenge], fetch: FetchToken) -> str:
        """What one of the challenges is answered with, "" when nothing that we have fits."""
        for challenge in challenges:
            if challenge.scheme == "bearer" and challenge.parameters.get("realm"):
                return f"Bearer {await self._token(challenge, fetch)}"
        if any(challenge.scheme == "basic" for challenge in challenges) and self._credentials.username:
            return basic(self._credentials.username, self._credentials.password)
        return ""

    async def _token(self, challenge: Challenge, fetch: FetchToken) -> str:
        realm = challenge.parameters["realm"]
        self._check_realm(realm)
        data = await fetch(self._token_request(realm, challenge.parameters), self.secrets())
        document = parse_object(data, f"token server {place(realm)}", 1000)
        token = document.string("token") or document.string("access_token")
        if not token or len(token) > _TOKEN_LIMIT or not _TOKEN.fullmatch(token):
            raise AccessDenied(f"token server {place(realm)}: the answer holds no usable token")
        return token

    def _scopes(self, offered: str) -> list[str]:
        """What a token is asked for: this repository, under the name that the registry has for it where that ends in
        ours (a proxy's project stands before it); never another one that a challenge names."""
        name = self._path
        match = _OFFERED.fullmatch(offered)
        if match and match[1].endswith(f"/{self._path}"):
            name = match[1]
        return [f"repository:{name}:{self._actions}", *(f"repository:{path}:pull" for path in self._mounted)]

    def _check_realm(self, realm: str) -> None:
        shown = self._host.origin
        try:
            parts = urlsplit(realm)
            _, realm_host, _ = origin_of(realm)
        except ValueError:
            raise AccessDenied(f"{shown}: its token server is no proper URL") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.fragment:
            raise AccessDenied(f"{shown}: its token server is no proper URL")
        if any(ord(char) <= 32 or ord(char) == 127 for char in realm):
            raise AccessDenied(f"{shown}: its token server is no proper URL")
        if parts.scheme == "https":
            return
        scheme, host, _ = origin_of(self._host.base)
        if scheme == "https" or not (realm_host == host or is_loopback(realm_host)):
            raise AccessDenied(f"{shown}: its token server {place(realm)} speaks plain http, so nothing is sent to it")

    def _token_request(self, realm: str, parameters: Mapping[str, str]) -> Request:
        given = self._credentials
        # A token server next to the registry shows the same certificate; any other must convince on its own.
        tls = Tls(self._host) if origin_of(realm)[1] == origin_of(self._host.base)[1] else Tls()
        service = parameters.get("service", "")
        scopes = self._scopes(parameters.get("scope", ""))
        if given.identity_token:
            # RFC 6749 3.3: one parameter, scopes apart by spaces; below, the distribution spec's GET repeats it.
            wanted = {"scope": " ".join(scopes), **({"service": service} if service else {})}
            form = {"grant_type": "refresh_token", "client_id": "ocid", "refresh_token": given.identity_token, **wanted}
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            return Request("POST", realm, headers, body=urlencode(form).encode(), tls=tls, redirects=0)
        query = [("scope", scope) for scope in scopes] + ([("service", service)] if service else [])
        url = f"{realm}{'&' if urlsplit(realm).query else '?'}{urlencode(query)}"
        secret = {"Authorization": basic(given.username, given.password)} if given.username else {}
        return Request("GET", url, {}, secret, tls=tls, redirects=0)
