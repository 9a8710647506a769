"""Signature policies on the way of a pull: where signatures are found, what is refused before anything is fetched, and
that an image which was accepted once is judged again whenever it is used."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagestore.attached import cosign_tag, fallback_tag
from imagestore.lookaside import url_of
from imagestore.model import ContentInvalid, Image, PolicyInvalid, RegistryUnavailable, SignatureRefused
from imagestore.reference import parse
from imagestore.signatures import BUNDLE_TYPE, COSIGN_TYPE, Bundle, Cosign, Signature, to_blob
from tests.fakes.imagestore import Bench, run
from tests.fakes.registry import (
    OCI_INDEX,
    OCI_MANIFEST,
    BuiltImage,
    Endless,
    FakeRegistry,
    Reply,
    as_json,
    build_image,
    build_index,
    sha256,
    write_layout,
)
from tests.vectors import Maker, payload

COSIGN = "cosign container image signature"
ATOMIC = "atomic container signature"


class World:
    """A store with a policy of its own, a registry, and keys."""

    def __init__(self, directory: Path, registry: FakeRegistry, maker: Maker) -> None:
        self.directory = directory
        self.registry = registry
        self.maker = maker
        self.file = directory / "policy.json"
        self.lookaside = directory / "lookaside"
        registries_d = directory / "registries.d"
        registries_d.mkdir()
        self.said = registries_d / "default.yaml"
        self.said.write_text(f"default-docker:\n  lookaside: file://{self.lookaside}\n")
        self.bench = Bench(directory, policy=self.file, registries_d=(registries_d,))
        self.image = build_image([{"bin/app": b"one"}])
        self.name = registry.add("team/app", "1", self.image)
        self.require("good")

    def policy(self, *requirements: dict[str, object], scopes: dict[str, object] | None = None) -> None:
        document = {"default": list(requirements) or [{"type": "reject"}], "transports": {"docker": scopes or {}}}
        # Another inode each time: what is remembered of a file goes by that and by its times.
        fresh = self.file.with_suffix(".new")
        fresh.write_text(json.dumps(document))
        os.rename(fresh, self.file)

    def require(self, key: str, **more: object) -> None:
        self.policy({"type": "sigstoreSigned", "keyPath": str(self.maker.public(key)), **more})

    def sign(self, key: str = "good", digest: str = "", name: str = "") -> Cosign:
        return self.maker.cosign(key, payload(COSIGN, digest or self.image.digest, name or self.name))

    def tag(self, *signatures: Cosign, digest: str = "", repository: str = "team/app") -> None:
        """As cosign attaches them."""
        layers = []
        for one in signatures:
            self.registry.blobs[sha256(one.payload)] = one.payload
            layers.append(
                {
                    "mediaType": COSIGN_TYPE,
                    "digest": sha256(one.payload),
                    "size": len(one.payload),
                    "annotations": dict(one.annotations),
                }
            )
        manifest = as_json({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": self._empty(), "layers": layers})
        self.registry.put(repository, cosign_tag(digest or self.image.digest), manifest, OCI_MANIFEST)

    def _empty(self) -> dict[str, object]:
        self.registry.blobs[sha256(b"{}")] = b"{}"
        return {"mediaType": "application/vnd.oci.empty.v1+json", "digest": sha256(b"{}"), "size": 2}

    def refer(self, bundle: Bundle, digest: str = "", *, typed: bool = True, subject: str = "") -> bytes:
        """As cosign 3 attaches a bundle; the index of referrers to be served."""
        digest = digest or self.image.digest
        self.registry.blobs[sha256(bundle.data)] = bundle.data
        layer = {"mediaType": BUNDLE_TYPE, "digest": sha256(bundle.data), "size": len(bundle.data)}
        document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": BUNDLE_TYPE}
        about = {"mediaType": OCI_MANIFEST, "digest": subject or digest, "size": 1}
        manifest = as_json({**document, "config": self._empty(), "layers": [layer], "subject": about})
        self.registry.put("team/app", "unused", manifest, OCI_MANIFEST)
        item = {"mediaType": OCI_MANIFEST, "digest": sha256(manifest), "size": len(manifest)}
        return as_json(
            {
                "schemaVersion": 2,
                "mediaType": OCI_INDEX,
                "manifests": [{**item, **({"artifactType": BUNDLE_TYPE} if typed else {})}],
            }
        )

    def lay(self, *signatures: Signature, digest: str = "") -> None:
        """Into the lookaside store."""
        for number, one in enumerate(signatures, 1):
            url = url_of(f"file://{self.lookaside}", "team/app", digest or self.image.digest, number)
            path = Path(url.removeprefix("file://"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(to_blob(one))

    def fetched(self, image: BuiltImage | None = None) -> bool:
        """Whether anything was asked for that the manifest names."""
        found = image or self.image
        return any(self.registry.count("GET", f"/blobs/{digest}") for digest in found.blobs)

    def refused(self, said: str) -> str:
        """Pulls, and is refused: nothing was fetched, nothing recorded, nothing left."""
        blobs = self.bench.blobs()
        with pytest.raises(SignatureRefused) as refusal:
            self.bench.pull(self.name)
        assert said in str(refusal.value)
        assert str(refusal.value).startswith(f"SignatureValidationFailed: pull {self.name}: ")
        assert not self.fetched()
        assert self.bench.blobs() == blobs and not self.bench.ingests() and not self.bench.strays()
        return str(refusal.value)


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maker]:
    found = Maker(tmp_path_factory.mktemp("vectors"))
    yield found
    found.close()


@pytest.fixture
def world(tmp_path: Path, maker: Maker) -> Iterator[World]:
    with FakeRegistry() as registry:
        found = World(tmp_path, registry, maker)
        yield found
        found.bench.close()
        maker.close()


# ---------------------------------------------------------------------------------------------- where signatures are


def test_without_a_signature_nothing_is_fetched(world: World) -> None:
    said = world.refused("there is no sigstore signature")
    assert "the policy's default" in said


def test_a_signature_by_cosigns_tag(world: World) -> None:
    world.tag(world.sign("evil"), world.sign())
    assert world.bench.pull(world.name).manifest_digest == world.image.digest


def test_a_signature_in_the_lookaside_store(world: World) -> None:
    world.lay(world.sign("evil"), world.sign())
    assert world.bench.pull(world.name).repo_tags == (world.name,)


def test_an_openpgp_signature_in_the_lookaside_store(world: World) -> None:
    key = world.maker.gpg_key("release@example.com")
    world.policy({"type": "signedBy", "keyType": "GPGKeys", "keyPath": str(key)})
    world.refused("there is no simple signing signature")
    claim = payload(ATOMIC, world.image.digest, world.name, {"creator": "gpg", "timestamp": 1})
    world.lay(world.maker.simple("release@example.com", claim))
    assert world.bench.pull(world.name).repo_tags == (world.name,)


class Kept:
    """A registry that keeps signatures itself, as OpenShift's."""

    def __init__(self, world: World) -> None:
        self.world = world
        key = world.maker.gpg_key("release@example.com")
        world.policy({"type": "signedBy", "keyType": "GPGKeys", "keyPath": str(key)})
        claim = payload(ATOMIC, world.image.digest, world.name, {"creator": "gpg", "timestamp": 1})
        self.good = world.maker.simple("release@example.com", claim).data
        self.path = f"^/extensions/v2/team/app/signatures/{world.image.digest}$"
        self.says("1")

    def says(self, header: str, status: int = 200) -> None:
        self.world.registry.heal()
        self.world.registry.rule("GET", "^/v2/$", Reply(status, {"X-Registry-Supports-Signatures": header}))

    def keeps(self, *items: object) -> None:
        answer = Reply(200, {"Content-Type": "application/json"}, as_json({"signatures": list(items)}))
        self.world.registry.rule("GET", self.path, answer)

    def item(self, content: bytes, kind: str = "atomic", version: int = 2) -> dict[str, object]:
        name = f"{self.world.image.digest}@0123456789abcdef0123456789abcdef"
        return {
            "schemaVersion": version, "name": name, "type": kind, "content": base64.b64encode(content).decode(),
        }  # fmt: skip


