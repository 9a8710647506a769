"""Debian's docker-registry on a free loopback port, with its storage in a directory of ours.

Started as a child and stopped by its pid; it dies with us (PR_SET_PDEATHSIG is its parent's to set, so a killed test
run may leave it: the leak comparison then names it).
"""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_S = 15.0


@dataclass(frozen=True, slots=True)
class Registry:
    """A running registry: `address` is "127.0.0.1:PORT", `storage` its files, `log` what it printed."""

    address: str
    storage: Path
    log: Path

    def reference(self, name: str) -> str:
        return f"{self.address}/{name}"


@dataclass(frozen=True, slots=True)
class Secured:
    """A registry over TLS that wants a password of `htpasswd` (bcrypt)."""

    certificate: Path
    key: Path
    htpasswd: Path


def _configuration(address: str, storage: Path, secured: Secured | None) -> str:
    tls = f", tls: {{certificate: '{secured.certificate}', key: '{secured.key}'}}" if secured else ""
    auth = f"auth: {{htpasswd: {{realm: conformance, path: '{secured.htpasswd}'}}}}\n" if secured else ""
    return (
        "version: 0.1\n"
        "log: {level: warn, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {storage}, maxthreads: 100}}, delete: {{enabled: true}}}}\n"
        f"http: {{addr: '{address}'{tls}}}\n{auth}"
    )


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def _answers(address: str, secured: Secured | None) -> bool:
    connection = http.client.HTTPConnection(address, timeout=2)
    if secured:
        trusted = ssl.create_default_context(cafile=secured.certificate)
        connection = http.client.HTTPSConnection(address, timeout=2, context=trusted)
    try:
        connection.request("GET", "/v2/")
        return connection.getresponse().status == (401 if secured else 200)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextmanager
def registry(directory: Path, secured: Secured | None = None, *, measured: bool = True) -> Iterator[Registry]:
    """Runs a registry below `directory` until the block ends. One that is not `measured` has one processor and seldom
    collects its garbage, which together cost as much as what it does."""
    directory.mkdir(parents=True, exist_ok=True)
    storage, log = directory / "storage", directory / "registry.log"
    environment = dict(os.environ) if measured else {**os.environ, "GOMAXPROCS": "1", "GOGC": "400"}
    for _ in range(5):
        # Another process may take the port between the probe and the start: then try the next one.
        address = _free_address()
        configuration = directory / "registry.yaml"
        configuration.write_text(_configuration(address, storage, secured))
        with open(log, "ab") as output:
            process = subprocess.Popen(
                ["docker-registry", "serve", str(configuration)],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        try:
            if _started(process, address, secured):
                yield Registry(address, storage, log)
                return
        finally:
            process.terminate()
            process.wait()
    raise RuntimeError(f"docker-registry does not start: {log.read_text()[-500:]}")


def _started(process: subprocess.Popen[bytes], address: str, secured: Secured | None) -> bool:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        if _answers(address, secured):
            return True
        time.sleep(0.02)
    return False
