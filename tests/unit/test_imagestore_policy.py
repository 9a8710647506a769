"""policy.json: what is read, what is refused, which scope decides, which names fit (containers-policy.json(5))."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from imagestore.identity import Identity
from imagestore.model import PolicyInvalid, SignatureRefused
from imagestore.policy import Accept, Pki, Policy, Reject, SigstoreSigned, parse_policy
from imagestore.reference import parse
from imagestore.scopes import Subject, in_file, in_registry, namespaces
from imagestore.verdict import Verdict, judge, needs_signatures

ACCEPT = {"type": "insecureAcceptAnything"}
REJECT = {"type": "reject"}
KEY = {"type": "sigstoreSigned", "keyPath": "/key"}
GPG = {"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/key"}
DATA = base64.b64encode(b"x").decode()
DIGEST = "sha256:" + "ab" * 32
FULCIO = {"caPath": "/ca", "oidcIssuer": "https://i", "subjectEmail": "a@b"}
PKI = {"caRootsPath": "/ca", "subjectEmail": "a@b"}


def policy(document: object) -> Policy:
    return parse_policy(json.dumps(document).encode(), "test.json")


def one(requirement: dict[str, object]) -> object:
    return policy({"default": [requirement]}).default[0]


# ---------------------------------------------------------------------------------------------------------- scopes


def test_scopes_run_from_the_exact_name_to_wildcards() -> None:
    assert in_registry(parse("registry.eu.example.com:5000/a/b:1")).scopes == (
        "registry.eu.example.com:5000/a/b:1",
        "registry.eu.example.com:5000/a/b",
        "registry.eu.example.com:5000/a",
        "registry.eu.example.com:5000",
        "*.eu.example.com",
        "*.example.com",
        "*.com",
    )
    assert namespaces(parse("busybox")) == ("docker.io/library/busybox", "docker.io/library", "docker.io", "*.io")
    assert namespaces(parse("localhost/app")) == ("localhost/app", "localhost")


@pytest.mark.parametrize(
    ("name", "decides"),
    [
        ("a.example.com/ns/app:1", "a.example.com/ns/app:1"),
        ("a.example.com/ns/app:2", "a.example.com/ns/app"),
        (f"a.example.com/ns/app@{DIGEST}", "a.example.com/ns/app"),
        ("a.example.com/ns/apple:1", "a.example.com/ns"),
        ("a.example.com/nsx/app:1", "a.example.com"),
        ("a.example.com:5000/ns/app:1", "*.example.com"),
        ("b.c.example.com/app", "*.c.example.com"),
        ("example.com/app", ""),
        ("a.example.com.evil.org/ns/app:1", ""),
    ],
)
def test_the_narrowest_scope_decides(name: str, decides: str) -> None:
    scopes = (
        "a.example.com/ns/app:1", "a.example.com/ns/app", "a.example.com/ns", "a.example.com", "*.example.com",
        "*.c.example.com", "",
    )  # fmt: skip
    # Which of the lists it is shows in its length.
    found = policy({
        "default": [REJECT],
        "transports": {"docker": {scope: [ACCEPT] * (number + 2) for number, scope in enumerate(scopes)}},
    })  # fmt: skip
    _, requirements = found.requirements(in_registry(parse(name)))
    assert scopes[len(requirements) - 2] == decides


def test_the_default_decides_where_a_transport_says_nothing() -> None:
    found = policy({"default": [REJECT], "transports": {"docker": {"example.com": [ACCEPT]}, "oci": {"": [ACCEPT]}}})
    assert found.requirements(in_registry(parse("example.org/app")))[1] == (Reject(),)
    assert found.requirements(in_file("oci", Path("/srv/a")))[1] == (Accept(),)
    assert found.requirements(in_file("docker-archive", Path("/srv/a.tar")))[1] == (Reject(),)


def test_files_are_known_by_their_path_and_what_is_above(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    subject = in_file("oci", tmp_path / "link")
    assert subject.scopes[:2] == (f"{tmp_path}/real", str(tmp_path))
    assert "/" not in subject.scopes
    assert in_file("docker-archive", tmp_path / "a.tar").scopes == ()


# ------------------------------------------------------------------------------------------------------- refusing


# Each is none to containers/image either (tests/peers).
WRONG: list[tuple[dict[str, object], str]] = [
        ({}, "default: missing"),
        ({"default": []}, "default: an empty list"),
        ({"default": [ACCEPT], "extra": 1}, "unknown key 'extra'"),
        ({"default": [ACCEPT], "transports": {"docker": {"example.com": []}}}, "docker.example.com: an empty list"),
        ({"default": [ACCEPT], "transports": {"oci": {"relative": [ACCEPT]}}}, "absolute path"),
        ({"default": [ACCEPT], "transports": {"oci": {"/a/../b": [ACCEPT]}}}, "shortest form"),
        ({"default": [ACCEPT], "transports": {"docker-archive": {"/a": [ACCEPT]}}}, "no scope"),
        ({"default": [{"type": "trust me"}]}, "no kind of requirement"),
        ({"default": [{**ACCEPT, "x": 1}]}, "unknown key 'x'"),
        ({"default": [{**REJECT, "x": 1}]}, "unknown key 'x'"),
        ({"default": [{**KEY, "x": 1}]}, "unknown key 'x'"),
        ({"default": [{"type": "sigstoreSigned"}]}, "exactly one of keyPath"),
        ({"default": [{**KEY, "keyData": DATA}]}, "exactly one of keyPath"),
        ({"default": [{**KEY, "keyPath": ""}]}, "keyPath: there is nothing in it"),
        ({"default": [{"type": "sigstoreSigned", "keyPaths": []}]}, "keyPaths: there is nothing in it"),
        ({"default": [{"type": "sigstoreSigned", "keyData": "?"}]}, "not base64"),
        ({"default": [{**KEY, "rekorPublicKeyPath": "/r", "rekorPublicKeyData": DATA}]}, "at most one of rekor"),
        ({"default": [{**GPG, "keyType": "PGP"}]}, "no type of key"),
        ({"default": [{"type": "signedBy", "keyType": "GPGKeys"}]}, "exactly one of keyPath, keyPaths and keyData"),
        ({"default": [{**GPG, "keyDatas": [DATA]}]}, "unknown key 'keyDatas'"),
        ({"default": [{**KEY, "signedIdentity": {"type": "matchAny"}}]}, "no kind of signedIdentity"),
        ({"default": [{**KEY, "signedIdentity": {"type": "matchExact", "dockerReference": "a"}}]}, "unknown key"),
        ({"default": [{**KEY, "signedIdentity": {"type": "exactReference", "dockerReference": "a/b"}}]}, "tag or dig"),
        ({"default": [{**KEY, "signedIdentity": {"type": "exactRepository", "dockerRepository": "a/B"}}]}, "no repo"),
        ({"default": [{**KEY, "signedIdentity": {"type": "remapIdentity", "prefix": "busybox"}}]}, "no host"),
        ({"default": [{"type": "sigstoreSigned", "fulcio": FULCIO}]}, "needs one of rekorPublicKeyPath"),
        ({"default": [{"type": "sigstoreSigned", "pki": PKI, "rekorPublicKeyPath": "/r"}]}, "do not go with pki"),
    ]  # fmt: skip


@pytest.mark.parametrize(("document", "said"), WRONG)
def test_what_is_wrong_is_refused_and_named(document: object, said: str) -> None:
    with pytest.raises(PolicyInvalid, match=r"signature policy test\.json") as refused:
        policy(document)
    assert said in str(refused.value)


def test_a_key_twice_is_refused() -> None:
    with pytest.raises(PolicyInvalid, match="duplicate key 'default'"):
        parse_policy(b'{"default": [{"type": "reject"}], "default": [{"type": "insecureAcceptAnything"}]}', "test.json")
    with pytest.raises(PolicyInvalid, match="unknown key 'Default'"):
        parse_policy(b'{"default": [{"type": "reject"}], "Default": [{"type": "insecureAcceptAnything"}]}', "test.json")


@pytest.mark.parametrize("missing", FULCIO)
def test_fulcio_needs_all_three(missing: str) -> None:
    given = {key: value for key, value in FULCIO.items() if key != missing}
    with pytest.raises(PolicyInvalid, match="fulcio"):
        one({"type": "sigstoreSigned", "fulcio": given, "rekorPublicKeyPath": "/r"})


def test_pki_needs_somebody_it_is_for() -> None:
    with pytest.raises(PolicyInvalid, match="subjectEmail or subjectHostname"):
        one({"type": "sigstoreSigned", "pki": {"caRootsPath": "/ca"}})
    found = one({"type": "sigstoreSigned", "pki": {"caRootsData": DATA, "subjectHostname": "h"}})
    assert isinstance(found, SigstoreSigned) and isinstance(found.pki, Pki) and found.pki.roots.read() == b"x"


@pytest.mark.parametrize(
    "requirement",
    [
        {"type": "signedBaseLayer", "baseLayerIdentity": {"type": "matchExact"}},
        {"type": "signedBy", "keyType": "X509Certificates", "keyPath": "/key"},
    ],
)
def test_what_nobody_implements_accepts_nothing(requirement: dict[str, object]) -> None:
    verdict = judge(policy({"default": [requirement]}), in_registry(parse("app")), (DIGEST,), (), 0)
    assert not verdict.accepted and "no implementation of it exists" in verdict.outcomes[0].sentence()


def test_a_key_that_cannot_be_read_accepts_nothing(tmp_path: Path) -> None:
    from imagestore.signatures import Cosign

    for name in ("missing", "garbage"):
        (tmp_path / "garbage").write_text("no key")
        found = policy({"default": [{**KEY, "keyPath": str(tmp_path / name)}]})
        with pytest.raises(PolicyInvalid, match=f"keyPath {tmp_path}/{name}"):
            judge(found, in_registry(parse("app")), (DIGEST,), [Cosign(b"", {}, "here")], 0)


def test_all_requirements_must_be_met() -> None:
    subject = in_registry(parse("app"))
    assert judge(policy({"default": [ACCEPT, ACCEPT]}), subject, (DIGEST,), (), 0).accepted
    verdict = judge(policy({"default": [ACCEPT, REJECT]}), subject, (DIGEST,), (), 0)
    with pytest.raises(SignatureRefused, match="the policy rejects all images of this scope"):
        verdict.require()
    assert not Verdict(subject, (DIGEST,), "", ()).accepted  # nothing required is nothing decided


def test_signatures_are_looked_for_only_where_they_matter() -> None:
    def needed(*requirements: dict[str, object]) -> bool:
        return needs_signatures(policy({"default": list(requirements)}).default)

    assert not needed(ACCEPT) and not needed(REJECT) and not needed(GPG, REJECT)
    assert needed(GPG) and needed(ACCEPT, KEY)


# ------------------------------------------------------------------------------------------------------ identities

TAGGED = "example.com/ns/app:1"
BY_DIGEST = f"example.com/ns/app@{DIGEST}"


@pytest.mark.parametrize(
    ("identity", "wanted", "signed", "fits"),
    [
        (Identity("matchExact"), TAGGED, TAGGED, True),
        (Identity("matchExact"), TAGGED, "example.com/ns/app:2", False),
        (Identity("matchExact"), TAGGED, "example.com/ns/app", False),
        (Identity("matchExact"), BY_DIGEST, BY_DIGEST, True),
        (Identity("matchExact"), BY_DIGEST, TAGGED, False),
        (Identity("matchExact"), "busybox", "docker.io/library/busybox:latest", True),
        (Identity("matchExact"), "busybox", "busybox:latest", True),
        (Identity("matchExact"), TAGGED, "not a reference", False),
        (Identity("matchExact"), TAGGED, "", False),
        (Identity("matchExact"), TAGGED, f"{TAGGED}@{DIGEST}", False),
        (Identity("matchRepoDigestOrExact"), TAGGED, TAGGED, True),
        (Identity("matchRepoDigestOrExact"), TAGGED, "example.com/ns/app:2", False),
        (Identity("matchRepoDigestOrExact"), TAGGED, BY_DIGEST, False),
        (Identity("matchRepoDigestOrExact"), BY_DIGEST, TAGGED, True),
        (Identity("matchRepoDigestOrExact"), BY_DIGEST, "example.com/ns/app", False),
        (Identity("matchRepoDigestOrExact"), BY_DIGEST, "example.com/ns/other:1", False),
        (Identity("matchRepository"), TAGGED, "example.com/ns/app:2", True),
        (Identity("matchRepository"), TAGGED, "example.com/ns/app", True),
        (Identity("matchRepository"), TAGGED, "example.com/ns/app2:1", False),
        (Identity("exactReference", TAGGED), "else.where/x:9", TAGGED, True),
        (Identity("exactReference", TAGGED), TAGGED, "example.com/ns/app:2", False),
        (Identity("exactReference", TAGGED), TAGGED, "example.com/ns/app", False),
        (Identity("exactRepository", "example.com/ns/app"), "else.where/x:9", "example.com/ns/app:7", True),
        (Identity("exactRepository", "example.com/ns/app"), TAGGED, "example.com/ns/apple:1", False),
        (Identity("remapIdentity", "mirror.local", "example.com"), "mirror.local/ns/app:1", TAGGED, True),
        (Identity("remapIdentity", "mirror.local", "example.com"), "mirror.local/ns/app:2", TAGGED, False),
        (Identity("remapIdentity", "mirror.local/copy", "example.com/ns"), "mirror.local/copy/app:1", TAGGED, True),
        (Identity("remapIdentity", "mirror.local/co", "example.com/ns"), "mirror.local/copy/app:1", TAGGED, False),
        (Identity("remapIdentity", "mirror.local", "example.com"), f"mirror.local/ns/app@{DIGEST}", TAGGED, True),
        (Identity("remapIdentity", "mirror.local", "example.com"), TAGGED, TAGGED, True),
        (Identity("remapIdentity", "mirror.local:5000", "example.com"), "mirror.local/ns/app:1", TAGGED, False),
    ],
)
def test_names_that_fit(identity: Identity, wanted: str, signed: str, fits: bool) -> None:
    assert identity.accepts(parse(wanted), signed) is fits


@pytest.mark.parametrize("kind", ["matchExact", "matchRepoDigestOrExact", "matchRepository"])
def test_an_image_without_a_name_fits_only_what_the_policy_names(kind: str) -> None:
    assert not Identity(kind).accepts(None, TAGGED)
    assert Identity("exactReference", TAGGED).accepts(None, TAGGED)
    assert Identity("exactRepository", "example.com/ns/app").accepts(None, TAGGED)


def test_a_subject_without_scopes_is_the_defaults() -> None:
    found = policy({"default": [REJECT], "transports": {"docker": {"": [ACCEPT]}}})
    assert found.requirements(Subject("local", "x", ()))[1] == (Reject(),)
