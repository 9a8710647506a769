"""The table of docs/trust.md, judged by containers/image: what podman, skopeo and CRI-O would do with each cell.

Runs where `python -m conformance.trust` has built the judge (OCID_JUDGE), against Debian's docker-registry. What
containers/image does otherwise stands in OTHERWISE, with the reason, and a difference that is gone fails.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.registry import registry
from imagestore.attached import cosign_tag
from imagestore.signatures import COSIGN_TYPE, Cosign, Simple
from tests.fakes.registry import OCI_MANIFEST, as_json, build_image, sha256
from tests.integration.test_imagestore_trust_peers import CASES, Place
from tests.trust_table import ACCEPTED, COLUMNS, COSIGN, NOTHING, ROWS, Wanted, case, cell
from tests.unit.test_imagestore_policy import WRONG
from tests.vectors import Maker, payload

IMAGE = build_image([{"bin/app": b"one"}])
CELLS = [
    (row, column)
    for row in ROWS
    for column in COLUMNS
    # It knows no bundles; of OpenPGP, Debian's skopeo is asked (tests/integration/test_imagestore_trust_peers.py).
    if cell(row, column) != NOTHING and "bundle" not in row and not row.startswith("signedBy")
]
OTHERWISE = {
    ("sigstoreSigned keyPath, RSA PSS", "good"): "it takes RSA signatures of PKCS #1 v1.5 only",
}


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("vectors"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("place")
    with registry(directory / "registry", measured=False) as server:
        made = Place(directory, server)
        made.stock()
        yield made


def put(place: Place, repository: str, signature: Cosign) -> None:
    """The image, and the signature as cosign attaches it."""
    for blob in (*IMAGE.blobs.values(), signature.payload, b"{}"):
        place.blob(repository, blob)
    place.manifest(repository, "1", IMAGE.manifest)
    layer = {"mediaType": COSIGN_TYPE, "digest": sha256(signature.payload), "size": len(signature.payload)}
    config = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": sha256(b"{}"), "size": 2}
    layers = [{**layer, "annotations": dict(signature.annotations)}]
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers}
    place.manifest(repository, cosign_tag(IMAGE.digest), as_json(document))


def judged(place: Place, tmp_path: Path, policy: object, name: str) -> dict[str, object]:
    """containers/image's verdict."""
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(policy))
    words = [os.environ["OCID_JUDGE"], str(file), str(place.directory / "registries.d"), name]
    found: dict[str, object] = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    return found


@pytest.mark.parametrize(("row", "column"), CELLS)
def test_cell(place: Place, maker: Maker, tmp_path: Path, row: str, column: str) -> None:
    repository = f"cell{CELLS.index((row, column))}/app"
    name = f"{place.server.address}/{repository}:1"
    requirement, signature = case(maker, row, column, Wanted(IMAGE.digest, name))
    assert isinstance(signature, Cosign) and not isinstance(signature, Simple)
    put(place, repository, signature)
    said = judged(place, tmp_path, {"default": [requirement]}, name)
    as_we_do = said["accepted"] is (cell(row, column) == ACCEPTED)
    assert as_we_do is ((row, column) not in OTHERWISE), said["error"]


def test_the_differences_are_of_cells_that_are_judged() -> None:
    assert set(OTHERWISE) <= set(CELLS)


@pytest.mark.parametrize("name", CASES)
def test_identities(place: Place, maker: Maker, tmp_path: Path, name: str) -> None:
    """Which names fit which: the cases that Debian's skopeo has answered for OpenPGP."""
    found = CASES[name]
    asked, repository, signed = found.at(place.server.address)
    signature = maker.cosign(found.key, payload(COSIGN, found.digest, signed))
    place.attach(repository, [] if found.unsigned else [signature])
    requirement = {"type": "sigstoreSigned", "keyPath": str(maker.public("good"))}
    requirement |= found.signed_identity(place.server.address)
    said = judged(place, tmp_path, {"default": [requirement]}, asked)
    assert said["accepted"] is found.accepted, said["error"]
    assert place.ours(tmp_path / "policy.json", asked, tmp_path / "ours")[0] is found.accepted


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_is_no_policy_here_is_none_there(place: Place, tmp_path: Path, number: int) -> None:
    said = judged(place, tmp_path, WRONG[number][0], f"{place.server.address}/team/app:1")
    assert str(said["error"]).startswith("policy: "), (WRONG[number], said)
