"""A Fulcio and a Rekor in the test process, with openssl's keys behind them (tests/vectors.py).

`with Services(maker) as services:` serves both on one port of loopback. Whoever brings the token "token-of-MAIL" gets a
certificate for MAIL; what is entered in the log is checked as Rekor does: the signature must be one.
"""

from __future__ import annotations

import base64
import json
import time
from typing import Any

from tests.fakes.posted import Posted
from tests.vectors import ISSUER, Maker, compact, pae


class Services(Posted):
    """`url` for both; `seen` has every body."""

    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.maker = maker
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.redirect = ""

    def posted(self, path: str, _kind: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        document = json.loads(body)
        self.seen.append((path, document))
        status, answer = self.answer(path, document)
        return status, {"Location": self.redirect} if self.redirect else {}, json.dumps(answer).encode()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if self.redirect:
            return 307, {}
        if path == "/api/v2/signingCert":
            return self._certificate(body)
        if path == "/api/v1/log/entries":
            return 201, {"24296fb24b8ad77a": self._entry(body)}
        return 404, {"message": "no such path"}

    def _certificate(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        token = body["credentials"]["oidcIdentityToken"]
        if not token.startswith("token-of-"):
            return 401, {"message": f"the identity token {token} is not valid"}
        request = base64.b64decode(body["certificateSigningRequest"])
        root = self.maker.authority("fulcio").read_bytes().decode()
        self.maker.between("fulcio-between", "fulcio")
        extensions = (
            "keyUsage=critical,digitalSignature\nextendedKeyUsage=codeSigning\n"
            f"subjectAltName=critical,email:{token.removeprefix('token-of-')}\n"
            f"1.3.6.1.4.1.57264.1.8=ASN1:UTF8String:{ISSUER}\n"
        )
        leaf = self.maker.certify(request, "fulcio-between", extensions).decode()
        between = (self.maker.directory / "fulcio-between.ca.pem").read_text()
        return 201, {"signedCertificateEmbeddedSct": {"chain": {"certificates": [leaf, between, root]}}}

    def _entry(self, body: dict[str, Any]) -> dict[str, Any]:
        spec = body["spec"]
        if body["kind"] == "dsse":
            envelope = json.loads(spec["proposedContent"]["envelope"])
            payload = base64.b64decode(envelope["payload"])
            signature = base64.b64decode(envelope["signatures"][0]["sig"])
            signer = base64.b64decode(spec["proposedContent"]["verifiers"][0])
            self.maker.check(signer, signature, pae(envelope["payloadType"], payload))
            stored = self.maker.envelope_record(signature, payload, signer)
        else:
            stored = compact(body)  # Rekor writes canonical JSON
        made = self.maker.entry("log", stored, int(time.time()) + 1)
        payload_ = made["Payload"]
        assert isinstance(payload_, dict)
        proof = self.maker.proof("log", stored)
        hexadecimal = {"rootHash": _hex(str(proof["rootHash"])), "hashes": [_hex(item) for item in proof["hashes"]]}  # type: ignore[attr-defined]
        checkpoint = proof["checkpoint"]
        assert isinstance(checkpoint, dict)
        numbers = {"logIndex": int(str(proof["logIndex"])), "treeSize": int(str(proof["treeSize"]))}
        return {
            **payload_,
            "verification": {
                "signedEntryTimestamp": made["SignedEntryTimestamp"],
                "inclusionProof": {**hexadecimal, **numbers, "checkpoint": checkpoint["envelope"]},
            },
        }


def _hex(text: str) -> str:
    return base64.b64decode(text).hex()
