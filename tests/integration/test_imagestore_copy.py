"""Copies between registries, layouts, archives and directories: same digests, nothing sent twice, nothing left."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imagestore.config import StoreConfig
from imagestore.copying.copy import CopyOptions
from imagestore.copying.inspect import referrers, tags
from imagestore.copying.places import parse_place
from imagestore.copying.scratch import scratch
from imagestore.copying.session import Access, beside, session
from imagestore.model import AccessDenied, ContentInvalid, Credentials, ImageError, ImageNotFound, Progress
from imagestore.platforms import Platform
from tests.fakes.imagestore import QUICK
from tests.fakes.registry import (
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    BuiltImage,
    Cut,
    FakeRegistry,
    Hang,
    Reply,
    Tokens,
    as_json,
    build_image,
    build_index,
    make_tls,
    sha256,
    write_layout,
)

AMD64 = Platform("linux", "amd64")


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        made.strict_repositories = True
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert [str(path) for path in tmp_path.rglob(".ocid-copy-*")] == []


def copy(
    source: str,
    target: str,
    *,
    logins: tuple[Access, Access] = (Access(), Access()),
    config: StoreConfig = QUICK,
    tell: Any = lambda _: None,
    **options: Any,
) -> str:
    """The digest at the target."""

    async def work() -> str:
        start, end = parse_place(source), parse_place(target)
        async with asyncio.timeout(30), session(config, beside(end)) as made:
            origin, to = await made.source(start, logins[0]), await made.target(end, start, logins[1])
            document = await made.copy(origin, to, CopyOptions(AMD64, **options), tell)
            await to.finish()
            return document.digest

    return asyncio.run(work())


def skopeo(*words: str) -> str:
    done = subprocess.run(["skopeo", *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stored(registry: FakeRegistry, repository: str, target: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(registry.manifests[(repository, target)][0])
    return found


# ------------------------------------------------------------------------------------------------------ where to where


@pytest.mark.parametrize("docker", [False, True])
def test_from_registry_to_registry(registry: FakeRegistry, docker: bool) -> None:
    image = build_image([{"a": b"1"}, {"b": b"2"}], docker=docker)
    source = registry.add("team/app", "1", image)
    with FakeRegistry() as other:
        assert copy(f"docker://{source}", f"docker://{other.name}/copy/app:2") == image.digest
        assert other.manifests[("copy/app", "2")] == (image.manifest, image.media_type)
        assert set(other.blobs) == set(image.blobs)
        sent = other.count("PATCH", "/blobs/uploads/")
        assert sent == len(image.blobs)
        copy(f"docker://{source}", f"docker://{other.name}/copy/app:3")
        assert other.count("PATCH", "/blobs/uploads/") == sent, "what is there was sent again"


def test_within_a_registry_blobs_are_mounted(registry: FakeRegistry) -> None:
    image = build_image([{"a": b"1"}, {"b": b"2"}])
    source = registry.add("team/app", "1", image)
    registry.tokens = Tokens()
    assert copy(f"docker://{source}", f"docker://{registry.name}/other/app:1") == image.digest
    assert {digest for _, digest in registry.uploads.mounted} == set(image.blobs)
    assert registry.count("PATCH", ".") == 0 and registry.count("GET", "/blobs/") == 0
    scopes = [seen.query for seen in registry.seen if seen.path == "/token"]
    assert any("other%2Fapp%3Apull%2Cpush" in query and "team%2Fapp%3Apull" in query for query in scopes)


def test_a_registry_that_has_answered_without_tls_is_not_asked_with_it(registry: FakeRegistry, tmp_path: Path) -> None:
    """Who need not prove who they are may be spoken to in two ways; "there is none" is an answer in the right one."""
    anyhow = Access(verify=False)
    with pytest.raises(ImageNotFound):
        copy(f"docker://{registry.name}/team/app:missing", f"oci:{tmp_path}/layout", logins=(anyhow, Access()))


def test_copies_into_one_layout_at_the_same_time(registry: FakeRegistry, tmp_path: Path) -> None:
    source = registry.add("team/app", "1", build_image())

    async def one(number: int) -> None:
        start, end = parse_place(f"docker://{source}"), parse_place(f"oci:{tmp_path}/layout:{number}")
        async with session(QUICK, beside(end)) as made:
            target = await made.target(end, start)
            await made.copy(await made.source(start), target, CopyOptions(AMD64))
            await target.finish()

    async def all_of_them() -> None:
        async with asyncio.timeout(30):
            await asyncio.gather(*(one(number) for number in range(12)))

    asyncio.run(all_of_them())
    entries = json.loads((tmp_path / "layout/index.json").read_bytes())["manifests"]
    names = {item["annotations"]["org.opencontainers.image.ref.name"] for item in entries}
    assert names == set(map(str, range(12)))


def test_what_a_killed_copy_left_goes_with_the_next(registry: FakeRegistry, tmp_path: Path) -> None:
    source = registry.add("team/app", "1", build_image())
    with scratch(tmp_path) as living:
        dead = tmp_path / ".ocid-copy-dead"
        (dead / "staging").mkdir(parents=True)
        (dead / "staging/blob").write_bytes(b"1")
        (tmp_path / ".ocid-copy-file").write_bytes(b"1")
        (tmp_path / ".ocid-copy-link").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").mkdir()
        copy(f"docker://{source}", f"oci-archive:{tmp_path}/archive:1")
        assert living.exists() and not dead.exists() and (tmp_path / "elsewhere").exists()
    assert not living.exists()
    for name in ("file", "link"):
        (tmp_path / f".ocid-copy-{name}").unlink()


def test_a_mount_that_is_refused_becomes_an_upload(registry: FakeRegistry) -> None:
    image = build_image()
    source = registry.add("team/app", "1", image)
    registry.uploads.has = {(r, d) for r, d in registry.uploads.has if r != "team/app"}
    registry.strict_repositories = False
    refused = registry.rule("HEAD", "^/v2/other/app/blobs/", Reply(404))
    assert copy(f"docker://{source}", f"docker://{registry.name}/other/app:1") == image.digest
    assert refused.hits and not registry.uploads.mounted
    assert registry.count("PATCH", "/other/app/") == len(image.blobs)
    assert registry.uploads.open == {}, "uploads that nobody ended"


@pytest.mark.parametrize("kind", ["oci:{}/layout:name", "oci-archive:{}/file.tar:name", "dir:{}/directory"])
def test_to_a_file_and_back(registry: FakeRegistry, tmp_path: Path, kind: str) -> None:
    image = build_image([{"a": os.urandom(100_000)}, {"b": b"2"}])
    source = registry.add("team/app", "1", image)
    place = kind.format(tmp_path)
    assert copy(f"docker://{source}", place) == image.digest
    assert json.loads(skopeo("inspect", place))["Digest"] == image.digest
    assert copy(place, f"docker://{registry.name}/back/app:1") == image.digest
    assert registry.manifests[("back/app", "1")] == (image.manifest, OCI_MANIFEST)


def test_docker_archive_and_back(registry: FakeRegistry, tmp_path: Path) -> None:
    """Layers are plain there, and compressed again on their way to a registry; the config never changes."""
    image = build_image([{"a": b"1" * 5000}, {"b": b"2"}], docker=True)
    source = registry.add("team/app", "1", image)
    place = f"docker-archive:{tmp_path}/file.tar:team/app:1"
    copy(f"docker://{source}", place)
    found = json.loads(skopeo("inspect", "--raw", place))
    assert found["config"]["digest"] == image.config_digest
    assert [layer["digest"] for layer in found["layers"]] == list(image.diff_ids)
    copy(place, f"docker://{registry.name}/back/app:1", compress="plain")
    back = stored(registry, "back/app", "1")
    assert back["config"]["digest"] == image.config_digest
    assert all(layer["mediaType"].endswith("+gzip") for layer in back["layers"])
    assert back["layers"][0]["size"] < 1000


def test_a_layout_keeps_what_else_is_there(registry: FakeRegistry, tmp_path: Path) -> None:
    first, second = build_image([{"a": b"1"}]), build_image([{"b": b"2"}])
    write_layout(tmp_path / "layout", {"one": first})
    source = registry.add("team/app", "2", second)
    copy(f"docker://{source}", f"oci:{tmp_path}/layout:two")
    copy(f"docker://{source}", f"oci:{tmp_path}/layout:two")
    index = json.loads((tmp_path / "layout/index.json").read_bytes())
    assert [item["digest"] for item in index["manifests"]] == [first.digest, second.digest]
    assert copy(f"oci:{tmp_path}/layout:one", f"dir:{tmp_path}/one") == first.digest


def test_docker_manifests_become_oci_in_a_layout(registry: FakeRegistry, tmp_path: Path) -> None:
    image = build_image(docker=True)
    source = registry.add("team/app", "1", image)
    made = copy(f"docker://{source}", f"oci:{tmp_path}/layout:x")
    assert made != image.digest
    skopeo("copy", "-q", "--src-tls-verify=false", f"docker://{source}", f"oci:{tmp_path}/theirs:x")
    theirs = json.loads((tmp_path / "theirs/index.json").read_bytes())["manifests"][0]
    ours = json.loads((tmp_path / "layout/blobs/sha256" / made[7:]).read_bytes())
    converted = json.loads((tmp_path / "theirs/blobs/sha256" / theirs["digest"][7:]).read_bytes())
    # skopeo writes the config anew, which gives the image another id; ours keeps both.
    assert ours["config"]["digest"] == image.config_digest
    assert ours["layers"] == converted["layers"] and ours["mediaType"] == converted["mediaType"]
    with pytest.raises(ImageError, match="digest is to be preserved"):
        copy(f"docker://{source}", f"oci:{tmp_path}/other:x", preserve_digests=True)
    assert not (tmp_path / "other/index.json").exists()


# ------------------------------------------------------------------------------------------------------------- indexes


def multi(registry: FakeRegistry) -> tuple[str, list[BuiltImage], bytes, bytes]:
    """An index of two platforms and an attestation, which is no image."""
    images = [build_image([{"a": name.encode()}], architecture=name) for name in ("amd64", "arm64")]
    statement = b'{"_type":"https://in-toto.io/Statement/v0.1"}'
    registry.blobs.update({sha256(statement): statement, sha256(b"{}"): b"{}"})
    attestation = as_json(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": sha256(b"{}"), "size": 2},
            "layers": [
                {"mediaType": "application/vnd.in-toto+json", "digest": sha256(statement), "size": len(statement)}
            ],
        }
    )
    extra = {
        "mediaType": OCI_MANIFEST,
        "digest": sha256(attestation),
        "size": len(attestation),
        "platform": {"os": "unknown", "architecture": "unknown"},
        "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
    }
    index = build_index(images, extra=[extra])
    for image in images:
        registry.add("team/app", image.digest, image)
    registry.put("team/app", sha256(attestation), attestation, OCI_MANIFEST)
    registry.uploads.has.update(("team/app", digest) for digest in registry.blobs)
    return registry.put("team/app", "1", index, OCI_INDEX), images, index, attestation


def test_one_platform_or_all(registry: FakeRegistry, tmp_path: Path) -> None:
    source, images, index, attestation = multi(registry)
    assert copy(f"docker://{source}", f"dir:{tmp_path}/one") == images[0].digest
    with FakeRegistry() as other:
        assert copy(f"docker://{source}", f"docker://{other.name}/app:1", all=True) == sha256(index)
        assert other.manifests[("app", "1")] == (index, OCI_INDEX)
        assert other.manifests[("app", sha256(attestation))][0] == attestation
        assert set(other.blobs) >= set(images[0].blobs) | set(images[1].blobs)
    for place in (f"dir:{tmp_path}/all", f"oci:{tmp_path}/layout:x", f"oci-archive:{tmp_path}/file:x"):
        assert copy(f"docker://{source}", place, all=True) == sha256(index)
        assert skopeo("inspect", "--raw", place).encode() == index
        assert copy(place, f"docker://{registry.name}/back:1", all=True) == sha256(index)
    with pytest.raises(ImageError, match="one platform"):
        copy(f"docker://{source}", f"docker-archive:{tmp_path}/no.tar", all=True)
    assert not (tmp_path / "no.tar").exists()


def test_another_format_for_all(registry: FakeRegistry) -> None:
    images = [build_image([{"a": name.encode()}], architecture=name) for name in ("amd64", "arm64")]
    for image in images:
        registry.add("team/app", image.digest, image)
    index = json.loads(build_index(images))
    index["annotations"] = {"kept": "yes"}
    source = registry.put("team/app", "1", as_json(index), OCI_INDEX)
    copy(f"docker://{source}", f"docker://{registry.name}/docker:1", all=True, format="docker")
    made = stored(registry, "docker", "1")
    assert made["mediaType"].endswith("manifest.list.v2+json") and made["annotations"] == {"kept": "yes"}
    for item, image in zip(made["manifests"], images, strict=True):
        assert item["platform"]["architecture"] == image.platform["architecture"]
        child = stored(registry, "docker", item["digest"])
        assert child["mediaType"] == DOCKER_MANIFEST
        assert child["layers"][0]["mediaType"] == "application/vnd.docker.image.rootfs.diff.tar.gzip"
        assert child["layers"][0]["digest"] == image.layer_digests[0]


@pytest.mark.parametrize(("how", "suffix"), [("zstd", "+zstd"), ("gzip", "+gzip"), ("none", ".tar")])
def test_other_compression(registry: FakeRegistry, how: str, suffix: str) -> None:
    image = build_image([{"a": b"x" * 50_000}], compression={"gzip": "zstd"}.get(how, "gzip"))
    source = registry.add("team/app", "1", image)
    copy(f"docker://{source}", f"docker://{registry.name}/made:1", compress=how)
    made = stored(registry, "made", "1")
    assert made["layers"][0]["mediaType"].endswith(suffix)
    assert made["config"]["digest"] == image.config_digest
    path = f"docker://{registry.name}/made:1"
    again = copy(path, f"docker://{registry.name}/again:1", compress=how)
    assert again == sha256(registry.manifests[("made", "1")][0]), "what is so already was changed"


def test_docker_has_no_zstd(registry: FakeRegistry) -> None:
    source = registry.add("team/app", "1", build_image(compression="zstd"))
    with pytest.raises(ContentInvalid, match="no layers compressed with zstd"):
        copy(f"docker://{source}", f"docker://{registry.name}/made:1", format="docker")
    assert ("made", "1") not in registry.manifests


# ------------------------------------------------------------------------------------------------------------- hostile


def test_s25_both_index_and_manifest(registry: FakeRegistry, tmp_path: Path) -> None:
    image = build_image(edit_manifest=lambda manifest: manifest.update(manifests=[]))
    source = registry.add("team/app", "1", image)
    with pytest.raises(ContentInvalid, match="both an index and a manifest"):
        copy(f"docker://{source}", f"dir:{tmp_path}/x")


def test_s35_an_index_in_itself(registry: FakeRegistry, tmp_path: Path) -> None:
    """An index cannot hold its own digest, but a registry may answer every digest with one more index."""
    index: bytes = build_index([])
    for _ in range(8):
        inner = {"mediaType": OCI_INDEX, "digest": sha256(index), "size": len(index)}
        registry.put("team/app", sha256(index), index, OCI_INDEX)
        index = build_index([], extra=[inner])
    source = registry.put("team/app", "1", index, OCI_INDEX)
    with pytest.raises(ContentInvalid, match="too deep"):
        copy(f"docker://{source}", f"dir:{tmp_path}/x", all=True)


def test_s26_foreign_layers_are_not_carried(registry: FakeRegistry, tmp_path: Path) -> None:
    kind = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"

    def spoil(manifest: dict[str, Any]) -> None:
        manifest["layers"][0].update(mediaType=kind, urls=["http://127.0.0.1:1/x"])

    source = registry.add("team/app", "1", build_image(edit_manifest=spoil))
    with pytest.raises(ContentInvalid, match="foreign layer"):
        copy(f"docker://{source}", f"dir:{tmp_path}/x")


def test_s37_a_layer_that_inflates_without_end(registry: FakeRegistry, tmp_path: Path) -> None:
    source = registry.add("team/app", "1", build_image([bytes(20 << 20)]))
    with pytest.raises(ContentInvalid, match="inflates to more than"):
        copy(
            f"docker://{source}",
            f"docker-archive:{tmp_path}/x.tar",
            config=replace(QUICK, image_bytes=1 << 20),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("garbage", [b"", b"\x1f\x8b\x08garbage", b"no gzip at all"])
def test_s41_damaged_layers(registry: FakeRegistry, tmp_path: Path, garbage: bytes) -> None:
    image = build_image()
    data = json.loads(image.manifest)
    data["layers"][0].update(digest=sha256(garbage), size=len(garbage))
    registry.blobs.update({**image.blobs, sha256(garbage): garbage})
    registry.strict_repositories = False
    source = registry.put("team/app", "1", as_json(data), OCI_MANIFEST)
    with pytest.raises(ContentInvalid, match="not valid gzip"):
        copy(f"docker://{source}", f"docker-archive:{tmp_path}/x.tar")
    assert list(tmp_path.iterdir()) == []


def test_s27_an_upload_elsewhere_gets_no_secret(registry: FakeRegistry) -> None:
    image = build_image()
    source = registry.add("team/app", "1", image)
    login = Credentials("anna", "pa55word")
    registry.basic = ("anna", "pa55word")
    with FakeRegistry() as elsewhere:
        elsewhere.uploads.open["1"] = bytearray()
        where = f"{elsewhere.url}/v2/other/blobs/uploads/1?sig=SIGNED"
        registry.rule("POST", "/other/app/blobs/uploads/$", Reply(202, {"Location": where}))
        registry.rule("POST", "/other/app/blobs/uploads/", Reply(202, {"Location": where}))
        with pytest.raises(ImageError) as error:
            copy(f"docker://{source}", f"docker://{registry.name}/other/app:1", logins=(Access(login), Access(login)))
        assert elsewhere.seen and not any(seen.authorization for seen in elsewhere.seen)
        assert "SIGNED" not in str(error.value) and "pa55word" not in str(error.value)


@pytest.mark.parametrize("location", ["", "ftp://x/y", "http://u:p@127.0.0.1/x", "http://127.0.0.1:99999/"])
def test_uploads_to_nowhere(registry: FakeRegistry, tmp_path: Path, location: str) -> None:
    write_layout(tmp_path / "layout", {"one": build_image()})
    registry.rule("POST", "/blobs/uploads/", Reply(202, {"Location": location}))
    with pytest.raises(ContentInvalid, match="of an upload"):
        copy(f"oci:{tmp_path}/layout:one", f"docker://{registry.name}/app:1")


def test_a_registry_that_stored_something_else(registry: FakeRegistry, tmp_path: Path) -> None:
    write_layout(tmp_path / "layout", {"one": build_image()})
    registry.rule("PUT", "/manifests/", Reply(201, {"Docker-Content-Digest": sha256(b"other")}))
    with pytest.raises(ContentInvalid, match="it stored sha256:"):
        copy(f"oci:{tmp_path}/layout:one", f"docker://{registry.name}/app:1")


def test_uploads_are_tried_again(registry: FakeRegistry, tmp_path: Path) -> None:
    image = build_image()
    write_layout(tmp_path / "layout", {"one": image})
    registry.rule("PATCH", ".", Reply(503), times=1)
    registry.rule("PUT", "/manifests/", Reply(429, {"Retry-After": "0"}), times=1)
    assert copy(f"oci:{tmp_path}/layout:one", f"docker://{registry.name}/app:1") == image.digest
    assert set(image.blobs) <= set(registry.blobs)


def test_o48_an_upload_that_is_not_answered(registry: FakeRegistry, tmp_path: Path) -> None:
    write_layout(tmp_path / "layout", {"one": build_image()})
    registry.rule("PATCH", ".", Hang())
    with pytest.raises(ImageError, match="no whole answer|no answer in time"):
        copy(f"oci:{tmp_path}/layout:one", f"docker://{registry.name}/app:1")


def test_pushing_without_permission(registry: FakeRegistry, tmp_path: Path) -> None:
    write_layout(tmp_path / "layout", {"one": build_image()})
    registry.basic = ("anna", "right")
    with pytest.raises(AccessDenied) as error:
        copy(
            f"oci:{tmp_path}/layout:one",
            f"docker://{registry.name}/app:1",
            logins=(Access(), Access(Credentials("anna", "wr0ng-one"))),
        )
    assert "wr0ng-one" not in str(error.value)


def test_a_digest_is_not_a_name_for_something_else(registry: FakeRegistry, tmp_path: Path) -> None:
    write_layout(tmp_path / "layout", {"one": build_image()})
    with pytest.raises(ImageError, match="cannot be called"):
        copy(f"oci:{tmp_path}/layout:one", f"docker://{registry.name}/app@{sha256(b'x')}")


def test_a_cut_download_goes_on(registry: FakeRegistry, tmp_path: Path) -> None:
    image = build_image([{"a": os.urandom(300_000)}])
    source = registry.add("team/app", "1", image)
    registry.rule("GET", f"/blobs/{image.layer_digests[0]}", Cut(100_000), times=1)
    assert copy(f"docker://{source}", f"dir:{tmp_path}/x") == image.digest


def test_a_full_target_keeps_what_was_there(registry: FakeRegistry, tmp_path: Path) -> None:
    """A layout whose blobs cannot be written: index.json tells what it told before."""
    first = build_image([{"a": b"1"}])
    write_layout(tmp_path / "layout", {"one": first})
    before = (tmp_path / "layout/index.json").read_bytes()
    second = build_image([{"b": os.urandom(10_000)}])
    source = registry.add("team/app", "2", second)
    registry.rule("GET", f"/blobs/{second.layer_digests[0]}", Reply(500))
    with pytest.raises(ImageError):
        copy(f"docker://{source}", f"oci:{tmp_path}/layout:two")
    assert (tmp_path / "layout/index.json").read_bytes() == before


def test_missing_places(tmp_path: Path) -> None:
    for place in (f"oci:{tmp_path}/none", f"oci-archive:{tmp_path}/none", f"dir:{tmp_path}/none"):
        with pytest.raises(ImageNotFound):
            copy(place, f"dir:{tmp_path}/x")


def test_progress_is_told(registry: FakeRegistry, tmp_path: Path) -> None:
    image = build_image([{"a": os.urandom(50_000)}])
    source = registry.add("team/app", "1", image)
    steps: list[Progress] = []
    copy(f"docker://{source}", f"dir:{tmp_path}/x", tell=steps.append)
    assert {step.digest for step in steps if step.phase == "done"} == set(image.blobs)
    assert all(0 <= step.done <= step.total for step in steps)


# ----------------------------------------------------------------------------------------------------------- referrers


def asked(registry: FakeRegistry, digest: str, kind: str = "") -> list[Mapping[str, Any]]:
    async def work() -> list[Mapping[str, Any]]:
        async with asyncio.timeout(30), session(QUICK) as made:
            repository = await made.repository(parse_place(f"docker://{registry.name}/team/app:1"), Access(), "pull")
            return list(await referrers(repository, digest, kind, QUICK))

    return asyncio.run(work())


def test_referrers_by_api_and_by_tag(registry: FakeRegistry) -> None:
    digest = build_image().digest
    entries = [
        {"mediaType": OCI_MANIFEST, "digest": sha256(name), "size": 7, "artifactType": f"application/{name.decode()}"}
        for name in (b"sig", b"sbom")
    ]
    index = as_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
    unknown = registry.rule("GET", "/referrers/", Reply(404))
    assert asked(registry, digest) == []
    registry.put("team/app", digest.replace(":", "-"), index, OCI_INDEX)
    assert [item["digest"] for item in asked(registry, digest)] == [sha256(b"sig"), sha256(b"sbom")]
    assert [item["digest"] for item in asked(registry, digest, "application/sbom")] == [sha256(b"sbom")]
    assert unknown.hits == 3
    registry.heal()
    registry.rule("GET", "/referrers/", Reply(200, {"Content-Type": OCI_INDEX}, index))
    assert [item["artifactType"] for item in asked(registry, digest, "application/sig")] == ["application/sig"]


@pytest.mark.parametrize("answer", [b"", b"<html>", b"[]", b"{}"])
def test_a_registry_that_knows_no_referrers_may_answer_what_it_likes(registry: FakeRegistry, answer: bytes) -> None:
    digest = build_image().digest
    entry = {"mediaType": OCI_MANIFEST, "digest": sha256(b"1"), "size": 1, "artifactType": "application/x"}
    index = as_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]})
    registry.put("team/app", digest.replace(":", "-"), index, OCI_INDEX)
    registry.rule("GET", "/referrers/", Reply(200, body=answer))

    async def ask() -> list[dict[str, Any]]:
        async with session(QUICK) as made:
            place = parse_place(f"docker://{registry.name}/team/app")
            return await referrers(await made.repository(place, Access(), "pull"), digest, "", QUICK)

    assert [item["artifactType"] for item in asyncio.run(ask())] == ["application/x"]


def test_referrers_in_pages(registry: FakeRegistry) -> None:
    digest = build_image().digest
    entries = [{"mediaType": OCI_MANIFEST, "digest": sha256(b"%d" % number), "size": 7} for number in range(5)]
    for number, entry in enumerate(entries):
        index = as_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]})
        more = {"Link": f'</v2/team/app/referrers/page{number + 1}?n=1>; rel="next"'} if number < 4 else {}
        at = f"/referrers/{f'page{number}' if number else digest}$"
        registry.rule("GET", at, Reply(200, {"Content-Type": OCI_INDEX, **more}, index))
    assert [item["digest"] for item in asked(registry, digest)] == [entry["digest"] for entry in entries]


# ------------------------------------------------------------------------------------------------------ tags, deletion


def tags_of(registry: FakeRegistry, access: Access = Access(), config: StoreConfig = QUICK) -> list[str]:
    async def work() -> list[str]:
        async with asyncio.timeout(30), session(config) as made:
            place = parse_place(f"docker://{registry.name}/team/app")
            return await tags(await made.repository(place, access, "pull"), config)

    return asyncio.run(work())


def page(registry: FakeRegistry, path: str, names: list[str], link: str = "") -> None:
    more = {"Link": f'<{link}>; rel="next"'} if link else {}
    registry.rule("GET", path, Reply(200, more, as_json({"name": "team/app", "tags": names})))


def test_tags_in_pages(registry: FakeRegistry) -> None:
    registry.basic = ("anna", "pa55word-of-anna")
    page(registry, "/tags/list$", ["1", "2"], "/v2/team/app/tags/more?last=2")
    page(registry, "/tags/more$", ["3"], f"{registry.url}/team/app/tags/last")
    page(registry, "/tags/last$", [])
    assert tags_of(registry, Access(Credentials(*registry.basic))) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("link", "says"),
    [
        ("http://127.0.0.2:1/v2/team/app/tags/list", "its next page is said to be at http://127.0.0.2:1"),
        ("/v2/team/app/tags/list?again", "more than 20 pages"),
        ("ftp://x", "a redirect without a proper location"),
    ],
)
def test_s27_pages_without_end_and_from_elsewhere(registry: FakeRegistry, link: str, says: str) -> None:
    page(registry, "/tags/list", ["1"], link)
    with pytest.raises(ContentInvalid, match=says):
        tags_of(registry, config=replace(QUICK, pages=20))


def test_s31_pages_that_are_more_than_the_limit_together(registry: FakeRegistry) -> None:
    page(registry, "/tags/list", ["t" * 100] * 30, "/v2/team/app/tags/list?again")
    with pytest.raises(ContentInvalid, match="list of tags: (more than )?[0-9]+ bytes"):
        tags_of(registry, config=replace(QUICK, list_bytes=20_000))
    assert registry.count("GET", "/tags/list") <= 7


def test_a_deletion_takes_every_tag(registry: FakeRegistry) -> None:
    image = build_image()
    for tag in ("1", "2"):
        registry.add("team/app", tag, image)
    registry.add("team/app", "other", build_image([{"x": b"y"}]))

    async def work() -> None:
        async with asyncio.timeout(30), session(QUICK) as made:
            repository = await made.repository(parse_place(f"docker://{registry.name}/team/app:1"), Access(), "*")
            await repository.delete(image.digest)
            with pytest.raises(ImageNotFound):
                await repository.delete(image.digest)

    asyncio.run(work())
    assert {target for _, target in registry.manifests} & {"1", "2", "other", image.digest} == {"other"}


# ----------------------------------------------------------------------------------------------------------------- TLS


def test_a_registry_that_need_not_prove_who_it_is(tmp_path: Path) -> None:
    """Only where somebody says so, for that side alone; over TLS, or without."""
    unknown = Access(verify=False)
    with FakeRegistry() as plain, FakeRegistry(tls=make_tls(tmp_path, "127.0.0.1")[0]) as secure:
        image = build_image()
        plain.add("team/app", "1", image)
        source, target = f"docker://{plain.name}/team/app:1", f"docker://{secure.name}/team/app:2"
        for logins in ((Access(), Access()), (unknown, Access())):
            with pytest.raises(ImageError):
                copy(source, target, logins=logins)
        assert copy(source, target, logins=(Access(), unknown)) == image.digest
        assert copy(target, f"docker://{plain.name}/team/app:3", logins=(unknown, unknown)) == image.digest
        assert stored(plain, "team/app", "3") == stored(secure, "team/app", "2")


def test_a_file_of_logins_for_one_side(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.basic = ("anna", "pa55word-of-anna")
    source = registry.add("team/app", "1", build_image())
    file = tmp_path / "auth.json"
    entry = {"username": "anna", "password": "pa55word-of-anna"}
    file.write_bytes(as_json({"auths": {registry.name: entry}}))
    target = f"dir:{tmp_path}/x"
    copy(f"docker://{source}", target, logins=(Access(authfile=file), Access()))
    with pytest.raises(AccessDenied):
        copy(f"docker://{source}", target, logins=(Access(), Access(authfile=file)))
    with pytest.raises(AccessDenied):  # nobody in particular, although there is a login
        copy(f"docker://{source}", target, logins=(Access(Credentials(), authfile=file), Access()))
