"""References, digests and ids: what the ecosystem accepts, what it refuses, and that nothing else gets through."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagestore.model import ReferenceInvalid
from imagestore.reference import id_prefix, is_digest, is_loopback, parse, split_port

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("team/app", "docker.io/team/app:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/library/busybox", "docker.io/library/busybox:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/x:1", "localhost:5000/x:1"),
        ("registry.example/a/b/c:v1", "registry.example/a/b/c:v1"),
        ("Registry.Example/a", "Registry.Example/a:latest"),
        ("HOST/a", "HOST/a:latest"),
        ("127.0.0.1:5000/x", "127.0.0.1:5000/x:latest"),
        ("[::1]:5000/x", "[::1]:5000/x:latest"),
        ("[2001:db8::1]/x", "[2001:db8::1]/x:latest"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        (f"registry.example:443/x:tag@{DIGEST}", f"registry.example:443/x@{DIGEST}"),
        ("a__b/c.d/e--f", "docker.io/a__b/c.d/e--f:latest"),
        ("x:" + "T" * 128, "docker.io/library/x:" + "T" * 128),
        ("sha256:abc", "docker.io/library/sha256:abc"),
        ("host.x:5000", "docker.io/library/host.x:5000"),
    ],
)
def test_normalised(text: str, meaning: str) -> None:
    assert str(parse(text)) == meaning
    assert parse(meaning) == parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "@",
        "/",
        "a/",
        "/a",
        "a//b",
        "a:",
        "a@",
        "a:b:c",
        "x:" + "T" * 129,
        "Busybox",
        "a/B",
        "a b",
        "a\n",
        "\na",
        "a\0",
        "a:1\n",
        f"a@{DIGEST}\n",
        f"a@{DIGEST}0",
        "a@sha256:abc",
        "a@md5:" + "a" * 32,
        f"a@{DIGEST.upper()}",
        "a@sha256:../../etc/passwd",
        "../a",
        "a/../b",
        "a/./b",
        ".a",
        "a.",
        "a-",
        "-a",
        "a..b",
        "a___b",
        "a_-b",
        "a@b@c",
        "host:0/x",
        "host:65536/x",
        "host:99999999/x",
        "ho_st.x:1/a",
        "-h.x/a",
        "h-.x/a",
        "h..x/a",
        "[::1/x",
        "[::g]/x",
        "user@host/x",
        "user:pw@host.x/y",
        "http://host/x",
        "a" * 300,
        "x/" * 600 + "y",
        "a" * 64,
        "ａ",
        "a:１",
        "hоst.x/y",
        "a?b",
        "a#b",
        "a%2e",
        "host.x:1:2/y",
        "registry.example/",
    ],
)
def test_s43_refused(text: str) -> None:
    with pytest.raises(ReferenceInvalid):
        parse(text)


def test_message_names_the_part() -> None:
    with pytest.raises(ReferenceInvalid, match="must be lower case"):
        parse("registry.example/App")
    with pytest.raises(ReferenceInvalid, match="the tag"):
        parse("app:spa ce")
    with pytest.raises(ReferenceInvalid, match="the digest"):
        parse("app@sha256:beef")
    with pytest.raises(ReferenceInvalid, match="image id, not a name"):
        parse("f" * 64)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256:",
        DIGEST.upper(),
        DIGEST[:-1],
        DIGEST + "a",
        DIGEST + "\n",
        "\n" + DIGEST,
        " " + DIGEST,
        "sha256:" + "g" * 64,
        "md5:" + "a" * 64,
        "sha512:" + "a" * 128,
        "sha256:" + "١" * 64,
        "sha256:../" + "a" * 61,
        DIGEST[:-1] + "\0",
        "sha256:" + "A" * 64,
    ],
)
def test_s43_digests(text: str) -> None:
    assert not is_digest(text)
    assert is_digest(DIGEST)


def test_ids() -> None:
    assert id_prefix("abc") == id_prefix("sha256:abc") == "abc"
    assert id_prefix(DIGEST) == "a" * 64
    for text in ("", "ab", "sha256:", "ABC", "xyz", "a" * 65, "abc\n", "sha256:sha256:abc", "../abc"):
        assert id_prefix(text) is None


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.255.0.9", True),
        ("[::1]", True),
        ("localhost.example", False),
        ("127.0.0.1.example", False),
        ("127.0.0.256", False),
        ("127.1", False),
        ("10.0.0.1", False),
        ("[::2]", False),
        ("LOCALHOST", False),
        ("my-localhost", False),
        ("0.0.0.0", False),
    ],
)
def test_s28_loopback_is_a_matter_of_spelling(host: str, here: bool) -> None:
    assert is_loopback(host) is here


def test_ports() -> None:
    assert split_port("a.b:80") == ("a.b", 80)
    assert split_port("[::1]") == ("[::1]", None)


@given(st.text(max_size=80))
def test_any_text_parses_to_a_fixed_point_or_is_refused(text: str) -> None:
    try:
        reference = parse(text)
    except ReferenceInvalid:
        return
    assert parse(str(reference)) == reference
    for part in (reference.domain, reference.path, reference.tag, reference.digest):
        assert part.isascii() and not re.search(r"[\s\0]", part) and ".." not in part
    assert not reference.path.startswith("/") and reference.target


_component = st.from_regex(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)?", fullmatch=True).filter(lambda text: len(text) < 30)
_host = st.from_regex(r"[a-z0-9]+\.[a-z]{2,3}(:[1-9][0-9]{0,3})?", fullmatch=True).filter(lambda text: len(text) < 60)


@given(
    _host,
    st.lists(_component, min_size=1, max_size=4),
    st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True),
)
def test_what_the_grammar_makes_is_accepted(host: str, path: list[str], tag: str) -> None:
    if not tag.isascii() or not host.isascii() or not all(part.isascii() for part in path):
        return
    reference = parse(f"{host}/{'/'.join(path)}:{tag}")
    assert (reference.domain, reference.path, reference.tag) == (host, "/".join(path), tag)
