"""The readers of what strangers have signed, sealed or configured, for tests.fuzz.targets: functions and valid inputs.

A key that nobody has stands for the policy's and the node's: nothing may ever be accepted.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from imagestore.claims import cosign, cosign_payload, simple, simple_payload, statement, statement_payload
from imagestore.encryption import jwe, pkcs7
from imagestore.host_files import with_certificates
from imagestore.hosts import hosts_for
from imagestore.identity import DEFAULT
from imagestore.model import ContentInvalid, ImageError, PolicyInvalid
from imagestore.openpgp_packets import unwrapped
from imagestore.policy import Material, SigstoreSigned, parse_policy
from imagestore.reference import is_digest, parse
from imagestore.scopes import in_registry
from imagestore.signatures import BUNDLE_TYPE, ENTRY, SIGNATURE, Bundle, Cosign, from_blob, to_blob
from imagestore.sigstore import NotSigned, Trusted, in_log, verify

_DIGEST = "sha256:" + "a" * 64
_NAME = "r.example/team/app:1"
_KEY = ec.generate_private_key(ec.SECP256R1())
_RSA = rsa.generate_private_key(65537, 2048)
_TRUSTED = Trusted(
    SigstoreSigned((Material("keyData"),), None, None, (), DEFAULT), (_KEY.public_key(),), (_KEY.public_key(),)
)


def policy(data: bytes) -> None:
    """A policy that was taken decides about every image, by at least one requirement."""
    try:
        found = parse_policy(data, "policy.json")
    except PolicyInvalid as error:
        assert str(error)
        return
    assert found.requirements(in_registry(parse(_NAME)))[1]


def hosts_toml(data: bytes) -> None:
    """Hosts whose URLs were checked, or ImageError; and one of them is the registry."""
    directory = Path(tempfile.gettempdir()) / f"ocid-fuzz-{os.getpid()}-hosts"
    (directory / "r.example").mkdir(parents=True, exist_ok=True)
    (directory / "r.example/hosts.toml").write_bytes(data)
    try:
        found = hosts_for("r.example", (directory,), 16)
    except ImageError as error:
        assert str(error)
        return
    assert with_certificates(found, "r.example", ()) == found
    assert [host.upstream for host in found].count(True) == 1
    for host in found:
        parts = urlsplit(host.base)
        assert parts.scheme in ("http", "https") and "@" not in parts.netloc and not parts.query and not parts.fragment
        assert not any(set(value) & set("\r\n\0") for _, value in host.headers)


def claim(data: bytes) -> None:
    """About digests, under names, or ContentInvalid."""
    for read in (cosign, simple, statement):
        try:
            found = read(data)
        except ContentInvalid:
            continue
        assert all(is_digest(one.digest) for one in (found if isinstance(found, tuple) else (found,)))


def signature(data: bytes) -> None:
    """A kept form comes back as it was, and nobody's signature is good."""
    try:
        kept = from_blob(data, "x")
        assert from_blob(to_blob(kept), "x") == kept
    except ContentInvalid:
        pass
    text = data.decode("latin-1")
    for found in (Bundle(data, "x"), Cosign(b"{}", {SIGNATURE: "AAAA", ENTRY: text}, "x")):
        for check in (lambda one: verify(one, _TRUSTED, 0.0), lambda one: in_log(one, _TRUSTED.logs, (b"k",))):
            try:
                check(found)
            except (NotSigned, ContentInvalid):
                continue
            raise AssertionError("accepted")


def openpgp(data: bytes) -> None:
    """No packet is larger than it looks."""
    try:
        assert len(unwrapped(data, 1 << 16)) <= max(len(data), 1 << 16)
    except ValueError as error:
        assert str(error)


def sealed(data: bytes) -> None:
    """Not for us."""
    for read, key in ((jwe.Packet, _KEY), (jwe.Packet, _RSA), (pkcs7.Packet, _RSA)):
        try:
            assert read(data, "x").unwrap(key) is None
        except ContentInvalid as error:
            assert str(error)


def _bundle() -> bytes:
    entry = {"logIndex": "1", "logId": {"keyId": "AAAA"}, "integratedTime": "1", "canonicalizedBody": "e30="}
    entry["inclusionPromise"] = {"signedEntryTimestamp": "AAAA"}
    payload = base64.b64encode(statement_payload(_DIGEST, _NAME)).decode()
    envelope = {"payload": payload, "payloadType": "application/vnd.in-toto+json", "signatures": [{"sig": "AAAA"}]}
    material = {"publicKey": {"hint": "x"}, "tlogEntries": [entry]}
    return json.dumps({"mediaType": BUNDLE_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope}).encode()


_POLICY = b"""{"default":[{"type":"reject"}],"transports":{"docker":{"r.example/team":[{"type":"sigstoreSigned",
"keyDatas":["AAAA"],"rekorPublicKeyPath":"/k","signedIdentity":{"type":"remapIdentity","prefix":"a.example",
"signedPrefix":"b.example/c"}}],"*.example":[{"type":"signedBy","keyType":"GPGKeys","keyPath":"/k"}]},
"oci":{"/srv":[{"type":"insecureAcceptAnything"}]}}}"""
_HOSTS = b"""server = "https://r.example"
[host."http://m.example:5000/v2/p"]
capabilities = ["pull", "resolve"]
override_path = true
client = [["a", "b"]]
dial_timeout = "1m30s"
[host."http://m.example:5000/v2/p".header]
x = ["a"]
"""
_SEEDS = {
    policy: (_POLICY,),
    hosts_toml: (_HOSTS,),
    claim: (
        cosign_payload(_DIGEST, _NAME, "c", 1),
        simple_payload(_DIGEST, _NAME, "c", 1),
        statement_payload(_DIGEST, _NAME),
    ),
    signature: (_bundle(), to_blob(Bundle(_bundle(), "x")), to_blob(Cosign(b"{}", {SIGNATURE: "AAAA"}, "x"))),
    openpgp: (b"\xcb\x05b\0\0\0\0", b"\xa3\x01" + b"\x63\0\0", b"\xe1\xcb\xe0a\x05"),
    sealed: (jwe.wrap(b"{}", [ec.generate_private_key(ec.SECP256R1()).public_key()]),),
}
TARGETS: dict[str, tuple[Callable[[bytes], None], tuple[bytes, ...]]] = {
    target.__name__: (target, seeds) for target, seeds in _SEEDS.items()
}
