"""Key providers, by a program of ours that speaks ocicrypt's protocol. Debian's skopeo is older than that protocol, so
what is asked and answered stands here in full, as ocicrypt's own types have it."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from imagestore.encryption import key_providers, key_services
from imagestore.encryption.keys import key_files, pack, recipients, unpack
from imagestore.model import DecryptionRefused, ImageError
from tests.fakes import key_provider
from tests.fakes.imagestore import QUICK, Bench
from tests.fakes.registry import FakeRegistry, build_image, make_tls
from tests.integration.test_imagestore_copy import copy
from tests.integration.test_imagestore_encryption import IMAGE, Keys, World, manifest_of
from tests.support import SOON_S

T = TypeVar("T")

ANNOTATION = "org.opencontainers.image.enc.keys.provider.vault"


class Node(World):
    """A node with a file of providers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.home = self.directory / "vault"
        self.home.mkdir()
        (self.home / "secret").write_bytes(b"of this node")
        self.file = self.directory / "providers.json"
        program = {"path": sys.executable, "args": ["-IS", str(Path(key_provider.__file__)), str(self.home)]}
        self.provide(vault={"cmd": program}, far={"grpc": "127.0.0.1:1"})
        self.bench.close()
        self.bench = Bench(self.directory / "store", decryption_keys=self.node_keys, key_providers=self.file)
        self.config = replace(QUICK, key_providers=self.file)

    def provide(self, **providers: object) -> None:
        self.file.write_text(json.dumps({"key-providers": providers}))

    def asked(self) -> list[dict[str, Any]]:
        path = self.home / "asked"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def sealed(self, *to: str) -> Path:
        """A layout that we have encrypted."""
        target = self.directory / f"sealed-{len(list(self.directory.iterdir()))}"
        copy(f"oci:{self.layout()}:1", f"oci:{target}:1", recipients=recipients(to), config=self.config)
        return target


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with FakeRegistry() as registry:
        made = Node(tmp_path, registry, Keys(tmp_path / "keys"))
        yield made
        made.bench.close()


def test_what_is_asked_and_answered(node: Node) -> None:
    encrypted = node.sealed("provider:vault:two", "provider:vault:three")
    (wrapped, _) = node.asked()
    told = {"vault": [base64.b64encode(b"two").decode(), base64.b64encode(b"three").decode()]}
    options = wrapped["keywrapparams"].pop("optsdata")
    assert wrapped == {
        "op": "keywrap",
        "keywrapparams": {"ec": {"Parameters": told, "DecryptConfig": {"Parameters": {}}}},
        "keyunwrapparams": {"dc": None, "annotation": None},
    }
    assert set(json.loads(base64.b64decode(options))) == {"symkey", "digest", "cipheroptions"}
    packets = [layer["annotations"][ANNOTATION] for layer in manifest_of(encrypted)["layers"]]
    node.holds(node.pull(node.serve(encrypted)))
    assert node.asked()[2:] == [
        {
            "op": "keyunwrap",
            "keywrapparams": {"ec": None, "optsdata": None},
            "keyunwrapparams": {"dc": {"Parameters": {}}, "annotation": packet},
        }
        for packet in packets
    ]


def test_it_is_asked_for_every_use(node: Node) -> None:
    """A provider that is gone opens nothing more."""
    image = node.pull(node.serve(node.sealed("provider:vault")))
    asked = len(node.asked())
    node.bench.store.permit(image, image.repo_tags[0])
    assert len(node.asked()) == asked + 2
    node.provide()
    with pytest.raises(DecryptionRefused, match=r"encrypted \(provider.vault\), and there is no private key"):
        node.bench.store.permit(image, image.repo_tags[0])


def test_a_copy_asks_those_that_are_named(node: Node) -> None:
    encrypted = node.sealed("provider:vault")
    source, plain = f"oci:{encrypted}:1", node.directory / "plain"
    with pytest.raises(ImageError, match="there is no private key to open it"):
        copy(source, f"oci:{plain}:1", decryption_keys=key_files(["provider:other"]), config=node.config)
    copy(source, f"oci:{plain}:1", decryption_keys=key_files(["provider:vault:mine"]), config=node.config)
    assert [layer["digest"] for layer in manifest_of(plain)["layers"]] == list(IMAGE.layer_digests)
    assert node.asked()[-1]["keyunwrapparams"]["dc"] == {"Parameters": {"vault": [base64.b64encode(b"mine").decode()]}}
    with pytest.raises(ImageError, match=r"key provider 'absent' is not in .*providers.json"):
        copy(f"oci:{node.layout()}:1", f"oci:{plain}2:1", recipients=recipients(["provider:absent"]),
             config=node.config)  # fmt: skip


