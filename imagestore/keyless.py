"""The services that signing asks: a certificate from Fulcio, an entry in Rekor, a time from an authority.

    POST FULCIO/api/v2/signingCert      token, request for a certificate     -> certificates
    POST REKOR/api/v1/log/entries       what was signed, by whom             -> a promise, and a proof of inclusion
    POST REKOR/api/v2/log/entries       the same (tiled_log.py)              -> a proof of inclusion
    POST TIME                           a hash of the signature (RFC 3161)   -> a signed time

Refuses redirects: the token goes where it was meant to go. Refuses answers beyond their cap, and ones about another
key. Invariant: no message holds the token.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from typing import TYPE_CHECKING

from imagestore import tiled_log, timestamps
from imagestore.certificates import parse_chain
from imagestore.claims import IN_TOTO
from imagestore.keys import der
from imagestore.model import ContentInvalid, ImageError, RegistryUnavailable
from imagestore.signing import Certified, Entry, Signer
from imagestore.strict_json import Fields, parse_object
from imagestore.transport import Request, Transport, place
from imagestore.wording import registry_words

if TYPE_CHECKING:
    from imagestore.keys import PublicKey

_LIMIT = 1 << 20
_VALUES = 10_000
_ANSWER_S = 60.0


class Services:
    """Each by its URL; "" where one is not asked."""

    def __init__(self, transport: Transport, fulcio: str, rekor: str, stamper: str = "") -> None:
        self._transport = transport
        self._fulcio, self._rekor, self._stamper = fulcio.rstrip("/"), rekor.rstrip("/"), stamper

    async def certificate(self, token: str, signer: Signer) -> Certified:
        """For whom the token speaks. Raises ImageError and its kinds."""
        request = {
            "credentials": {"oidcIdentityToken": token},
            "certificateSigningRequest": base64.b64encode(signer.request()).decode(),
        }
        answer = await self._post(f"{self._fulcio}/api/v2/signingCert", request, "certificate", [token])
        found: list[str] = []
        for key in ("signedCertificateEmbeddedSct", "signedCertificateDetachedSct"):
            part = answer.object(key)
            chain = part.object("chain") if part else None
            found = list(chain.strings("certificates")) if chain else found
        if not found:
            raise ContentInvalid(f"fulcio {place(self._fulcio)}: the answer has no certificate")
        leaf = found[0].encode()
        if _key_of(leaf) != der(signer.public):
            raise ContentInvalid(f"fulcio {place(self._fulcio)}: the certificate is for another key")
        return Certified(leaf, "".join(found[1:]).encode())

    async def entry(self, signature: bytes, payload: bytes, signer: bytes, *, bundle: bool) -> Entry | None:
        """In the log; `signer` is PEM. None where no log is asked. Raises ImageError and its kinds."""
        if not self._rekor:
            return None
        document = _dsse(signature, payload, signer) if bundle else _hashed(signature, payload, signer)
        answer = await self._post(f"{self._rekor}/api/v1/log/entries", document, "log entry", [])
        names = answer.names()
        made = answer.object(names[0]) if len(names) == 1 else None
        if made is None:
            raise ContentInvalid(f"rekor {place(self._rekor)}: the answer has no entry")
        return _entry(made, "dsse" if bundle else "hashedrekord")

    async def tiled_entry(
        self, signature: bytes, payload: bytes, data: bytes, key: PublicKey, certificate: bytes
    ) -> Entry:
        """In a log of Rekor 2; see tiled_log.request. Raises ImageError and its kinds."""
        document = tiled_log.request(signature, payload, data, key, certificate)
        answer = await self._post(f"{self._rekor}/api/v2/log/entries", document, "log entry", [])
        return Entry("", tiled_log.answered(answer, place(self._rekor)))

    async def stamp(self, signature: bytes) -> bytes:
        """The RFC 3161 response about `signature`; b"" where no authority is asked. Raises ImageError and its kinds."""
        if not self._stamper:
            return b""
        asked = timestamps.query(signature)
        headers = {"Content-Type": "application/timestamp-query", "Accept": "application/timestamp-reply"}
        answer = await self._send(self._stamper, headers, asked.as_bytes(), "timestamp", [])
        try:
            timestamps.check_answer(answer, asked)
        except timestamps.Untimed as error:
            raise ContentInvalid(f"{place(self._stamper)}: {error}") from None
        return answer

    async def _post(self, url: str, document: object, what: str, secrets: list[str]) -> Fields:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        body = await self._send(url, headers, json.dumps(document).encode(), what, secrets)
        return parse_object(body, f"{place(url)}: {what}", _VALUES)

    async def _send(self, url: str, headers: dict[str, str], data: bytes, what: str, secrets: list[str]) -> bytes:
        request = Request("POST", url, headers, body=data, redirects=0)
        try:
            async with asyncio.timeout(_ANSWER_S), self._transport.send(request) as answer:
                body = await answer.response.content.read(_LIMIT + 1)
                while len(body) <= _LIMIT and (piece := await answer.response.content.read(_LIMIT)):
                    body += piece
                status = answer.response.status
        except TimeoutError:
            raise RegistryUnavailable(f"{place(url)}: {what}: no whole answer in {_ANSWER_S:g} s") from None
        if len(body) > _LIMIT:
            raise ContentInvalid(f"{place(url)}: {what}: more than {_LIMIT} bytes")
        if status not in (200, 201):
            words = registry_words(body, secrets)
            raise ImageError(f"{place(url)} answered {status} for {what}" + (f" ({words})" if words else ""))
        return body


def _key_of(leaf: bytes) -> bytes:
    try:
        key: PublicKey = parse_chain(leaf)[0].public_key()  # type: ignore[assignment]
        return der(key)
    except (ValueError, IndexError):
        return b""


def _hashed(signature: bytes, payload: bytes, signer: bytes) -> dict[str, object]:
    digest = {"hash": {"algorithm": "sha256", "value": hashlib.sha256(payload).hexdigest()}}
    made = {"content": _b64(signature), "publicKey": {"content": _b64(signer)}}
    return {"apiVersion": "0.0.1", "kind": "hashedrekord", "spec": {"data": digest, "signature": made}}


def _dsse(signature: bytes, payload: bytes, signer: bytes) -> dict[str, object]:
    envelope = {"payload": _b64(payload), "payloadType": IN_TOTO, "signatures": [{"sig": _b64(signature)}]}
    content = {"envelope": json.dumps(envelope, separators=(",", ":")), "verifiers": [_b64(signer)]}
    return {"apiVersion": "0.0.1", "kind": "dsse", "spec": {"proposedContent": content}}


def _entry(made: Fields, kind: str) -> Entry:
    """Rekor's answer as the two forms of signatures have it: hexadecimal there, base64 in bundles."""
    ever = (1 << 63) - 1
    verification = made.object("verification") or Fields({}, "verification")
    promise = verification.string("signedEntryTimestamp")
    body, log = made.string("body"), made.string("logID")
    time, index = made.integer("integratedTime", 0, ever), made.integer("logIndex", 0, ever)
    payload = {"body": body, "integratedTime": time, "logIndex": index, "logID": log}
    annotation = json.dumps({"SignedEntryTimestamp": promise, "Payload": payload}, separators=(",", ":"))
    bundled: dict[str, object] = {
        "logIndex": str(index),
        "logId": {"keyId": _from_hex(log)},
        "kindVersion": {"kind": kind, "version": "0.0.1"},
        "integratedTime": str(time),
        "inclusionPromise": {"signedEntryTimestamp": promise},
        "canonicalizedBody": body,
    }
    proof = verification.object("inclusionProof")
    if proof is not None:
        bundled["inclusionProof"] = {
            "logIndex": str(proof.integer("logIndex", 0, ever)),
            "treeSize": str(proof.integer("treeSize", 0, ever)),
            "rootHash": _from_hex(proof.string("rootHash")),
            "hashes": [_from_hex(item) for item in proof.strings("hashes")],
            "checkpoint": {"envelope": proof.string("checkpoint")},
        }
    return Entry(annotation, bundled)


def _from_hex(text: str) -> str:
    try:
        return _b64(bytes.fromhex(text))
    except ValueError:
        raise ContentInvalid("log entry: not hexadecimal") from None


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