def test_a_signature_that_the_registry_keeps(world: World) -> None:
    kept = Kept(world)
    kept.keeps(kept.item(b"noise", "else"), kept.item(kept.good, version=1), kept.item(b"noise"))
    world.refused("number 1: no OpenPGP message")
    kept.says("1")
    kept.keeps(kept.item(b"noise"), kept.item(kept.good))
    image = world.bench.pull(world.name)
    # It is kept with the image: no registry is asked when it is used.
    world.registry.rule("GET", "", Reply(500))
    world.bench.store.permit(image, world.name)


def test_a_registry_that_keeps_none_is_not_asked_for_them(world: World) -> None:
    kept = Kept(world)
    kept.keeps(kept.item(kept.good))
    kept.world.registry.rules.pop(0)
    world.refused("there is no simple signing signature")
    assert not world.registry.count("GET", "^/extensions/")
    # Nor is one that is asked for sigstore's signatures alone.
    world.require("good")
    world.registry.seen.clear()
    world.refused("there is no sigstore signature")
    assert not world.registry.count("GET", "^/v2/$")


@pytest.mark.parametrize("answer", [Reply(500), Reply(200, {}, b"<html>"), Endless(b"x" * 65536)])
def test_a_registry_that_says_it_keeps_some_and_hands_over_none(world: World, answer: Reply | Endless) -> None:
    kept = Kept(world)
    kept.world.registry.rule("GET", kept.path, answer)
    with pytest.raises((RegistryUnavailable, ContentInvalid)):
        world.bench.pull(world.name)
    assert not world.fetched()


