"""A registry that lies, stalls, leaks and breaks off: one clear sentence, nothing left, the same call works later."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from imagestore.model import (
    AccessDenied,
    ContentInvalid,
    Credentials,
    ImageError,
    ImageNotFound,
    RegistryUnavailable,
)
from tests.costs import soon
from tests.fakes.imagestore import Bench, run
from tests.fakes.proxy import ConnectProxy
from tests.fakes.registry import (
    OCI_INDEX,
    OCI_MANIFEST,
    Action,
    Cut,
    Endless,
    FakeRegistry,
    Hang,
    NoRange,
    Reply,
    Spoil,
    Stall,
    Tokens,
    WrongRange,
    as_json,
    build_image,
    build_index,
    make_tls,
    sha256,
)

BIG = os.urandom(3 << 20)
ANNA = Credentials("anna", "pa55word-of-anna")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that only a test knows must not be asked for at the machine's proxy."""
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        yield made


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def fails(
    bench: Bench, reference: str, kind: type[ImageError], says: str, credentials: Credentials | None = None
) -> str:
    """The pull fails so, in one sentence, and leaves no record, no stray file and no thread."""
    with soon(), pytest.raises(kind, match=says) as raised:
        bench.pull(reference, credentials)
    assert type(raised.value) in (ImageNotFound, AccessDenied, RegistryUnavailable, ContentInvalid, ImageError)
    text = str(raised.value)
    assert text.startswith(f"pull {reference}: ") and "\n" not in text and len(text) < 1500
    assert "pa55word" not in text and "SECRET" not in text
    assert list(bench.store.list()) == [] and bench.strays() == set()
    return text


def heals(bench: Bench, registry: FakeRegistry, reference: str, credentials: Credentials | None = None) -> None:
    registry.heal()
    assert bench.pull(reference, credentials).repo_tags == (reference,)
    assert bench.ingests() == set()


# ------------------------------------------------------------------------------------- answers that are no image


