"""Logging in: what a challenge may ask for, and where credentials never go."""

from __future__ import annotations

import asyncio
from urllib.parse import parse_qs, urlsplit

import pytest

from imagestore.auth import Challenge, Login, applicable, basic, parse_challenges
from imagestore.hosts import Host
from imagestore.model import AccessDenied, ContentInvalid, Credentials
from imagestore.transport import Request, origin_of
from imagestore.wording import quote, registry_words

ANNA = Credentials("anna", "hunter2!")
HTTPS = Host("https://registry.example/v2", upstream=True)
HTTP = Host("http://localhost:5000/v2", upstream=True)


def ask(
    host: Host, credentials: Credentials | None, realm: str, answer: bytes = b'{"token":"t0k"}'
) -> tuple[Login, list[Request]]:
    """Lets a Login react to a bearer challenge; returns it with the token requests it made."""
    login, requests = Login(host, "team/app", [credentials] if credentials else []), []

    async def fetch(request: Request, secrets: list[str]) -> bytes:
        requests.append(request)
        return answer

    challenge = Challenge("bearer", {"realm": realm, "service": "reg", "scope": "repository:other/secret:push"})
    asyncio.run(login.answer([challenge], login.headers().get("Authorization", ""), fetch))
    return login, requests


def test_challenges() -> None:
    found = parse_challenges(
        [
            'Bearer realm="https://auth.example/token",service="reg",scope="a:b:pull,push"',
            'Basic realm="with \\"quotes\\", and commas"',
            'Negotiate abc, Basic realm=plain , bearer realm="x"',
            "",
            "Bearer",
        ]
    )
    assert found[0] == Challenge(
        "bearer", {"realm": "https://auth.example/token", "service": "reg", "scope": "a:b:pull,push"}
    )
    assert found[1] == Challenge("basic", {"realm": 'with "quotes", and commas'})
    assert Challenge("bearer") in found


def test_long_challenges_are_cut() -> None:
    assert len(parse_challenges(["Basic realm=" + '"' * 1_000_000, 'Bearer realm="' + "a" * 10_000_000])) <= 2


def test_token_request_has_our_scope_only() -> None:
    login, (request,) = ask(HTTPS, ANNA, "https://auth.example/token?x=1")
    query = parse_qs(urlsplit(request.url).query)
    assert query == {"x": ["1"], "scope": ["repository:team/app:pull"], "service": ["reg"]}
    assert request.secret == {"Authorization": basic("anna", "hunter2!")}
    assert request.redirects == 0
    assert login.headers() == {"Authorization": "Bearer t0k"}


def test_anonymous_token() -> None:
    login, (request,) = ask(HTTPS, None, "https://auth.example/token")
    assert request.secret == {} and login.headers() == {"Authorization": "Bearer t0k"}


def test_identity_token_goes_by_post() -> None:
    _, (request,) = ask(HTTPS, Credentials(identity_token="refresh-me"), "https://auth.example/token")
    assert request.method == "POST" and request.body is not None
    form = parse_qs(request.body.decode())
    assert form["refresh_token"] == ["refresh-me"] and form["grant_type"] == ["refresh_token"]
    assert "refresh-me" not in request.url + repr(request)


def test_registry_token_is_sent_at_once() -> None:
    assert Login(HTTPS, "a", [Credentials(registry_token="abc")]).headers() == {"Authorization": "Bearer abc"}


@pytest.mark.parametrize(
    "realm",
    [
        "http://auth.example/token",
        "http://registry.example/token",
        "http://127.0.0.1/token",
        "ftp://auth.example",
        "//auth.example/token",
        "/token",
        "",
        "https://",
        "https://user:pw@auth.example/token",
        "https://auth.example/token#frag",
        "https://auth.example/to ken",
        "https://auth.example/\ntoken",
        "https://[::1/token",
        "https://auth.example:99999999/",
        "javascript:alert(1)",
    ],
)
def test_s29_realms_that_get_nothing(realm: str) -> None:
    login, requests = Login(HTTPS, "a", [ANNA]), []

    async def fetch(request: Request, secrets: list[str]) -> bytes:
        requests.append(request)
        return b"{}"

    async def scenario() -> None:
        try:
            assert not await login.answer([Challenge("bearer", {"realm": realm})], "", fetch)
        except AccessDenied as error:
            assert "hunter2" not in str(error) and "pw" not in str(error)

    asyncio.run(scenario())
    assert requests == [] and login.headers() == {}


