"""Signatures made with openssl and gpg alone, for tests of what verifies them: no code of ours signs here.

`Maker(directory)` keeps keys and certificates there, each made once; keys and requests for certificates are of a
library's making, a process less for each. Logs (Rekor) and authorities (Fulcio) are such keys, too: what they sign is
put together here from the published formats, by hand.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from imagestore.signatures import BUNDLE_TYPE, CERTIFICATE, CHAIN, ENTRY, SIGNATURE, Bundle, Cosign, Simple

CURVES = {"p256": ec.SECP256R1(), "p384": ec.SECP384R1(), "p521": ec.SECP521R1()}
ISSUER = "https://accounts.example.com"


def _generated(kind: str) -> ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey:
    if kind in CURVES:
        return ec.generate_private_key(CURVES[kind])
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    return rsa.generate_private_key(65537, 1024 if kind == "small" else 2048)


def compact(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def payload(kind: str, digest: str, name: str, optional: object = None) -> bytes:
    image, identity = {"docker-manifest-digest": digest}, {"docker-reference": name}
    return json.dumps({"critical": {"type": kind, "image": image, "identity": identity}, "optional": optional}).encode()


def pae(kind: str, data: bytes) -> bytes:
    return f"DSSEv1 {len(kind)} {kind} {len(data)} ".encode() + data


@dataclass(frozen=True)
class Certificate:
    """A leaf with its key's name; `chain` is what a signer sends along, PEM."""

    key: str
    pem: bytes
    chain: bytes


