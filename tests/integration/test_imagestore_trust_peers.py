"""The same image, the same policy, the same signatures, to skopeo and to us: both accept, or both refuse.

The registry is Debian's docker-registry, the signatures are gpg's and openssl's. Debian's skopeo knows no
sigstore; tests/peers asks containers/image itself about that.
"""

from __future__ import annotations

import http.client
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conformance.registry import Registry, registry
from imagestore.attached import cosign_tag
from imagestore.lookaside import url_of
from imagestore.model import SignatureRefused
from imagestore.signatures import COSIGN_TYPE, Cosign, Simple
from runtime.linux.files import remove_tree
from tests.fakes.imagestore import Bench
from tests.fakes.registry import OCI_MANIFEST, as_json, build_image, sha256
from tests.support import needs
from tests.vectors import Maker, payload

ATOMIC = "atomic container signature"
IMAGE = build_image([{"bin/app": b"one"}])
OTHER = "sha256:" + "0" * 64


class Stocked:
    """A registry that several tests use, one after the other. It keeps nothing in memory: no cache is configured."""

    def __init__(self, server: Registry) -> None:
        self.server = server
        self._kept = server.storage.with_name("kept")

    def anew(self, place: Place) -> None:
        """As `place` stocks it, whatever a test before has done there: pushed once, and copied from then on."""
        if not self._kept.exists():
            place.stock()
            subprocess.run(["cp", "-a", self.server.storage, self._kept], check=True)
            return
        remove_tree(self.server.storage)
        subprocess.run(["cp", "-a", self._kept, self.server.storage], check=True)


