"""Logins that lie on the machine, used against a registry: who is sent what, and what happens when it is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from imagestore.keyring import KeyringConfig
from imagestore.model import AccessDenied, Credentials, ImageError
from tests.fakes.imagestore import Bench
from tests.fakes.registry import FakeRegistry, Reply, Tokens, build_image

SECRET = "hunter2!"
UNAUTHORIZED = Reply(401, {}, b'{"details":"incorrect username or password"}')


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as fake:
        yield fake


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    opened = Bench(
        tmp_path,
        keyring=KeyringConfig((tmp_path / "auth.json",)),
        registries_conf=tmp_path / "registries.conf",
    )
    yield opened
    opened.close()


def log_in(bench: Bench, users: Mapping[str, str]) -> None:
    """As `podman login` does: a user for each host, all with the same password."""
    entries = {host: {"auth": base64.b64encode(f"{user}:{SECRET}".encode()).decode()} for host, user in users.items()}
    (bench.directory / "auth.json").write_text(json.dumps({"auths": entries}))


def authorized(registry: FakeRegistry) -> set[str]:
    return {seen.authorization for seen in registry.seen if seen.authorization}


def test_a_login_of_this_machine(bench: Bench, registry: FakeRegistry) -> None:
    reference = registry.add("team/app", "1", build_image())
    registry.basic = ("anna", SECRET)
    with pytest.raises(AccessDenied):
        bench.pull(reference)
    log_in(bench, {registry.name: "anna"})
    assert bench.pull(reference).repo_tags == (reference,)


def test_the_callers_own_login_is_the_only_one(bench: Bench, registry: FakeRegistry) -> None:
    reference = registry.add("team/app", "1", build_image())
    registry.basic = ("anna", SECRET)
    log_in(bench, {registry.name: "anna"})
    with pytest.raises(AccessDenied):
        bench.pull(reference, Credentials("eve", "guess"))
    assert len(authorized(registry)) == 1


def test_a_stale_login_does_not_close_what_is_public(bench: Bench, registry: FakeRegistry) -> None:
    """The token server refuses the login, and gives anybody a token."""
    reference = registry.add("team/app", "1", build_image())
    registry.tokens = Tokens()
    log_in(bench, {registry.name: "former"})
    refused = registry.rule("GET", "^/token", UNAUTHORIZED, times=1)
    bench.pull(reference)
    assert refused.hits == 1
    asked = [seen.authorization for seen in registry.seen if seen.path == "/token"]
    assert len(asked) == 2 and asked[0].startswith("Basic ") and asked[1] == ""


def test_a_stale_login_for_what_is_private_is_told(bench: Bench, registry: FakeRegistry) -> None:
    reference = registry.add("team/app", "1", build_image())
    registry.tokens = Tokens()
    log_in(bench, {registry.name: "former"})
    registry.rule("GET", "^/token", UNAUTHORIZED)
    with pytest.raises(AccessDenied, match="token server") as error:
        bench.pull(reference)
    assert SECRET not in str(error.value)


def test_s27_a_mirror_gets_its_own_login_and_no_other(bench: Bench, registry: FakeRegistry) -> None:
    image = build_image()
    with FakeRegistry() as mirror:
        mirror.add("cache/team/app", "1", image)
        reference = registry.add("team/app", "1", image)
        log_in(bench, {registry.name: "anna", mirror.name: "robot"})
        mirror.basic, registry.basic = ("robot", SECRET), ("anna", SECRET)
        (bench.directory / "registries.conf").write_text(
            f'[[registry]]\nlocation = "{registry.name}"\n[[registry.mirror]]\nlocation = "{mirror.name}/cache"\n'
        )
        bench.pull(reference)
        assert {base64.b64decode(text[6:]).decode() for text in authorized(mirror)} == {f"robot:{SECRET}"}
        assert not authorized(registry)
        mirror.basic = ("somebody", "else")
        bench.store.remove(reference)
        bench.store.collect()
        bench.pull(reference)
        assert {base64.b64decode(text[6:]).decode() for text in authorized(registry)} == {f"anna:{SECRET}"}
        assert f"anna:{SECRET}" not in {base64.b64decode(text[6:]).decode() for text in authorized(mirror)}


def test_a_project_before_the_name_is_in_the_scope(bench: Bench, registry: FakeRegistry) -> None:
    """A proxy cache of Harbor's kind: hosts.toml names /v2/proxy, and its tokens are for proxy/team/app."""
    image = build_image()
    registry.blobs.update(image.blobs)
    registry.put("proxy/team/app", "1", image.manifest, image.media_type)
    registry.tokens = Tokens()
    bench.hosts_toml("far.example", f'server = "{registry.url}/v2/proxy"\noverride_path = true\n')
    bench.pull("far.example/team/app:1")
    token = next(seen for seen in registry.seen if seen.path == "/token")
    assert "scope=repository%3Aproxy%2Fteam%2Fapp%3Apull" in token.query


def test_blocked_whatever_hosts_toml_says(bench: Bench, registry: FakeRegistry) -> None:
    reference = registry.add("team/app", "1", build_image())
    bench.hosts_toml(registry.name, f'server = "{registry.url}"\n')
    (bench.directory / "registries.conf").write_text(f'[[registry]]\nlocation = "{registry.name}"\nblocked = true\n')
    with pytest.raises(AccessDenied, match="blocked"):
        bench.pull(reference)
    assert not registry.seen


def test_short_names_from_pull_to_removal(bench: Bench, registry: FakeRegistry) -> None:
    (bench.directory / "registries.conf").write_text(
        f'unqualified-search-registries = ["{registry.name}/none", "{registry.name}/team"]\n'
        f'[aliases]\n"nick" = "{registry.name}/team/app"\n'
    )
    reference = registry.add("team/app", "1", build_image())
    image = bench.pull("app:1")
    assert image.repo_tags == (reference,)
    assert bench.pull("nick:1").id == image.id
    for name in ("app:1", "nick:1", reference):
        found = bench.store.get(name)
        assert found is not None and found.id == image.id
    bench.store.remove("nick:1")
    assert bench.store.get(reference) is None


def test_a_file_that_cannot_be_read_stops_pulls_and_nothing_else(bench: Bench, registry: FakeRegistry) -> None:
    reference = registry.add("team/app", "1", build_image())
    image = bench.pull(reference)
    (bench.directory / "registries.conf").write_text("= broken")
    with pytest.raises(ImageError, match=r"registries\.conf: not valid TOML"):
        bench.pull(reference)
    found = bench.store.get(reference)
    assert found is not None and found.id == image.id