class Maker:
    """Keys by name. `now` is when a log takes what is signed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # A certificate that is made later during a test must be good at this time, too.
        self.now = int(datetime.datetime.now(datetime.UTC).timestamp()) + 900
        self._gpg = directory / "gpg"
        self._gpg.mkdir(mode=0o700)
        self._certificates: dict[str, Certificate] = {}
        self._made: dict[tuple[object, ...], bytes] = {}

    def _openssl(self, *words: str, data: bytes = b"") -> bytes:
        return subprocess.run(
            ["openssl", *words], input=data, capture_output=True, check=True, cwd=self.directory
        ).stdout

    # ---------------------------------------------------------------------------------------------------------- keys

    def private(self, name: str, kind: str = "p256") -> Path:
        path = self.directory / f"{name}.key"
        if not path.exists():
            made = _generated(kind)
            path.write_bytes(made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return path

    def public(self, name: str, kind: str = "p256") -> Path:
        path = self.directory / f"{name}.pub"
        if not path.exists():
            made = load_pem_private_key(self.private(name, kind).read_bytes(), None).public_key()
            path.write_bytes(made.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        return path

    def sign(self, name: str, data: bytes, kind: str = "p256") -> bytes:
        """A signature; the same one when the same is signed again: processes are what this costs."""
        wanted = (name, data, kind)
        if wanted not in self._made:
            self._made[wanted] = self._sign(name, data, kind)
        return self._made[wanted]

    def _sign(self, name: str, data: bytes, kind: str) -> bytes:
        key = str(self.private(name, kind))
        if kind == "ed25519":
            (self.directory / "data").write_bytes(data)
            return self._openssl("pkeyutl", "-sign", "-rawin", "-inkey", key, "-in", "data")
        pss = ("-sigopt", "rsa_padding_mode:pss") if kind == "rsa-pss" else ()
        return self._openssl("dgst", "-sha256", "-sign", key, *pss, data=data)

    def check(self, signer: bytes, signature: bytes, data: bytes) -> None:
        """openssl's own word that `signature` is one; `signer` is a certificate or a public key in PEM."""
        if b"CERTIFICATE" in signer:
            signer = self._openssl("x509", "-pubkey", "-noout", data=signer)
        (self.directory / "check.pub").write_bytes(signer)
        (self.directory / "check.sig").write_bytes(signature)
        self._openssl("dgst", "-sha256", "-verify", "check.pub", "-signature", "check.sig", data=data)

    # -------------------------------------------------------------------------------------------------- certificates

    def authority(self, name: str) -> Path:
        """A root, self-signed, for ten years."""
        path = self.directory / f"{name}.ca.pem"
        if not path.exists():
            self._openssl(
                "req", "-x509", "-new", "-key", str(self.private(name)), "-subj", f"/CN={name}", "-days", "3650",
                "-addext", "keyUsage=critical,keyCertSign", "-out", str(path),
            )  # fmt: skip
        return path

    def between(self, name: str, root: str) -> Path:
        """An intermediate below `root`."""
        path = self.directory / f"{name}.ca.pem"
        if not path.exists():
            extensions = "basicConstraints=critical,CA:true,pathlen:0\nkeyUsage=critical,keyCertSign\n"
            path.write_bytes(self._issue(name, root, f"/CN={name}", extensions, "3650"))
        return path

    def _issue(self, name: str, issuer: str, subject: str, extensions: str, days: str) -> bytes:
        return self.certify(self._request(name, subject), issuer, extensions, days)

    def _request(self, name: str, subject: str) -> bytes:
        """What is asked for: who certifies it is openssl. `subject` is "/" or "/CN=…"."""
        common = subject.removeprefix("/").removeprefix("CN=")
        names = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)] if common else [])
        key = load_pem_private_key(self.private(name).read_bytes(), None)
        algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else SHA256()
        made = x509.CertificateSigningRequestBuilder().subject_name(names).sign(key, algorithm)  # type: ignore[arg-type]
        return made.public_bytes(Encoding.PEM)

    def certify(self, request: bytes, issuer: str, extensions: str, days: str = "1") -> bytes:
        """A certificate for who asks."""
        (self.directory / "ext").write_text(extensions)
        return self._openssl(
            "x509", "-req", "-CA", str(self.directory / f"{issuer}.ca.pem"), "-CAkey", str(self.private(issuer)),
            "-extfile", "ext", "-days", days, data=request,
        )  # fmt: skip

    def leaf(
        self,
        name: str,
        root: str,
        san: str,
        *,
        issuer: str = ISSUER,
        usage: str = "codeSigning",
        days_of_2020: bool = False,
    ) -> Certificate:
        """A signer's certificate for one day, this one or one of 2020, through an intermediate that is sent along."""
        if name not in self._certificates:
            self.authority(root)
            middle = self.between(f"{root}-between", root)
            extensions = f"keyUsage=critical,digitalSignature\nsubjectAltName=critical,{san}\n"
            extensions += f"extendedKeyUsage={usage}\n" if usage else ""
            if issuer:
                extensions += f"1.3.6.1.4.1.57264.1.1=DER:{issuer.encode().hex()}\n"
                extensions += f"1.3.6.1.4.1.57264.1.8=ASN1:UTF8String:{issuer}\n"
            if days_of_2020:
                pem = self._issue_in_2020(name, f"{root}-between", extensions)
            else:
                pem = self._issue(name, f"{root}-between", "/", extensions, "1")
            chain = middle.read_bytes() + self.authority(root).read_bytes()
            self._certificates[name] = Certificate(name, pem, chain)
        return self._certificates[name]

    def _issue_in_2020(self, name: str, issuer: str, extensions: str) -> bytes:
        """`openssl x509` always begins now; `openssl ca` wants files for what it has issued."""
        (self.directory / "request").write_bytes(self._request(name, "/CN=old"))
        (self.directory / "ext").write_text(extensions)
        (self.directory / "issued").write_text("")
        (self.directory / "ca.conf").write_text(
            "[ca]\ndefault_ca=it\n[it]\ndatabase=issued\nnew_certs_dir=.\nrand_serial=yes\ndefault_md=sha256\n"
            "policy=any\nunique_subject=no\n[any]\ncommonName=optional\n"
        )
        self._openssl(
            "ca", "-batch", "-config", "ca.conf", "-cert", f"{issuer}.ca.pem", "-keyfile", str(self.private(issuer)),
            "-startdate", "20200101000000Z", "-enddate", "20200102000000Z", "-extfile", "ext", "-in", "request",
            "-notext", "-out", "old.pem",
        )  # fmt: skip
        return (self.directory / "old.pem").read_bytes()

    # ------------------------------------------------------------------------------------------------------ the log

    def entry(self, log: str, body: bytes, at: int | None = None) -> dict[str, object]:
        """A log's promise, as cosign keeps it in an annotation."""
        promised = {
            "body": b64(body), "integratedTime": self.now if at is None else at,
            "logID": hashlib.sha256(self._der(self.public(log))).hexdigest(), "logIndex": 7,
        }  # fmt: skip
        return {"SignedEntryTimestamp": b64(self.sign(log, compact(promised))), "Payload": promised}

    def _der(self, path: Path) -> bytes:
        return _der_of(path.read_bytes())

    def record(self, signature: bytes, data: bytes, signer: bytes) -> bytes:
        """A hashedrekord."""
        digest = {"hash": {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}}
        made = {"content": b64(signature), "publicKey": {"content": b64(signer)}}
        return compact({"apiVersion": "0.0.1", "kind": "hashedrekord", "spec": {"data": digest, "signature": made}})

    def envelope_record(self, signature: bytes, data: bytes, signer: bytes) -> bytes:
        """A dsse entry."""
        digest = {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}
        made = [{"signature": b64(signature), "verifier": b64(signer)}]
        spec = {"envelopeHash": digest, "payloadHash": digest, "signatures": made}
        return compact({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec})

    def proof(self, log: str, body: bytes, *, others: int = 6, index: int = 3) -> dict[str, object]:
        """A path to the root of a tree with `others` more leaves, and the log's checkpoint (RFC 9162, signed note)."""
        leaves = [hashlib.sha256(b"\x00other %d" % number).digest() for number in range(others)]
        leaves.insert(index, hashlib.sha256(b"\x00" + body).digest())
        root = _root(leaves)
        note = f"log.example - 1\n{len(leaves)}\n{b64(root)}\n"
        line = b64(b"\x01\x02\x03\x04" + self.sign(log, note.encode()))
        return {
            "logIndex": str(index), "treeSize": str(len(leaves)), "rootHash": b64(root),
            "hashes": [b64(item) for item in _path(index, leaves)],
            "checkpoint": {"envelope": f"{note}\n\u2014 log.example {line}\n"},
        }  # fmt: skip

    def record_2(self, signature: bytes, data: bytes, signer: bytes, *, kind: str = "hashedrekord") -> bytes:
        """A hashedrekord of Rekor 2 about what was signed, or its dsse about a payload."""
        form = "x509Certificate" if b"CERTIFICATE" in signer else "publicKey"
        verifier = {"keyDetails": "PKIX_ECDSA_P256_SHA_256", form: {"rawBytes": b64(_der_of(signer))}}
        digest = {"algorithm": "SHA2_256", "digest": b64(hashlib.sha256(data).digest())}
        made = {"content": b64(signature), "verifier": verifier}
        spec: dict[str, object] = {"hashedRekordV002": {"data": digest, "signature": made}}
        if kind == "dsse":
            spec = {"dsseV002": {"payloadHash": digest, "signatures": [made]}}
        return compact({"apiVersion": "0.0.2", "kind": kind, "spec": spec})

    # -------------------------------------------------------------------------------------------------------- times

    def stamper(self, name: str, root: str, *, usage: str = "critical,timeStamping", of_2020: bool = False) -> Path:
        """A time-stamping authority's own certificate, below `root`."""
        path = self.directory / f"{name}.tsa.pem"
        if not path.exists():
            self.authority(root)
            extensions = f"extendedKeyUsage={usage}\n"
            issue = self._issue_in_2020(name, root, extensions) if of_2020 else b""
            path.write_bytes(issue or self._issue(name, root, f"/CN={name}", extensions, "30"))
        return path

    def stamp(self, name: str, data: bytes, *, certificate: bool = True) -> bytes:
        """An RFC 3161 response about `data`, of now, by the authority `name` that `stamper` made."""
        (self.directory / "stamped").write_bytes(data)
        wants = ["-cert"] if certificate else []
        return self.stamped(name, self._openssl("ts", "-query", "-data", "stamped", "-sha256", "-no_nonce", *wants))

    def stamped(self, name: str, query: bytes) -> bytes:
        """The response to a query."""
        (self.directory / "tsa.conf").write_text(
            f"[tsa]\ndefault_tsa=it\n[it]\nserial=tsa.serial\nsigner_cert={name}.tsa.pem\nsigner_key={name}.key\n"
            "signer_digest=sha256\ndefault_policy=1.2.3.4\ndigests=sha256,sha512\ness_cert_id_alg=sha256\n"
        )
        (self.directory / "query").write_bytes(query)
        self._openssl("ts", "-reply", "-config", "tsa.conf", "-queryfile", "query", "-out", "reply")
        return (self.directory / "reply").read_bytes()

    # ---------------------------------------------------------------------------------------------------- signatures

    def cosign(
        self,
        key: str,
        data: bytes,
        *,
        kind: str = "p256",
        certificate: Certificate | None = None,
        log: str = "",
        at: int | None = None,
    ) -> Cosign:
        signature = self.sign(key, data, kind)
        notes = {SIGNATURE: b64(signature)}
        signer = certificate.pem if certificate else self.public(key, kind).read_bytes()
        if certificate:
            notes |= {CERTIFICATE: certificate.pem.decode(), CHAIN: certificate.chain.decode()}
        if log:
            notes[ENTRY] = compact(self.entry(log, self.record(signature, data, signer), at)).decode()
        return Cosign(data, notes, "test")

    def bundle(
        self,
        key: str,
        digest: str,
        name: str,
        *,
        certificate: Certificate | None = None,
        log: str = "",
        promise: bool = True,
        proof: bool = False,
        at: int | None = None,
        predicate: str = "https://sigstore.dev/cosign/sign/v1",
    ) -> Bundle:
        subject = {"digest": {"sha256": digest.removeprefix("sha256:")}, **({"name": name} if name else {})}
        statement = compact(
            {"_type": "https://in-toto.io/Statement/v1", "subject": [subject], "predicateType": predicate}
        )
        kind = "application/vnd.in-toto+json"
        signature = self.sign(key, pae(kind, statement))
        material: dict[str, object] = {"publicKey": {"hint": ""}}
        signer = self.public(key).read_bytes()
        if certificate:
            material = {"certificate": {"rawBytes": b64(_der_of(certificate.pem))}}
            signer = certificate.pem
        if log:
            body = self.envelope_record(signature, statement, signer)
            entry = self.entry(log, body, at)
            promised = entry["Payload"]
            assert isinstance(promised, dict)
            item = {
                "logIndex": "7", "logId": {"keyId": b64(bytes.fromhex(promised["logID"]))},
                "kindVersion": {"kind": "dsse", "version": "0.0.1"}, "integratedTime": str(promised["integratedTime"]),
                "canonicalizedBody": b64(body),
            }  # fmt: skip
            if promise:
                item["inclusionPromise"] = {"signedEntryTimestamp": entry["SignedEntryTimestamp"]}
            if proof:
                item["inclusionProof"] = self.proof(log, body)
            material["tlogEntries"] = [item]
        envelope = {"payload": b64(statement), "payloadType": kind, "signatures": [{"sig": b64(signature)}]}
        document = {"mediaType": BUNDLE_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope}
        return Bundle(compact(document), "test")

    def bundle_2(
        self,
        key: str,
        digest: str,
        name: str,
        *,
        certificate: Certificate | None = None,
        log: str = "",
        stamper: str = "",
        kind: str = "hashedrekord",
    ) -> Bundle:
        """As `bundle`, by the rules of Rekor 2: a proof, no promise, and the time from elsewhere."""
        made = json.loads(self.bundle(key, digest, name, certificate=certificate).data)
        material, envelope = made["verificationMaterial"], made["dsseEnvelope"]
        statement, signature = (
            base64.b64decode(text) for text in (envelope["payload"], envelope["signatures"][0]["sig"])
        )
        if log:
            signer = certificate.pem if certificate else self.public(key).read_bytes()
            data = statement if kind == "dsse" else pae(envelope["payloadType"], statement)
            body = self.record_2(signature, data, signer, kind=kind)
            material["tlogEntries"] = [
                {
                    "logIndex": "3", "logId": {"keyId": b64(hashlib.sha256(self._der(self.public(log))).digest())},
                    "kindVersion": {"kind": kind, "version": "0.0.2"}, "canonicalizedBody": b64(body),
                    "inclusionProof": self.proof(log, body),
                }
            ]  # fmt: skip
        if stamper:
            stamps = [{"signedTimestamp": b64(self.stamp(stamper, signature))}]
            material["timestampVerificationData"] = {"rfc3161Timestamps": stamps}
        return Bundle(compact(made), "test")

    # ----------------------------------------------------------------------------------------------------------- gpg

    def gpg(self, *words: str, data: bytes = b"", at: str = "") -> bytes:
        """gpg itself, with a home of its own, at the time `at`."""
        faked = ("--faked-system-time", at) if at else ()
        command = ["gpg", "--batch", "--quiet", "--no-permission-warning", "--passphrase", "", *faked, *words]
        environment = {**os.environ, "GNUPGHOME": str(self._gpg)}
        return subprocess.run(command, input=data, capture_output=True, check=True, env=environment).stdout

    def gpg_key(self, email: str, *, algorithm: str = "ed25519", expires: str = "never", at: str = "") -> Path:
        """A key pair; the file of its public half."""
        path = self.directory / f"{email}.asc"
        if not path.exists():
            self.gpg("--quick-gen-key", email, algorithm, "sign", expires, at=at)
            path.write_bytes(self.gpg("--armor", "--export", email))
        return path

    def simple(self, email: str, data: bytes, *, at: str = "") -> Simple:
        wanted = (email, data, at)
        if wanted not in self._made:
            self._made[wanted] = self.gpg("--local-user", email, "--sign", data=data, at=at)
        return Simple(self._made[wanted], "test")

    def close(self) -> None:
        """Ends the agent that gpg has started."""
        subprocess.run(
            ["gpgconf", "--homedir", str(self._gpg), "--kill", "gpg-agent"], capture_output=True, check=False
        )


def _der_of(pem: bytes) -> bytes:
    return base64.b64decode(b"".join(line for line in pem.splitlines() if not line.startswith(b"-----")))


def _split(count: int) -> int:
    """The largest power of two below `count`."""
    return 1 << ((count - 1).bit_length() - 1)


def _root(leaves: list[bytes]) -> bytes:
    if len(leaves) == 1:
        return leaves[0]
    at = _split(len(leaves))
    return hashlib.sha256(b"\x01" + _root(leaves[:at]) + _root(leaves[at:])).digest()


def _path(index: int, leaves: list[bytes]) -> list[bytes]:
    if len(leaves) == 1:
        return []
    at = _split(len(leaves))
    if index < at:
        return [*_path(index, leaves[:at]), _root(leaves[at:])]
    return [*_path(index - at, leaves[at:]), _root(leaves[:at])]


def tree_root(leaves: list[bytes]) -> bytes:
    """RFC 9162 2.1.1, over leaf hashes."""
    return _root(leaves)


def tree_path(index: int, leaves: list[bytes]) -> list[bytes]:
    """RFC 9162 2.1.3.1."""
    return _path(index, leaves)