def test_a_lookaside_store_over_http(world: World) -> None:
    world.said.write_text(f"docker:\n  {world.registry.name}/team:\n    lookaside: {world.registry.url}/sigs/\n")
    path = f"/sigs/team/app@{world.image.digest.replace(':', '=')}/signature-"
    world.registry.rule("GET", f"{path}1$", Reply(200, {}, to_blob(world.sign())))
    world.registry.rule("GET", f"{path}2$", Reply(404))
    assert world.bench.pull(world.name).repo_tags == (world.name,)


def test_a_bundle_by_the_referrers_api(world: World) -> None:
    index = world.refer(world.maker.bundle("good", world.image.digest, world.name))
    world.registry.rule("GET", f"/referrers/{world.image.digest}$", Reply(200, {"Content-Type": OCI_INDEX}, index))
    assert world.bench.pull(world.name).repo_tags == (world.name,)


def test_a_bundle_on_the_second_page_of_referrers(world: World) -> None:
    index = world.refer(world.maker.bundle("good", world.image.digest, world.name))
    empty = as_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []})
    more = {"Content-Type": OCI_INDEX, "Link": '</v2/team/app/referrers/more>; rel="next"'}
    world.registry.rule("GET", f"/referrers/{world.image.digest}$", Reply(200, more, empty))
    world.registry.rule("GET", "/referrers/more$", Reply(200, {"Content-Type": OCI_INDEX}, index))
    assert world.bench.pull(world.name).repo_tags == (world.name,)


@pytest.mark.parametrize("answer", [Reply(404), Reply(400, {}, b"what?"), Reply(200, {}, b"<html>")])
def test_a_bundle_by_the_tag_that_stands_for_the_api(world: World, answer: Reply) -> None:
    index = world.refer(world.maker.bundle("good", world.image.digest, world.name), typed=False)
    world.registry.rule("GET", "/referrers/", answer)
    world.registry.put("team/app", fallback_tag(world.image.digest), index, OCI_INDEX)
    assert world.bench.pull(world.name).repo_tags == (world.name,)


def test_a_referrer_of_another_image_is_none(world: World) -> None:
    index = world.refer(world.maker.bundle("good", world.image.digest, world.name), subject="sha256:" + "0" * 64)
    world.registry.rule("GET", "/referrers/", Reply(200, {}, index))
    world.refused("there is no sigstore signature")