def test_what_a_caller_says_goes_along_to_a_daemon() -> None:
    (file,) = unpack(pack(key_files(["provider:vault:a:b"])))
    assert (file.name, file.data) == ("provider:vault", b"a:b")
    with pytest.raises(DecryptionRefused, match="expected provider:NAME"):
        key_files(["provider::x"])


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("", "its answer is none of ocicrypt's protocol"),
        ("SECRET", "its answer is none of ocicrypt's protocol"),
        ("[1]", "its answer is none of ocicrypt's protocol"),
        ('{"keyunwrapresults": {"optsdata": "%%"}}', "its answer is none of ocicrypt's protocol"),
        ('{"keyunwrapresults": {"optsdata": ""}}', "its answer has no optsdata"),
        ('{"keywrapresults": {"annotation": "AAAA"}}', "its answer has no optsdata"),
        ("x" * (1 << 20), "answered more than 262144 bytes, killed"),
    ],
)
def test_a_provider_that_answers_nonsense(node: Node, answer: str, says: str) -> None:
    name = node.serve(node.sealed("provider:vault"))
    (node.home / "answer").write_text(answer)
    with pytest.raises(DecryptionRefused) as refused:
        node.pull(name)
    assert says in str(refused.value) and "SECRET" not in str(refused.value)
    assert node.registry.count("GET", "/blobs/") == 1  # the config's: no layer was asked for
    node.holds_nothing()


def test_another_secret_opens_nothing_and_a_key_file_still_does(node: Node) -> None:
    jwe = f"jwe:{node.keys.public('rsa')}"
    name = node.serve(node.sealed("provider:vault", jwe))
    (node.home / "secret").write_bytes(b"of another node")
    with pytest.raises(DecryptionRefused, match="program python.*: exit code 1") as refused:
        node.pull(name)
    assert "SECRET" not in str(refused.value)
    asked = len(node.asked())
    node.holds(node.pull(name, node.keys.private("rsa")))
    assert len(node.asked()) == asked  # a key that opens it needs no program


def test_an_image_names_no_programs(node: Node) -> None:
    """Only the node's file does, and of many packets for one provider a few are tried."""
    encrypted = node.sealed("provider:vault")

    def many(manifest: dict[str, Any]) -> None:
        for layer in manifest["layers"]:
            notes = layer["annotations"]
            notes[ANNOTATION] = ",".join([base64.b64encode(b"noise" * 10).decode()] * 300)
            notes[f"{ANNOTATION}/../../bin/sh"] = notes[f"{ANNOTATION[:-5]}far"] = "AAAA"

    with pytest.raises(DecryptionRefused, match="there is no private key"):
        node.pull(node.serve(encrypted, "bad/app", many))
    assert len([one for one in node.asked() if one["op"] == "keyunwrap"]) == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "providers.json: not valid JSON"),
        ('{"key-providers": {"vault": {"cmd": {"path": "vault"}}}}', "'vault' is no absolute path"),
        ('{"key-providers": {"vault": {"cmd": {"path": "/does/not/exist"}}}}', "start: ENOENT"),
        ('{"key-providers": {"vault": {"grpc": "127.0.0.1:1"}}}', "service 127.0.0.1:1: UNAVAILABLE"),
        ('{"key-providers": {"vault": {"grpc": "198.51.100.1:50000"}}}', "is not on this machine, and has no grpc-tls"),
        ('{"key-providers": {"vault": {}}}', "neither cmd nor grpc"),
        (
            '{"key-providers": {"vault": {"grpc": "198.51.100.1:1", "grpc-tls": {"insecure-skip-verify": true}}}}',
            "who answers would not be known",
        ),
        (None, "ENOENT"),
    ],
)
def test_a_file_that_cannot_be_used(node: Node, text: str | None, says: str) -> None:
    name = node.serve(node.sealed("provider:vault"))
    if text is None:
        node.file.unlink()
    else:
        node.file.write_text(text)
    with pytest.raises(DecryptionRefused, match=says):
        node.pull(name)


def silenced(node: Node) -> Callable[[], list[int]]:
    """From now on the provider does not answer: the processes that do not."""
    (node.home / "silent").mkdir()
    return lambda: [int(name) for name in os.listdir(node.home / "silent")]


async def whichever(probe: Callable[[], T], what: str) -> T:
    """As `eventually`, for the event loop."""
    async with asyncio.timeout(SOON_S):
        while not (found := probe()):
            await asyncio.sleep(0.01)
    assert found, what
    return found


def test_r14_one_that_is_silent_holds_up_nobody_else_and_ends_with_its_pulls(node: Node) -> None:
    """More of them than there are threads that write what others download."""
    names = [node.serve(node.sealed("provider:vault"), f"stuck/app{n}") for n in range(2)]
    plain = node.registry.add("plain", "1", build_image([{"x": b"y"}]))
    asked, store = silenced(node), node.bench.store
    count = node.bench.config.concurrent_downloads + 4

    async def body() -> None:
        # Each in a namespace of its own is a pull of its own.
        stuck = [asyncio.create_task(store.pull(names[n % 2], namespace=f"n{n}")) for n in range(count)]
        await whichever(lambda: len(asked()) == count, "all of them wait")
        assert (await store.pull(plain)).repo_tags == (plain,)
        for pull in stuck:
            pull.cancel()
        await asyncio.wait(stuck)
        assert all(pull.cancelled() for pull in stuck)
        assert not [pid for pid in asked() if Path(f"/proc/{pid}").exists()]

    asyncio.run(body())