@pytest.mark.parametrize(
    ("path", "action", "kind", "says"),
    [
        ("/manifests/", Reply(404), ImageNotFound, r"answered 404 for manifest 1"),
        ("/manifests/", Reply(403), AccessDenied, r"answered 403 for manifest 1.*do not allow"),
        ("/manifests/", Reply(401), AccessDenied, r"answered 401 for manifest 1.*log in"),
        ("/manifests/", Reply(500), RegistryUnavailable, r"answered 500 for manifest 1"),
        ("/manifests/", Reply(503, {"Retry-After": "0"}), RegistryUnavailable, r"answered 503"),
        ("/manifests/", Reply(429, {"Retry-After": "0"}), RegistryUnavailable, r"answered 429"),
        ("/manifests/", Reply(429, {"Retry-After": "7200"}), RegistryUnavailable, r"come back in 7200 s"),
        (
            "/manifests/",
            Reply(429, {"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}),
            RegistryUnavailable,
            r"come back",
        ),
        ("/manifests/", Reply(418), ContentInvalid, r"answered 418"),
        ("/manifests/", Hang(), RegistryUnavailable, r"no answer in time|no whole answer"),
        ("/manifests/", Cut(20), RegistryUnavailable, r"connection ended"),
        ("/manifests/", Stall(20), RegistryUnavailable, r"no answer in time|no whole answer"),
        ("/manifests/", Stall(20, drip=1), RegistryUnavailable, r"no whole answer"),
        ("/manifests/", Spoil(), ContentInvalid, r"the content is sha256:"),
        ("/manifests/", Reply(200, {}, b"<html>hello</html>"), ContentInvalid, r"not valid JSON"),
        ("/manifests/", Reply(200, {}, b""), ContentInvalid, r"not valid JSON"),
        ("/blobs/", Reply(404), ImageNotFound, r"answered 404 for blob sha256:"),
        ("/blobs/", Reply(403), AccessDenied, r"answered 403 for blob"),
        ("/blobs/", Reply(500), RegistryUnavailable, r"answered 500 for blob"),
        ("/blobs/", Reply(204), ContentInvalid, r"answered 204"),
        ("/blobs/", Hang(), RegistryUnavailable, r"no answer in time"),
        ("/blobs/", Cut(10), RegistryUnavailable, r"connection ended"),
        ("/blobs/", Stall(10), RegistryUnavailable, r"no answer in time"),
        ("/blobs/", Stall(10, drip=1), RegistryUnavailable, r"stalled, "),
        ("/blobs/", Spoil(), ContentInvalid, r"wrong content"),
        ("/blobs/", Reply(200, {}, b""), RegistryUnavailable, r"ended after 0 of"),
        ("/blobs/", Reply(200, {"Content-Encoding": "gzip"}, b"x"), ContentInvalid, r"content encoding"),
    ],
)
def test_o48_bad_answers(
    bench: Bench, registry: FakeRegistry, path: str, action: Action, kind: type[ImageError], says: str
) -> None:
    reference = registry.add("app", "1", build_image([{"a": os.urandom(60_000)}]))
    registry.rule("GET", path, action)
    fails(bench, reference, kind, says)
    heals(bench, registry, reference)


def test_a_registry_that_is_not_there(bench: Bench) -> None:
    with FakeRegistry() as gone:
        reference = gone.add("app", "1", build_image())
    fails(bench, reference, RegistryUnavailable, "connect: ECONNREFUSED connection refused")


def test_a_host_that_does_not_resolve(bench: Bench) -> None:
    fails(bench, "no-such-host.invalid/app:1", RegistryUnavailable, "the host name does not resolve")


def test_registry_words_are_quoted(bench: Bench, registry: FakeRegistry) -> None:
    text = fails(bench, f"{registry.name}/app:1", ImageNotFound, "manifest unknown")
    assert text == f"pull {registry.name}/app:1: {registry.url} answered 404 for manifest 1 (manifest unknown)"


def test_o48_short_trouble_is_survived(bench: Bench, registry: FakeRegistry) -> None:
    reference = registry.add("app", "1", build_image([{"a": BIG}]))
    registry.rule("GET", "/manifests/", Reply(503), times=1)
    registry.rule("GET", "/manifests/", Reply(429, {"Retry-After": "0"}), times=1)
    registry.rule("GET", "/blobs/", Cut(1 << 20), times=2)
    assert bench.pull(reference).repo_tags == (reference,)
    assert any("Range" in seen.headers for seen in registry.seen)


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_o48_a_registry_that_says_when_is_waited_for(bench: Bench, registry: FakeRegistry, kind: str) -> None:
    """And not with the backoff of our own, which would come back at once."""
    reference = registry.add("app", "1", build_image())
    at = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=2)  # a date has whole seconds
    said = "1" if kind == "seconds" else format_datetime(at, usegmt=True)
    registry.rule("GET", "/manifests/", Reply(429, {"Retry-After": said}), times=1)
    bench.close()
    bench.config = replace(bench.config, retry_after_limit_s=30.0)
    bench.open()
    began = time.monotonic()
    bench.pull(reference)
    assert time.monotonic() - began >= 0.9
    assert kind == "seconds" or datetime.now(UTC) >= at
    assert registry.count("GET", "/manifests/") == 2


def test_o48_head_that_is_never_answered(bench: Bench, registry: FakeRegistry) -> None:
    reference = registry.add("app", "1", build_image())
    image = bench.pull(reference)
    registry.rule("HEAD", "/manifests/", Hang())
    with pytest.raises(RegistryUnavailable, match="no answer in time|no whole answer"):
        bench.pull(reference)
    assert bench.store.get(reference) == image
    registry.heal()
    assert bench.pull(reference) == image


def test_registry_without_head(bench: Bench, registry: FakeRegistry) -> None:
    reference = registry.add("app", "1", build_image())
    image = bench.pull(reference)
    registry.rule("HEAD", "/manifests/", Reply(405))
    assert bench.pull(reference) == image
    registry.heal()
    registry.digest_header = False
    assert bench.pull(reference) == image


# -------------------------------------------------------------------------------------------------- S25, S35, S43, S45


def test_s25_document_that_is_both(bench: Bench, registry: FakeRegistry) -> None:
    image = build_image(edit_manifest=lambda doc: doc.update(manifests=[]))
    registry.add("app", "1", image)
    fails(bench, f"{registry.name}/app:1", ContentInvalid, "both an index and a manifest")


@pytest.mark.parametrize(("own", "announced"), [(OCI_MANIFEST, OCI_INDEX), (OCI_INDEX, OCI_MANIFEST)])
def test_s25_content_type_disagrees(bench: Bench, registry: FakeRegistry, own: str, announced: str) -> None:
    image = build_image()
    registry.blobs.update(image.blobs)
    data = image.manifest if own == OCI_MANIFEST else build_index([image])
    reference = registry.put("app", "1", data, announced)
    fails(bench, reference, ContentInvalid, "media types contradict one another")


def test_s25_index_entry_disagrees(bench: Bench, registry: FakeRegistry) -> None:
    image = build_image()
    registry.add("app", "inner", image)
    entry = {**image.descriptor(), "mediaType": OCI_INDEX}
    index = as_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]})
    fails(bench, registry.put("app", "1", index, OCI_INDEX), ContentInvalid, "contradict")


def test_index_chooses_our_platform_and_keeps_the_index(bench: Bench, registry: FakeRegistry) -> None:
    ours, theirs = build_image([{"a": b"1"}]), build_image([{"b": b"2"}], architecture="arm64")
    registry.add("app", "x", theirs)
    registry.add("app", "y", ours)
    index = build_index([theirs, ours])
    reference = registry.put("app", "1", index, OCI_INDEX)
    image = bench.pull(reference)
    assert image.manifest_digest == ours.digest
    assert image.repo_digests == (f"{registry.name}/app@{sha256(index)}",)
    by_digest = bench.pull(f"{registry.name}/app@{sha256(index)}")
    assert by_digest.id == image.id
    assert bench.store.get(f"{registry.name}/app@{ours.digest}") is not None
    assert sha256(index) in bench.blobs() and theirs.digest not in bench.blobs()


def test_s35_index_chain(bench: Bench, registry: FakeRegistry) -> None:
    image = build_image()
    registry.add("app", "inner", image)
    entry: dict[str, Any] = image.descriptor()
    for _ in range(100):
        index = as_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]})
        reference = registry.put("app", "1", index, OCI_INDEX)
        entry = {"mediaType": OCI_INDEX, "digest": sha256(index), "size": len(index)}
    fails(bench, reference, ContentInvalid, "indexes within indexes, deeper than 4")
    assert len(registry.seen) <= 6


def test_s35_wide_index_asks_for_nothing(bench: Bench, registry: FakeRegistry) -> None:
    entry = {"mediaType": OCI_INDEX, "digest": "sha256:" + "a" * 64, "size": 10}
    index = as_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry] * 10_000})
    fails(bench, registry.put("app", "1", index, OCI_INDEX), ContentInvalid, "10000 entries, the limit is")
    assert len(registry.seen) == 1