def test_a_bundle_that_names_no_repository_counts_only_where_that_is_configured(world: World) -> None:
    index = world.refer(world.maker.bundle("good", world.image.digest, ""))
    world.registry.rule("GET", "/referrers/", Reply(200, {}, index))
    world.refused("for no repository in particular")
    config = Bench(world.directory, policy=world.file, registries_d=(), accept_unnamed_bundles=True)
    try:
        assert config.pull(world.name).repo_tags == (world.name,)
    finally:
        config.close()


def test_registries_d_turns_attachments_off(world: World) -> None:
    world.tag(world.sign())
    world.said.write_text(f"docker:\n  {world.registry.name}:\n    use-sigstore-attachments: false\n")
    world.refused("there is no sigstore signature")
    world.said.write_text(f"docker:\n  {world.registry.name}:\n    use-sigstore-attachments: true\n")
    assert world.bench.pull(world.name).repo_tags == (world.name,)


@pytest.mark.parametrize("bad", ["docker: []", "x: 1", "docker: {a: {lookaside: 7}}", "docker: {a: {x: 1}}", "a: [b"])
def test_registries_d_that_cannot_be_read_refuses_by_name(world: World, bad: str) -> None:
    world.said.write_text(bad)
    with pytest.raises(PolicyInvalid, match=r"registries\.d .*default\.yaml"):
        world.bench.pull(world.name)


def test_a_signed_index_speaks_for_its_images(world: World) -> None:
    index = build_index([world.image])
    world.registry.put("team/app", "1", index, OCI_INDEX)
    world.tag(world.sign(digest=sha256(index)), digest=sha256(index))
    assert world.bench.pull(world.name).manifest_digest == world.image.digest


def test_a_signed_image_of_an_unsigned_index(world: World) -> None:
    world.registry.put("team/app", "1", build_index([world.image]), OCI_INDEX)
    world.tag(world.sign())
    assert world.bench.pull(world.name).manifest_digest == world.image.digest


# --------------------------------------------------------------------------------------------------- bad registries


def test_a_rejected_scope_is_refused_without_a_word_to_the_registry(world: World) -> None:
    world.policy({"type": "insecureAcceptAnything"}, scopes={f"{world.registry.name}/team": [{"type": "reject"}]})
    said = world.refused("rejects all images of this scope")
    assert f"docker {world.registry.name}/team" in said
    assert not world.registry.seen


def test_a_registry_that_withholds_signatures_fails_the_pull(world: World) -> None:
    world.tag(world.sign())
    world.registry.rule("GET", r"\.sig$", Reply(503))
    with pytest.raises(RegistryUnavailable, match="503"):
        world.bench.pull(world.name)
    assert not world.fetched()


def test_s31_an_endless_signature_is_cut_off(world: World) -> None:
    for path in (r"\.sig$", "/referrers/"):
        world.registry.rule("GET", path, Endless(b"x" * (1 << 20)), times=1)
        with pytest.raises((ContentInvalid, SignatureRefused, RegistryUnavailable)):
            world.bench.pull(world.name)
        assert not world.fetched()


def test_a_signature_whose_blob_is_another_is_refused(world: World) -> None:
    signature = world.sign()
    world.tag(signature)
    world.registry.blobs[sha256(signature.payload)] = b"x" * len(signature.payload)
    with pytest.raises(ContentInvalid, match="another digest"):
        world.bench.pull(world.name)


def test_more_signatures_than_the_limit(world: World) -> None:
    bench = Bench(world.directory, policy=world.file, signatures=3, registries_d=())
    world.tag(*[world.sign("evil")] * 4)
    try:
        with pytest.raises(ContentInvalid, match="the limit is 3"):
            bench.pull(world.name)
    finally:
        bench.close()


def test_more_bytes_of_signatures_than_the_limit(world: World) -> None:
    bench = Bench(world.directory, policy=world.file, signatures_bytes=1000, registries_d=())
    world.tag(*[world.sign("evil")] * 4)
    try:
        with pytest.raises(ContentInvalid, match="bytes in all, the limit is 1000"):
            bench.pull(world.name)
        assert not world.fetched()
    finally:
        bench.close()


