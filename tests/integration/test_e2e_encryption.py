"""Encrypted images over the real socket: pulled with the caller's key, run by nobody who has none, decrypted by the
node's own keys for a kubelet."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc import StatusCode

from conformance.cri_client import container
from tests import warm
from tests.e2e import Node, busybox, busybox_layout, node
from tests.fakes.registry import OCI_MANIFEST, FakeRegistry
from tests.support import needs

WORKS = ["sh", "-c", "exit 3"]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """key.pem and key.pub, and `node`, where the node has its own."""
    directory = tmp_path_factory.mktemp("keys")
    (directory / "node").mkdir()
    for words in ("genpkey -algorithm RSA -out key.pem", "pkey -in key.pem -pubout -out key.pub"):
        subprocess.run(["openssl", *words.split()], cwd=directory, check=True, capture_output=True)
    return directory


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        yield made


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, keys: Path, registry: FakeRegistry) -> Iterator[Node]:
    """A node that has run something: what that starts stays."""
    needs("root", "overlay")
    with node(tmp_path_factory.mktemp("encryption"), image=f'decryption_keys_path = "{keys}/node"') as made:
        made.client.pull(ready := registry.add("busybox", "1", busybox()))
        pod, one, _ = made.run(ready, WORKS)
        assert made.client.wait_exit(one) == 3
        made.drop(pod)
        yield made


def ocid(served: Node, *words: str, code: int = 0) -> str:
    done = warm.run([*served.words, *words], text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def encrypted(served: Node, registry: FakeRegistry, keys: Path) -> str:
    """The busybox image, encrypted by `ocid copy`, in the registry."""
    layout = keys / "encrypted"
    ocid(
        served, "copy", "--encryption-key", f"jwe:{keys}/key.pub", f"oci:{busybox_layout()}:busybox:1", f"oci:{layout}"
    )
    blobs = {f"sha256:{path.name}": path.read_bytes() for path in (layout / "blobs/sha256").iterdir()}
    digest = json.loads((layout / "index.json").read_bytes())["manifests"][0]["digest"]
    registry.put("sealed", "1", blobs.pop(digest), OCI_MANIFEST)
    registry.blobs.update(blobs)
    return f"{registry.name}/sealed:1"


def test_from_ocid_copy_to_a_container(served: Node, registry: FakeRegistry, keys: Path) -> None:
    name, key = encrypted(served, registry, keys), f"{keys}/key.pem"
    with pytest.raises(grpc.RpcError) as error:
        served.client.pull(name)
    assert error.value.code() == StatusCode.PERMISSION_DENIED
    said = str(error.value.details())
    assert "encrypted (jwe), and there is no private key to open it" in said and f"{keys}/node" in said
    assert "there is no private key" in ocid(served, "pull", name, code=125)

    image = ocid(served, "pull", "--decryption-key", key, name).strip()
    # It is here, unpacked; without a key it is still nobody's.
    config = served.pod_config()
    pod = served.client.run_pod(config)
    for asked in (name, image):
        with pytest.raises(grpc.RpcError, match="there is no private key"):
            served.client.create(pod, container("refused", asked, WORKS), config)
    served.drop(pod)
    assert "there is no private key" in ocid(served, "run", "--rm", "--net", "none", name, *WORKS, code=125)
    ocid(served, "run", "--rm", "--net", "none", "--decryption-key", key, name, *WORKS, code=3)
    assert "there is no private key" in ocid(served, "verify", "--deep", name, code=125)
    assert "as its diff ids say" in ocid(served, "verify", "--deep", "--decryption-key", key, name)

    # What a kubelet may run is what the node has keys for.
    (keys / "node/key").write_bytes((keys / "key.pem").read_bytes())
    assert served.client.pull(name) == image
    pod, one, _ = served.run(name, WORKS)
    assert served.client.wait_exit(one) == 3
    served.drop(pod)
    # Neither the key nor what it opens is in the daemon's log.
    log = served.log.read_text()
    assert "PRIVATE KEY" not in log and "symkey" not in log