def test_s35_shared_fan_out_follows_one_path(bench: Bench, registry: FakeRegistry) -> None:
    image = build_image()
    registry.add("app", "inner", image)
    inner = build_index([image])
    registry.put("app", "mid", inner, OCI_INDEX)
    entry = {"mediaType": OCI_INDEX, "digest": sha256(inner), "size": len(inner)}
    index = as_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry] * 2000})
    reference = registry.put("app", "1", index, OCI_INDEX)
    assert bench.pull(reference).manifest_digest == image.digest
    assert registry.count("GET", "/manifests/") == 3


@pytest.mark.parametrize("bad", ["sha256:../../x", "sha256:abc", "SHA256:" + "a" * 64, "md5:" + "a" * 32])
def test_s43_digest_header(bench: Bench, registry: FakeRegistry, bad: str) -> None:
    image = build_image()
    reference = registry.add("app", "1", image)
    headers = {"Docker-Content-Digest": bad, "Content-Type": image.media_type}
    registry.rule("GET", "/manifests/", Reply(200, headers, image.manifest))
    fails(bench, reference, ContentInvalid, "Docker-Content-Digest")
    heals(bench, registry, reference)


def test_s43_wrong_manifest_for_a_digest(bench: Bench, registry: FakeRegistry) -> None:
    image, other = build_image(), build_image([{"evil": b"1"}])
    registry.add("app", "1", image)
    registry.manifests[("app", image.digest)] = (other.manifest, other.media_type)
    registry.digest_header = False
    fails(bench, f"{registry.name}/app@{image.digest}", ContentInvalid, f"announced was {image.digest}")


@pytest.mark.parametrize("where", ["config", "layer"])
def test_s43_digests_in_a_manifest_reach_no_url(bench: Bench, registry: FakeRegistry, where: str) -> None:
    def edit(doc: dict[str, Any]) -> None:
        (doc["config"] if where == "config" else doc["layers"][0])["digest"] = "sha256:../../../etc/passwd"

    fails(bench, registry.add("app", "1", build_image(edit_manifest=edit)), ContentInvalid, "is not sha256:")
    assert len(registry.seen) == 1


def test_s45_diff_id_of_another_layer(bench: Bench, registry: FakeRegistry) -> None:
    def edit(doc: dict[str, Any]) -> None:
        doc["rootfs"]["diff_ids"][0] = "sha256:" + "d" * 64

    reference = registry.add("app", "1", build_image(edit_config=edit))
    fails(bench, reference, ContentInvalid, r"unpack layer sha256:.*diff id is")


def test_s45_wrong_config_for_the_machine(bench: Bench, registry: FakeRegistry) -> None:
    reference = registry.add("app", "1", build_image(architecture="arm64"))
    fails(bench, reference, ImageNotFound, "the image is for linux/arm64, wanted is one for linux/amd64")
    assert bench.unpacker.calls == []  # the config told; its layers may have been asked for, but that is all


def test_s49_two_manifests_with_one_config(bench: Bench, registry: FakeRegistry) -> None:
    """The same diff ids, compressed differently: each name's own blobs are there, whole."""
    files = [{"a": b"1" * 5000}, {"b": b"2" * 5000}]
    packed, plain = build_image(files, compression="gzip"), build_image(files, compression="")
    assert packed.config_digest == plain.config_digest and packed.digest != plain.digest
    first, second = registry.add("app", "gz", packed), registry.add("app", "tar", plain)
    one = bench.pull(first)
    assert {layer.blob.digest for layer in one.layers} == set(packed.layer_digests)
    assert not set(plain.layer_digests) & bench.blobs()
    two = bench.pull(second)
    assert two.id == one.id and set(two.repo_tags) == {first, second}
    bench.store.collect()
    assert bench.blobs() >= {*packed.layer_digests, *plain.layer_digests, packed.digest, plain.digest}


# ----------------------------------------------------------------------------------------------------------------- S31


@pytest.mark.parametrize(
    ("path", "setup", "says"),
    [
        ("/manifests/", "", "more than 4194304 bytes"),
        ("/token", "tokens", "more than 1048576 bytes"),
    ],
)
def test_s31_endless_answers(bench: Bench, registry: FakeRegistry, path: str, setup: str, says: str) -> None:
    reference = registry.add("app", "1", build_image())
    if setup == "tokens":
        registry.tokens = Tokens()
    registry.rule("", path, Endless(body=b"[" * 65536))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fails(bench, reference, ContentInvalid, says)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    heals(bench, registry, reference)