# ------------------------------------------------------------------------------------------------ pulled, and later


def test_a_tag_that_moves_is_checked_again(world: World) -> None:
    world.tag(world.sign())
    first = world.bench.pull(world.name)
    evil = build_image([{"bin/app": b"two"}])
    world.registry.add("team/app", "1", evil)
    with pytest.raises(SignatureRefused):
        world.bench.pull(world.name)
    assert not world.fetched(evil)
    found = world.bench.store.get(world.name)
    assert found is not None and found.id == first.id


def test_a_pull_again_is_judged_by_the_policy_of_today(world: World) -> None:
    world.tag(world.sign())
    world.bench.pull(world.name)
    world.require("other")
    with pytest.raises(SignatureRefused):
        world.bench.pull(world.name)
    world.tag(world.sign(), world.sign("other"))
    assert world.bench.pull(world.name).repo_tags == (world.name,)


def test_the_policy_of_today_decides_about_use(world: World) -> None:
    world.tag(world.sign())
    image = world.bench.pull(world.name)
    store = world.bench.store
    for name in (world.name, image.id, image.repo_digests[0]):
        store.permit(image, name)
    world.require("other")
    for name in (world.name, image.id, image.repo_digests[0]):
        with pytest.raises(SignatureRefused, match="^SignatureValidationFailed: use image "):
            store.permit(image, name)
    world.policy({"type": "reject"}, scopes={world.name: [{"type": "insecureAcceptAnything"}]})
    store.permit(image, world.name)
    store.permit(image, image.id)


def test_use_is_judged_after_a_restart_and_without_the_registry(world: World) -> None:
    world.tag(world.sign())
    image = world.bench.pull(world.name)
    before = len(world.registry.seen)
    world.bench.close()
    world.bench.open()
    world.bench.store.permit(image, image.id)
    world.require("other")
    with pytest.raises(SignatureRefused):
        world.bench.store.permit(image, image.id)
    assert len(world.registry.seen) == before


def test_a_key_that_is_exchanged_is_another_policy(world: World, tmp_path: Path) -> None:
    key = tmp_path / "key.pub"
    key.write_bytes(world.maker.public("good").read_bytes())
    world.policy({"type": "sigstoreSigned", "keyPath": str(key)})
    world.tag(world.sign())
    image = world.bench.pull(world.name)
    world.bench.store.permit(image, image.id)
    key.unlink()
    key.write_bytes(world.maker.public("other").read_bytes())
    with pytest.raises(SignatureRefused):
        world.bench.store.permit(image, image.id)
    key.unlink()
    with pytest.raises(PolicyInvalid, match="ENOENT"):
        world.bench.store.permit(image, image.id)


def test_what_came_without_signatures_says_so(world: World) -> None:
    world.policy({"type": "insecureAcceptAnything"})
    world.tag(world.sign())
    image = world.bench.pull(world.name)
    assert not world.registry.count("GET", r"\.sig$")
    world.require("good")
    with pytest.raises(SignatureRefused) as refused:
        world.bench.store.permit(image, image.id)
    assert "pull it again" in " ".join(refused.value.__notes__)
    world.bench.store.permit(world.bench.pull(world.name), image.id)


def test_a_local_tag_opens_nothing(world: World) -> None:
    """A name that was given here stands for no registry: it is judged by where the image came from."""
    world.policy({"type": "insecureAcceptAnything"})
    image = world.bench.pull(world.name)
    world.bench.store.tag(world.name, "trusted.example/app:1")
    world.policy({"type": "reject"}, scopes={"trusted.example": [{"type": "insecureAcceptAnything"}]})
    with pytest.raises(SignatureRefused):
        world.bench.store.permit(image, "trusted.example/app:1")


def test_the_name_that_is_asked_for_decides(world: World) -> None:
    """The same image under two names, one of which the policy rejects."""
    world.policy({"type": "insecureAcceptAnything"})
    other = world.registry.add("other/app", "1", world.image)
    image = world.bench.pull(world.name)
    world.bench.pull(other)
    world.policy({"type": "reject"}, scopes={f"{world.registry.name}/other": [{"type": "insecureAcceptAnything"}]})
    world.bench.store.permit(image, other)
    world.bench.store.permit(image, image.id)
    with pytest.raises(SignatureRefused):
        world.bench.store.permit(image, world.name)


