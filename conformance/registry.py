"""Debian's docker-registry on a free loopback port, with its storage in a directory of ours.

Started as a child and stopped by its pid; it dies with us (PR_SET_PDEATHSIG is its parent's to set, so a killed test
run may leave it: the leak comparison then names it).
"""

from __future__ import annotations

import http.client
import socket
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


def _configuration(address: str, storage: Path) -> str:
    return (
        "version: 0.1\n"
        "log: {level: warn, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {storage}, maxthreads: 100}}, delete: {{enabled: true}}}}\n"
        f"http: {{addr: '{address}'}}\n"
    )


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def _answers(address: str) -> bool:
    connection = http.client.HTTPConnection(address, timeout=2)
    try:
        connection.request("GET", "/v2/")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@contextmanager
def registry(directory: Path) -> Iterator[Registry]:
    """Runs a registry below `directory` until the block ends."""
    directory.mkdir(parents=True, exist_ok=True)
    storage, log = directory / "storage", directory / "registry.log"
    for _ in range(5):
        # Another process may take the port between the probe and the start: then try the next one.
        address = _free_address()
        configuration = directory / "registry.yaml"
        configuration.write_text(_configuration(address, storage))
        with open(log, "ab") as output:
            process = subprocess.Popen(
                ["docker-registry", "serve", str(configuration)], stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )
        try:
            if _started(process, address):
                yield Registry(address, storage, log)
                return
        finally:
            process.terminate()
            process.wait()
    raise RuntimeError(f"docker-registry does not start: {log.read_text()[-500:]}")


def _started(process: subprocess.Popen[bytes], address: str) -> bool:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        if _answers(address):
            return True
        time.sleep(0.02)
    return False
