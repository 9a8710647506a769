"""`ocid sign` and `ocid verify`, as commands, against Debian's docker-registry: what the one makes the other, the store
and openssl accept; with an identity by a Fulcio and a Rekor of the test's."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conformance.registry import registry
from cri.cli.main import ocid
from imagestore.attached import cosign_tag, fallback_tag
from tests.fakes.imagestore import Bench
from tests.fakes.registry import OCI_INDEX, OCI_MANIFEST, build_image, build_index, sha256
from tests.fakes.sigstore import Services
from tests.fakes.tiled_log import STAMPER_ROOT, TiledLog
from tests.integration.test_imagestore_trust_peers import Place, Stocked
from tests.support import needs
from tests.unit import test_imagestore_cosign_keys as cosign_keys
from tests.vectors import ISSUER, Maker

ONE = build_image([{"bin/app": b"one"}])
TWO = build_image([{"bin/app": b"two"}], architecture="arm64")
INDEX = build_index([ONE, TWO])
MAIL = "release@example.com"


class World(Place):
    """A registry with an index of two images, commands to be run, and stores to pull with."""

    def __init__(self, directory: Path, server: Any, maker: Maker) -> None:
        super().__init__(directory, server)
        self.maker = maker
        self.policy = directory / "policy.json"
        self.config = directory / "config.toml"
        self.config.write_text(
            f'[image]\nsignature_policy = "{self.policy}"\nregistries_d = "{directory}/registries.d"\nhosts_dirs = []\n'
        )
        self.name = f"{server.address}/team/app:1"
        self.many = f"{server.address}/many/app:1"
        self._stores = 0

    def stock(self) -> None:
        super().stock()
        for image in (ONE, TWO):
            for blob in image.blobs.values():
                self.blob("many/app", blob)
            self.manifest("many/app", image.digest, image.manifest)
        self._ask("PUT", "/v2/many/app/manifests/1", INDEX, OCI_INDEX)

    def run(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """The command, in this process: an interpreter for each would be most of the time."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = ocid(["--config", str(self.config), *words])
        assert status == code, out.getvalue() + err.getvalue()
        return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())

    def require(self, requirement: dict[str, object]) -> None:
        self.policy.write_text(json.dumps({"default": [requirement]}))

    def keyed(self, key: str = "good", kind: str = "p256", **more: object) -> None:
        self.require({"type": "sigstoreSigned", "keyPath": str(self.maker.public(key, kind)), **more})

    def pulls(self, name: str) -> bool:
        self._stores += 1
        return self.ours(self.policy, name, self.directory / f"store{self._stores}")[0]

    def verdict(self, name: str, *, accepted: bool = True) -> dict[str, Any]:
        done = self.run("verify", "--format", "json", name, code=0 if accepted else 1)
        found: dict[str, Any] = json.loads(done.stdout)
        assert found["accepted"] is accepted
        return found

    def fetch(self, repository: str, target: str) -> dict[str, Any]:
        import http.client

        connection = http.client.HTTPConnection(self.server.address, timeout=10)
        connection.request(
            "GET", f"/v2/{repository}/manifests/{target}", headers={"Accept": f"{OCI_MANIFEST}, {OCI_INDEX}"}
        )
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        assert answer.status == 200, body
        found: dict[str, Any] = json.loads(body)
        return found


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maker]:
    yield Maker(tmp_path_factory.mktemp("vectors"))


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stocked]:
    needs("root")
    with registry(tmp_path_factory.mktemp("registry"), measured=False) as server:
        yield Stocked(server)


@pytest.fixture
def world(tmp_path: Path, stocked: Stocked, maker: Maker) -> Iterator[World]:
    made = World(tmp_path, stocked.server, maker)
    stocked.anew(made)
    yield made
    maker.close()


@pytest.mark.parametrize("kind", ["p256", "p384", "rsa", "ed25519"])
def test_with_a_key(world: World, maker: Maker, kind: str) -> None:
    key = f"signer-{kind}"
    world.keyed(key, kind)
    assert not world.pulls(world.name)
    world.verdict(world.name, accepted=False)
    world.run("sign", "--key", str(maker.private(key, kind)), world.name)
    found = world.verdict(world.name)["requirements"]
    assert [(one["type"], one["met"], one["digest"]) for one in found] == [("sigstoreSigned", True, ONE_OF_TEAM)]
    assert found[0]["by"].startswith("key sha256:") and found[0]["name"] == world.name
    assert world.pulls(world.name)


ONE_OF_TEAM = build_image([{"bin/app": b"one"}]).digest