def test_s29_plain_registry_may_use_its_own_host_and_loopback_only() -> None:
    assert ask(HTTP, ANNA, "http://localhost:5001/token")[1]
    assert ask(HTTP, ANNA, "http://127.0.0.1:5001/token")[1]
    with pytest.raises(AccessDenied, match="plain http, so nothing is sent"):
        ask(HTTP, ANNA, "http://auth.example/token")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"{}",
        b'{"token":""}',
        b'{"token":7}',
        b'{"token":"a b"}',
        b'{"token":"a\\nX: y"}',
        b'{"token":"\\u00e9"}',
        b'{"token":"' + b"a" * 70_000 + b'"}',
    ],
)
def test_bad_tokens(answer: bytes) -> None:
    with pytest.raises((AccessDenied, ContentInvalid)):
        ask(HTTPS, ANNA, "https://auth.example/token", answer)


def test_basic_once() -> None:
    login = Login(HTTPS, "a", [ANNA])

    async def fetch(request: Request, secrets: list[str]) -> bytes:
        raise AssertionError

    async def scenario() -> None:
        assert await login.answer([Challenge("basic")], "", fetch)
        assert login.headers()["Authorization"] == basic("anna", "hunter2!")
        assert not await login.answer([Challenge("basic")], login.headers()["Authorization"], fetch)
        assert not await Login(HTTPS, "a", []).answer([Challenge("basic")], "", fetch)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("server", "domain", "fits"),
    [
        ("", "quay.io", True),
        ("quay.io", "quay.io", True),
        ("https://quay.io/v2/", "quay.io", True),
        ("https://index.docker.io/v1/", "docker.io", True),
        ("registry-1.docker.io", "docker.io", True),
        ("quay.io", "ghcr.io", False),
        ("quay.io:443", "quay.io", False),
        ("https://evil.example", "docker.io", False),
    ],
)
def test_s27_server_address_binds(server: str, domain: str, fits: bool) -> None:
    credentials = Credentials("anna", "hunter2!", server_address=server)
    assert applicable(credentials, domain) == (credentials if fits else None)


def test_s27_origins_are_spellings() -> None:
    home = origin_of("https://registry.example/v2/")
    assert origin_of("https://registry.example:443/x") == home
    for other in (
        "http://registry.example/",
        "https://registry.example:5000/",
        "https://registry.example./",
        "https://REGISTRY.example/",
        "https://registry.example.evil/",
        "https://other.example/",
    ):
        assert origin_of(other) != home


def test_s30_words_of_a_registry_are_cleaned() -> None:
    assert quote("see https://u:pw@h.example/x?sig=SECRET now") == "see https://h.example/… now"
    assert quote("got Basic YW5uYTpodW50ZXIy!") == "got Basic ***"
    assert quote("bearer  abc.def") == "bearer ***"
    assert quote("the password hunter2! is bad", ["hunter2!"]) == "the password *** is bad"
    assert quote("a\x1b[31mb\r\nc\u202ed") == "a [31mb c d"
    assert len(quote("x" * 10_000)) <= 240
    body = b'{"errors":[{"code":"DENIED","message":"no hunter2! here"},{"message":"other"}]}'
    assert registry_words(body, ["hunter2!"]) == "no *** here"
    for odd in (b"", b"<html>", b"[]", b'{"errors":7}', b'{"errors":[7]}', b'{"errors":[{"message":7}]}', b"[" * 99999):
        assert registry_words(odd) == ""