class Place:
    """A registry with one image in two repositories, once it is stocked, and a lookaside store."""

    def __init__(self, directory: Path, server: Registry) -> None:
        self.directory, self.server = directory, server
        self.lookaside = directory / "lookaside"
        (directory / "registries.d").mkdir()
        text = f"default-docker: {{lookaside: 'file://{self.lookaside}', use-sigstore-attachments: true}}\n"
        (directory / "registries.d" / "default.yaml").write_text(text)

    def stock(self) -> None:
        for repository in ("team/app", "copy/app"):
            for blob in IMAGE.blobs.values():
                self.blob(repository, blob)
            self.manifest(repository, "1", IMAGE.manifest)

    def _ask(self, method: str, path: str, body: bytes, kind: str) -> str:
        connection = http.client.HTTPConnection(self.server.address, timeout=10)
        connection.request(method, path, body, {"Content-Type": kind})
        answer = connection.getresponse()
        answer.read()
        assert answer.status in (201, 202), f"{method} {path}: {answer.status}"
        connection.close()
        return answer.headers.get("Location", "")

    def blob(self, repository: str, data: bytes) -> None:
        where = self._ask("POST", f"/v2/{repository}/blobs/uploads/", b"", "application/octet-stream")
        path = where.partition(self.server.address)[2]
        self._ask("PUT", f"{path}&digest={sha256(data)}", data, "application/octet-stream")

    def manifest(self, repository: str, tag: str, data: bytes) -> None:
        self._ask("PUT", f"/v2/{repository}/manifests/{tag}", data, OCI_MANIFEST)

    def attach(self, repository: str, signatures: list[Cosign]) -> None:
        """As cosign does; none takes those of the test before away."""
        layers = []
        self.blob(repository, b"{}")
        for one in signatures:
            self.blob(repository, one.payload)
            about = {"mediaType": COSIGN_TYPE, "digest": sha256(one.payload), "size": len(one.payload)}
            layers.append({**about, "annotations": dict(one.annotations)})
        config = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": sha256(b"{}"), "size": 2}
        document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers}
        self.manifest(repository, cosign_tag(IMAGE.digest), as_json(document))

    def lay(self, repository: str, signatures: list[Simple]) -> None:
        for number in range(1, 4):
            url = url_of(f"file://{self.lookaside}", repository, IMAGE.digest, number)
            path = Path(url.removeprefix("file://"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if number <= len(signatures):
                path.write_bytes(signatures[number - 1].data)

    def skopeo(self, policy: Path, name: str, target: Path) -> tuple[bool, str]:
        done = subprocess.run(
            ["skopeo", "--policy", str(policy), "--registries.d", str(self.directory / "registries.d"), "copy",
             "--src-tls-verify=false", f"docker://{name}", f"dir:{target}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode == 0, done.stderr

    def ours(self, policy: Path, name: str, directory: Path) -> tuple[bool, str]:
        directory.mkdir()
        bench = Bench(directory, policy=policy, registries_d=(self.directory / "registries.d",))
        try:
            bench.pull(name)
        except SignatureRefused as error:
            return False, str(error)
        finally:
            bench.close()
        return True, ""


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maker]:
    found = Maker(tmp_path_factory.mktemp("vectors"))
    found.gpg_key("good@example.com")
    yield found
    found.close()


@pytest.fixture
def place(tmp_path: Path, maker: Maker) -> Iterator[Place]:
    needs("root")
    with registry(tmp_path / "registry", measured=False) as server:
        made = Place(tmp_path, server)
        made.stock()
        yield made
    maker.close()


@dataclass(frozen=True)
class Case:
    """A signature for `signed` ("H" is the registry's address), and what is asked for."""

    accepted: bool
    signed: str = "H/team/app:1"
    asked: str = "H/team/app:1"
    key: str = "good"
    digest: str = IMAGE.digest
    identity: dict[str, str] = field(default_factory=dict)
    unsigned: bool = False

    def at(self, address: str) -> tuple[str, str, str]:
        """What is asked for, its repository, and what the signature names, in the registry at `address`."""
        asked = self.asked.replace("H/", f"{address}/")
        return (
            asked,
            asked.partition("/")[2].partition("@")[0].partition(":")[0],
            self.signed.replace("H/", f"{address}/"),
        )

    def signed_identity(self, address: str) -> dict[str, object]:
        """The part of a requirement."""
        found = {key: value.replace("H/", f"{address}/") for key, value in self.identity.items()}
        return {"signedIdentity": found} if found else {}


BY_DIGEST = f"H/team/app@{IMAGE.digest}"
CASES = {
    "good": Case(True),
    "unsigned": Case(False, unsigned=True),
    "wrong key": Case(False, key="evil"),
    "another image": Case(False, digest=OTHER),
    "another tag": Case(False, signed="H/team/app:2"),
    "no tag": Case(False, signed="H/team/app"),
    "replay": Case(False, asked="H/copy/app:1"),
    "by digest": Case(True, asked=BY_DIGEST),
    "by digest, replay": Case(False, signed="H/copy/app:1", asked=BY_DIGEST),
    "exact": Case(True, identity={"type": "matchExact"}),
    "exact, by digest": Case(False, asked=BY_DIGEST, identity={"type": "matchExact"}),
    "exact, digest signed": Case(True, signed=BY_DIGEST, asked=BY_DIGEST, identity={"type": "matchExact"}),
    "repository": Case(True, signed="H/team/app:2", identity={"type": "matchRepository"}),
    "repository, no tag": Case(True, signed="H/team/app", identity={"type": "matchRepository"}),
    "repository, replay": Case(False, asked="H/copy/app:1", identity={"type": "matchRepository"}),
    "reference": Case(True, "H/x:9", identity={"type": "exactReference", "dockerReference": "H/x:9"}),
    "another reference": Case(False, "H/x:8", identity={"type": "exactReference", "dockerReference": "H/x:9"}),
    "that repository": Case(True, "H/x:8", identity={"type": "exactRepository", "dockerRepository": "H/x"}),
    "another repository": Case(False, "H/xy:8", identity={"type": "exactRepository", "dockerRepository": "H/x"}),
    "remapped": Case(
        True, asked="H/copy/app:1", identity={"type": "remapIdentity", "prefix": "H/copy", "signedPrefix": "H/team"}
    ),
    "not remapped": Case(
        False, asked="H/copy/app:1", identity={"type": "remapIdentity", "prefix": "H/cop", "signedPrefix": "H/team"}
    ),
}


def test_the_same_verdict_as_skopeo(place: Place, maker: Maker) -> None:
    for number, (name, case) in enumerate(CASES.items()):
        asked, repository, signed = case.at(place.server.address)
        maker.gpg_key(f"{case.key}@example.com")
        claim = payload(ATOMIC, case.digest, signed, {"creator": "gpg", "timestamp": 1})
        place.lay(repository, [] if case.unsigned else [maker.simple(f"{case.key}@example.com", claim)])
        policy = place.directory / "policy.json"
        key = {"keyType": "GPGKeys", "keyPath": str(maker.gpg_key("good@example.com"))}
        requirement = {"type": "signedBy", **key, **case.signed_identity(place.server.address)}
        policy.write_text(json.dumps({"default": [requirement]}))
        theirs, said = place.skopeo(policy, asked, place.directory / f"{number}-dir")
        ours, told = place.ours(policy, asked, place.directory / f"{number}-ours")
        assert theirs is case.accepted, f"{name}: skopeo: {said}"
        assert ours is case.accepted, f"{name}: ours: {told}"


BROKEN = {
    "unknown key": {"default": [{"type": "reject", "x": 1}]},
    "empty": {"default": []},
    "no default": {"transports": {}},
    "unknown top": {"default": [{"type": "insecureAcceptAnything"}], "x": 1},
    "empty scope": {"default": [{"type": "insecureAcceptAnything"}], "transports": {"docker": {"a": []}}},
    "two keys": {"default": [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/a", "keyData": "eA=="}]},
    "relative": {"default": [{"type": "insecureAcceptAnything"}], "transports": {"dir": {"a": [{"type": "reject"}]}}},
    "bare prefix": {
        "default": [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/a", "signedIdentity": {
            "type": "remapIdentity", "prefix": "UPPER//x", "signedPrefix": "example.com"}}]
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_skopeo_cannot_read_we_cannot(tmp_path: Path, name: str) -> None:
    from imagestore.model import PolicyInvalid
    from imagestore.policy import read_policy

    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps(BROKEN[name]))
    (tmp_path / "source").mkdir()
    done = subprocess.run(
        ["skopeo", "--policy", str(policy), "copy", f"dir:{tmp_path}/source", f"dir:{tmp_path}/target"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and "olicy" in done.stderr, done.stderr
    with pytest.raises(PolicyInvalid):
        read_policy(policy)


def test_a_signature_by_skopeo_itself(place: Place, maker: Maker, tmp_path: Path) -> None:
    """standalone-sign, which is what Debian's skopeo signs with."""
    key = maker.gpg_key("good@example.com")
    (tmp_path / "manifest").write_bytes(IMAGE.manifest)
    name = f"{place.server.address}/team/app:1"
    words = [str(tmp_path / "manifest"), name, "good@example.com", "-o", str(tmp_path / "sig")]
    subprocess.run(
        ["skopeo", "standalone-sign", *words],
        check=True, capture_output=True, env={"PATH": "/usr/bin:/bin", "GNUPGHOME": str(maker.directory / "gpg")},
    )  # fmt: skip
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"default": [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": str(key)}]}))
    place.lay("team/app", [Simple((tmp_path / "sig").read_bytes(), "")])
    assert place.ours(policy, name, tmp_path / "ours") == (True, "")