def test_an_image_is_forgotten_with_its_origins(world: World) -> None:
    world.tag(world.sign())
    image = world.bench.pull(world.name)
    world.bench.store.remove(image.id)
    assert world.bench.db.execute("SELECT count(*) FROM image_origin").fetchone() == (0,)


def test_a_layout_is_judged_by_its_path(world: World, tmp_path: Path) -> None:
    for place, requirement in (("good", "insecureAcceptAnything"), ("bad", "reject")):
        write_layout(tmp_path / place / "layout", {"1": world.image})
        document = json.loads(world.file.read_text())
        document["transports"].setdefault("oci", {})[str(tmp_path / place)] = [{"type": requirement}]
        world.file.write_text(json.dumps(document))
    with pytest.raises(SignatureRefused, match="SignatureValidationFailed: import "):
        run(world.bench.store.import_layout(tmp_path / "bad" / "layout", "1"))
    assert not world.bench.blobs()
    image = run(world.bench.store.import_layout(tmp_path / "good" / "layout", "1"))
    world.bench.store.permit(image, image.id)


@pytest.mark.parametrize("content", [None, "", "{", '{"default": []}'])
def test_a_policy_that_cannot_be_read_accepts_nothing(world: World, content: str | None) -> None:
    world.policy({"type": "insecureAcceptAnything"})
    image = world.bench.pull(world.name)
    world.file.unlink()
    if content is not None:
        world.file.write_text(content)
    for act in (lambda: world.bench.pull(world.name), lambda: world.bench.store.permit(image, image.id)):
        with pytest.raises(PolicyInvalid, match=r"policy\.json"):
            act()


def test_without_a_policy_everything_is_accepted(tmp_path: Path) -> None:
    bench = Bench(tmp_path, policy_defaults=(tmp_path / "not-there.json",))
    try:
        with FakeRegistry() as registry:
            image = bench.pull(registry.add("team/app", "1", build_image()))
            bench.store.permit(image, image.id)
            (tmp_path / "not-there.json").write_text('{"default": [{"type": "reject"}]}')
            with pytest.raises(SignatureRefused):
                bench.store.permit(image, image.id)
            with pytest.raises(SignatureRefused):
                bench.pull(str(parse(image.repo_tags[0])))
    finally:
        bench.close()


def test_a_namespace_may_have_a_policy_of_its_own(world: World, tmp_path: Path) -> None:
    """NAMESPACE.json takes the place of the policy for all, in pulls and in use; nobody joins another's pull."""
    policies = tmp_path / "policies"
    policies.mkdir()
    world.policy({"type": "insecureAcceptAnything"})
    (policies / "strict.json").write_text('{"default": [{"type": "reject"}]}')
    bench = Bench(tmp_path, policy=world.file, policy_directory=policies, registries_d=())

    async def at_once() -> list[object]:
        pulls = (bench.store.pull(world.name, namespace=one) for one in ("strict", "lax", ""))
        return list(await asyncio.gather(*pulls, return_exceptions=True))

    try:
        refused, lax, none = run(at_once())
        assert isinstance(refused, SignatureRefused) and lax == none
        assert isinstance(lax, Image)
        bench.store.permit(lax, lax.id, "lax")
        with pytest.raises(SignatureRefused):
            bench.store.permit(lax, lax.id, "strict")
        world.policy({"type": "reject"})
        (policies / "strict.json").write_text('{"default": [{"type": "insecureAcceptAnything"}] }')
        bench.store.permit(lax, lax.id, "strict")
        with pytest.raises(SignatureRefused):
            bench.store.permit(lax, lax.id)
        for name in ("../strict", "a/b", ".", "UPPER"):
            with pytest.raises(PolicyInvalid, match="no name of one"):
                bench.store.permit(lax, lax.id, name)
    finally:
        bench.close()