def test_a_service_that_is_silent_ends_with_its_pull(node: Node, vault: list[str]) -> None:
    name = node.serve(node.sealed("provider:vault"))
    asked, began = silenced(node), time.monotonic()

    async def body() -> None:
        pull = asyncio.create_task(node.bench.store.pull(name))
        await whichever(asked, "it is asked")
        pull.cancel()
        await asyncio.wait({pull})
        assert pull.cancelled() and time.monotonic() - began < key_providers.ANSWER_S

    asyncio.run(body())
    for pid in asked():  # the service's own
        os.kill(pid, signal.SIGKILL)


# --------------------------------------------------------------------------------------------------------- services


@contextmanager
def served(node: Node, tls: Path | None = None) -> Iterator[tuple[str, list[str]]]:
    """The same provider as a service: where, and which methods were called."""
    import grpc

    called: list[str] = []

    def answer(message: bytes, context: Any) -> bytes:
        # By protobuf's own hand: keyProviderKeyWrapProtocolInput and -Output are one field of bytes each.
        request = BytesValue.FromString(message).value
        command = [sys.executable, "-IS", key_provider.__file__, str(node.home)]
        made = subprocess.run(command, input=request, capture_output=True, check=False)
        if made.returncode:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "SECRET: not wrapped by me")
        return BytesValue(value=made.stdout).SerializeToString()

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            called.append(details.method)
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Handler()])
    address = f"unix:{node.directory}/vault.sock"
    if tls is None:
        server.add_insecure_port(address)
    else:
        pair = ((tls / "server.key").read_bytes(), (tls / "server.crt").read_bytes())
        address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', grpc.ssl_server_credentials([pair]))}"
    server.start()
    try:
        yield address, called
    finally:
        server.stop(None).wait()


@pytest.fixture
def vault(node: Node) -> Iterator[list[str]]:
    with served(node) as (address, called):
        node.provide(vault={"grpc": address})
        yield called


def test_a_service_behind_tls_is_asked_where_it_is_known(node: Node) -> None:
    (node.directory / "theirs").mkdir()
    make_tls(node.directory, "vault.example")
    make_tls(node.directory / "theirs", "vault.example")
    with served(node, node.directory) as (address, called):

        def knows(certificate: str, name: str) -> None:
            tls = {"root-ca-file": f"{node.directory}/{certificate}", "server-name": name}
            node.provide(vault={"grpc": address, "grpc-tls": tls})

        knows("server.crt", "vault.example")
        name = node.serve(node.sealed("provider:vault"))
        image = node.pull(name)
        node.holds(image)
        before = len(called)
        for certificate, other in (("server.crt", "other.example"), ("theirs/server.crt", "vault.example")):
            knows(certificate, other)
            with pytest.raises(DecryptionRefused, match=r"service 127.0.0.1:\d+: UNAVAILABLE"):
                node.bench.store.permit(image, name)
        assert len(called) == before
        knows("missing.crt", "vault.example")
        with pytest.raises(DecryptionRefused, match="ENOENT"):
            node.bench.store.permit(image, name)


def test_a_service_is_asked_as_a_program_is(node: Node, vault: list[str]) -> None:
    name = node.serve(node.sealed("provider:vault"))
    node.holds(node.pull(name))
    calls = [f"/keyprovider.KeyProviderService/{one}" for one in ("WrapKey", "WrapKey", "UnWrapKey", "UnWrapKey")]
    assert vault == calls and [one["op"] for one in node.asked()] == ["keywrap"] * 2 + ["keyunwrap"] * 2
    (node.home / "secret").write_bytes(b"of another node")
    with pytest.raises(DecryptionRefused, match=r"service unix:.*vault.sock: PERMISSION_DENIED") as refused:
        node.pull(name)
    assert "SECRET" not in str(refused.value)
    (node.home / "answer").write_text("SECRET" * 100_000)
    with pytest.raises(DecryptionRefused, match="RESOURCE_EXHAUSTED"):
        node.pull(name)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 300, 70_000])
def test_messages_are_protobufs(size: int) -> None:
    data = bytes(size)
    assert BytesValue.FromString(key_services._pack(data)).value == data
    if size:
        assert key_services._unpack(BytesValue(value=data).SerializeToString()) == data
    for wrong in (b"", b"\x0a", b"\x0a\x05abc", b"\x12\x01a", b"\x0a\xff\xff\xff\xff\xff\xff"):
        assert key_services._unpack(wrong) == b""