def test_openssl_alone_accepts_what_we_sign(world: World, maker: Maker) -> None:
    world.run("sign", "--key", str(maker.private("good")), world.name)
    layer = world.fetch("team/app", cosign_tag(ONE_OF_TEAM))["layers"][0]
    blob = world.server.storage / "docker/registry/v2/blobs/sha256"
    payload = (blob / layer["digest"][7:9] / layer["digest"][7:] / "data").read_bytes()
    signature = base64.b64decode(layer["annotations"]["dev.cosignproject.cosign/signature"])
    maker.check(maker.public("good").read_bytes(), signature, payload)
    assert json.loads(payload)["critical"]["image"] == {"docker-manifest-digest": ONE_OF_TEAM}
    with pytest.raises(subprocess.CalledProcessError):
        maker.check(maker.public("good").read_bytes(), signature, payload + b" ")


def test_a_second_signature_leaves_the_first(world: World, maker: Maker) -> None:
    for key in ("first", "second"):
        world.run("sign", "--key", str(maker.private(key)), world.name)
    for key in ("first", "second"):
        world.keyed(key)
        assert world.pulls(world.name)
    # All must be met: both are.
    both = [{"type": "sigstoreSigned", "keyPath": str(maker.public(key))} for key in ("first", "second")]
    world.policy.write_text(json.dumps({"default": both}))
    assert len(world.verdict(world.name)["requirements"]) == 2 and world.pulls(world.name)


def test_bundles_as_referrers(world: World, maker: Maker) -> None:
    """Twice, so that the index that stands for the API keeps what it had."""
    for key in ("first", "second"):
        world.run("sign", "--bundle", "--key", str(maker.private(key)), world.name)
    assert len(world.fetch("team/app", fallback_tag(ONE_OF_TEAM))["manifests"]) == 2
    for key in ("first", "second"):
        world.keyed(key)
        found = world.verdict(world.name)["requirements"][0]
        assert found["signature"].startswith("referrer sha256:")
        assert world.pulls(world.name)


def test_every_manifest_of_an_index_is_signed(world: World, maker: Maker) -> None:
    done = world.run("sign", "--format", "json", "--key", str(maker.private("good")), world.many)
    assert [one["digest"] for one in json.loads(done.stdout)] == [sha256(INDEX), ONE.digest, TWO.digest]
    world.keyed()
    assert world.pulls(world.many)
    assert world.verdict(world.many)["digests"] == [ONE.digest, sha256(INDEX)]
    for digest in (ONE.digest, TWO.digest, sha256(INDEX)):
        world.fetch("many/app", cosign_tag(digest))


def test_openpgp_into_the_lookaside_store_and_skopeo_accepts_it(world: World, maker: Maker) -> None:
    public = maker.gpg_key("good@example.com")
    secret = world.directory / "secret.asc"
    secret.write_bytes(maker.gpg("--armor", "--export-secret-keys", "good@example.com"))
    world.require({"type": "signedBy", "keyType": "GPGKeys", "keyPath": str(public)})
    world.run("sign", "--openpgp-key", str(secret), world.name)
    found = world.verdict(world.name)["requirements"][0]
    assert "good@example.com" in found["by"] and found["signature"].startswith("lookaside file://")
    assert world.pulls(world.name)
    assert world.skopeo(world.policy, world.name, world.directory / "copied") == (True, "")


def test_a_name_that_is_no_tag_is_asked_for(world: World, maker: Maker) -> None:
    by_digest = f"{world.name.rpartition(':')[0]}@{ONE_OF_TEAM}"
    done = world.run("sign", "--key", str(maker.private("good")), by_digest, code=125)
    assert "has no tag; say with --as" in done.stderr
    world.run("sign", "--key", str(maker.private("good")), "--as", "example.com/released/app:7", by_digest)
    world.keyed(signedIdentity={"type": "exactReference", "dockerReference": "example.com/released/app:7"})
    assert world.pulls(world.name)


def test_an_encrypted_key_and_a_wrong_password(world: World, maker: Maker, tmp_path: Path) -> None:
    key, password = tmp_path / "locked.key", tmp_path / "password"
    maker._openssl("pkcs8", "-topk8", "-in", str(maker.private("good")), "-passout", "pass:horse", "-out", str(key))
    password.write_text("donkey\n")
    words = ("sign", "--key", str(key), "--password-file", str(password), world.name)
    done = world.run(*words, code=125)
    assert "private key: cannot be used" in done.stderr and "donkey" not in done.stderr
    password.write_text("horse\n")
    world.run(*words)
    world.keyed()
    assert world.pulls(world.name)