@pytest.mark.parametrize("status", [404, 500, 401])
def test_s31_endless_error_body(bench: Bench, registry: FakeRegistry, status: int) -> None:
    reference = registry.add("app", "1", build_image())
    registry.rule("GET", "/manifests/", Endless(status=status, content_type="application/json"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fails(bench, reference, ImageError, f"answered {status}")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_s31_endless_blob(bench: Bench, registry: FakeRegistry) -> None:
    reference = registry.add("app", "1", build_image())
    registry.rule("GET", "/blobs/", Endless())
    fails(bench, reference, ContentInvalid, "more than the announced")
    assert bench.ingests() == set()
    heals(bench, registry, reference)


def test_s31_config_that_announces_too_much(bench: Bench, registry: FakeRegistry) -> None:
    def edit(doc: dict[str, Any]) -> None:
        doc["config"]["size"] = 5 << 20

    reference = registry.add("app", "1", build_image(edit_manifest=edit))
    fails(bench, reference, ContentInvalid, "the limit is 4194304")


def test_s31_huge_headers(bench: Bench, registry: FakeRegistry) -> None:
    reference = registry.add("app", "1", build_image())
    registry.rule("GET", "/manifests/", Reply(200, {"X-Long": "a" * 100_000}))
    fails(bench, reference, ContentInvalid, "not proper HTTP")
    heals(bench, registry, reference)


# ------------------------------------------------------------------------------------------ S26 - S30: where secrets go


def secrets_in(registry: FakeRegistry) -> list[str]:
    return [
        f"{seen.method} {seen.path}"
        for seen in registry.seen
        if seen.authorization or "Cookie" in seen.headers or "X-Mirror-Key" in seen.headers
    ]


def test_s26_urls_of_a_layer_are_never_asked(bench: Bench, registry: FakeRegistry) -> None:
    with FakeRegistry() as evil:
        evil.tokens = Tokens()

        def edit(doc: dict[str, Any]) -> None:
            doc["layers"][0]["urls"] = [f"{evil.url}/layer"]

        registry.basic = ("anna", "pa55word-of-anna")
        reference = registry.add("app", "1", build_image(edit_manifest=edit))
        assert bench.pull(reference, ANNA).repo_tags
        assert evil.seen == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("way", ["other port", "other spelling", "host with dot"])
def test_s27_redirected_blob_gets_no_secret(bench: Bench, registry: FakeRegistry, status: int, way: str) -> None:
    """Blobs live elsewhere (a signed URL); the way there and back carries no Authorization."""
    image = build_image()
    registry.basic = ("anna", "pa55word-of-anna")
    reference = registry.add("app", "1", image)
    bench.hosts_toml(registry.name, f'server = "{registry.url}"\n[header]\nX-Mirror-Key = "k"')
    with FakeRegistry() as storage:
        storage.blobs.update(image.blobs)
        target = {
            "other port": storage.url,
            "other spelling": f"http://LOCALHOST:{storage.port}",
            "host with dot": f"http://localhost.:{storage.port}",
        }[way]
        headers = {"Location": f"{target}/signed/blobs/{image.layer_digests[0]}?sig=SECRET", "Set-Cookie": "id=1"}
        registry.rule("GET", f"/blobs/{image.layer_digests[0]}", Reply(status, headers))
        if way == "other port":
            assert bench.pull(reference, ANNA).repo_tags == (reference,)
            assert storage.count("GET", "/signed/") == 1
        else:
            try:  # whether such a name resolves is the machine's business
                bench.pull(reference, ANNA)
            except RegistryUnavailable as error:
                assert "SECRET" not in str(error)
        assert secrets_in(storage) == []
        assert not any("Cookie" in seen.headers for seen in registry.seen)


def test_s27_redirect_back_home_stays_without_secret(bench: Bench, registry: FakeRegistry) -> None:
    image = build_image()
    registry.basic = ("anna", "pa55word-of-anna")
    reference = registry.add("app", "1", image)
    with FakeRegistry() as other:
        back = f"{registry.url}/v2/app/blobs/{image.config_digest}?back"
        other.rule("GET", "", Reply(307, {"Location": back}))
        registry.rule("GET", f"/blobs/{image.config_digest}", Reply(307, {"Location": other.url}), times=1)
        fails(bench, reference, AccessDenied, "answered 401", ANNA)
        assert [seen.authorization for seen in registry.seen if seen.query == "back"] == [""]
        assert secrets_in(other) == []


def test_s27_challenge_of_a_redirect_target_is_not_answered(bench: Bench, registry: FakeRegistry) -> None:
    image = build_image()
    registry.basic = ("anna", "pa55word-of-anna")
    reference = registry.add("app", "1", image)
    with FakeRegistry() as evil:
        evil.blobs.update(image.blobs)
        for evil.basic, evil.tokens in ((("x", "y"), None), (None, Tokens())):
            location = f"{evil.url}/blobs/{image.layer_digests[0]}"
            registry.rule("GET", f"/blobs/{image.layer_digests[0]}", Reply(307, {"Location": location}))
            fails(bench, reference, AccessDenied, "answered 401", ANNA)
            assert secrets_in(evil) == [] and evil.count("GET", "/token") == 0


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("", "without a proper location"),
        ("ftp://evil/x", "without a proper location"),
        ("file:///etc/passwd", "without a proper location"),
        ("http://[::1", "without a proper location"),
        ("http://evil:99999999/", "without a proper location"),
        ("http://user:SECRET@evil/x?sig=SECRET", "user and password"),
    ],
)
def test_s30_bad_redirects(bench: Bench, registry: FakeRegistry, location: str, says: str) -> None:
    reference = registry.add("app", "1", build_image())
    registry.rule("GET", "/blobs/", Reply(307, {"Location": location}))
    fails(bench, reference, ContentInvalid, says)
    heals(bench, registry, reference)


def test_redirect_loop(bench: Bench, registry: FakeRegistry) -> None:
    image = build_image()
    reference = registry.add("app", "1", image)
    registry.rule("GET", f"/blobs/({image.config_digest}|again)", Reply(307, {"Location": "/v2/app/blobs/again"}))
    fails(bench, reference, ContentInvalid, "redirects more than 5 times")
    assert registry.count("GET", "/blobs/again") == 5


