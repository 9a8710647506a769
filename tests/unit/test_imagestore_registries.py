"""containers-registries.conf(5): which hosts a reference leads to, and what a short name means."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagestore.model import AccessDenied, ImageError, ReferenceInvalid
from imagestore.reference import parse
from imagestore.registries_conf import Registries, RegistriesFiles

DIGEST = "sha256:" + "a" * 64


def read(tmp_path: Path, text: str, **drops: str) -> Registries:
    file = tmp_path / "registries.conf"
    file.write_text(text)
    directory = tmp_path / "registries.conf.d"
    directory.mkdir(exist_ok=True)
    for name, content in drops.items():
        (directory / f"{name}.conf").write_text(content)
    return RegistriesFiles(file).now()


def places(registries: Registries, name: str) -> list[str]:
    """Every URL that is asked, "!" before those whose certificate is not verified."""
    hosts = registries.hosts(parse(name))
    assert hosts is not None
    return [f"{'!' if host.skip_verify else ''}{host.base}/{host.path}" for host in hosts]


FULL = """
[[registry]]
prefix = "example.com/foo"
location = "internal.example:5000/bar"

[[registry.mirror]]
location = "mirror.example/cache"

[[registry.mirror]]
location = "digests.example"
pull-from-mirror = "digest-only"

[[registry.mirror]]
location = "tags.example"
pull-from-mirror = "tag-only"
insecure = true

[[registry]]
location = "example.com"

[[registry]]
location = "blocked.example"
blocked = true

[[registry]]
location = "docker.io"
[[registry.mirror]]
location = "hub-mirror.example"

[[registry]]
prefix = "*.wild.example"
blocked = true

[[registry]]
prefix = "good.wild.example"
location = "good.wild.example"

