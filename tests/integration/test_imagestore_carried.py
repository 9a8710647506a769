"""Signatures in copies: they come along, or the copy is refused; and those that are made on the way. Against Debian's
docker-registry, by the commands; conformance/run images has the same beside skopeo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from imagestore.attached import cosign_tag, fallback_tag
from imagestore.lookaside import url_of
from tests.fakes.registry import build_image, sha256
from tests.integration.test_imagestore_sign import INDEX, ONE, TWO, World, maker, stocked, world
from tests.vectors import Maker

__all__ = ["maker", "stocked", "world"]

IMAGE = build_image([{"bin/app": b"one"}])
INSECURE = ("--src-tls-verify=false", "--dest-tls-verify=false")


def copy(world: World, source: str, target: str, *options: str, code: int = 0) -> str:
    """What is printed: the digest, or why it is refused."""
    world.policy.write_text(json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
    done = world.run("copy", *INSECURE, *options, source, target, code=code)
    return done.stderr if code else done.stdout.strip()


def signed(world: World, maker: Maker) -> None:
    """By all three: OpenPGP in the lookaside store, attached to cosign's tag, a bundle among the referrers."""
    maker.gpg_key("good@example.com")
    secret = world.directory / "secret.asc"
    secret.write_bytes(maker.gpg("--armor", "--export-secret-keys", "good@example.com"))
    world.run("sign", "--openpgp-key", str(secret), world.name)
    world.run("sign", "--key", str(maker.private("attached")), world.name)
    world.run("sign", "--key", str(maker.private("bundled")), "--bundle", world.name)


def requirements(world: World, maker: Maker) -> list[dict[str, Any]]:
    """That what is at hand was signed under the name in `team/app` by all three."""
    identity = {"type": "exactReference", "dockerReference": world.name}
    found = [
        {"type": "sigstoreSigned", "keyPath": str(maker.public(key)), "signedIdentity": identity}
        for key in ("attached", "bundled")
    ]
    gpg = {"type": "signedBy", "keyType": "GPGKeys", "keyPath": str(maker.gpg_key("good@example.com"))}
    return [{**gpg, "signedIdentity": identity}, *found]


def accepted(world: World, maker: Maker, name: str) -> bool:
    world.policy.write_text(json.dumps({"default": requirements(world, maker)}))
    return world.pulls(name)


def test_to_another_repository_and_twice(world: World, maker: Maker) -> None:
    signed(world, maker)
    target = f"{world.server.address}/copies/app:2"
    for _ in range(2):
        assert copy(world, f"docker://{world.name}", f"docker://{target}") == IMAGE.digest
        assert accepted(world, maker, target)
        assert len(world.fetch("copies/app", cosign_tag(IMAGE.digest))["layers"]) == 1, "the same signature twice"
        assert len(world.fetch("copies/app", fallback_tag(IMAGE.digest))["manifests"]) == 1
        assert not Path(url_of(f"file://{world.lookaside}", "copies/app", IMAGE.digest, 2)[7:]).exists()


def test_through_a_directory(world: World, maker: Maker, tmp_path: Path) -> None:
    signed(world, maker)
    place, target = f"dir:{tmp_path}/here", f"{world.server.address}/copies/app:2"
    copy(world, f"docker://{world.name}", place)
    assert sorted(path.name for path in (tmp_path / "here").glob("*signature*")) == [
        "signature-1", "signature-2", "signature-3",
    ]  # fmt: skip
    copy(world, place, f"docker://{target}")
    assert accepted(world, maker, target)


def test_signatures_of_the_image_that_was_there_before_are_gone(world: World, maker: Maker, tmp_path: Path) -> None:
    signed(world, maker)
    place = f"dir:{tmp_path}/here"
    copy(world, f"docker://{world.name}", place)
    copy(world, f"docker://{world.many}", place)
    assert not list((tmp_path / "here").glob("*signature*"))


def test_the_policy_asks_for_those_in_a_directory(world: World, maker: Maker, tmp_path: Path) -> None:
    signed(world, maker)
    copy(world, f"docker://{world.name}", f"dir:{tmp_path}/good")
    copy(world, f"docker://{world.name}", f"dir:{tmp_path}/bare", "--remove-signatures")
    by_key = requirements(world, maker)[1]
    world.policy.write_text(json.dumps({"default": [by_key]}))
    world.run("copy", "--remove-signatures", f"dir:{tmp_path}/good", f"oci:{tmp_path}/layout:a")
    done = world.run("copy", f"dir:{tmp_path}/bare", f"oci:{tmp_path}/layout:b", code=125)
    assert "the signature policy refuses dir:" in done.stderr and "no sigstore signature" in done.stderr


