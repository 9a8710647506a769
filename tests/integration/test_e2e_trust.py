"""Signature policies over the real socket: what a kubelet is told, and that a container is made of nothing that the
policy of the moment refuses."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc import StatusCode

from conformance.cri_client import container
from imagestore.attached import cosign_tag
from imagestore.signatures import COSIGN_TYPE
from tests import warm
from tests.e2e import Node, busybox, node, stocked
from tests.fakes.registry import OCI_MANIFEST, FakeRegistry, as_json, sha256
from tests.support import needs
from tests.vectors import Maker, payload

WORKS = ["sh", "-c", "exit 3"]


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    with stocked() as made:
        yield made


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policy") / "policy.json"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, policy: Path, registry: FakeRegistry) -> Iterator[Node]:
    """A node that has pulled and run something: what that starts stays."""
    needs("root", "overlay")
    write(policy, {"type": "insecureAcceptAnything"})
    with node(tmp_path_factory.mktemp("trust"), image=f'signature_policy = "{policy}"') as made:
        name = registry.add("ready", "1", busybox())
        made.client.pull(name)
        pod, one, _ = made.run(name, WORKS)
        assert made.client.wait_exit(one) == 3
        made.drop(pod)
        yield made


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("vectors"))


def write(policy: Path, requirement: dict[str, object]) -> None:
    fresh = policy.with_suffix(".new")
    fresh.write_text(json.dumps({"default": [requirement]}))
    fresh.rename(policy)


def sign(registry: FakeRegistry, maker: Maker, name: str, key: str) -> None:
    """As cosign attaches a signature."""
    image, repository = busybox(), name.partition("/")[2].partition(":")[0]
    signature = maker.cosign(key, payload("cosign container image signature", image.digest, name))
    for blob in (signature.payload, b"{}"):
        registry.blobs[sha256(blob)] = blob
    layer = {"mediaType": COSIGN_TYPE, "digest": sha256(signature.payload), "size": len(signature.payload)}
    config = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": sha256(b"{}"), "size": 2}
    layers = [{**layer, "annotations": dict(signature.annotations)}]
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers}
    registry.put(repository, cosign_tag(image.digest), as_json(document), OCI_MANIFEST)


def refusal(error: pytest.ExceptionInfo[grpc.RpcError]) -> str:
    """What a kubelet makes of a refusal: it strips the code where that is UNKNOWN and looks at the first word."""
    assert error.value.code() == StatusCode.UNKNOWN  # type: ignore[attr-defined]
    said = str(error.value.details())  # type: ignore[attr-defined]
    assert said.startswith("SignatureValidationFailed: ") and "\n" not in said
    return said


def test_a_kubelet_knows_a_refusal(served: Node, registry: FakeRegistry, policy: Path, maker: Maker) -> None:
    name = registry.add("unsigned/app", "1", busybox())
    write(policy, {"type": "sigstoreSigned", "keyPath": str(maker.public("good"))})
    before = served.held()
    with pytest.raises(grpc.RpcError) as error:
        served.client.pull(name)
    assert f"pull {name}" in refusal(error) and "there is no sigstore signature" in refusal(error)
    served.settles(before)
    done = warm.run([*served.words, "pull", name], text=True)
    assert done.returncode == 125 and "SignatureValidationFailed" in done.stderr


def test_no_container_of_what_the_policy_refuses_today(
    served: Node, registry: FakeRegistry, policy: Path, maker: Maker
) -> None:
    name = registry.add("signed/app", "1", busybox())
    sign(registry, maker, name, "good")
    write(policy, {"type": "sigstoreSigned", "keyPath": str(maker.public("good"))})
    image = served.client.pull(name)
    pod, one, _ = served.run(name, WORKS)
    assert served.client.wait_exit(one) == 3
    write(policy, {"type": "sigstoreSigned", "keyPath": str(maker.public("other"))})
    config = served.pod_config()
    for asked in (name, image):
        with pytest.raises(grpc.RpcError) as error:
            served.client.create(pod, container("refused", asked, WORKS), config)
        assert f"use image {asked}" in refusal(error)
    # The one that is there stays: what runs was accepted when it was made.
    assert served.client.wait_exit(one) == 3
    write(policy, {"type": "reject"})
    with pytest.raises(grpc.RpcError) as error:
        served.client.create(pod, container("refused", name, WORKS), config)
    assert "rejects all images" in refusal(error)
    write(policy, {"type": "insecureAcceptAnything"})
    served.drop(pod)


def test_a_policy_that_is_broken_pulls_nothing(served: Node, registry: FakeRegistry, policy: Path) -> None:
    name = registry.add("any/app", "1", busybox())
    kept = policy.read_text()
    policy.write_text('{"default": []}')
    try:
        with pytest.raises(grpc.RpcError) as error:
            served.client.pull(name)
        assert error.value.code() == StatusCode.FAILED_PRECONDITION  # type: ignore[attr-defined]
        assert f"signature policy {policy}.default: an empty list" in str(error.value.details())  # type: ignore[attr-defined]
    finally:
        policy.write_text(kept)


def test_verification_costs_nothing_where_no_policy_asks_for_it(tmp_path: Path, registry: FakeRegistry) -> None:
    """The libraries behind it are not in the memory of a daemon that has pulled and run without such a policy."""
    policy = tmp_path / "policy.json"
    write(policy, {"type": "insecureAcceptAnything"})
    (tmp_path / "node").mkdir()
    with node(tmp_path / "node", image=f'signature_policy = "{policy}"') as made:
        name = registry.add("plain/app", "1", busybox())
        made.client.pull(name)
        assert made.process is not None
        maps = Path(f"/proc/{made.process.pid}/maps").read_text()
        loaded = [word for word in ("pysequoia", "cryptography", "_yaml") if word in maps]
        assert not loaded


def test_what_is_changed_on_disk_is_found_while_the_daemon_serves(served: Node, registry: FakeRegistry) -> None:
    name = registry.add("deep/app", "1", busybox())
    served.client.pull(name)

    def deep(code: int) -> str:
        words = [*served.words, "verify", "--deep", name]
        done = warm.run(words, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    verity = "fs-verity: (not on this filesystem|2 of 2 blobs sealed)\n"
    assert re.fullmatch(f"{verity}{name}: as its diff ids say\n", deep(0))
    program = next(served.root.glob("snapshots/layers/*/fs/bin/busybox"))
    status = program.stat()
    data = bytearray(program.read_bytes())
    data[len(data) // 2] ^= 1
    with program.open("r+b") as file:
        file.write(data)
    os.utime(program, ns=(status.st_atime_ns, status.st_mtime_ns))
    try:
        said = deep(1)
        # Each of its names is a hard link to the same file.
        assert "bin/busybox: has other content" in said and said.endswith("differences\n")
        assert warm.run([*served.words, "doctor"], text=True).returncode == 0  # as many files as there were
        done = warm.run([*served.words, "doctor", "--deep", "--format", "json"], text=True)
        assert done.returncode == 1
        assert any("bin/busybox: has other content" in one["what"] for one in json.loads(done.stdout)["left"])
    finally:
        data[len(data) // 2] ^= 1
        with program.open("r+b") as file:
            file.write(data)
        os.utime(program, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert deep(0)
    assert not list(served.root.glob("verify-*"))
