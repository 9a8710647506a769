"""A log of Rekor 2 and a time-stamping authority in the test process, with openssl's keys behind them.

    POST /api/v2/log/entries      protobuf's JSON; refused where Rekor 2 refuses it: unknown fields, a digest or a
                                  signature that does not belong to the key, a kind of key that it is not, a duplicate
    POST /api/v1/timestamp        RFC 3161, by `openssl ts`

What is entered stays in the tree, which grows; every answer has a path in it and a checkpoint, a signed note of C2SP.
Numbers are strings and what is empty is there, as in the answers of the real one. `spoil` changes an answer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
from collections.abc import Callable
from typing import Any

from tests.fakes.posted import Posted
from tests.vectors import Maker, b64, compact, pae, tree_path, tree_root

KEY, KIND, ORIGIN = "tiled-log", "ed25519", "log2025.example"
STAMPER, STAMPER_ROOT = "clock", "clock-root"
# PublicKeyDetails: how openssl words such a key, the hash, and how long that is.
DETAILS = {
    "PKIX_ECDSA_P256_SHA_256": ("ASN1 OID: prime256v1", "sha256", 32),
    "PKIX_ECDSA_P384_SHA_384": ("ASN1 OID: secp384r1", "sha384", 48),
    "PKIX_ECDSA_P521_SHA_512": ("ASN1 OID: secp521r1", "sha512", 64),
    "PKIX_RSA_PKCS1V15_2048_SHA256": ("Public-Key: (2048 bit)\nModulus", "sha256", 32),
    "PKIX_RSA_PKCS1V15_3072_SHA256": ("Public-Key: (3072 bit)\nModulus", "sha256", 32),
    "PKIX_ED25519": ("ED25519 Public-Key", "", 0),
}


class Refused(Exception):
    """status 400, as the real one words it."""


class TiledLog(Posted):
    """`url` is the log's, `clock` the authority's; `bodies` is what was entered."""

    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.maker = maker
        self.bodies: list[bytes] = [compact({"other": number}) for number in range(5)]
        self.seen: list[tuple[str, bytes]] = []
        self.spoil: Callable[[dict[str, Any]], None] = lambda answer: None
        self.key = maker.public(KEY, KIND)
        maker.stamper(STAMPER, STAMPER_ROOT)

    def posted(self, path: str, kind: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        self.seen.append((path, body))
        status, data = self.answer(path, kind, body)
        return status, {}, data

    @property
    def clock(self) -> str:
        return f"{self.url}/api/v1/timestamp"

    # ------------------------------------------------------------------------------------------------------- answers

    def answer(self, path: str, kind: str, body: bytes) -> tuple[int, bytes]:
        if path == "/api/v1/timestamp":
            if kind != "application/timestamp-query":
                return 400, b"wrong content type"
            return 201, self.maker.stamped(STAMPER, body)
        if path != "/api/v2/log/entries":
            return 404, _error(5, "Not Found")
        try:
            name, spec = self._spec(json.loads(body))
        except Refused as refused:
            return 400, _error(3, str(refused))
        entry = compact({"apiVersion": "0.0.2", "kind": name, "spec": spec})
        if entry in self.bodies:
            return 409, _error(6, f"an equivalent entry already exists in the transparency log with index {len(entry)}")
        self.bodies.append(entry)
        answer = self._entry(name, len(self.bodies) - 1)
        self.spoil(answer)
        return 201, json.dumps(answer).encode()

    def _entry(self, name: str, index: int) -> dict[str, Any]:
        leaves = [hashlib.sha256(b"\x00" + body).digest() for body in self.bodies]
        root = tree_root(leaves)
        note = f"{ORIGIN}\n{len(leaves)}\n{b64(root)}\n"
        log_id = hashlib.sha256(ORIGIN.encode() + b"\n\x01" + self._der(self.key.read_bytes())[-32:]).digest()
        line = b64(log_id[:4] + self.maker.sign(KEY, note.encode(), KIND))
        return {
            "logIndex": str(index),
            "logId": {"keyId": b64(log_id)},
            "kindVersion": {"kind": name, "version": "0.0.2"},
            "integratedTime": "0",
            "inclusionPromise": None,
            "inclusionProof": {
                "logIndex": str(index),
                "rootHash": b64(root),
                "treeSize": str(len(leaves)),
                "hashes": [b64(item) for item in tree_path(index, leaves)],
                "checkpoint": {"envelope": f"{note}\n\u2014 {ORIGIN} {line}\n"},
            },
            "canonicalizedBody": b64(self.bodies[index]),
        }

    def _der(self, pem: bytes) -> bytes:
        return base64.b64decode(b"".join(line for line in pem.splitlines() if not line.startswith(b"-----")))

    # ------------------------------------------------------------------------------------------------------ requests

    def _spec(self, request: dict[str, Any]) -> tuple[str, dict[str, object]]:
        if set(request) == {"hashedRekordRequestV002"}:
            return "hashedrekord", self._hashed(request["hashedRekordRequestV002"])
        if set(request) == {"dsseRequestV002"}:
            return "dsse", self._dsse(request["dsseRequestV002"])
        raise Refused("invalid type, must be either hashedrekord or dsse")

    def _hashed(self, request: dict[str, Any]) -> dict[str, object]:
        _only("hashedrekord", request, "digest", "signature")
        made = request["signature"]
        _only("hashedrekord", made, "content", "verifier")
        digest, signature = (base64.b64decode(text) for text in (request["digest"], made["content"]))
        key, hash_, size = self._verifier("hashedrekord", made["verifier"])
        if not hash_ or len(digest) != size:
            raise Refused("invalid hashedrekord request")
        self._check("hashedrekord", key, signature, digest, "-pkeyopt", f"digest:{hash_}")
        named = {"algorithm": f"SHA2_{hash_.removeprefix('sha')}", "digest": request["digest"]}
        return {"hashedRekordV002": {"data": named, "signature": made}}

    def _dsse(self, request: dict[str, Any]) -> dict[str, object]:
        _only("dsse", request, "envelope", "verifiers")
        envelope = request["envelope"]
        _only("dsse", envelope, "payload", "payloadType", "signatures")
        payload = base64.b64decode(envelope["payload"])
        (made,), (verifier,) = envelope["signatures"], request["verifiers"]
        key, hash_, _ = self._verifier("dsse", verifier)
        if hash_:
            raise Refused("invalid dsse request")  # the real one would take it; nobody here should ask
        self._check("dsse", key, base64.b64decode(made["sig"]), pae(envelope["payloadType"], payload), "-rawin")
        named = {"algorithm": "SHA2_256", "digest": b64(hashlib.sha256(payload).digest())}
        return {"dsseV002": {"payloadHash": named, "signatures": [{"content": made["sig"], "verifier": verifier}]}}

    def _verifier(self, kind: str, verifier: dict[str, Any]) -> tuple[bytes, str, int]:
        """The key in PEM, and what belongs to it."""
        forms = set(verifier) - {"keyDetails"}
        if forms not in ({"publicKey"}, {"x509Certificate"}) or verifier.get("keyDetails") not in DETAILS:
            raise Refused(f"invalid {kind} request")
        raw = base64.b64decode(verifier[forms.pop()]["rawBytes"])
        if "x509Certificate" in verifier:
            key = self.maker._openssl("x509", "-inform", "DER", "-pubkey", "-noout", data=raw)
        else:
            key = self.maker._openssl("pkey", "-pubin", "-inform", "DER", data=raw)
        words, hash_, size = DETAILS[verifier["keyDetails"]]
        if words not in self.maker._openssl("pkey", "-pubin", "-text", "-noout", data=key).decode():
            raise Refused(f"invalid {kind} request")
        return key, hash_, size

    def _check(self, kind: str, key: bytes, signature: bytes, data: bytes, *how: str) -> None:
        for name, content in (("log.pub", key), ("log.sig", signature), ("log.data", data)):
            (self.maker.directory / name).write_bytes(content)
        words = ("pkeyutl", "-verify", "-pubin", "-inkey", "log.pub", "-sigfile", "log.sig", "-in", "log.data", *how)
        try:
            self.maker._openssl(*words)
        except subprocess.CalledProcessError:
            raise Refused(f"invalid {kind} request") from None


def _only(kind: str, document: dict[str, Any], *names: str) -> None:
    """protobuf's JSON refuses fields that it does not know; what is missing, the log refuses."""
    if set(document) != set(names):
        raise Refused(f"invalid {kind} request")


def _error(code: int, message: str) -> bytes:
    return json.dumps({"code": code, "message": message, "details": []}).encode()
