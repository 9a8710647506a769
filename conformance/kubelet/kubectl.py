"""kubectl as a subprocess: words in, what it printed out. `ok` judges the exit code."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance.crictl.tool import CheckFailed

CALL_S = 120
# kubectl speaks WebSocket unless told otherwise.
TRANSPORTS: dict[str, dict[str, str]] = {
    "websocket": {},
    "spdy": {"KUBECTL_REMOTE_COMMAND_WEBSOCKETS": "false", "KUBECTL_PORT_FORWARD_WEBSOCKETS": "false"},
}


@dataclass(frozen=True, slots=True)
class Kubectl:
    binary: Path
    kubeconfig: Path

    def command(self, *words: object) -> list[str]:
        return [str(self.binary), f"--kubeconfig={self.kubeconfig}", *map(str, words)]

    @property
    def environment(self) -> dict[str, str]:
        """Nothing of this machine's user: neither a configuration nor a cache."""
        return {"PATH": os.environ["PATH"], "HOME": str(self.kubeconfig.parent), "TERM": "xterm"}

    def run(
        self, *words: object, data: bytes = b"", changes: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        environment = {**self.environment, **(changes or {})}
        return subprocess.run(
            self.command(*words), input=data, capture_output=True, timeout=CALL_S, check=False, env=environment
        )

    def ok(self, *words: object, data: bytes = b"", changes: Mapping[str, str] | None = None) -> str:
        """What it prints on success."""
        done = self.run(*words, data=data, changes=changes)
        if done.returncode != 0:
            raise CheckFailed(f"kubectl {' '.join(map(str, words))} exits {done.returncode}: {done.stderr.decode()}")
        return done.stdout.decode()

    def get(self, kind: str, name: str) -> Any:
        """The object; {} when there is none."""
        done = self.run("get", kind, name, "--output=json", "--ignore-not-found")
        if done.returncode != 0:
            raise CheckFailed(f"kubectl get {kind} {name}: {done.stderr.decode()}")
        return json.loads(done.stdout or b"{}")

    def apply(self, document: Mapping[str, Any]) -> None:
        self.ok("apply", "--filename=-", data=json.dumps(document).encode())