def test_a_key_as_cosign_keeps_it(world: World, tmp_path: Path) -> None:
    for name, data in (("cosign.key", cosign_keys.KEY), ("cosign.pub", cosign_keys.PUBLIC), ("password", b"horse\n")):
        (tmp_path / name).write_bytes(data)
    world.run("sign", "--key", f"{tmp_path}/cosign.key", "--password-file", f"{tmp_path}/password", world.name)
    world.require({"type": "sigstoreSigned", "keyPath": f"{tmp_path}/cosign.pub"})
    assert world.pulls(world.name)


# ------------------------------------------------------------------------------------------------------ an identity


@pytest.fixture
def services(maker: Maker) -> Iterator[Services]:
    with Services(maker) as made:
        yield made


def keyless(world: World, services: Services, *more: str, mail: str = MAIL, code: int = 0) -> str:
    token = world.directory / "token"
    token.write_text(f"token-of-{mail}\n")
    words = ("--identity-token", str(token), "--fulcio-url", services.url, "--rekor-url", services.url)
    return world.run("sign", *words, *more, world.name, code=code).stderr


def fulcio(world: World, maker: Maker) -> None:
    # Bundles carry the signer's certificate alone: what is between has to be with the roots.
    maker.authority("fulcio")
    roots = world.directory / "roots.pem"
    roots.write_bytes(maker.authority("fulcio").read_bytes() + maker.between("fulcio-between", "fulcio").read_bytes())
    who = {"caPath": str(roots), "oidcIssuer": ISSUER, "subjectEmail": MAIL}
    world.require({"type": "sigstoreSigned", "fulcio": who, "rekorPublicKeyPath": str(maker.public("log"))})


@pytest.mark.parametrize("form", [(), ("--bundle",)], ids=["annotations", "bundle"])
def test_with_an_identity(world: World, maker: Maker, services: Services, form: tuple[str, ...]) -> None:
    fulcio(world, maker)
    keyless(world, services, *form, mail="somebody@example.com")
    refused = world.verdict(world.name, accepted=False)["requirements"][0]["reasons"]
    assert any("the policy wants 'release@example.com'" in reason for reason in refused), refused
    keyless(world, services, *form)
    found = world.verdict(world.name)["requirements"][0]
    assert found["by"] == f"{MAIL}, for whom {ISSUER} vouched, logged as number 7"
    assert world.pulls(world.name)
    # The key was of a minute: nothing but a request for a certificate, and signatures, left the process.
    assert {path for path, _ in services.seen} == {"/api/v2/signingCert", "/api/v1/log/entries"}


def test_a_key_whose_signatures_are_logged(world: World, maker: Maker, services: Services) -> None:
    world.keyed(rekorPublicKeyPath=str(maker.public("log")))
    world.run("sign", "--key", str(maker.private("good")), world.name)
    assert "no log entry" in world.verdict(world.name, accepted=False)["requirements"][0]["reasons"][0]
    for form in ((), ("--bundle",)):
        world.run("sign", "--key", str(maker.private("good")), "--rekor-url", services.url, *form, world.name)
        assert world.pulls(world.name)


# ------------------------------------------------------------------------------------------------------- Rekor 2


@pytest.fixture
def tiled(maker: Maker) -> Iterator[TiledLog]:
    with TiledLog(maker) as made:
        yield made


def in_rekor_2(tiled: TiledLog, *more: str) -> tuple[str, ...]:
    return ("--bundle", "--rekor-url", tiled.url, "--rekor-version", "2", "--rekor-key", str(tiled.key), *more)


@pytest.mark.parametrize("kind", ["p256", "p384", "p521", "rsa", "ed25519"])
def test_a_key_whose_signatures_are_logged_in_rekor_2(world: World, maker: Maker, tiled: TiledLog, kind: str) -> None:
    key = f"signer-{kind}"
    world.keyed(key, kind, rekorPublicKeyPath=str(tiled.key))
    world.run("sign", "--bundle", "--key", str(maker.private(key, kind)), world.name)
    assert "no log entry" in world.verdict(world.name, accepted=False)["requirements"][0]["reasons"][0]
    world.run("sign", "--key", str(maker.private(key, kind)), *in_rekor_2(tiled), world.name)
    found = world.verdict(world.name)["requirements"][0]
    assert found["by"].endswith(", logged as number 5") and len(tiled.bodies) == 6
    assert json.loads(tiled.bodies[-1])["kind"] == ("dsse" if kind == "ed25519" else "hashedrekord")
    assert world.pulls(world.name)
    world.keyed(key, kind, rekorPublicKeyPath=str(maker.public("log")))
    assert not world.pulls(world.name)