[[registry]]
prefix = "*.moved.example"
location = "new.example"
"""


def test_mirrors_and_locations(tmp_path: Path) -> None:
    registries = read(tmp_path, FULL)
    assert places(registries, "example.com/foo/app:1") == [
        "https://mirror.example/v2/cache/app",
        "!https://tags.example/v2/app",
        "http://tags.example/v2/app",
        "https://internal.example:5000/v2/bar/app",
    ]
    assert places(registries, f"example.com/foo/app@{DIGEST}") == [
        "https://mirror.example/v2/cache/app",
        "https://digests.example/v2/app",
        "https://internal.example:5000/v2/bar/app",
    ]
    assert places(registries, "example.com/food/app") == ["https://example.com/v2/food/app"]
    assert places(registries, "busybox") == [
        "https://hub-mirror.example/v2/library/busybox",
        "https://registry-1.docker.io/v2/library/busybox",
    ]
    assert registries.hosts(parse("unknown.example/app")) is None
    assert registries.hosts(parse("xexample.com/app")) is None


def test_only_the_last_gets_the_callers_credentials(tmp_path: Path) -> None:
    hosts = read(tmp_path, FULL).hosts(parse("example.com/foo/app:1"))
    assert hosts is not None and [host.upstream for host in hosts] == [False, False, False, True]
    assert not any(host.asks_namespace for host in hosts)


def test_blocked_and_wildcards(tmp_path: Path) -> None:
    registries = read(tmp_path, FULL)
    for name in ("blocked.example/a/b", "a.wild.example/x", "a.b.wild.example/x", "a.wild.example:5000/x"):
        with pytest.raises(AccessDenied, match="is blocked by .*registries.conf"):
            registries.hosts(parse(name))
    assert places(registries, "good.wild.example/x") == ["https://good.wild.example/v2/x"]
    assert registries.hosts(parse("wild.example/x")) is None
    assert places(registries, "a.moved.example/x/y") == ["https://new.example/v2/x/y"]


def test_insecure_only_where_said(tmp_path: Path) -> None:
    text = '[[registry]]\nlocation = "{}"\ninsecure = {}\n'
    assert places(read(tmp_path, text.format("r.example", "true")), "r.example/x") == [
        "!https://r.example/v2/x",
        "http://r.example/v2/x",
    ]
    assert places(read(tmp_path, text.format("localhost:5000", "true")), "localhost:5000/x")[0].startswith("http:")
    assert places(read(tmp_path, text.format("r.example", "false")), "r.example/x") == ["https://r.example/v2/x"]


def test_mirror_by_digest_only(tmp_path: Path) -> None:
    text = '[[registry]]\nlocation = "r.example"\nmirror-by-digest-only = true\n'
    text += '[[registry.mirror]]\nlocation = "m.example"'
    registries = read(tmp_path, text)
    assert len(places(registries, "r.example/x:1")) == 1
    assert len(places(registries, f"r.example/x@{DIGEST}")) == 2


def test_short_names(tmp_path: Path) -> None:
    text = 'unqualified-search-registries = ["a.example", "b.example"]\n[aliases]\n"fedora" = "quay.example/fedora"\n'
    registries = read(tmp_path, text)
    assert [str(found) for found in registries.candidates("app:2")] == ["a.example/app:2", "b.example/app:2"]
    assert [str(found) for found in registries.candidates("team/app")] == [
        "a.example/team/app:latest",
        "b.example/team/app:latest",
    ]
    assert [str(found) for found in registries.candidates("fedora:40")] == ["quay.example/fedora:40"]
    assert [str(found) for found in registries.candidates(f"fedora@{DIGEST}")] == [f"quay.example/fedora@{DIGEST}"]
    assert [str(found) for found in registries.candidates("r.example/app")] == ["r.example/app:latest"]
    enforcing = read(tmp_path, f'short-name-mode = "enforcing"\n{text}')
    with pytest.raises(ReferenceInvalid, match="enforcing"):
        enforcing.candidates("app")
    assert len(enforcing.candidates("fedora")) == 1
    assert [str(found) for found in Registries().candidates("app")] == ["docker.io/library/app:latest"]


def test_credential_helpers(tmp_path: Path) -> None:
    assert read(tmp_path, FULL).helpers == ()
    assert read(tmp_path, 'credential-helpers = ["containers-auth.json", "ecr-login"]').helpers == (
        "containers-auth.json",
        "ecr-login",
    )
    assert read(tmp_path, "", drop='credential-helpers = ["x"]').helpers == ("x",)
    with pytest.raises(ImageError, match="credential-helpers: expected a list of names"):
        read(tmp_path, 'credential-helpers = "x"')


def test_drop_ins_win_in_their_order(tmp_path: Path) -> None:
    registries = read(
        tmp_path,
        'unqualified-search-registries = ["a.example"]\n[[registry]]\nlocation = "r.example"\nblocked = true\n'
        '[aliases]\n"x" = "one.example/x"\n"y" = "one.example/y"',
        a='[[registry]]\nlocation = "r.example"\n',
        b='unqualified-search-registries = ["b.example"]\n[aliases]\n"x" = ""\n"y" = "two.example/y"\n',
    )
    assert places(registries, "r.example/app") == ["https://r.example/v2/app"]
    assert [str(found) for found in registries.candidates("x")] == ["b.example/x:latest"]
    assert [str(found) for found in registries.candidates("y")] == ["two.example/y:latest"]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "registries.conf"
    files = RegistriesFiles(file)
    assert files.now() == Registries()
    file.write_text('unqualified-search-registries = ["a.example"]')
    assert files.now().search == ("a.example",)
    file.write_text('unqualified-search-registries = ["bb.example"]')
    assert files.now().search == ("bb.example",)
    file.unlink()
    assert files.now() == Registries()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("= 1", "not valid TOML"),
        ('[registries.search]\nregistries = ["a"]', "version 1"),
        ("[registry]\nlocation = 'a'", "registry: expected tables"),
        ("[[registry]]\nblocked = true", r"registry\[0\].location"),
        ("[[registry]]\nlocation = 7", r"registry\[0\].location"),
        ("[[registry]]\nlocation = 'https://a'", "without https://"),
        ("[[registry]]\nlocation = 'a.example'\nblocked = 'no'", r"registry\[0\].blocked"),
        ("[[registry]]\nlocation = 'a.example'\n[[registry.mirror]]\nlocation = 'u:p@b'", r"mirror\[0\].location"),
        ("[[registry]]\nlocation='a.b'\n[[registry.mirror]]\nlocation='c'\npull-from-mirror='x'", "pull-from-mirror"),
        ("short-name-mode = 'maybe'", "short-name-mode"),
        ("unqualified-search-registries = 'a'", "unqualified-search-registries"),
        ("aliases = 1", "aliases"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ImageError, match=says) as error:
        read(tmp_path, text)
    assert "registries.conf" in str(error.value)