def test_s30_failing_signed_url(
    bench: Bench, registry: FakeRegistry, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever fails behind a signed URL: neither error, cause, log nor file holds it."""
    image = build_image()
    reference = registry.add("app", "1", image)
    with FakeRegistry() as storage:
        for action in (Reply(403, {}, b'{"errors":[{"message":"no http://h/?sig=SECRET"}]}'), Cut(3), Hang(), Spoil()):
            storage.heal()
            storage.blobs.update(image.blobs)
            storage.rule("GET", "", action)
            registry.heal()
            location = f"{storage.url}/p4th-SECRET/blobs/{image.layer_digests[0]}?sig=SECRET"
            registry.rule("GET", f"/blobs/{image.layer_digests[0]}", Reply(307, {"Location": location}))
            with pytest.raises(ImageError) as raised:
                bench.pull(reference)
            shown: BaseException | None = raised.value
            while shown is not None:
                assert "SECRET" not in str(shown) + repr(shown) + repr(shown.__context__)
                shown = shown.__cause__
    assert "SECRET" not in caplog.text and "SECRET" not in "".join(capfd.readouterr())
    for path in bench.directory.rglob("*"):
        assert not path.is_file() or b"SECRET" not in path.read_bytes()


def test_s30_registry_that_repeats_the_password(bench: Bench, registry: FakeRegistry) -> None:
    import base64

    reference = registry.add("app", "1", build_image())
    token = base64.b64encode(b"anna:pa55word-of-anna").decode()
    body = as_json({"errors": [{"message": f"anna pa55word-of-anna {token} Basic {token} is wrong"}]})
    registry.rule("GET", "", Reply(401, {"WWW-Authenticate": "Basic realm=x"}, body))
    text = fails(bench, reference, AccessDenied, "is wrong", ANNA)
    assert token not in text
    for path in bench.directory.rglob("*"):
        assert not path.is_file() or b"pa55word" not in path.read_bytes()


def test_s27_mirror_and_registry_keep_their_own(bench: Bench, registry: FakeRegistry) -> None:
    image = build_image()
    reference = registry.add("app", "1", image)
    registry.tokens = Tokens("anna", "pa55word-of-anna", token="token-of-upstream")
    with FakeRegistry() as mirror:
        mirror.tokens = Tokens(token="token-of-mirror")
        mirror.add("app", "1", image)
        layer = image.layer_digests[0]
        mirror.rule("GET", f"/blobs/{layer}", Reply(404))
        bench.hosts_toml(registry.name, f'server = "{registry.url}"\n[host."{mirror.url}".header]\nX-Mirror-Key = "k"')
        assert bench.pull(reference, ANNA).repo_tags == (reference,)
        assert {seen.authorization for seen in mirror.seen} == {"", "Bearer token-of-mirror"}
        assert {seen.authorization.split()[0] for seen in registry.seen if seen.authorization} == {"Basic", "Bearer"}
        assert not any("mirror" in seen.authorization for seen in registry.seen)
        assert not any("X-Mirror-Key" in seen.headers for seen in registry.seen)
        assert all(f"ns={registry.name}" in seen.query for seen in mirror.seen if "/v2/" in seen.path)
        assert {seen.path.rpartition("/")[2] for seen in registry.seen if seen.path != "/token"} == {layer}


def test_s27_password_for_another_server_is_not_used(bench: Bench, registry: FakeRegistry) -> None:
    registry.basic = ("anna", "pa55word-of-anna")
    reference = registry.add("app", "1", build_image())
    elsewhere = Credentials("anna", "pa55word-of-anna", server_address="quay.io")
    fails(bench, reference, AccessDenied, "answered 401", elsewhere)
    assert secrets_in(registry) == []


@pytest.mark.parametrize("credentials", [None, ANNA, Credentials(identity_token="refresh-SECRET")])
def test_bearer_tokens(bench: Bench, registry: FakeRegistry, credentials: Credentials | None) -> None:
    registry.tokens = Tokens(
        username="anna" if credentials is ANNA else "",
        password="pa55word-of-anna" if credentials is ANNA else "",
        refresh_token="refresh-SECRET" if credentials and credentials is not ANNA else "",
    )
    reference = registry.add("team/app", "1", build_image([{"a": b"1"}, {"b": b"2"}]))
    assert bench.pull(reference, credentials).repo_tags == (reference,)
    asked = [seen for seen in registry.seen if seen.path == "/token"]
    assert len(asked) == 1
    assert "repository%3Ateam%2Fapp%3Apull" in asked[0].query + asked[0].body.decode()


def test_bearer_wrong_password(bench: Bench, registry: FakeRegistry) -> None:
    registry.tokens = Tokens("anna", "pa55word-of-anna")
    reference = registry.add("app", "1", build_image())
    wrong = Credentials("anna", "pa55word-wrong")
    fails(bench, reference, AccessDenied, r"token server .* answered 401 for token \(incorrect username", wrong)
    heals(bench, registry, reference, ANNA)


def test_expired_token_is_asked_for_again(bench: Bench, registry: FakeRegistry) -> None:
    image = build_image([{"a": b"1"}, {"b": b"2"}, {"c": b"3"}])
    reference = registry.add("app", "1", image)
    registry.tokens = Tokens(token="first")
    rule = registry.rule("GET", f"/blobs/{image.config_digest}", Hang(), times=1)

    async def scenario() -> None:
        pull = asyncio.create_task(bench.store.pull(reference))
        while not rule.hits:
            await asyncio.sleep(0.01)
        registry.tokens = Tokens(token="second")  # from now on the first is worth nothing
        assert (await pull).repo_tags

    run(scenario())
    assert registry.count("GET", "/token") == 2


def test_token_server_that_breaks(bench: Bench, registry: FakeRegistry) -> None:
    registry.tokens = Tokens()
    reference = registry.add("app", "1", build_image())
    for action, kind in (
        (Reply(500), RegistryUnavailable),
        (Hang(), RegistryUnavailable),
        (Reply(200, {}, b"{}"), AccessDenied),
        (Reply(200, {}, b"junk"), ContentInvalid),
        (Reply(307, {"Location": "http://127.0.0.1:1/"}), ContentInvalid),
    ):
        registry.heal()
        registry.rule("", "/token", action)
        fails(bench, reference, kind, ".")
    heals(bench, registry, reference)


# -------------------------------------------------------------------------------------------------------- S28, S29: TLS


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[tuple[FakeRegistry, Path]]:
    context, certificate = make_tls(tmp_path, "127.0.0.1", "localhost")
    with FakeRegistry(tls=context) as made:
        yield made, certificate


def test_tls_with_a_ca_of_hosts_toml(bench: Bench, secure: tuple[FakeRegistry, Path]) -> None:
    registry, certificate = secure
    reference = registry.add("app", "1", build_image())
    bench.hosts_toml(registry.name, f'server = "{registry.url}"\nca = "{certificate}"')
    registry.basic = ("anna", "pa55word-of-anna")
    assert bench.pull(reference, ANNA).repo_tags == (reference,)


def test_tls_skip_verify_is_for_that_host_alone(
    bench: Bench, secure: tuple[FakeRegistry, Path], tmp_path: Path
) -> None:
    registry, _ = secure
    image = build_image()
    reference = registry.add("app", "1", image)
    bench.hosts_toml(registry.name, f'server = "{registry.url}"\nskip_verify = true')
    (tmp_path / "other").mkdir()
    with FakeRegistry(tls=make_tls(tmp_path / "other", "127.0.0.1")[0]) as other:
        location = f"{other.url}/blobs/{image.config_digest}"
        registry.rule("GET", f"/blobs/{image.config_digest}", Reply(307, {"Location": location}))
        fails(bench, reference, RegistryUnavailable, f"{other.url}: the server's certificate is not trusted")
        assert other.seen == []
    heals(bench, registry, reference)


def test_s28_bad_certificate_gets_no_credentials(bench: Bench, secure: tuple[FakeRegistry, Path]) -> None:
    registry, _ = secure
    reference = registry.add("app", "1", build_image())
    bench.hosts_toml(registry.name, f'server = "{registry.url}"')
    fails(bench, reference, RegistryUnavailable, "certificate is not trusted", ANNA)
    assert registry.seen == []


def test_s28_a_name_that_resolves_to_loopback_is_no_loopback(
    bench: Bench, secure: tuple[FakeRegistry, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS may answer 127.0.0.1 for any name: that makes no plain HTTP and no trust (CVE-2026-92543)."""
    import socket

    registry, _ = secure
    real = socket.getaddrinfo

    def lying(host: Any, *args: Any, **kwargs: Any) -> Any:
        return real("127.0.0.1" if host == "registry.test" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", lying)
    with FakeRegistry() as plain:
        for port, says in ((registry.port, "certificate is not trusted"), (plain.port, "TLS failed")):
            fails(bench, f"registry.test:{port}/app:1", RegistryUnavailable, says, ANNA)
        assert registry.seen == [] and secrets_in(plain) == []


def test_s29_realm_over_plain_http(bench: Bench, secure: tuple[FakeRegistry, Path]) -> None:
    registry, certificate = secure
    reference = registry.add("app", "1", build_image())
    bench.hosts_toml(registry.name, f'server = "{registry.url}"\nca = "{certificate}"')
    with FakeRegistry() as evil:
        registry.tokens = Tokens(realm=f"{evil.url}/token")
        fails(bench, reference, AccessDenied, "plain http, so nothing is sent", ANNA)
        assert evil.seen == []
    assert all(not seen.authorization for seen in registry.seen)


def test_s27_downgrade_to_http_is_refused(bench: Bench, secure: tuple[FakeRegistry, Path]) -> None:
    registry, certificate = secure
    image = build_image()
    reference = registry.add("app", "1", image)
    bench.hosts_toml(registry.name, f'server = "{registry.url}"\nca = "{certificate}"')
    with FakeRegistry() as plain:
        plain.blobs.update(image.blobs)
        registry.rule("GET", "/blobs/", Reply(307, {"Location": f"{plain.url}/blobs/{image.config_digest}"}))
        fails(bench, reference, ContentInvalid, "from https to http", ANNA)
        assert plain.seen == []


def test_http_to_a_tls_registry_says_what_to_do(bench: Bench, secure: tuple[FakeRegistry, Path]) -> None:
    registry, _ = secure
    fails(bench, f"{registry.name}/app:1", ImageError, "connection|https://")


# ------------------------------------------------------------------------------------------------------------- mirrors


def test_mirrors_in_order_with_capabilities(bench: Bench, registry: FakeRegistry) -> None:
    image = build_image()
    reference = registry.add("app", "1", image)
    with FakeRegistry() as first, FakeRegistry() as second:
        second.add("app", "1", image)
        bench.hosts_toml(
            registry.name,
            f"""server = "{registry.url}"
            [host."{first.url}"]
            [host."{second.url}"]
            capabilities = ["pull"]
            """,
        )
        assert bench.pull(reference).repo_tags == (reference,)
        assert first.count("GET", "/manifests/1") == 1 and second.count("GET", "/manifests/1") == 0
        assert registry.count("GET", "/manifests/1") == 1 and registry.count("GET", "/blobs/") == 0
        assert second.count("GET", "/blobs/") == 2


def test_mirror_that_is_down_corrupt_or_slow(bench: Bench, registry: FakeRegistry) -> None:
    image = build_image([{"a": BIG}])
    reference = registry.add("app", "1", image)
    for action in (Spoil(), Reply(500), Cut(1000), Hang(), Reply(401), Endless(), NoRange()):
        with FakeRegistry() as mirror:
            mirror.add("app", "1", image)
            mirror.rule("GET", "/blobs/", action)
            bench.hosts_toml(registry.name, f'server = "{registry.url}"\n[host."{mirror.url}"]')
            assert bench.pull(reference).repo_tags == (reference,), action
        bench.store.remove(reference)
        bench.store.collect()
        assert bench.ingests() == set()


def test_all_hosts_fail_and_each_is_named(bench: Bench, registry: FakeRegistry) -> None:
    with FakeRegistry() as mirror:
        mirror.rule("GET", "", Reply(500))
        bench.hosts_toml(registry.name, f'server = "{registry.url}"\n[host."{mirror.url}"]')
        text = fails(bench, f"{registry.name}/app:1", ImageNotFound, "answered 404")
        assert f"mirror {mirror.url} answered 500" in text


def test_override_path(bench: Bench, registry: FakeRegistry) -> None:
    image = build_image()
    reference = registry.add("app", "1", image)
    bench.hosts_toml(registry.name, f'server = "{registry.url}/proxy/v2"\noverride_path = true')
    assert bench.pull(reference).repo_tags == (reference,)
    assert all(seen.path.startswith("/proxy/v2/app/") for seen in registry.seen)


def test_broken_hosts_toml(bench: Bench, registry: FakeRegistry) -> None:
    reference = registry.add("app", "1", build_image())
    bench.hosts_toml(registry.name, "server = 7")
    fails(bench, reference, ImageError, r"hosts\.toml: server: expected a URL")
    bench.hosts_toml(registry.name, f'server = "https://{registry.name}"\nca = "missing.pem"')
    fails(bench, reference, ImageError, rf"registry https://{registry.name}: certificates: ")
    bench.hosts_toml(registry.name, f'server = "{registry.url}"')
    heals(bench, registry, reference)


# ------------------------------------------------------------------------------------------------------------- proxies


def test_plain_http_through_a_proxy(bench: Bench, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry plays the proxy too: it sees requests for a name that only the proxy could know."""
    registry.add("app", "1", build_image())
    monkeypatch.setenv("HTTP_PROXY", f"http://anna:pa55word@{registry.name}")
    bench.hosts_toml("registry.test", 'server = "http://registry.test"')
    assert bench.pull("registry.test/app:1").repo_tags == ("registry.test/app:1",)
    assert all(seen.headers["Host"] == "registry.test" for seen in registry.seen)
    assert all(seen.headers["Proxy-Authorization"].startswith("Basic ") for seen in registry.seen)
    monkeypatch.setenv("NO_PROXY", "other, .test")
    count = len(registry.seen)
    with pytest.raises(RegistryUnavailable, match="does not resolve"):
        bench.pull("registry.test/app:1")
    assert len(registry.seen) == count


def test_tls_through_a_proxy(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy gets its own login and a name, and nothing else: what is said to the registry goes through in TLS, and
    the certificate is the registry's. A network that NO_PROXY has is not asked for there."""
    bench.close()
    bench.config = replace(bench.config, connect_timeout_s=0.3, retries=0)  # nobody is in those networks
    bench.open()
    context, certificate = make_tls(tmp_path, "registry.test")
    with FakeRegistry(tls=context) as secure, ConnectProxy("127.0.0.1", int(secure.name.rpartition(":")[2])) as proxy:
        secure.basic = ("anna", "pa55word-of-anna")
        secure.add("app", "1", build_image())
        bench.hosts_toml("registry.test", f'server = "https://registry.test"\nca = "{certificate}"')
        monkeypatch.setenv("HTTPS_PROXY", f"http://proxy:0pen@{proxy.address}")
        assert bench.pull("registry.test/app:1", ANNA).repo_tags == ("registry.test/app:1",)
        said = b"".join(proxy.asked)
        assert proxy.asked and all(head.startswith(b"CONNECT registry.test:443 HTTP/1.1") for head in proxy.asked)
        assert said.count(b"Proxy-Authorization: Basic cHJveHk6MHBlbg==") == len(proxy.asked)
        assert b"\r\nAuthorization:" not in said
        assert not any("Proxy-Authorization" in seen.headers for seen in secure.seen)
        count = len(proxy.asked)
        for excluded, name in (("192.0.2.0/24", "192.0.2.7:1"), ("2001:db8::/32", "[2001:db8::7]:1")):
            monkeypatch.setenv("NO_PROXY", excluded)
            with pytest.raises(RegistryUnavailable, match="connect|no answer"):
                bench.pull(f"{name}/app:1")
        assert len(proxy.asked) == count
        monkeypatch.setenv("NO_PROXY", "192.0.3.0/24")
        with pytest.raises(RegistryUnavailable, match="certificate is not trusted"):
            bench.pull("192.0.2.7:1/app:1")
        assert proxy.asked[-1].startswith(b"CONNECT 192.0.2.7:1 ")


def test_a_proxy_that_fails(bench: Bench, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", f"http://anna:pa55word@{registry.name}")
    registry.rule("", "", Reply(407))
    fails(bench, "registry.test/app:1", RegistryUnavailable, f"proxy http://{registry.name}: answered")
    monkeypatch.setenv("http_proxy", f"http://anna:pa55word@{registry.name}")
    bench.hosts_toml("registry.test", 'server = "http://registry.test"\n')
    fails(bench, "registry.test/app:1", RegistryUnavailable, "answered 407 for manifest 1: that is the proxy")
    (bench.hosts / "registry.test/hosts.toml").unlink()
    monkeypatch.setenv("https_proxy", "http://anna:pa55word@127.0.0.1:1")
    fails(bench, "registry.test/app:1", RegistryUnavailable, "proxy http://127.0.0.1:1: connect: ECONNREFUSED")
    monkeypatch.setenv("https_proxy", "socks5://anna:pa55word@127.0.0.1:1")
    fails(bench, "registry.test/app:1", ImageError, "HTTPS_PROXY of the environment is no http://host:port")


# ------------------------------------------------------------------------------------------------------- O49: resuming


@pytest.mark.parametrize("at", [1, 4096, 1 << 20, (3 << 20) - 1, 3 << 20])
@pytest.mark.parametrize("then", [None, NoRange(), WrongRange(), WrongRange(5), Reply(416), Reply(206)])
def test_o49_cut_and_resumed(bench: Bench, registry: FakeRegistry, at: int, then: Action | None) -> None:
    image = build_image([BIG], compression="")
    layer = image.layer_digests[0]
    reference = registry.add("app", "1", image)
    registry.rule("GET", f"/blobs/{layer}", Cut(at), times=1)
    if then is not None:
        registry.rule("GET", f"/blobs/{layer}", then, times=1)
    assert bench.pull(reference).repo_tags == (reference,)
    assert bench.ingests() == set()
    if then is None and 4096 <= at < 3 << 20:
        ranges = [seen.headers.get("Range") for seen in registry.seen if seen.path.endswith(layer)]
        assert ranges[0] is None and ranges[1] is not None and len(ranges) == 2


def test_o49_partial_survives_a_failed_pull_and_a_restart(bench: Bench, registry: FakeRegistry) -> None:
    image = build_image([BIG], compression="")
    layer = image.layer_digests[0]
    reference = registry.add("app", "1", image)
    registry.rule("GET", f"/blobs/{layer}", Cut(2 << 20), times=1)
    registry.rule("GET", f"/blobs/{layer}", Reply(503))
    fails(bench, reference, RegistryUnavailable, "answered 503 for blob")
    assert bench.ingests() == {f".{layer[7:]}.part"}
    bench.close()
    bench.open()
    registry.seen.clear()
    heals(bench, registry, reference)
    (last,) = [seen for seen in registry.seen if seen.path.endswith(layer)]
    assert last.headers["Range"].startswith("bytes=")
    assert int(last.headers["Range"][6:-1]) > 1 << 20


def test_o49_poisoned_partial_is_replaced(bench: Bench, registry: FakeRegistry) -> None:
    image = build_image([BIG], compression="")
    layer = image.layer_digests[0]
    reference = registry.add("app", "1", image)
    (bench.root / "ingest" / f".{layer[7:]}.part").write_bytes(b"poison" * 1000)
    assert bench.pull(reference).repo_tags == (reference,)
    assert bench.ingests() == set()


# ------------------------------------------------------------------------------------------- S41, unpacker and the disk


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"\x1f\x8b" + b"junk" * 20, lambda b: b""])
def test_s41_damaged_stream_holds_no_lock(bench: Bench, registry: FakeRegistry, spoil: Any) -> None:
    good = build_image([{"a": b"1"}, {"b": b"2" * 5000}])
    bad_blob = spoil(good.blobs[good.layer_digests[1]])

    def edit(doc: dict[str, Any]) -> None:
        doc["layers"][1].update(digest=sha256(bad_blob), size=len(bad_blob))

    bad = build_image([{"a": b"1"}, {"b": b"2" * 5000}], edit_manifest=edit)
    registry.blobs[sha256(bad_blob)] = bad_blob
    reference = registry.add("app", "bad", bad)
    fails(bench, reference, ContentInvalid, "unpack layer sha256:")
    with soon():
        assert bench.pull(registry.add("app", "good", good)).repo_tags
    bench.store.collect()
    assert sha256(bad_blob) not in bench.blobs() and bad.digest not in bench.blobs()


def test_unpacker_without_space(bench: Bench, registry: FakeRegistry) -> None:
    import errno

    image = build_image([{"a": b"1"}, {"b": b"2"}])
    reference = registry.add("app", "1", image)
    bench.unpacker.fail[image.diff_ids[0]] = OSError(errno.ENOSPC, "No space left on device")  # type: ignore[attr-defined]
    fails(bench, reference, ImageError, "unpack layer sha256:.*: ENOSPC no space left on device")
    bench.unpacker.fail.clear()  # type: ignore[attr-defined]
    arrived = bench.blobs()
    registry.seen.clear()
    heals(bench, registry, reference)
    asked = {seen.path.rpartition("/")[2] for seen in registry.seen if "/blobs/" in seen.path}
    assert image.layer_digests[0] in arrived and not asked & arrived


# ------------------------------------------------------------------------------------------------------------- cancel


def test_cancelled_pull_leaves_resumable_ingests_only(bench: Bench, registry: FakeRegistry) -> None:
    image = build_image([BIG, os.urandom(1000)], compression="")
    reference = registry.add("app", "1", image)
    rule = registry.rule("GET", f"/blobs/{image.layer_digests[0]}", Stall(2 << 20, drip=5000))

    async def scenario() -> None:
        pull = asyncio.create_task(bench.store.pull(reference))
        while not rule.hits or not bench.ingests():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull

    run(scenario())
    assert list(bench.store.list()) == [] and bench.strays() == set()
    assert bench.ingests() == {f".{image.layer_digests[0][7:]}.part"}
    heals(bench, registry, reference)