def test_an_index_in_rekor_2(world: World, maker: Maker, tiled: TiledLog) -> None:
    """The tree grows by each: proofs are of trees of several sizes."""
    world.keyed(rekorPublicKeyPath=str(tiled.key))
    world.run("sign", "--key", str(maker.private("good")), *in_rekor_2(tiled), world.many)
    assert len(tiled.bodies) == 8 and world.pulls(world.many)


def test_an_identity_in_rekor_2_with_the_time_of_an_authority(
    world: World, maker: Maker, services: Services, tiled: TiledLog
) -> None:
    fulcio(world, maker)
    policy = json.loads(world.policy.read_text())
    policy["default"][0]["rekorPublicKeyPath"] = str(tiled.key)
    world.policy.write_text(json.dumps(policy))
    clocks = maker.authority(STAMPER_ROOT)
    world.config.write_text(f'{world.config.read_text()}timestamp_authorities = "{clocks}"\n')
    token = world.directory / "token"
    token.write_text(f"token-of-{MAIL}\n")
    who = ("sign", "--identity-token", str(token), "--fulcio-url", services.url, *in_rekor_2(tiled))
    assert "needs --timestamp-url" in world.run(*who, world.name, code=125).stderr
    world.run(*who, "--timestamp-url", tiled.clock, world.name)
    found = world.verdict(world.name)["requirements"][0]
    assert found["by"].endswith("logged as number 5, with the time of an authority")
    # The one who vouches is in the log's entry, not a key that is known to nobody.
    verifier = json.loads(tiled.bodies[-1])["spec"]["hashedRekordV002"]["signature"]["verifier"]
    assert set(verifier) == {"x509Certificate", "keyDetails"}


def _other_root(answer: dict[str, Any]) -> None:
    answer["inclusionProof"]["rootHash"] = base64.b64encode(b"\1" * 32).decode()


def _other_place(answer: dict[str, Any]) -> None:
    answer["inclusionProof"]["logIndex"] = "0"


def _other_body(answer: dict[str, Any]) -> None:
    answer["canonicalizedBody"] = base64.b64encode(b'{"other":4}').decode()


def _no_proof(answer: dict[str, Any]) -> None:
    del answer["inclusionProof"]


def _unsigned(answer: dict[str, Any]) -> None:
    note = answer["inclusionProof"]["checkpoint"]
    note["envelope"] = note["envelope"].partition("\n\n")[0] + "\n\n"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_other_root, "of another tree than the proof"),
        (_other_place, "does not lead to the log's signed root"),
        (_other_body, "does not lead to the log's signed root"),
        (_no_proof, "no proof of inclusion with a checkpoint"),
        (_unsigned, "signed by no log that the policy trusts"),
    ],
)
def test_what_a_log_answers_is_verified_before_anything_is_pushed(
    world: World, maker: Maker, tiled: TiledLog, spoil: Any, says: str
) -> None:
    tiled.spoil = spoil
    done = world.run("sign", "--key", str(maker.private("good")), *in_rekor_2(tiled), world.name, code=125)
    assert says in done.stderr and len(tiled.bodies) == 6
    with pytest.raises(AssertionError, match="MANIFEST_UNKNOWN|manifest unknown"):
        world.fetch("team/app", fallback_tag(ONE_OF_TEAM))


def test_what_rekor_2_refuses_is_told(world: World, maker: Maker, tiled: TiledLog) -> None:
    maker._openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2056", "-out", "odd.key")
    odd = str(maker.directory / "odd.key")
    done = world.run("sign", "--key", odd, *in_rekor_2(tiled), world.name, code=125)
    assert "RSA of 2056 bits; logs of Rekor 2 take 2048, 3072, 4096" in done.stderr and not tiled.seen
    words = list(in_rekor_2(tiled))
    words[words.index("--rekor-url") + 1] += "/elsewhere"
    done = world.run("sign", "--key", str(maker.private("good")), *words, world.name, code=125)
    assert "answered 404 for log entry" in done.stderr
    other = str(maker.public("log"))
    done = world.run(
        "sign", "--key", str(maker.private("good")), *in_rekor_2(tiled, "--rekor-key", other), world.name, code=125
    )
    assert "the log's answer does not verify" in done.stderr


