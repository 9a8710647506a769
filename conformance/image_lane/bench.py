"""What the cases work with: a registry over TLS that wants a password, images to begin with, ocid and its peers.

Refuses to go on when a command fails, with what it printed. Invariant: everything lies below one directory; what was
mounted was mounted in a namespace that is gone.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance.daemons import command_path
from conformance.registry import Secured, registry

USER, PASSWORD = "conformance", "c0nformance"
# bcrypt, the only kind that docker-registry takes; of the password above, which protects nothing.
_HTPASSWD = f"{USER}:$2b$05$pLBQTsUdknJxe0252U8MyeNTYpdblfw.an7mW/NWzR4b3O4/mIwbq\n"
COMMAND_S = 300.0


class CaseFailed(Exception):
    """Something is not as it should be."""


@dataclass(frozen=True, slots=True)
class Bench:
    """`address` is the registry's; `ca` the file that its certificate is trusted by; `began` in seconds since 1970."""

    directory: Path
    address: str
    ca: Path
    began: int

    def fresh(self, name: str) -> Path:
        """A directory for one case."""
        path = self.directory / "work" / name
        path.mkdir(parents=True)
        return path

    def docker(self, name: str) -> str:
        return f"docker://{self.address}/{name}"

    def ocid(self, *words: str) -> str:
        return _run([*self._ocid(), *words])

    def ocid_fails(self, *words: str) -> str:
        """What it prints on stderr when it refuses, as it must."""
        return _fails([*self._ocid(), *words])

    def _ocid(self) -> list[str]:
        base = self.directory
        where = ["--config", str(base / "config.toml"), "--root", str(base / "root"), "--state", str(base / "state")]
        return [command_path("ocid"), *where]

    def skopeo(self, *words: str, login: bool = True) -> str:
        return _run(self._skopeo(words, login))

    def skopeo_fails(self, *words: str, login: bool = True) -> str:
        return _fails(self._skopeo(words, login))

    def _skopeo(self, words: Sequence[str], login: bool) -> list[str]:
        """The command with a certificate directory and a login on whichever side is a registry."""
        command, *rest = words
        made = ["skopeo", f"--registries.d={self.directory}/registries.d", command]
        certificates, authfile = str(self.directory / "skopeo-certs"), str(self.directory / "auth.json")
        if command == "copy":
            made += ["-q", f"--src-cert-dir={certificates}", f"--dest-cert-dir={certificates}"]
        elif command == "sync":
            made += [f"--src-cert-dir={certificates}", f"--dest-cert-dir={certificates}"]
        elif command == "inspect":
            made += ["--no-tags", f"--cert-dir={certificates}"]
        else:
            made.append(f"--cert-dir={certificates}")
        return made + ([f"--authfile={authfile}"] if login else []) + rest

    def raw(self, place: str) -> bytes:
        """A manifest or an index as skopeo reads it, byte by byte."""
        return self.skopeo("inspect", "--raw", place).encode()

    def digest(self, place: str) -> str:
        return str(json.loads(self.skopeo("inspect", place))["Digest"])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, timeout=COMMAND_S, check=False)
    if done.returncode != 0:
        raise CaseFailed(f"{' '.join(command)}: {done.returncode}: {done.stderr.decode(errors='replace')[-2000:]}")
    return done.stdout.decode()


def _fails(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, timeout=COMMAND_S, check=False)
    if done.returncode == 0:
        raise CaseFailed(f"{' '.join(command)}: was to be refused, and was not")
    return done.stderr.decode(errors="replace")


def same(what: str, ours: Any, theirs: Any) -> None:
    """Raises CaseFailed unless both are equal."""
    if ours != theirs:
        raise CaseFailed(f"{what}: ours {_short(ours)}, theirs {_short(theirs)}")


def holds(what: str, true: bool) -> None:
    if not true:
        raise CaseFailed(what)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 1500 else f"{text[:1500]}…"


@contextmanager
def bench(directory: Path) -> Iterator[Bench]:
    """The registry runs until the block ends."""
    certificate, key = _certificate(directory)
    (directory / "htpasswd").write_text(_HTPASSWD)
    with registry(directory / "registry", Secured(certificate, key, directory / "htpasswd")) as running:
        made = Bench(directory, running.address, certificate, int(time.time()))
        _configure(made)
        yield made


def _configure(made: Bench) -> None:
    base = made.directory
    (base / "skopeo-certs").mkdir()
    (base / "skopeo-certs" / "ca.crt").write_bytes(made.ca.read_bytes())
    # A login as podman login writes it: by the peer, so that ocid is seen to read the real thing.
    login = ["skopeo", "login", f"--cert-dir={base}/skopeo-certs", f"--authfile={base}/auth.json"]
    _run([*login, "-u", USER, "-p", PASSWORD, made.address])
    hosts = base / "certs.d" / made.address
    hosts.mkdir(parents=True)
    (hosts / "hosts.toml").write_text(f'server = "https://{made.address}"\nca = "{made.ca}"\n')
    (base / "config.toml").write_text(
        f'[image]\nhosts_dirs = ["{base}/certs.d"]\nauth_files = ["{base}/auth.json"]\n'
        f'registries_conf = "{base}/registries.conf"\n'
        f'registries_d = "{base}/registries.d"\n[network]\nnetns_pool = 0\nconf_dir = "{base}/net.d"\n'
    )
    (base / "net.d").mkdir()
    (base / "registries.d").mkdir()
    lookaside = f"default-docker:\n  lookaside: file://{base}/lookaside\n  sigstore: file://{base}/lookaside\n"
    (base / "registries.d" / "default.yaml").write_text(lookaside)


def _certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "conformance")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    certificate, private = directory / "registry.crt", directory / "registry.key"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate, private