@pytest.mark.parametrize("target", ["oci:{}/x:1", "oci-archive:{}/x.tar", "docker-archive:{}/x.tar"])
def test_where_there_is_no_place_for_them(world: World, maker: Maker, tmp_path: Path, target: str) -> None:
    signed(world, maker)
    place = target.format(tmp_path)
    said = copy(world, f"docker://{world.name}", place, code=125)
    assert "has 3 signatures" in said and "no place for them: --remove-signatures leaves them behind" in said
    copy(world, f"docker://{world.name}", place, "--remove-signatures")


@pytest.mark.parametrize("change", [("--format", "docker"), ("--compress", "zstd")])
def test_a_change_would_invalidate_them(world: World, maker: Maker, change: tuple[str, ...]) -> None:
    signed(world, maker)
    source, target = f"docker://{world.name}", f"docker://{world.server.address}/copies/app:2"
    said = copy(world, source, target, *change, code=125)
    assert f"which would invalidate 3 signatures of {IMAGE.digest} (see --remove-signatures)" in said
    assert copy(world, source, target, *change, "--remove-signatures") != IMAGE.digest


def test_nothing_is_compressed_that_nobody_asked_for(world: World, maker: Maker, tmp_path: Path) -> None:
    """A registry is sent compressed layers; not those of what is signed."""
    copy(world, f"docker://{world.name}", f"docker://{world.server.address}/plain/app:1", "--compress", "none")
    plain = f"{world.server.address}/plain/app:1"
    digest = world.run("manifest", "digest", plain).stdout.strip()
    target = f"docker://{world.server.address}/copies/app:2"
    assert copy(world, f"docker://{plain}", target) != digest
    world.run("sign", "--key", str(maker.private("good")), plain)
    assert copy(world, f"docker://{plain}", target) == digest


def test_all_of_an_index(world: World, maker: Maker, tmp_path: Path) -> None:
    world.run("sign", "--key", str(maker.private("good")), world.many)
    place, target = f"dir:{tmp_path}/here", f"{world.server.address}/copies/many:1"
    assert copy(world, f"docker://{world.many}", place, "--all") == sha256(INDEX)
    assert {path.name for path in (tmp_path / "here").glob("*signature*")} == {
        "signature-1", f"{ONE.digest[7:]}.signature-1", f"{TWO.digest[7:]}.signature-1",
    }  # fmt: skip
    copy(world, place, f"docker://{target}", "--all")
    for digest in (ONE.digest, TWO.digest, sha256(INDEX)):
        world.fetch("copies/many", cosign_tag(digest))
    # One of them takes its own along, not the index's.
    copy(world, place, f"dir:{tmp_path}/one", "--platform", "linux/arm64")
    assert (tmp_path / "one/signature-1").read_bytes() == (tmp_path / f"here/{TWO.digest[7:]}.signature-1").read_bytes()
    said = copy(world, place, f"dir:{tmp_path}/docker", "--all", "--format", "docker", code=125)
    assert f"would invalidate 1 signature of {sha256(INDEX)}" in said


@pytest.mark.parametrize("text", ["false", ""])
def test_registries_d_says_whether_what_is_attached_comes_along(world: World, maker: Maker, text: str) -> None:
    signed(world, maker)
    said = f", use-sigstore-attachments: {text}" if text else ""
    lookaside = f"default-docker: {{lookaside: 'file://{world.lookaside}'{said}}}\n"
    (world.directory / "registries.d/default.yaml").write_text(lookaside)
    copy(world, f"docker://{world.name}", f"dir:{world.directory}/here")
    assert [path.name for path in (world.directory / "here").glob("*signature*")] == ["signature-1"]


def test_signed_on_the_way(world: World, maker: Maker, tmp_path: Path) -> None:
    key, target = str(maker.private("good")), f"{world.server.address}/copies/app:2"
    sign = ("--sign-by-sigstore-private-key", key)
    copy(world, f"docker://{world.name}", f"docker://{target}", *sign, "--format", "docker")
    world.keyed()
    assert world.pulls(target)
    said = copy(world, f"docker://{world.name}", f"dir:{tmp_path}/here", *sign, code=125)
    assert "has no tag: say with --sign-identity" in said
    copy(world, f"docker://{world.name}", f"dir:{tmp_path}/here", *sign, "--sign-identity", "example.com/app:7")
    assert b"example.com/app:7" in bytes_of(tmp_path / "here/signature-1")
    assert "no place for signatures" in copy(world, f"docker://{world.name}", f"oci:{tmp_path}/x", *sign, code=125)


def bytes_of(signature: Path) -> bytes:
    import base64

    found = json.loads(signature.read_bytes().partition(b"\n")[2])
    return base64.b64decode(found["payload"])