def test_s30_a_token_goes_nowhere_else_and_is_not_repeated(world: World, services: Services, maker: Maker) -> None:
    token = world.directory / "token"
    token.write_text("SECRET-of-nobody")
    words = ("--identity-token", str(token), "--fulcio-url", services.url, "--rekor-url", services.url, world.name)
    done = world.run("sign", *words, code=125)
    assert "answered 401 for certificate" in done.stderr and "SECRET" not in done.stderr
    with Services(maker) as elsewhere:
        services.redirect = f"{elsewhere.url}/api/v2/signingCert"
        done = world.run("sign", *words, code=125)
        assert "redirects more than 0 times" in done.stderr and not elsewhere.seen


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "exactly one of --key"),
        (("--key", "KEY", "--openpgp-key", "KEY"), "exactly one of --key"),
        (("--identity-token", "KEY"), "needs --fulcio-url and --rekor-url"),
        (("--openpgp-key", "KEY", "--bundle"), "knows neither bundles nor logs"),
        (
            ("--key", "KEY", "--rekor-version", "2", "--rekor-url", "http://x"),
            "needs --rekor-url, --bundle and --rekor-key",
        ),
        (("--key", "KEY", "--rekor-key", "KEY"), "is the key of the log at --rekor-url"),
        (("--key", "KEY", "--timestamp-url", "http://x"), "--timestamp-url needs --bundle"),
        (("--key", "/does/not/exist"), "read /does/not/exist: no such file or directory"),
        (("--key", "JUNK"), "private key: cannot be used"),
    ],
)
def test_what_cannot_be_meant(world: World, maker: Maker, words: tuple[str, ...], said: str) -> None:
    (world.directory / "junk").write_text("junk")
    named = {"KEY": str(maker.private("good")), "JUNK": str(world.directory / "junk")}
    done = world.run("sign", *(named.get(word, word) for word in words), world.name, code=125)
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------------------- verify, in words


def test_verify_says_in_words_what_was_met_by_what(world: World, maker: Maker) -> None:
    requirements = [
        {"type": "sigstoreSigned", "keyPath": str(maker.public("good"))},
        {"type": "sigstoreSigned", "keyPath": str(maker.public("other"))},
    ]
    world.policy.write_text(json.dumps({"default": [{"type": "reject"}], "transports": {"docker": {
        f"{world.server.address}/team": requirements}}}))  # fmt: skip
    world.run("sign", "--key", str(maker.private("good")), world.name)
    said = world.run("verify", world.name, code=1).stdout.splitlines()
    assert said[0] == f"{world.name}: REFUSED by the requirements of docker {world.server.address}/team"
    assert said[1] == f"  digest   {ONE_OF_TEAM}"
    assert said[2].startswith("  met      sigstoreSigned: signed by key sha256:") and f"as {world.name}" in said[2]
    assert said[3] == "  not met  sigstoreSigned"
    assert "no good signature by key sha256:" in said[4]
    world.run("sign", "--key", str(maker.private("other")), world.name)
    assert "accepted" in world.run("verify", world.name).stdout.splitlines()[0]
    other = world.directory / "other.json"
    other.write_text('{"default": [{"type": "reject"}]}')
    assert "REFUSED" in world.run("verify", "--policy", str(other), world.name, code=1).stdout
    other.write_text("{")
    assert "other.json" in world.run("verify", "--policy", str(other), world.name, code=125).stderr


def test_verify_keeps_nothing(world: World) -> None:
    world.policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    before = set(os.listdir(world.directory))
    world.run("verify", world.name)
    assert set(os.listdir(world.directory)) == before
    bench = Bench(world.directory)
    try:
        assert not bench.blobs()
    finally:
        bench.close()


# ----------------------------------------------------------------------------------------------------- ocid copy


def test_a_copy_asks_the_policy_of_its_source(world: World, maker: Maker) -> None:
    """As skopeo does: nothing is copied of what is refused, from a registry or from files."""
    world.keyed()
    target = world.directory / "layout"
    done = world.run("copy", f"docker://{world.name}", f"oci:{target}:1", code=125)
    assert "the signature policy refuses" in done.stderr and "there is no sigstore signature" in done.stderr
    assert not list(target.glob("blobs/sha256/*"))
    world.run("sign", "--key", str(maker.private("good")), world.name)
    world.run("copy", "--remove-signatures", f"docker://{world.name}", f"oci:{target}:1")
    world.run("sign", "--key", str(maker.private("good")), world.many)
    world.run("copy", "--remove-signatures", "--all", f"docker://{world.many}", f"oci:{world.directory}/all:1")
    # The layout has no signatures of its own; a policy may accept it by its path.
    words = (f"oci:{target}:1", f"dir:{world.directory}/dir")
    world.run("copy", *words, code=125)
    world.run("copy", "--insecure-policy", *words)
    accept = {"oci": {str(target): [{"type": "insecureAcceptAnything"}]}}
    world.policy.write_text(json.dumps({"default": [{"type": "reject"}], "transports": accept}))
    world.run("copy", f"oci:{target}:1", f"dir:{world.directory}/another")
